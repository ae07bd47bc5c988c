"""PriorPipeline: images from a prior over pixels, or over what a codec makes of them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from latent_codec.families import family_of
from latent_codec.pipelines.sampling import (
    Callback,
    Generators,
    Labels,
    Prior,
    PriorPipelineOutput,
    SamplingPipeline,
    check_codes,
)


class PriorPipeline(SamplingPipeline):
    """Sample images from a PixelCNN or a PixelSNAIL, with or without class labels.

        labels, seeds --prior--> pixels --------------------------> images --classifier--> the most probable, if asked
                             +-> codes --vae.decode---------------> images
                             +-> levels --dequantize, vae.decode--> images

    Args:
        prior: over pixels, codes or latents.
        vae: the autoencoder whose codes (AutoencoderVQ, diffusers' VQModel, a HierarchicalVQ of one level) or latents
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
    def _priors(self) -> dict[str, Prior]:
        return {"prior": self.prior}

    @property
    def _data(self) -> str:
        return self.prior.config.get("data", "codes")

    def _condition(self, level: int, grids: list[Tensor]) -> None:
        return None

    def _decode(self, grids: list[Tensor]) -> Tensor:
        (indices,) = grids
        if self._data == "pixels":
            return indices.float() / 127.5 - 1
        if self._data == "latents":
            return self._codec.decode(self.prior.decode_latents(indices), output_type="pt")
        return self._codec.decode_indices([indices], output_type="pt")

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
                    f"prior is a {kind} over latents and vae a {type(vae).__name__}, whose images are codes; {advice}"
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
        check_codes("prior", prior, "vae", vae, codec.codebook_sizes[0])

    def __call__(
        self,
        class_labels: Labels = None,
        num_images: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        keep: float | int | None = None,
        batch_size: int = 64,
        generator: Generators = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callback = None,
    ) -> PriorPipelineOutput | tuple:
        """Sample images.

        Args:
            class_labels: a label or class name, or several, for priors with classes.
            num_images: drawn for every label, or in all without labels.
            height, width: in pixels, multiples of those of a position; by default what the prior was trained on, or
                as large as `known`.
            temperature, top_k, top_p: as AutoregressivePrior.sample.
            keep: of the images drawn for a label, return so many (an integer) or such a share (a float in (0, 1],
                rounded up): those whose label `classifier` finds most probable, in that order (VQ-VAE-2,
                arXiv:1906.00446, section 3.4).
            batch_size: images sampled at a time.
            generator: one random number generator, or one for each image drawn. Every image has its own (one generator gives
                each a seed), so that an image is the same in batches of any size, and however many are drawn after it;
                only a draw on the very edge between two indices can be turned by how a batch rounds.
            known: indices to complete, int64 (h, w) or (B, h, w), with channels (C, h, w) or (B, C, h, w); B is 1, for
                all images, or that of the images drawn. `LatentCodec.encode_indices` gives codes,
                `PixelCNN.encode_latents` levels.
            known_mask: bool (h, w) or (B, h, w), the positions to keep.
            output_type: "pil", "pt", "np" or "indices" (nothing is decoded).
            return_dict: False for a tuple: images, indices, class_labels, probabilities.
            callback: called as callback(step, num_steps, grids, done) after every position of every batch: steps count
                from 1; `grids` are the batch's indices so far, here one grid, and `done` says which positions of it are
                known or drawn. Both change as sampling goes on: copy what you keep. `partial_images(grids, done)`
                shows them.

        Raises:
            ValueError: for labels, sizes, known indices and numbers out of range.
        """
        labels = self._labels(class_labels)
        side = 1 if self.vae is None else family_of(self.vae).side_multiple
        completed = None
        if known is not None or known_mask is not None:
            num_drawn = num_images * (1 if labels is None else len(labels))
            completed = known_grids(self.prior, known, known_mask, num_drawn)
            rows, columns = completed[0].shape[-2:]
            height = rows * side if height is None else height
            width = columns * side if width is None else width
        height, width = self._image_size(height, width)
        shape = (height // side, width // side)
        if completed is not None and shape != (rows, columns):
            raise ValueError(
                f"known is {rows}x{columns} and an image of {height}x{width} pixels has {shape[0]}x{shape[1]} positions; "
                "leave height and width out."
            )
        return self._generate(
            labels,
            num_images,
            height,
            width,
            [shape],
            keep=keep,
            batch_size=batch_size,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            callback=callback,
            known=completed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )


def known_grids(
    prior: Prior, known: Tensor | None, known_mask: Tensor | None, num_images: int
) -> tuple[Tensor, Tensor]:
    """`known` and `known_mask` of PriorPipeline, checked, for each of `num_images`: (B, ..., h, w) and (B, h, w)."""
    if known is None or known_mask is None:
        raise ValueError("known and known_mask belong together; give both or neither.")
    form = ("B", f"{prior.data_channels}", "h", "w") if prior.has_channels else ("B", "h", "w")
    shape = tuple(known.shape)
    known = known[None] if known.ndim == len(form) - 1 else known
    mask = known_mask[None] if known_mask.ndim == 2 else known_mask
    if (
        known.dtype != torch.int64
        or known.ndim != len(form)
        or len(known) not in (1, num_images)
        or 0 in shape
        or (prior.has_channels and known.shape[1] != prior.data_channels)
    ):
        raise ValueError(
            f"known is {known.dtype} of shape {shape}; expected torch.int64 of shape ({', '.join(form)}), where B may be "
            f"left out, 1 or the number of images drawn, {num_images}."
        )
    if (
        mask.dtype != torch.bool
        or mask.ndim != 3
        or mask.shape[1:] != known.shape[-2:]
        or len(mask) not in (1, num_images)
    ):
        raise ValueError(
            f"known_mask is {known_mask.dtype} of shape {tuple(known_mask.shape)}; expected torch.bool of known's "
            f"{tuple(known.shape[-2:])}, for all images or with B = {num_images} before it."
        )
    mask = mask.to(known.device)
    every = mask[:, None] if prior.has_channels else mask
    kept = known.masked_fill(~every, 0)
    if kept.min() < 0 or kept.max() >= prior.num_values:
        raise ValueError(
            f"known indices run from {int(kept.min())} to {int(kept.max())}; the prior, a {type(prior).__name__}, knows 0 "
            f"to {prior.num_values - 1}."
        )
    return kept.expand(num_images, *kept.shape[1:]), mask.expand(num_images, -1, -1)
