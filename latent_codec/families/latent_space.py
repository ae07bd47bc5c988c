"""LatentSpace: from an encoder's raw latents to the latents that a denoiser sees, and back."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # a space is read from a config without torch
    from torch import Tensor

Config: TypeAlias = Mapping[str, Any]
"""Entries of a config.json."""

CHANNEL_FIRST = "channel, row, column"
"""Order of packed channels: c * 4 + 2 * row + column (FLUX.1 and 2, Qwen-Image)."""
POSITION_FIRST = "row, column, channel"
"""Order of packed channels: (2 * row + column) * C + c (Ideogram 4)."""
_ORDERS = (CHANNEL_FIRST, POSITION_FIRST)


@dataclass(frozen=True)
class LatentSpace:
    """From raw latents to the grid of latents that a denoiser works on, and from the grid to what it is handed.

        raw_latents (B, c, h, w) -> normalize -> latents (B, C, h', w') -> pack -> tokens or video, where it takes those

    Two conventions exist, and diffusers keeps both in the autoencoder's config:

        latents = (raw_latents - shift_factor) * scaling_factor          SD 1-3, FLUX.1, SANA
        latents = (raw_latents - mean) * scaling_factor / std            SDXL, GLM-Image, Wan, Qwen-Image

    `mean` and `std` have one entry per channel. SD 1 and 2 ignore `shift_factor`, and most pipelines ignore `mean` and
    `std`. SDXL in turn ignores `shift_factor`, so both together are an error.

    FLUX.2 moves 2x2 positions of a channel into 4 channels first (`packed`), so that mean and std have 4 entries per
    raw channel, and latents are half as wide and high; FIBO 2 undoes the packing after it (`unpacked_again`).

    Args:
        channels: C, of latents.
        downsampling_factor: pixels per position of latents, along one side.
        packed: order of the channels that 2x2 positions become before mean and std are applied; None: not packed.
        unpacked_again: whether the packing is undone once mean and std are applied.
        tokens: side of the squares of positions that `pack` makes one token of, 1 or 2; None: no tokens.
        frame_axis: whether the denoiser is handed video: (B, C, 1, h, w).
        repeated: whether it is handed every channel twice, as two frames folded into channels (HunyuanImage's refiner).

    Raises:
        ValueError: for a scale or std that is not positive, lengths that do not fit, or both conventions.
    """

    channels: int
    downsampling_factor: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    packed: str | None = None
    unpacked_again: bool = False
    tokens: int | None = None
    frame_axis: bool = False
    repeated: bool = False

    def __post_init__(self):
        for name in ("scaling_factor", "shift_factor"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"expected a number as {name}, got {reprlib.repr(getattr(self, name))}")
        for name, values in (("latents_mean", self.mean), ("latents_std", self.std)):
            if values is not None and not (isinstance(values, list | tuple) and all(map(_is_number, values))):
                raise ValueError(f"expected a list of numbers as {name}, got {reprlib.repr(values)}")
        if not 0 < self.scaling_factor < float("inf"):
            raise ValueError(f"scaling_factor is {self.scaling_factor}; it must be a positive number")
        if not abs(self.shift_factor) < float("inf"):
            raise ValueError(f"shift_factor is {self.shift_factor}; it must be a finite number")
        if self.packed not in (None, *_ORDERS) or self.tokens not in (None, 1, 2):
            raise ValueError(f"expected packed of {_ORDERS} or None and tokens of 1 or 2 or None, got {self}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("latents_mean and latents_std go together: give both or neither")
        if self.mean is None:
            return
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        normalized = self.channels * (4 if self.unpacked_again else 1)
        if not len(self.mean) == len(self.std) == normalized:
            raise ValueError(
                f"expected {normalized} entries of latents_mean and latents_std, one per channel, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"latents_std is {self.std}; every entry must be a positive number")
        if not all(abs(value) < float("inf") for value in self.mean):
            raise ValueError(f"latents_mean is {self.mean}; every entry must be a finite number")
        if self.shift_factor != 0:
            raise ValueError(
                f"shift_factor {self.shift_factor} and latents_mean / latents_std are two conventions: SD3 and FLUX "
                "read the one, SDXL the other, so their latents would differ. Keep one of them."
            )

    @property
    def is_plain(self) -> bool:
        """Whether latents_mean and latents_std, if any, change nothing."""
        return self.mean is None or (not any(self.mean) and set(self.std or ()) == {1.0})

    @classmethod
    def from_config(cls, autoencoder) -> "LatentSpace":
        """The space of an autoencoder of diffusers or our own (a model, not its config).

        Raises:
            ValueError: for a class that is not supported, with the reason, or entries that make no space.
        """
        from latent_codec.families import family_of

        return family_of(autoencoder).latent_space()

    @classmethod
    def read(
        cls, class_name: str, config: Config, pipeline: str | None = None, statistics: Mapping | None = None
    ) -> "LatentSpace":
        """Read the space of an autoencoder from its config.json, all of whose entries are there.

        Args:
            pipeline: the class name of a pipeline whose space it is to be; None: the usual one of that class.
            statistics: the weights that its family's space depends on (`Family.statistics_keys`).

        Raises:
            ValueError: for a class that is not supported, with the reason, entries that make no space, or a pipeline
                that takes no such autoencoder.
            KeyError: for a missing entry.
        """
        from latent_codec.families import family_class

        family = family_class(class_name, config)
        if pipeline is not None:
            family.check_pipeline(pipeline, class_name)
        return family.latent_space_of(config, pipeline, statistics)

    @classmethod
    def of_entries(cls, channels: int, downsampling_factor: int, config: Config, **packing) -> "LatentSpace":
        """The space that the entries of a config describe which `to_config` writes; absent ones change nothing."""
        scaling_factor, shift_factor = config.get("scaling_factor"), config.get("shift_factor")
        return cls(
            channels=channels,
            downsampling_factor=downsampling_factor,
            scaling_factor=1.0 if scaling_factor is None else scaling_factor,
            shift_factor=0.0 if shift_factor is None else shift_factor,
            mean=config.get("latents_mean"),
            std=config.get("latents_std"),
            **packing,
        )

    def to_config(self) -> dict:
        """The config entries that `of_entries` reads back, named as diffusers names them.

        `shift_factor` is written even when 0, because SD3's pipelines add it without asking for None.
        """
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": None if self.mean is None else list(self.mean),
            "latents_std": None if self.std is None else list(self.std),
        }

    def is_close(self, other: "LatentSpace") -> bool:
        """Whether latents of both are equal up to rounding: within 1e-5 of the latents' own unit."""
        if self._unscaled() != other._unscaled():
            return False
        return all(
            abs(std / their_std - 1) < 1e-5 and abs(mean - their_mean) / their_std < 1e-5
            for mean, std, their_mean, their_std in zip(*self.statistics(), *other.statistics())
        )

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std that alone would make the same latents, (raw - mean) / std, one of each per normalized channel."""
        if self.mean is None or self.std is None:
            normalized = self.channels * (4 if self.unpacked_again else 1)
            return (self.shift_factor,) * normalized, (1 / self.scaling_factor,) * normalized
        return self.mean, tuple(std / self.scaling_factor for std in self.std)

    def _unscaled(self) -> "LatentSpace":
        return replace(self, scaling_factor=1.0, shift_factor=0.0, mean=None, std=None)

    @property
    def raw_channels(self) -> int:
        """Channels of raw latents."""
        return self.channels // 4 if self.packed and not self.unpacked_again else self.channels

    @property
    def raw_factor(self) -> int:
        """Pixels per position of raw latents, along one side."""
        return self.downsampling_factor // (2 if self.packed and not self.unpacked_again else 1)

    @property
    def side_multiple(self) -> int:
        """What the sides of an image must be divisible by, so that raw latents pack."""
        return self.raw_factor * (2 if self.packed else 1)

    def arrange(self, raw_latents: "Tensor") -> "Tensor":
        """Raw latents, (B, c, h, w), or a figure for each of them, on the channels and positions of latents."""
        if self.packed is None or self.unpacked_again:
            return raw_latents
        return pack_positions(raw_latents, self.packed)

    def normalize(self, raw_latents: "Tensor") -> "Tensor":
        """Raw latents of the encoder, (B, c, h, w) -> latents for a denoiser, in the same dtype."""
        if self.packed:
            raw_latents = pack_positions(raw_latents, self.packed)
        if self.mean is None:
            latents = (raw_latents - self.shift_factor) * self.scaling_factor
        else:
            mean, std = self._statistics(raw_latents)
            latents = (raw_latents - mean) * self.scaling_factor / std
        return unpack_positions(latents, self.packed) if self.packed and self.unpacked_again else latents

    def normalize_log_variance(self, raw_log_variance: "Tensor") -> "Tensor":
        """Log variance of raw latents, (B, c, h, w) -> of latents: each channel's variance is divided by that of its unit."""
        if self.packed:
            raw_log_variance = pack_positions(raw_log_variance, self.packed)
        _, std = self.statistics()
        log_variance = raw_log_variance - 2 * raw_log_variance.new_tensor(std).log().view(1, -1, 1, 1)
        return (
            unpack_positions(log_variance, self.packed)
            if self.packed and self.unpacked_again
            else log_variance
        )

    def denormalize(self, latents: "Tensor") -> "Tensor":
        """Latents of a denoiser, (B, C, h, w) -> raw latents for the decoder, in the same dtype."""
        if self.packed and self.unpacked_again:
            latents = pack_positions(latents, self.packed)
        if self.mean is None:
            raw_latents = latents / self.scaling_factor + self.shift_factor
        else:
            mean, std = self._statistics(latents)
            raw_latents = latents * std / self.scaling_factor + mean
        return unpack_positions(raw_latents, self.packed) if self.packed else raw_latents

    def pack(self, latents: "Tensor") -> "Tensor":
        """Latents (B, C, h, w) -> what the denoiser is handed.

        Returns:
            Tokens (B, h * w, C) or, of 2x2 positions, (B, h/2 * w/2, 4C), row by row, where there are `tokens`; else
            (B, C, 1, h, w) where there is a `frame_axis`; else the latents as they are.

        Raises:
            ValueError: for latents of another shape, or odd sides that 2x2 positions do not divide.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"expected latents (B, {self.channels}, h, w), got {tuple(latents.shape)}")
        if self.tokens is None:
            if self.repeated:
                latents = latents.repeat(1, 2, 1, 1)
            return latents.unsqueeze(2) if self.frame_axis else latents
        if self.tokens == 2:
            latents = pack_positions(latents, CHANNEL_FIRST)
        return latents.flatten(2).mT

    def unpack(self, packed: "Tensor", size: tuple[int, int] | None = None) -> "Tensor":
        """Undo `pack`.

        Args:
            packed: tokens (B, N, C or 4C), video (B, C, 1, h, w) or latents (B, C, h, w).
            size: rows and columns of the latents, (h, w); tokens need it.

        Raises:
            ValueError: for more than one frame, tokens without a size, or a size that they do not fill.
        """
        if packed.ndim == 5:
            if packed.shape[2] != 1:
                raise ValueError(f"expected one frame, got {packed.shape[2]} frames; unpack them one by one")
            packed = packed[:, :, 0]
        if packed.ndim == 4:
            return packed[:, self.channels :] if self.repeated else packed
        if self.tokens is None or packed.ndim != 3:
            raise ValueError(f"expected latents (B, {self.channels}, h, w), got {tuple(packed.shape)}")
        if size is None:
            raise ValueError(
                "expected the size (rows, columns) of the latents that the tokens make, got None"
            )
        rows, columns = (length // self.tokens for length in size)
        channels = self.channels * self.tokens**2
        if packed.shape[1:] != (rows * columns, channels):
            raise ValueError(
                f"expected {rows * columns} tokens of {channels} channels for latents of {size[0]}x{size[1]}, "
                f"got {packed.shape[1]} of {packed.shape[2]}"
            )
        latents = packed.mT.unflatten(2, (rows, columns))
        return unpack_positions(latents, CHANNEL_FIRST) if self.tokens == 2 else latents

    def describe_packing(self) -> str | None:
        """What is packed, and what `pack` hands to the denoiser, in words; None where that is the latents as they are."""
        parts = []
        if self.packed:
            where = ", normalized and unpacked again" if self.unpacked_again else ""
            parts.append(f"2x2 positions are packed into channels, ordered {self.packed}{where}")
        if self.tokens:
            squares = {1: "each position", 2: "2x2 positions"}[self.tokens]
            parts.append(f"the denoiser takes {squares} as a token")
        elif self.frame_axis:
            twice = ", each channel twice" if self.repeated else ""
            parts.append(f"the denoiser takes video of one frame{twice}")
        return "; ".join(parts) or None

    def identity(self) -> dict[str, "float | list[float]"]:
        """Numbers that tell this space from others whose weights are the same, for fingerprints."""
        entries = {key: value for key, value in self.to_config().items() if value is not None}
        if self.packed:
            entries["packing"] = [float(_ORDERS.index(self.packed)), float(self.unpacked_again)]
        return entries

    def _statistics(self, like: "Tensor") -> tuple["Tensor", "Tensor"]:
        return tuple(like.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))


def pack_positions(grid: "Tensor", order: str) -> "Tensor":
    """Move 2x2 positions into channels: (B, C, h, w) -> (B, 4C, h/2, w/2).

    Args:
        order: of the new channels, CHANNEL_FIRST or POSITION_FIRST.

    Raises:
        ValueError: for odd sides.
    """
    if any(side % 2 for side in grid.shape[-2:]):
        raise ValueError(f"expected even sides to pack 2x2 positions, got {grid.shape[-2]}x{grid.shape[-1]}")
    blocks = grid.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h/2, row, w/2, column)
    axes = (0, 1, 3, 5, 2, 4) if order == CHANNEL_FIRST else (0, 3, 5, 1, 2, 4)
    return blocks.permute(axes).flatten(1, 3)


def unpack_positions(grid: "Tensor", order: str) -> "Tensor":
    """Undo `pack_positions`: (B, 4C, h, w) -> (B, C, 2h, 2w)."""
    blocks = grid.unflatten(1, (-1, 2, 2) if order == CHANNEL_FIRST else (2, 2, -1))
    axes = (0, 1, 4, 2, 5, 3) if order == CHANNEL_FIRST else (0, 3, 4, 1, 5, 2)
    return blocks.permute(axes).flatten(4, 5).flatten(2, 3)


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
