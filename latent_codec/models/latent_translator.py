"""LatentTranslator: latents of one codec -> latents of another, without an image in between."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.families import LatentSpace, component_class, family_of
from latent_codec.models.memory_format import use_channels_last
from latent_codec.models.own_weights import OwnWeights
from latent_codec.tensors import check_floating
from latent_codec.torch_settings import ignoring_caller_settings

if TYPE_CHECKING:  # which imports models
    from latent_codec.codec import LatentCodec


@dataclass(frozen=True, kw_only=True)
class CodecIdentity:
    """Whose latents they are: what latent files and data sets keep of a codec."""

    name: str
    space_fingerprint: str
    fingerprint: str
    latent_space: LatentSpace
    image_channels: int
    codebook_sizes: list[int]
    pipeline: str | None = None

    @classmethod
    def of(cls, codec: "LatentCodec") -> Self:
        return cls(
            name=codec.name,
            space_fingerprint=codec.space_fingerprint,
            fingerprint=codec.fingerprint,
            latent_space=codec.latent_space,
            image_channels=codec.channels,
            codebook_sizes=codec.codebook_sizes,
            pipeline=codec.pipeline,
        )

    @classmethod
    def of_config(cls, entries: dict[str, Any]) -> Self:
        """Undo `to_config`."""
        return cls(**entries | {"latent_space": LatentSpace(**entries["latent_space"])})

    def to_config(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (space {self.space_fingerprint})"

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the latents of an image of `size`, (height, width)."""
        space = self.latent_space
        multiple, factor = space.side_multiple, space.downsampling_factor
        height, width = (-(-side // multiple) * multiple // factor for side in size)
        return height, width


class LatentTranslator(OwnWeights, ModelMixin, ConfigMixin):
    """Gives the latents that another codec would have encoded the same image to.

        source's latents --[head]-- fold r x r --+-- linear, k x k ----------------------------(+)-- unfold --[tail]--> target's latents
                                                 +-- conv -- [residual block] x num_blocks -- conv --+

    Latents are those that denoisers see. Where the target's are coarser, r x r positions are folded into channels first;
    where they are finer, each position is unfolded into r x r. The linear map is the best that there is of its size, in closed
    form (training/translator_task.py); the network, of TAESD's blocks, adds what is not linear. The head is what the source's
    decoder does on the latents' own grid, the tail what the target's encoder does there: with them decoding and encoding
    are cut short where they would leave the grid.

    Args:
        source, target: of both codecs, `CodecIdentity.to_config`.
        source_autoencoder, target_autoencoder: the config, with `_class_name`, of the autoencoder that the head or tail is a part
            of; None: there is none.
        upscale: how much larger the images of the target's latents are, per side: 2 enlarges.
        kernel_size: of the linear map; odd.
        width: channels of the network.
        num_blocks: of three convolutions each; 0: the linear map is all there is.

    Raises:
        ValueError: for positions that are no multiple of one another's, images of other channels, or an autoencoder whose
            layers are not told apart.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        source: dict,
        target: dict,
        upscale: int = 1,
        kernel_size: int = 3,
        width: int = 96,
        num_blocks: int = 4,
        source_autoencoder: dict | None = None,
        target_autoencoder: dict | None = None,
    ):
        super().__init__()
        self.source, self.target = map(CodecIdentity.of_config, (source, target))
        self.folded, self.unfolded = fold_factors(self.source, self.target, upscale)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.head = _grid_layers(source_autoencoder, "decoder_head")
        self.tail = _grid_layers(target_autoencoder, "encoder_tail")
        channels_in, channels_out = self.source.latent_space.channels, self.target.latent_space.channels
        if self.head is not None:
            channels_in = _convolutions(self.head)[-1].out_channels
        if self.tail is not None:
            channels_out = _convolutions(self.tail)[0].in_channels
        channels_in, channels_out = channels_in * self.folded**2, channels_out * self.unfolded**2
        self.linear = nn.Conv2d(channels_in, channels_out, kernel_size)
        self.network = None
        if num_blocks:
            last = nn.Conv2d(width, channels_out, 3, padding=1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.network = nn.Sequential(
                nn.Conv2d(channels_in, width, 3, padding=1),
                *(AutoencoderTinyBlock(width, width, "relu") for _ in range(num_blocks)),
                last,
            )
        self.register_buffer("residual_std", torch.ones(channels_out, 1, 1))
        """Of what the linear map leaves, in each channel: the network's unit."""

    def forward(self, latents: Tensor) -> Tensor:
        """The source's latents (B, C, h, w) -> the target's (B, C', h r, w r)."""
        folded = self.fold(latents)
        translated = self.linear(self.with_border(folded))
        if self.network is not None:
            translated = translated + self.residual_std * self.network(folded)
        return self.unfold(translated)

    @ignoring_caller_settings()
    def translate(self, latents: Tensor) -> Tensor:
        """The source's latents -> the target's, in their dtype and on their device, without gradients.

        Raises:
            ValueError: for latents of another shape than the source's, or that are not finite.
        """
        check_floating(latents, "latents")
        channels = self.source.latent_space.channels
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(
                f"expected latents of {self.source.name}, (B, {channels}, h, w), got shape {tuple(latents.shape)}"
            )
        use_channels_last(self)
        translated = self(latents.to(self.device, self.dtype)).to(latents)
        if not torch.isfinite(translated).all():
            raise ValueError(
                "latents or their translation hold NaN or infinity; look at where they were made"
            )
        return translated

    def linearly(self, latents: Tensor) -> Tensor:
        """What the linear map makes of the source's latents, between head and tail, without the network."""
        return self.unfold(self.linear(self.with_border(self.fold(latents))))

    def fold(self, latents: Tensor) -> Tensor:
        """The head's features of the source's latents, or these themselves, with r x r positions moved into channels, after the
        last row and column were continued to a multiple of r."""
        if self.head is not None:
            latents = self.head(self.source.latent_space.denormalize(latents))
        rows, columns = (-side % self.folded for side in latents.shape[-2:])
        if rows or columns:
            latents = F.pad(latents, (0, columns, 0, rows), mode="replicate")
        return F.pixel_unshuffle(latents, self.folded)

    def unfold(self, translated: Tensor) -> Tensor:
        """Undo `fold` on the target's side: r x r positions of each, and the target's latents of them."""
        translated = F.pixel_shuffle(translated, self.unfolded)
        if self.tail is None:
            return translated
        space = self.target.latent_space
        return space.normalize(self.tail(translated)[:, : space.channels])  # without log variances

    def with_border(self, folded: Tensor) -> Tensor:
        """Continued at all borders by what the linear map's kernel reaches beyond them."""
        reach = self.linear.kernel_size[0] // 2
        return F.pad(folded, (reach,) * 4, mode="replicate") if reach else folded

    def check_source(self, codec: "CodecIdentity | LatentCodec") -> None:
        """Refuse latents of another codec than the source.

        Raises:
            ValueError: naming both.
        """
        _check_space("translates latents of", self.source, codec)

    def check_target(self, codec: "CodecIdentity | LatentCodec") -> None:
        """Refuse to decode by another codec than the target.

        Raises:
            ValueError: naming both.
        """
        _check_space("gives latents of", self.target, codec)


def fold_factors(source: CodecIdentity, target: CodecIdentity, upscale: int = 1) -> tuple[int, int]:
    """How many of the source's positions, per side, are folded into one, and how many of the target's one unfolds to.

    Raises:
        ValueError: where neither divides the other, or the images differ in channels; naming both codecs.
    """
    if source.image_channels != target.image_channels:
        raise ValueError(
            f"expected codecs of images of one number of channels, got {source} with {source.image_channels} and "
            f"{target} with {target.image_channels}; take two codecs of the same kind of images"
        )
    factor, coarser = source.latent_space.downsampling_factor, target.latent_space.downsampling_factor
    finer = factor * upscale
    if upscale < 1 or (finer % coarser and coarser % finer):
        raise ValueError(
            f"expected positions of whole multiples of each other, got {source} with {factor} px "
            f"and {target} with {coarser} px at upscale {upscale}"
        )
    return max(coarser // finer, 1), max(finer // coarser, 1)


def _grid_layers(
    config: dict[str, Any] | None, part: Literal["decoder_head", "encoder_tail"]
) -> nn.Module | None:
    """Those layers of an autoencoder of random weights, from its config."""
    if config is None:
        return None
    name, end = config["_class_name"], part.partition("_")[0]
    layers = getattr(family_of(component_class(name).from_config(config)), part)
    if layers is None:
        raise ValueError(f"layers of {name}'s {end} are not told apart; leave {end} layers out")
    return layers


def _convolutions(layers: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]


def _check_space(what: str, ours: CodecIdentity, theirs: Any) -> None:
    if ours.space_fingerprint != theirs.space_fingerprint:
        other = f"{theirs.name} (space {theirs.space_fingerprint})"
        raise ValueError(f"this translator {what} {ours}, not of {other}; train one for {theirs.name}")
