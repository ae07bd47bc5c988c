"""The PatchGAN discriminator of the adversarial loss."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches of an image as real or reconstructed.

    PatchGAN (Isola et al., arXiv:1611.07004, section 3.2.2), with group norm where
    the original has batch norm: batch norm would have to be synchronized over
    processes, which has no CPU form, and mixes the images of a batch.

        image --4x4/2--> width --[4x4/2, norm]--> 2w, 4w, ... --4x4, norm--> --4x4--> logits

    Args:
        in_channels: image channels.
        width: channels after the first layer; doubled by each further one, up to 8 times.
        num_layers: stride-2 layers; 3 gives a receptive field of 70 px.
        norm_num_groups: of the group norms; must divide `width`.

    Raises:
        ValueError: if the group norms do not divide `width`.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3, norm_num_groups: int = 8):
        super().__init__()
        if width % norm_num_groups:
            raise ValueError(f"width {width} is not divisible by norm_num_groups {norm_num_groups}.")
        self.num_layers = num_layers
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, num_layers + 1):
            wider = width * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(norm_num_groups, wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> logits (N, 1, h, w), high where a patch looks real.

        Raises:
            ValueError: if a side of `image` is smaller than `min_side(num_layers)`.
        """
        least, (height, width) = min_side(self.num_layers), image.shape[-2:]
        if min(height, width) < least:
            raise ValueError(f"expected an image of {least} px or more a side, got {height}x{width}")
        return self.layers(image)


def min_side(num_layers: int) -> int:
    """The smallest image that leaves one logit: `num_layers` halvings, then two convolutions that each take a pixel."""
    return 3 * 2**num_layers
