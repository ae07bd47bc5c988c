"""Family: the few things that LatentCodec and every capability ask of an autoencoder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from latent_codec.errors import SettingError
from latent_codec.families.latent_space import Config, LatentSpace
from latent_codec.families.pipeline_spaces import PIPELINES, find_pipeline

if TYPE_CHECKING:  # what a config says is read without torch
    from torch import Generator, Tensor, nn

    from latent_codec.models.hierarchical_kl import NegativeElbo

Entries: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a discrete autoencoder.

    Args:
        codebook: codewords, (codebook_size, dim), in the autoencoder's dtype and on its device.
        side: pixels that one index stands for, per side; of a MultiScaleVQ it may be a fraction.
    """

    codebook: "Tensor"
    side: int | Fraction

    @property
    def codebook_size(self) -> int:
        return len(self.codebook)


class LatentGroup(NamedTuple):
    """One group of a hierarchy of continuous latents, each given those above it."""

    channels: int
    """Of the latents, where groups are next to one another, top first."""
    side: int
    """Pixels that one position stands for, per side."""


class Encoded(NamedTuple):
    """What an encoder gives: a posterior over raw latents, or the raw latents themselves."""

    posterior: Any | None
    """With `mean`, `var`, `mode()` and `sample(generator)`; None where the class has none."""
    raw_latents: "Tensor | None"
    """(B, C, h, w); None where there is a posterior."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """How the trainer may treat an autoencoder that it trains from one end to the other.

    Args:
        encoder: names of the modules before the latents, the codebook excepted.
        linear_start: whether models/initialization.py knows its layers.
    """

    encoder: tuple[str, ...]
    linear_start: bool = False


class Family:
    """An autoencoder as one of a family: how it encodes, decodes, tiles, and which weights are whose.

        images -> encode_raw -> raw latents -> latent_space().normalize -> latents
        images <- decode_raw <- raw latents <- latent_space().denormalize <-

    A family is one file and one row of `families.FAMILIES`. Methods neither pad nor crop, and take and give
    tensors on the autoencoder's device: images (B, C, H, W) in [-1, 1], raw latents (B, c, h, w).

    Args:
        autoencoder: a model of one of the family's classes.
    """

    channels_key: ClassVar[str] = "latent_channels"
    widths_key: ClassVar[str] = "block_out_channels"
    factor_key: ClassVar[str | None] = None
    images_key: ClassVar[str] = "in_channels"
    """Entries of the config: channels of the latents; a width for each resolution, each half the last; the downsampling
    factor, where it is said; channels of the images."""
    frames: ClassVar[int] = 0
    """0: images; 1: a video autoencoder that is given stills."""
    trainable: ClassVar[Trainable | None] = None
    """None: of its weights only those of `decoder_keys` are trained."""
    untrained: ClassVar[str | None] = None
    """Why its decoder is not trained on images, either; None: it is."""
    unit_range: ClassVar[bool] = False
    """Whether the autoencoder's own images are in [0, 1]."""
    has_posterior: ClassVar[bool] = True
    """Whether `encode_raw` gives a posterior."""
    indices_suffice: ClassVar[bool] = True
    """Whether the indices, where there are levels, hold all that the decoder uses."""
    levels_condition: ClassVar[bool] = False
    """Whether each level below the top is sampled given the features of those above it."""
    read_entries: ClassVar[tuple[str, ...] | None] = None
    """What `reads` gives whatever the pipeline; None: what the pipeline's row or the config says."""
    uncalibrated: ClassVar[str] = "its config has no place for one"
    """Why no pipeline reads a scale of it, where none does."""
    channels_last: ClassVar[bool] = False
    """Whether it was measured to compute faster with weights laid out by `models.memory_format`."""
    taken_as: ClassVar[tuple[str, ...]] = (
        "AutoencoderKL",
        "AutoencoderDC",
        "AutoencoderKLHunyuanImage",
        "AutoencoderTiny",
    )
    """Classes of autoencoders whose pipelines take this family's in their place, because they call it alike."""
    packs: ClassVar[bool] = False
    """Whether 2x2 positions of raw latents become channels before they are normalized."""
    usual_pipeline: ClassVar[str | None] = None
    """The pipeline whose latents are meant where none is named; None: scale, shift, mean and std are the config's."""
    statistics_keys: ClassVar[tuple[str, ...]] = ()
    """Weights that the latent space depends on, next to the config."""
    has_exact_tiles: ClassVar[bool] = False
    """Whether any tile gives the untiled result; else tiles are diffusers' own, blended, or refused."""
    untiled: ClassVar[str] = "diffusers has no tiles for it"
    """Why tiles are refused, where they are."""

    def __init__(self, autoencoder: "nn.Module"):
        self.autoencoder = autoencoder

    @classmethod
    def of(cls, config: Config) -> "type[Family]":
        """The family itself, or the one that `config` makes of the same class."""
        return cls

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        """Channels of the latents and the downsampling factor."""
        factor = config[cls.factor_key] if cls.factor_key else 2 ** (len(config[cls.widths_key]) - 1)
        return config[cls.channels_key], factor

    @classmethod
    def image_channels(cls, config: Config) -> int:
        """Channels of the images: 1, 3 or 4."""
        return config[cls.images_key]

    @classmethod
    def level_shapes(cls, config: Config) -> Sequence[tuple[int, int | Fraction]]:
        """(codebook_size, side in pixels of what an index stands for) of each level, top first; empty if continuous."""
        return []

    @classmethod
    def codeword_dim(cls, config: Config) -> int:
        """Length of a codeword: of several levels, whose codewords are the latents, side by side, a part of the channels."""
        return cls.latent_shape(config)[0] // len(cls.level_shapes(config))

    @classmethod
    def decoder_keys(cls, config: Config) -> tuple[str, ...]:
        """What the keys begin with of the weights that a fine-tuned decoder may change: those that no latent depends on."""
        return ("decoder.", "post_quant_conv.")

    @classmethod
    def latent_space_of(
        cls, config: Config, pipeline: str | None = None, statistics: Mapping[str, Any] | None = None
    ) -> LatentSpace:
        """The latent space that a config describes; no model is needed.

        Args:
            pipeline: the class name of a pipeline that takes this family; None: the usual one.
            statistics: the weights of `statistics_keys`, as arrays.

        Raises:
            ValueError: for entries that no latent space has, or statistics that are not given.
        """
        channels, factor = cls.latent_shape(config)
        if pipeline is None:
            return LatentSpace.of_entries(channels, factor, config, frame_axis=bool(cls.frames))
        return PIPELINES[pipeline].latent_space(channels, factor, config)

    def latent_space(self, pipeline: str | None = None) -> LatentSpace:
        """`latent_space_of` this autoencoder, as `pipeline` sees it.

        Raises:
            ValueError: for a pipeline that is not known or takes other autoencoders, naming both.
        """
        if pipeline is not None:
            self.check_pipeline(pipeline, type(self.autoencoder).__name__)
        statistics = {
            key: self.autoencoder.get_buffer(key).detach().float().cpu().numpy()
            for key in self.statistics_keys
        }
        return self.latent_space_of(self.autoencoder.config, pipeline, statistics)

    @classmethod
    def check_pipeline(cls, pipeline: str, class_name: str) -> None:
        """Refuse a pipeline that is not known, or made for other autoencoders.

        Raises:
            ValueError: naming the pipeline and `class_name`, the autoencoder's.
        """
        row = find_pipeline(pipeline)
        if class_name not in row.autoencoders and not set(row.autoencoders) & set(cls.taken_as):
            raise ValueError(
                f"{pipeline} takes {' or '.join(row.autoencoders)}, and this autoencoder is of the class {class_name}; name a "
                "pipeline that takes it"
            )

    @property
    def channels(self) -> int:
        """Of the images: 1, 3 or 4."""
        return self.image_channels(self.autoencoder.config)

    @property
    def upscale(self) -> int:
        """How many times as large as the encoded image the decoded one is, per side."""
        return 1

    @property
    def side_multiple(self) -> int:
        """What the sides of an image must be divisible by."""
        return self.latent_shape(self.autoencoder.config)[1]

    @property
    def only_size(self) -> tuple[int, int] | None:
        """(height, width) of the images, of a family that takes one size only."""
        return None

    def check_size(self, height: int, width: int) -> None:
        """Refuse images of a size that the family cannot take.

        Raises:
            ValueError: naming the size that it takes.
        """
        if self.only_size not in (None, (height, width)):
            raise ValueError(
                f"expected images of {'x'.join(map(str, self.only_size))} pixels, the one size that "
                f"{type(self.autoencoder).__name__} takes, got {height}x{width}; crop or resize first"
            )

    @property
    def levels(self) -> list[Level]:
        """Codebooks, top level first; empty where the latents are continuous."""
        return []

    @property
    def groups(self) -> list[LatentGroup]:
        """Of hierarchical continuous latents, whose prior is N(0, I) in each, top group first; empty for all others."""
        return []

    def negative_elbo(
        self, images: "Tensor", num_groups: int | None = None, generator: "Generator | None" = None
    ) -> "NegativeElbo":
        """-ELBO of images where the posterior informs the first `num_groups` groups, all if None, and the prior the others."""
        raise TypeError(f"{type(self.autoencoder).__name__} has no groups of latents")

    def reads(self, pipeline: str | None = None) -> tuple[str, ...]:
        """Which of a space's entries (`LatentSpace.to_config`) may be measured and written for `pipeline` to read.

        Without a scaling_factor mean and std of each channel are all that it reads.
        """
        if self.read_entries is not None:
            return self.read_entries
        if pipeline is not None:
            return PIPELINES[pipeline].reads
        entries = LatentSpace(1, 1).to_config()
        return tuple(key for key in entries if key in self.autoencoder.config)

    def least_std(self, pipeline: str | None = None) -> float:
        """The smallest std of a channel that can be written."""
        return 0.0

    def set_latent_space(self, space: LatentSpace, pipeline: str | None = None) -> LatentSpace:
        """Write what `latent_space(pipeline)` reads, so that it is `space`; return it as it is read.

        Raises:
            ValueError: if it could not be `space`; nothing is written then.
        """
        entries, weights = self.entries_of(space, pipeline)
        config = {**self.autoencoder.config, **entries}
        found = self.latent_space_of(config, pipeline, weights)
        if not found.is_close(space):
            name = type(self.autoencoder).__name__
            raise ValueError(f"{space} does not fit {name}, which would have {found}")
        self.autoencoder.register_to_config(**entries)
        for key, values in weights.items():
            buffer = self.autoencoder.get_buffer(key)
            buffer.copy_(buffer.new_tensor(values))
        return found

    def entries_of(self, space: LatentSpace, pipeline: str | None = None) -> tuple[Entries, Entries]:
        """The entries of the config and the weights of `statistics_keys` that `latent_space_of` reads `space` from.

        Raises:
            ValueError: for what this autoencoder has no place for.
        """
        entries = space.to_config()
        if pipeline is not None:
            entries["scaling_factor"] /= PIPELINES[pipeline].multiplier
        unscaled = LatentSpace(1, 1).to_config()
        for key in entries.keys() - self.autoencoder.config.keys():
            if entries[key] != unscaled[key]:
                name = type(self.autoencoder).__name__
                raise ValueError(f"{name} has no {key}, so no pipeline would read {entries[key]}")
            del entries[key]
        return entries, {}

    @property
    def folds_statistics(self) -> bool:
        """Whether mean and deviation of the latents can be folded into weights."""
        return False

    @property
    def last_layer(self) -> "nn.Module":
        """The layer that makes the image, of an autoencoder that is trained."""
        return last_layer_of(self.autoencoder.decoder)

    @property
    def decoder_head(self) -> "nn.Sequential | None":
        """The decoder's layers on the latents' own grid, which raw latents go through first; None where they are not told apart."""
        return None

    @property
    def encoder_tail(self) -> "nn.Sequential | None":
        """The encoder's layers on the latents' own grid, whose last gives raw latents, or a posterior's mean and log variance."""
        return None

    @property
    def has_post_quant_conv(self) -> bool:
        """Whether there is the layer whose dtype SDXL's pipelines ask for when they upcast."""
        return getattr(self.autoencoder, "post_quant_conv", None) is not None

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        """Images -> the posterior over raw latents, or raw latents."""
        with self.tiling(tile):
            output = self.autoencoder.encode((images + 1) / 2 if self.unit_range else images)
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            return Encoded(posterior, None)
        return Encoded(None, output.latents if "latents" in output else output.latent)

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        """Raw latents -> images, not clamped; a discrete autoencoder snaps them to its codebook first."""
        with self.tiling(tile):
            images = self.autoencoder.decode(raw_latents).sample
        return images * 2 - 1 if self.unit_range else images

    def encode_with_indices(self, images: "Tensor") -> "tuple[Encoded, list[Tensor]]":
        """Images -> raw latents as `encode_raw` gives them, and indices of each level, int64 (B, h, w), top first."""
        raise TypeError(f"{type(self.autoencoder).__name__} has no codebook")

    def decode_indices(
        self, indices: "Sequence[Tensor]", known: "Sequence[Tensor] | None" = None
    ) -> "Tensor":
        """Indices, top level first -> images, not clamped.

        Args:
            known: bool masks shaped like `indices`: where False, a mean codeword is taken, if the family has one.
        """
        raise TypeError(f"{type(self.autoencoder).__name__} has no codebook")

    def latents_of_indices(self, indices: "Sequence[Tensor]") -> "Tensor":
        """Indices, top level first -> raw latents, (B, c, h, w)."""
        raise TypeError(f"{type(self.autoencoder).__name__} has no codebook")

    def record_usage(self, level: int, counts: "Tensor") -> None:
        """Take note of how often each codeword of a level is used, where the family has a use for it."""

    @contextmanager
    def tiling(self, tile: int | None) -> Iterator[None]:
        """Work in tiles of `tile` pixels, blended by diffusers with an overlap of a quarter, inside the block.

        Raises:
            SettingError: for a tile that the autoencoder cannot take.
        """
        if tile is None:
            yield
            return
        factor = self.side_multiple
        settings = self.tile_settings(tile, factor)
        if tile % (4 * factor):
            raise SettingError("tile", f"a multiple of {4 * factor} pixels", tile)
        settings["use_tiling"] = True
        before = {key: getattr(self.autoencoder, key) for key in settings}
        try:
            vars(self.autoencoder).update(settings)
            yield
        finally:
            vars(self.autoencoder).update(before)

    def tile_settings(self, tile: int, factor: int) -> dict[str, float]:
        """Attributes of diffusers' own tiling.

        Raises:
            SettingError: where there are no tiles, with the reason.
        """
        name = type(self.autoencoder).__name__
        raise SettingError("tile", f"None, as tiles of {name} are not supported ({self.untiled})", tile)


def gaussian(moments: "Tensor") -> Encoded:
    """The posterior of mean and log variance, (B, 2c, h, w)."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return Encoded(DiagonalGaussianDistribution(moments), None)


def decoder_head_of(autoencoder) -> "nn.Sequential":
    """`Family.decoder_head` of diffusers' Decoder and the convolution before it."""
    from torch import nn

    decoder = autoencoder.decoder
    layers = autoencoder.post_quant_conv, decoder.conv_in, decoder.mid_block
    return nn.Sequential(*(layer for layer in layers if layer is not None))


def encoder_tail_of(autoencoder) -> "nn.Sequential":
    """`Family.encoder_tail` of diffusers' Encoder and the convolution after it."""
    from torch import nn

    encoder = autoencoder.encoder
    last = encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, autoencoder.quant_conv
    layers = encoder.down_blocks[-1], encoder.mid_block, *last
    return nn.Sequential(*(layer for layer in layers if layer is not None))


def last_layer_of(network: "nn.Module") -> "nn.Module":
    """The last convolution or linear layer of a network whose layers are in the order in which they compute."""
    layers = [each for each in network.modules() if getattr(getattr(each, "weight", None), "ndim", 0) > 1]
    return layers[-1]


def single_level_indices(indices: "Sequence[Tensor]", codebook_size: int) -> "Tensor":
    """The one index map of a single-level autoencoder.

    Raises:
        ValueError: for more or fewer maps, another dtype or shape, or an index beyond the codebook.
    """
    import torch

    from latent_codec.tensors import check_range, check_shape

    if len(indices) != 1:
        raise ValueError(f"expected a list of one index map, got {len(indices)} index maps")
    (only,) = indices
    check_shape(only, "indices", ("B", "h", "w"), dtype=torch.int64)
    check_range(only, codebook_size, "indices", "indices of its codebook")
    return only
