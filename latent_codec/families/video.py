"""Autoencoders of video that give one latent frame for one frame, used for still images."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from latent_codec.families.family import Config, Encoded, Entries, Family, gaussian
from latent_codec.families.latent_space import LatentSpace
from latent_codec.families.pipeline_spaces import MEAN_AND_STD, SCALE

if TYPE_CHECKING:
    from torch import Tensor


class Stills(Family):
    """A video autoencoder with one frame: an axis of frames is added before it and taken away after it."""

    frames = 1
    taken_as: ClassVar[tuple[str, ...]] = ()
    untiled = "diffusers' tiles are for video, and were not checked with one frame"

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        posterior, raw_latents = super().encode_raw(images.unsqueeze(2), tile)
        if posterior is None:
            return Encoded(None, _only_frame(raw_latents))
        return gaussian(_only_frame(posterior.parameters))

    def decode_raw(self, raw_latents: "Tensor", tile: int | None = None) -> "Tensor":
        return _only_frame(super().decode_raw(raw_latents.unsqueeze(2), tile))


def _only_frame(video: "Tensor") -> "Tensor":
    if video.shape[2] != 1:
        raise ValueError(f"expected one frame for one frame, got {video.shape[2]}")
    return video[:, :, 0]


class HunyuanVideo(Stills):
    """HunyuanVideo's and HunyuanVideo 1.5's."""

    factor_key = "spatial_compression_ratio"


class HunyuanVideo15(HunyuanVideo):
    """Its attention's mask is made for one image: several go one by one."""

    def __init__(self, autoencoder):
        super().__init__(autoencoder)
        autoencoder.enable_slicing()


class CogVideoX(Stills):
    """CogVideoX's and EasyAnimate's (Magvit), 8 times per side, whose pipelines ignore shift, mean and std."""

    read_entries = SCALE


class KVAEVideo(Stills):
    """Kandinsky's autoencoder of video, whose config has no scale."""

    channels_key, widths_key = "z_channels", "ch_mult"


class LTX(Stills):
    """LTX-Video's; mean and deviation of its latents are in its weights."""

    statistics_keys = read_entries = MEAN_AND_STD

    @classmethod
    def of(cls, config: Config) -> type[Family]:
        if config.get("timestep_conditioning"):
            raise ValueError(
                "AutoencoderKLLTXVideo with timestep_conditioning is not supported: its decoder removes noise of a "
                "strength that it must be told"
            )
        return cls

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["latent_channels"], config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])

    @classmethod
    def latent_space_of(
        cls, config: Config, pipeline: str | None = None, statistics: Mapping[str, Any] | None = None
    ) -> LatentSpace:
        if not statistics:
            raise ValueError("expected the weights' latents_mean and latents_std, got a config without them")
        values = {key: statistics[key].tolist() for key in cls.statistics_keys}
        return super().latent_space_of({**config, **values}, pipeline)

    def entries_of(self, space: LatentSpace, pipeline: str | None = None) -> tuple[Entries, Entries]:
        import numpy as np  # not on top: the command line names families before it loads anything

        statistics = zip(self.statistics_keys, space.statistics())
        return {"scaling_factor": 1.0}, {key: np.asarray(values, np.float32) for key, values in statistics}


class Mochi(Stills):
    """Mochi 1's, whose encoder makes 15 channels of an image's 3."""

    images_key = "out_channels"
    read_entries = MEAN_AND_STD

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["latent_channels"], math.prod(config["spatial_expansions"])


class Cosmos(Stills):
    """Cosmos 1's, without a posterior; of its statistics per frame those of the first frame."""

    has_posterior = False
    read_entries = MEAN_AND_STD
    factor_key = "spatial_compression_ratio"

    @classmethod
    def latent_space_of(cls, config: Config, *where: Any) -> LatentSpace:
        values = {key: config[key] for key in ("latents_mean", "latents_std")}
        first = {
            key: each and each[:: len(each) // config["latent_channels"]] for key, each in values.items()
        }
        return super().latent_space_of({**config, **first}, *where)

    def entries_of(self, space: LatentSpace, pipeline: str | None = None) -> tuple[Entries, Entries]:
        """Of its statistics only the first frame's are changed."""
        entries: Entries = {"scaling_factor": 1.0}
        for key, values in zip(MEAN_AND_STD, space.statistics()):
            entries[key] = list(self.autoencoder.config[key])
            entries[key][:: len(entries[key]) // len(values)] = values
        return entries, {}

    def encode_raw(self, images: "Tensor", tile: int | None = None) -> Encoded:
        with self.tiling(tile):
            return Encoded(None, _only_frame(self.autoencoder.encode(images.unsqueeze(2)).latent_dist.mode()))
