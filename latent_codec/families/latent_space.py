"""LatentSpace: from an encoder's raw latents to the latents that a denoiser sees, and back."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a space is read from a config without torch
    from torch import Tensor


@dataclass(frozen=True)
class LatentSpace:
    """Scale and shift of a latent space, and the size of its grid.

    Two conventions exist, and diffusers keeps both in the autoencoder's config:

        latents = (raw_latents - shift_factor) * scaling_factor          SD 1-3, FLUX.1, SANA
        latents = (raw_latents - mean) * scaling_factor / std            SDXL, where the config has both

    `mean` and `std` have one entry per channel. SD 1 and 2 ignore `shift_factor`, and all but SDXL's
    pipelines ignore `mean` and `std`. SDXL in turn ignores `shift_factor`, so both together are an error.

    Raises:
        ValueError: for a scale or std that is not positive, lengths that do not fit, or both conventions.
    """

    channels: int
    downsampling_factor: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

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
        if (self.mean is None) != (self.std is None):
            raise ValueError("latents_mean and latents_std go together: give both or neither")
        if self.mean is None:
            return
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"latents_mean has {len(self.mean)} entries and latents_std {len(self.std)}; "
                f"the latents have {self.channels} channels"
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
        return self.mean is None or (not any(self.mean) and set(self.std) == {1.0})

    @classmethod
    def from_config(cls, autoencoder) -> "LatentSpace":
        """The space of an autoencoder of diffusers or our own (a model, not its config).

        Raises:
            ValueError: for a class that is not supported, with the reason, or entries that make no space.
        """
        from latent_codec.families import family_of

        return family_of(autoencoder).latent_space()

    @classmethod
    def read(cls, class_name: str, config: Mapping) -> "LatentSpace":
        """Read the space of an autoencoder from its config.json, all of whose entries are there.

        Raises:
            ValueError: for a class that is not supported, with the reason, or entries that make no space.
            KeyError: for a missing entry.
        """
        from latent_codec.families import family_class

        return family_class(class_name, config).latent_space_of(config)

    @classmethod
    def of_entries(cls, channels: int, downsampling_factor: int, config: Mapping) -> "LatentSpace":
        """The space that the entries of a config describe which `to_config` writes; absent ones change nothing."""
        scaling_factor, shift_factor = config.get("scaling_factor"), config.get("shift_factor")
        return cls(
            channels=channels,
            downsampling_factor=downsampling_factor,
            scaling_factor=1.0 if scaling_factor is None else scaling_factor,
            shift_factor=0.0 if shift_factor is None else shift_factor,
            mean=config.get("latents_mean"),
            std=config.get("latents_std"),
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

    def normalize(self, raw_latents: "Tensor") -> "Tensor":
        """Raw latents of the encoder, (B, C, h, w) -> latents for a denoiser, in the same dtype."""
        if self.mean is None:
            return (raw_latents - self.shift_factor) * self.scaling_factor
        mean, std = self._statistics(raw_latents)
        return (raw_latents - mean) * self.scaling_factor / std

    def denormalize(self, latents: "Tensor") -> "Tensor":
        """Latents of a denoiser, (B, C, h, w) -> raw latents for the decoder, in the same dtype."""
        if self.mean is None:
            return latents / self.scaling_factor + self.shift_factor
        mean, std = self._statistics(latents)
        return latents * std / self.scaling_factor + mean

    def _statistics(self, like: "Tensor") -> tuple["Tensor", "Tensor"]:
        return tuple(like.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
