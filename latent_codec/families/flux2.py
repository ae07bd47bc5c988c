"""AutoencoderKLFlux2: latents that are packed 2x2 and normalized by the statistics of a batch norm (FLUX.2)."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latent_codec.families.family import Config, Entries
from latent_codec.families.kl import KL
from latent_codec.families.latent_space import LatentSpace
from latent_codec.families.pipeline_spaces import MEAN_AND_STD, PIPELINES

if TYPE_CHECKING:
    import numpy as np


class Flux2(KL):
    """AutoencoderKL's network; mean and deviation per packed channel are in its weights, not in its config."""

    packs = True
    read_entries = MEAN_AND_STD
    usual_pipeline = "Flux2Pipeline"
    taken_as = ("AutoencoderKLFlux2",)
    statistics_keys = ("bn.running_mean", "bn.running_var")

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return 4 * config["latent_channels"], 2 ** len(config["block_out_channels"])

    @classmethod
    def latent_space_of(
        cls, config: Config, pipeline: str | None = None, statistics: Mapping[str, "np.ndarray"] | None = None
    ) -> LatentSpace:
        row = PIPELINES[pipeline or cls.usual_pipeline]
        if statistics is None:
            raise ValueError("expected the weights' batch-norm statistics, got a config without them")
        import numpy as np  # not on top: the command line names families before it loads anything

        mean, variance = (np.asarray(statistics[key], np.float32) for key in cls.statistics_keys)
        std = np.sqrt(variance + np.float32(cls.eps(config, pipeline)))  # in float32, as the pipelines
        channels, factor = cls.latent_shape(config)
        if row.unpacked_again:
            channels, factor = channels // 4, factor // 2
        entries = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        return row.latent_space(channels, factor, entries)

    @classmethod
    def eps(cls, config: Config, pipeline: str | None) -> float:
        """What `pipeline` adds to the variance."""
        eps = PIPELINES[pipeline or cls.usual_pipeline].batch_norm_eps
        return config["batch_norm_eps"] if eps is None else eps

    def least_std(self, pipeline: str | None = None) -> float:
        return math.sqrt(self.eps(self.autoencoder.config, pipeline))

    def entries_of(self, space: LatentSpace, pipeline: str | None = None) -> tuple[Entries, Entries]:
        mean, std = space.statistics()
        eps = self.eps(self.autoencoder.config, pipeline)
        variance = [max(each**2 - eps, 0.0) for each in std]
        return {}, dict(zip(self.statistics_keys, (mean, variance)))

    @property
    def folds_statistics(self) -> bool:
        return False
