"""ImageClassifier: a small convolutional network that names what an image shows."""

from collections.abc import Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec import deprecated
from latent_codec.errors import SettingError
from latent_codec.models.own_weights import OwnWeights
from latent_codec.tensors import check_floating, check_shape


class ImageClassifier(OwnWeights, ModelMixin, ConfigMixin):
    """A residual network (He et al., arXiv:1603.05027) with group norm, so that no image depends on its batch.

        image --conv_in--> [ResidualBlock x layers] --stride 2--> ... --norm, silu--> mean over positions --> logits
                           once per width                             dropout, linear

    It judges what a prior draws: classifier-based rejection sampling (VQ-VAE-2, arXiv:1906.00446, section 3.4).

    Args:
        in_channels: of the image.
        num_classes: of the labels.
        block_out_channels: the widths; between two of them the grid's sides are halved, rounding up.
        layers_per_block: residual blocks of each width.
        norm_num_groups: of the group norms; divides every width.
        dropout: share of the mean features left out while training.
        sample_size: (height, width) of the training images; any other works.
        class_names: one for each class, in the order of labels.

    Raises:
        ValueError: where these do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        dropout: float = 0.1,
        sample_size: tuple[int, int] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier tells 2 or more apart.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"expected {num_classes} class_names, one per class, got {len(class_names)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected a share from 0, below 1")
        if not block_out_channels or any(width % norm_num_groups for width in block_out_channels):
            expected = f"one or more multiples of norm_num_groups, {norm_num_groups}"
            raise SettingError("block_out_channels", expected, tuple(block_out_channels))
        channels = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.Sequential()
        for level, width in enumerate(block_out_channels):
            if level:
                self.blocks.append(nn.Conv2d(channels, width, 3, stride=2, padding=1))
            self.blocks.extend(ResidualBlock(width, norm_num_groups) for _ in range(layers_per_block))
            channels = width
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1], of any size -> logits (B, num_classes).

        Raises:
            ValueError: for another number of channels, or integers.
        """
        check_floating(images, "images")
        check_shape(images, "images", ("B", self.config.in_channels, "H", "W"))
        if 0 in images.shape:
            raise ValueError(f"expected images with no side 0, got shape {tuple(images.shape)}")
        hidden = self.blocks(self.conv_in(images))
        features = F.silu(self.norm_out(hidden)).mean((2, 3))
        return self.linear(F.dropout(features, self.config.dropout, self.training))


class ResidualBlock(nn.Module):
    """x + conv3x3(silu(norm(conv3x3(silu(norm(x))))))."""

    def __init__(self, channels: int, norm_num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_num_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


def __getattr__(name: str):
    """The class's old name, which pipelines that were saved by version 0.1 ask this module for."""
    return deprecated.find_name(__name__, name)
