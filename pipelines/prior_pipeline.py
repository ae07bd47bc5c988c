"""PriorPipeline: images from a prior over pixels, or over what a codec makes of them."""

from typing import ClassVar

from torch import Tensor, nn

from latent_codec.pipelines.sampling import Prior, SamplingPipeline, check_indices
from latent_codec.pipelines.sampling import PriorPipelineOutput as PriorPipelineOutput


class PriorPipeline(SamplingPipeline):
    """Sample images from a PixelCNN or a PixelSNAIL, with or without class labels.

        labels, seeds --prior--> pixels ---------------------------> images --classifier--> the most probable, if asked
                             +-> indices --vae.decode--------------> images
                             +-> symbols --dequantize, vae.decode--> images

    Args:
        prior: over pixels, indices (`data` "codes") or quantized latents.
        vae: the autoencoder whose indices (AutoencoderVQ, diffusers' VQModel, a HierarchicalVQ of one level) or latents
            (AutoencoderKL) the prior learned; None for pixels.
        classifier: for `keep`: an ImageClassifier, or any model of images in [-1, 1] whose output is logits or has
            `logits`, such as transformers' image classifiers. Put into eval mode.
        class_names: one for each class, in the order of labels.
        for_pipeline: the class name of the pipeline of diffusers whose latents the prior learned, as `pipeline` of
            LatentCodec; None: the usual ones of the class of `vae`.

    Raises:
        ValueError: where these do not fit together.
    """

    model_cpu_offload_seq = "prior->vae->classifier"
    _optional_components: ClassVar = ["vae", "classifier"]

    def __init__(
        self,
        prior: Prior,
        vae: nn.Module | None = None,
        classifier: nn.Module | None = None,
        class_names: list[str] | None = None,
        for_pipeline: str | None = None,
    ):
        super().__init__()
        self.register_modules(prior=prior, vae=vae, classifier=classifier)
        self.register_to_config(class_names=None if class_names is None else list(class_names))
        if for_pipeline is not None:
            self.register_to_config(for_pipeline=for_pipeline)
        self._check_prior()
        self._check_components()

    @property
    def priors(self) -> dict[str, Prior]:
        return {"prior": self.prior}

    @property
    def _data(self) -> str:
        return self.prior.config.get("data", "codes")

    def _shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        return [(height // self._side, width // self._side)]

    def _decode(self, indices: list[Tensor]) -> Tensor:
        if self._data == "pixels":
            return indices[0].float() / 127.5 - 1
        if self._data == "latents":
            return self._codec.decode(self.prior.decode_latents(indices[0]), output_type="pt")
        return self._codec.decode_indices(indices, output_type="pt")

    def _check_prior(self) -> None:
        prior, vae = self.prior, self.vae
        kind = type(prior).__name__
        if prior.condition_network is not None:
            raise ValueError(
                f"prior is a {kind} made for a condition, {prior.condition_network.expected}; "
                "HierarchicalPriorPipeline samples the levels of a HierarchicalVQ."
            )
        if self._data == "pixels":
            if vae is not None:
                raise ValueError(
                    f"prior is a {kind} over pixels and vae a {type(vae).__name__}, which it does not need: leave vae out."
                )
            return
        if vae is None:
            raise ValueError(
                f"prior is a {kind} over {self._data} and vae is None; give the autoencoder it was trained with."
            )
        codec, advice = self._codec, "load the autoencoder that the prior was trained with."
        if self._data == "latents":
            if codec.is_discrete:
                raise ValueError(
                    f"prior is a {kind} over latents and vae a {type(vae).__name__}, whose images are indices; {advice}"
                )
            if codec.latent_space.channels != prior.data_channels:
                raise ValueError(
                    f"prior is a {kind} with data_channels {prior.data_channels}, and vae a {type(vae).__name__} with "
                    f"{codec.latent_space.channels} latent channels; {advice}"
                )
            return
        if not codec.is_discrete:
            raise ValueError(
                f"prior is a {kind} over codes and vae a {type(vae).__name__}, which has no codebook; {advice}"
            )
        if len(codec.codebook_sizes) > 1:
            raise ValueError(
                f"vae is a {type(vae).__name__} of {len(codec.codebook_sizes)} levels; HierarchicalPriorPipeline samples "
                "them, with a prior for each."
            )
        check_indices("prior", prior, "vae", vae, codec.codebook_sizes[0])
