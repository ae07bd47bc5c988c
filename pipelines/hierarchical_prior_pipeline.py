"""HierarchicalPriorPipeline: images from the priors of the levels of a HierarchicalVQ or a MultiScaleVQ."""

from typing import ClassVar

from torch import Tensor, nn

from latent_codec.models.hierarchical_vq import HierarchicalVQ
from latent_codec.models.multi_scale_vq import MultiScaleVQ
from latent_codec.pipelines.sampling import Prior, SamplingPipeline, check_indices, onload


class HierarchicalPriorPipeline(SamplingPipeline):
    """Sample images level by level, each level given those above it (VQ-VAE-2, arXiv:1906.00446, section 3.2).

        labels, seeds --top_prior--> indices 0 --condition--> middle_prior --> indices 1 --condition--> bottom_prior --> indices 2
                                         |                                         |                                         |
        most probable <--classifier-- images <------------------------- vae.decode_indices <---------------------------------+

    A condition is the indices of the level above (a prior with `condition_codebook_size`), or the codewords of all levels
    above as the autoencoder's `upper_features` brings them together (`condition_channels`).

    It samples as `SamplingPipeline.__call__` says: `temperature`, `top_k` and `top_p` are of every level, `known` of none.

    Args:
        vae: the autoencoder of two levels, or of three.
        top_prior, middle_prior, bottom_prior: over the indices of each level; `middle_prior` is None for two.
        classifier, class_names: as for PriorPipeline.

    Raises:
        ValueError: where these do not fit together.
    """

    model_cpu_offload_seq = "top_prior->middle_prior->bottom_prior->vae->classifier"
    _optional_components: ClassVar = ["middle_prior", "classifier"]

    def __init__(
        self,
        vae: HierarchicalVQ | MultiScaleVQ,
        top_prior: Prior,
        bottom_prior: Prior,
        middle_prior: Prior | None = None,
        classifier: nn.Module | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            top_prior=top_prior,
            bottom_prior=bottom_prior,
            middle_prior=middle_prior,
            classifier=classifier,
        )
        self.register_to_config(class_names=None if class_names is None else list(class_names))
        self._check_priors()
        self._check_components()

    @property
    def priors(self) -> dict[str, Prior]:
        named = {name: getattr(self, name) for name in ("top_prior", "middle_prior", "bottom_prior")}
        return {name: prior for name, prior in named.items() if prior is not None}

    def _shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        return self.vae.grid_shapes(height, width)

    def _condition(self, level: int, indices: list[Tensor]) -> Tensor | None:
        if level == 0:
            return None
        prior = list(self.priors.values())[level]
        if prior.config.condition_codebook_size is not None:
            return indices[-1]
        onload(self.vae)
        return self.vae.upper_features([each.to(self.vae.device) for each in indices])

    def _decode(self, indices: list[Tensor]) -> Tensor:
        return self._codec.decode_indices(indices, output_type="pt")

    def _check_priors(self) -> None:
        vae, priors = self.vae, self.priors
        if not self._codec.family.levels_condition:
            raise ValueError(
                f"vae is a {type(vae).__name__}; a HierarchicalVQ is needed. PriorPipeline samples codecs of one level."
            )
        sizes = [quantizer.codebook_size for quantizer in vae.quantizers]
        name_of_vae = type(vae).__name__
        if len(sizes) != len(priors):
            advice = "give one for each level: two, or three with middle_prior."
            if len(sizes) > 3:
                advice = "more than three levels are not supported: take an autoencoder of two or three, or sample level by level."
            raise ValueError(
                f"vae is a {name_of_vae} of {len(sizes)} levels, and there are {len(priors)} priors ({', '.join(priors)}); "
                f"{advice}"
            )
        for level, (name, prior) in enumerate(priors.items()):
            check_indices(name, prior, f"level {level} of vae", vae, sizes[level])
            described = f"{name} is a {type(prior).__name__}"
            codes, channels = prior.config.condition_codebook_size, prior.config.condition_channels
            width = vae.condition_channels(level)
            if level == 0:
                if prior.condition_network is not None:
                    raise ValueError(
                        f"{described} made for a condition, {prior.condition_network.expected}; nothing is above the top."
                    )
            elif codes is None and channels is None:
                raise ValueError(
                    f"{described} made without a condition; a level below the top is sampled given the one above: train "
                    f"it with condition_codebook_size {sizes[level - 1]} or condition_channels {width}."
                )
            elif codes not in (None, sizes[level - 1]):
                raise ValueError(
                    f"{described} with condition_codebook_size {codes}, and level {level - 1} of vae, a {name_of_vae}, has "
                    f"a codebook of {sizes[level - 1]}; load the prior that was trained on this codec."
                )
            elif channels not in (None, width):
                raise ValueError(
                    f"{described} with condition_channels {channels}, and the levels above it in vae, a {name_of_vae}, "
                    f"have {width} channels; load the prior that was trained on this codec."
                )
