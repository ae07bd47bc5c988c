"""LatentSpace: what lies between an encoder's raw output and the latents a denoiser sees.

It reads the conventions that diffusers' pipelines keep in an autoencoder's config, and lists
by name every autoencoder of diffusers and our own: those read here, and why the others are not.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a space is read from a config without torch
    from torch import Tensor

SUPPORTED = (
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLKVAE",
    "AutoencoderTiny",
    "AutoencoderTinyGN",
    "AutoencoderVQ",
    "HierarchicalVQ",
    "VQModel",
)

_VIDEO = "it works on video: tensors of five dimensions, with time"
_AUDIO = "it works on sound, not on images"

REFUSED = {
    "AutoencoderKLAllegro": _VIDEO,
    "AutoencoderKLCogVideoX": _VIDEO,
    "AutoencoderKLCosmos": _VIDEO,
    "AutoencoderKLFlux2": "FLUX.2 packs 2x2 latents into channels and normalises them with batch-norm "
    "statistics kept in the weights, which scale and shift cannot express",
    "AutoencoderKLHunyuanImageRefiner": _VIDEO,
    "AutoencoderKLHunyuanVideo": _VIDEO,
    "AutoencoderKLHunyuanVideo15": _VIDEO,
    "AutoencoderKLKVAEAudio": _AUDIO,
    "AutoencoderKLKVAEVideo": _VIDEO,
    "AutoencoderKLLTX2Audio": _AUDIO,
    "AutoencoderKLLTX2Video": _VIDEO,
    "AutoencoderKLLTXVideo": _VIDEO,
    "AutoencoderKLMagvit": _VIDEO,
    "AutoencoderKLMiniMaxH3": _VIDEO,
    "AutoencoderKLMiniMaxH3Audio": _AUDIO,
    "AutoencoderKLMochi": _VIDEO,
    "AutoencoderKLQwenImage": "Qwen-Image's autoencoder is a video one: it takes tensors of five dimensions",
    "AutoencoderKLQwenImage21": "Qwen-Image's autoencoder is a video one: it takes tensors of five dimensions",
    "AutoencoderKLTemporalDecoder": "its decoder works on video and wants the number of frames",
    "AutoencoderKLWan": _VIDEO,
    "AutoencoderOobleck": _AUDIO,
    "AutoencoderRAE": "it resizes every image to one fixed square, so none would come back in its own size",
    "AutoencoderSAME": _AUDIO,
    "AutoencoderVidTok": _VIDEO,
    "ConsistencyDecoderVAE": "its decoder is a diffusion sampler, which answers differently at each call",
    "Cosmos3AVAEAudioTokenizer": _AUDIO,
    "Kandinsky6SRVAE": _VIDEO,
    "LTX2VideoDiffusionDecoderModel": "it is a video decoder without an encoder",
    "LongCatAudioDiTVae": _AUDIO,
    "MMAudioVAE": _AUDIO,
    "MMAudioVocoder": _AUDIO,
    "MiniMaxMusic3Vocoder": _AUDIO,
    "RFD4ProteinaAutoencoder": "it works on protein structures, not on images",
}


def supported_class(autoencoder: type | str) -> str:
    """The name in SUPPORTED that `autoencoder` (a class, or a class name from a config) is or derives from.

    Raises:
        ValueError: for every other class, with the reason.
    """
    if isinstance(autoencoder, str):
        names = [autoencoder]
    else:
        names = [ancestor.__name__ for ancestor in autoencoder.__mro__]
    for name in names:
        if name in SUPPORTED:
            return name
    reason = REFUSED.get(names[0], "it is not an autoencoder of images that is known here")
    raise ValueError(f"{names[0]} cannot be used: {reason}. Usable classes: {', '.join(SUPPORTED)}.")


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
        """Read the space of a diffusers autoencoder (a model, not its config).

        Raises:
            ValueError: for a class of autoencoder that cannot be used, with the reason.
        """
        from latent_codec.torch_settings import uncompiled

        return cls.read(supported_class(type(uncompiled(autoencoder))), autoencoder.config)

    @classmethod
    def read(cls, class_name: str, config: Mapping) -> "LatentSpace":
        """Read the space of an autoencoder from its config.json, all of whose entries are there.

        Args:
            class_name: one of SUPPORTED.

        Raises:
            ValueError: for another class, with the reason, or for entries that make no space.
            KeyError: for a missing entry.
        """
        kind = supported_class(class_name)
        if kind in ("AutoencoderDC", "AutoencoderTiny", "AutoencoderTinyGN"):
            channels, factor = config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)
        elif kind == "AsymmetricAutoencoderKL":
            channels, factor = config["latent_channels"], 2 ** (len(config["down_block_out_channels"]) - 1)
        elif kind == "AutoencoderKLHunyuanImage":
            channels, factor = config["latent_channels"], config["spatial_compression_ratio"]
        elif kind == "AutoencoderKLKVAE":
            channels, factor = config["z_channels"], 2 ** (len(config["ch_mult"]) - 1)
        elif kind == "HierarchicalVQ":
            channels, factor = len(config["strides"]) * config["embed_dim"], config["strides"][0]
        elif kind in ("AutoencoderVQ", "VQModel"):
            channels = config["vq_embed_dim"] or config["latent_channels"]
            factor = 2 ** (len(config["block_out_channels"]) - 1)
        else:
            channels, factor = config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

        scaling_factor = config.get("scaling_factor")
        if scaling_factor is None or _is_movq(config):
            # Kandinsky's pipelines hand MoVQ's latents to the denoiser as they are, whatever its config says.
            scaling_factor = 1.0
        return cls(
            channels=channels,
            downsampling_factor=factor,
            scaling_factor=scaling_factor,
            shift_factor=0.0 if config.get("shift_factor") is None else config["shift_factor"],
            mean=config.get("latents_mean"),
            std=config.get("latents_std"),
        )

    def to_config(self) -> dict:
        """The config entries that `from_config` reads back, named as diffusers names them.

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


def side_multiple(autoencoder) -> int:
    """What an image's sides must be divisible by: the factor, or more where levels halve the grid again."""
    from latent_codec.torch_settings import uncompiled

    if supported_class(type(uncompiled(autoencoder))) == "HierarchicalVQ":
        return autoencoder.multiple
    return LatentSpace.from_config(autoencoder).downsampling_factor


def is_movq(autoencoder) -> bool:
    """Whether this is Kandinsky's VQModel (spatial norm), whose pipelines decode latents unquantised."""
    return _is_movq(autoencoder.config)


def _is_movq(config: Mapping) -> bool:
    return config.get("norm_type") == "spatial"
