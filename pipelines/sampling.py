"""What the pipelines over priors share: labels, random generators, batches, rejection sampling and half-sampled images."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, count
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from latent_codec.codec import LatentCodec, as_output, to_precision
from latent_codec.components.loading import CONFIG, download
from latent_codec.components.weight_files import weight_patterns
from latent_codec.families import family_of
from latent_codec.models.own_weights import check_finite
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.pixelsnail import PixelSNAIL
from latent_codec.pipelines.loading import INDEX, load_components, shipped_pipeline
from latent_codec.pipelines.rejection import class_probabilities, most_probable, num_to_keep
from latent_codec.tensors import check_range, check_shape
from latent_codec.torch_settings import ignoring_caller_settings

logger = logging.getLogger(__name__)

Prior = PixelCNN | PixelSNAIL
Labels = int | str | Sequence[int | str] | None
Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[int, int, list[Tensor], Tensor], None] | None

OUTPUT_TYPES = ("pil", "pt", "np", "indices")


@dataclass
class PriorPipelineOutput(ImagePipelineOutput):
    """Images of one label after the other, in the order drawn, or the most probable first where some were kept.

    `images` is what `output_type` names: a list of PIL images, "pt" float32 (N, C, H, W) in [-1, 1], "np" float32
    (N, H, W, C) in [0, 1], or for "indices" the same as `indices`.
    """

    indices: list[Tensor]
    """What was decoded: int64 (N, h, w) of each level, top first; (N, C, h, w) for pixels and latents."""
    class_labels: list[int] | None
    """Of each image; None for priors without classes."""
    probabilities: Tensor | None
    """What the classifier gives each image's label, float64 (N,); None where `keep` is."""


class SamplingPipeline(DiffusionPipeline):
    """Draw indices from each prior, top level first, and decode them.

    A subclass has `vae`, `classifier`, `class_names` and its priors, and says how their indices become images.
    """

    @classmethod
    @ignoring_caller_settings()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **given,
    ) -> Self:
        """Open a shipped pipeline, a pipeline's folder or one on the hub; every component is checked, no code in it is run.

        Args:
            pretrained_model_name_or_path: a shipped pipeline's name ("fashion-mnist"), a folder, or "owner/name" on the hub.
            torch_dtype: of the weights, but for those that a class keeps in float32; None means float32.
            revision, token, cache_dir, local_files_only: for the hub.
            given: components, `class_names` too, in place of the folder's.

        Raises:
            ValueError: if there is no such pipeline, a component is damaged, or they do not fit together.
        """
        name = str(pretrained_model_name_or_path)
        folder = shipped_pipeline(name) or Path(name)
        if not folder.is_dir():
            wanted = [INDEX, *(f"*/{name}" for name in (CONFIG, *chain(*weight_patterns())))]
            hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
            folder = download(name, wanted, local_files_only=local_files_only, **hub)
        pipe = cls(**load_components(folder, cls, given))
        pipe.register_to_config(_name_or_path=name)
        if torch_dtype not in (None, torch.float32):
            for part, component in pipe.components.items():
                if isinstance(component, nn.Module) and part not in given:
                    to_precision(component, torch_dtype)
                    for key, tensor in component.state_dict().items():
                        check_finite(tensor, key, folder / part, torch.float32)
        return pipe

    @property
    def priors(self) -> dict[str, Prior]:
        """Component names and priors, top level first."""
        raise NotImplementedError

    def _shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the indices of each level, top first, for images of this size."""
        raise NotImplementedError

    def _condition(self, level: int, indices: list[Tensor]) -> Tensor | None:
        """What the prior of `level` is told, of the indices of the levels above it."""
        return None

    def _decode(self, indices: list[Tensor]) -> Tensor:
        """Indices, top level first, the lowest of which may be missing -> images (B, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    @property
    def _side(self) -> int:
        """Pixels of a position of the top level, along one side."""
        return 1 if self.vae is None else family_of(self.vae).side_multiple

    @property
    def _codec(self) -> LatentCodec:
        onload(self.vae)
        return LatentCodec(self.vae, name="vae", pipeline=self.config.get("for_pipeline"))

    @property
    def _num_classes(self) -> int | None:
        each = [prior.config.num_classes for prior in self.priors.values()]
        return next((num_classes for num_classes in each if num_classes is not None), None)

    @property
    def _top_prior(self) -> tuple[str, Prior]:
        return next(iter(self.priors.items()))

    def _check_components(self) -> None:
        """Check what holds for all these pipelines, once components are registered."""
        classes = {name: prior.config.num_classes for name, prior in self.priors.items()}
        if len(set(classes.values()) - {None}) > 1:
            told = ", ".join(f"{name} has {num_classes}" for name, num_classes in classes.items())
            raise ValueError(f"the priors differ in their classes: {told}. Load priors of the same data.")
        names, num_classes = self.config.class_names, self._num_classes
        if names is not None and (len(names) != num_classes or len(set(names)) != len(names)):
            raise ValueError(
                f"{len(names)} class_names, {len(set(names))} of them different: the prior has "
                f"{num_classes or 'no'} classes; give one name for each."
            )
        if self.classifier is not None:
            self.classifier.eval()
            others = getattr(getattr(self.classifier, "config", None), "class_names", None)
            if names is not None and others is not None and list(others) != names:
                raise ValueError(
                    f"class_names are {names} and the classifier's {list(others)}; both have to be in the order of "
                    "the prior's labels."
                )
        self._warn_of_another_codec()

    def _warn_of_another_codec(self) -> None:
        known = {name: prior.config.space_fingerprint for name, prior in self.priors.items()}
        if self.vae is None or not any(known.values()):
            return
        if any(weight.dtype != torch.float32 for weight in self.vae.parameters()):
            return  # rounded weights have another fingerprint
        found = self._codec.space_fingerprint
        for name, fingerprint in known.items():
            if fingerprint not in (None, found):
                logger.warning(
                    "%s learned the indices of the codec with space %s, and vae has space %s: it decodes them to other "
                    "images. Load the autoencoder that the prior was trained with.",
                    name,
                    fingerprint,
                    found,
                )

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, those left out as the top prior was trained."""
        name, prior = self._top_prior
        side, codec = self._side, "" if self.vae is None else f" of {type(self.vae).__name__}"
        if prior.config.sample_size is None and None in (height, width):
            raise ValueError(
                f"the config of {name} has no sample_size; give height and width, in pixels (multiples of {side})."
            )
        trained_height, trained_width = prior.config.sample_size or (0, 0)
        height = trained_height * side if height is None else height
        width = trained_width * side if width is None else width
        if height < 1 or width < 1 or height % side or width % side:
            raise ValueError(
                f"height x width is {height}x{width}; a position{codec} has {side}x{side} pixels: give multiples of "
                f"{side}."
            )
        return height, width

    def _labels(self, class_labels: Labels) -> list[int] | None:
        """Labels as numbers, checked."""
        (name, _), num_classes = self._top_prior, self._num_classes
        if num_classes is None:
            if class_labels is not None:
                raise ValueError(
                    f"class_labels are {class_labels!r} and {name} has no classes; leave them out."
                )
            return None
        if class_labels is None:
            raise ValueError(
                f"{name} has {num_classes} classes; give class_labels, 0 to {num_classes - 1} or their names."
            )
        each = [class_labels] if isinstance(class_labels, Integral | str) else list(class_labels)
        labels = [self._label_of(label) if isinstance(label, str) else index(label) for label in each]
        if not labels or min(labels) < 0 or max(labels) >= num_classes:
            raise ValueError(f"class_labels are {labels}; {name} has classes 0 to {num_classes - 1}.")
        return labels

    def _label_of(self, class_name: str) -> int:
        names = self.config.class_names
        if names is None:
            raise ValueError(
                f"class label: expected a number, as the pipeline has no class_names, got {class_name!r}."
            )
        if class_name not in names:
            near = get_close_matches(class_name, names) or [*names[:5], "..."]
            raise ValueError(
                f"class label {class_name!r} is none of the {len(names)} class_names; there are {', '.join(near)}."
            )
        return names.index(class_name)

    @torch.no_grad()
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
            height, width: in pixels, multiples of those of a position of the top level; by default what its prior
                was trained on, or as large as `known`.
            temperature, top_k, top_p: as AutoregressivePrior.sample, for every level.
            keep: of the images drawn for a label, return so many (an integer) or such a share (a float in (0, 1],
                rounded up): those whose label `classifier` finds most probable, in that order (VQ-VAE-2,
                arXiv:1906.00446, section 3.4).
            batch_size: images sampled at a time.
            generator: one random number generator, or one for each image drawn. Every image has its own (one generator gives
                each a seed), so that an image is the same in batches of any size, and however many are drawn after it;
                only a draw on the very edge between two indices can be turned by how a batch rounds.
            known: indices to complete, int64 (h, w) or (B, h, w), with channels (C, h, w) or (B, C, h, w); B is 1, for
                all images, or that of the images drawn. `LatentCodec.encode_indices` gives those of a codebook,
                `PixelCNN.encode_latents` those of quantized latents. Not for several levels.
            known_mask: bool (h, w) or (B, h, w), the positions to keep.
            output_type: "pil", "pt", "np" or "indices" (nothing is decoded).
            return_dict: False for a tuple: images, indices, class_labels, probabilities.
            callback: called as callback(step, num_steps, indices, done) after every position of every batch: steps
                count from 1; `indices` are the batch's so far, of the levels begun, top first, and `done` says which
                positions of the last of them are known or drawn. Both change as sampling goes on: copy what you keep.
                `partial_images(indices, done)` shows them.

        Raises:
            ValueError: for labels, sizes, known indices and numbers out of range.
        """
        labels = self._labels(class_labels)
        num_drawn = num_images * (1 if labels is None else len(labels))
        completed = None
        if known is not None or known_mask is not None:
            if len(self.priors) > 1:
                raise ValueError(
                    f"known: expected None, as {type(self).__name__} completes no levels; leave it out"
                )
            completed = check_known(self._top_prior[1], known, known_mask, num_drawn)
            rows, columns = completed[0].shape[-2:]
            height = rows * self._side if height is None else height
            width = columns * self._side if width is None else width
        height, width = self._image_size(height, width)
        shapes = self._shapes(height, width)
        if completed is not None and shapes != [(rows, columns)]:
            raise ValueError(
                f"known is {rows}x{columns} and an image of {height}x{width} pixels has {shapes[0][0]}x{shapes[0][1]} "
                "positions; leave height and width out."
            )
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images is {num_images} and batch_size {batch_size}; both are at least 1.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; allowed are {', '.join(OUTPUT_TYPES)}.")
        num_kept = None if keep is None else num_to_keep(keep, num_images)
        if keep is not None:
            self._check_classifier(labels, height, width)
        drawn = None if labels is None else [label for label in labels for _ in range(num_images)]
        generators = image_generators(generator, num_drawn)
        batches = [slice(start, start + batch_size) for start in range(0, num_drawn, batch_size)]

        steps, num_steps = count(1), len(batches) * sum(rows * columns for rows, columns in shapes)
        parts = []
        with self.progress_bar(total=num_steps) as progress:

            def report(indices: list[Tensor], done: Tensor) -> None:
                progress.update()
                if callback is not None:
                    callback(next(steps), num_steps, indices, done)

            for batch in batches:
                parts.append(
                    self._sample(
                        shapes,
                        generators[batch],
                        None if drawn is None else drawn[batch],
                        None if completed is None else [each[batch] for each in completed],
                        report,
                        {"temperature": temperature, "top_k": top_k, "top_p": top_p},
                    )
                )
        with ignoring_caller_settings():
            indices = [torch.cat(level) for level in zip(*parts)]
            images = None
            if keep is not None or output_type != "indices":
                images = torch.cat([self._decode([each[batch] for each in indices]) for batch in batches])
            probabilities = None
            if keep is not None:
                scores = torch.cat([self._score(images[batch], drawn[batch]) for batch in batches])
                kept, probabilities = most_probable(scores.view(-1, num_images), num_kept)
                indices = [each[kept.to(each.device)] for each in indices]
                images = images[kept.to(images.device)]
                drawn = [drawn[place] for place in kept.tolist()]
            images = indices if output_type == "indices" else as_output(list(images), output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, indices, drawn, probabilities
        return PriorPipelineOutput(images, indices, drawn, probabilities)

    def _sample(
        self,
        shapes: list[tuple[int, int]],
        generators: list[torch.Generator],
        labels: list[int] | None,
        known: list[Tensor] | None,
        report: Callable[[list[Tensor], Tensor], None],
        options: dict,
    ) -> list[Tensor]:
        """The indices of one batch, top level first."""
        indices: list[Tensor] = []
        for level, (prior, shape) in enumerate(zip(self.priors.values(), shapes)):
            with ignoring_caller_settings():
                condition = self._condition(level, indices)

            def report_level(drawn: Tensor, done: Tensor, above=tuple(indices), prior=prior) -> None:
                report([*above, drawn], done)
                onload(prior)  # which makes way if the callback decodes

            onload(prior)
            class_labels = None
            if prior.config.num_classes is not None:
                class_labels = torch.tensor(labels, device=prior.device)
            channels = [prior.data_channels] if prior.has_channels else []
            indices.append(
                prior.sample(
                    (len(generators), *channels, *shape),
                    None if condition is None else condition.to(prior.device),
                    class_labels,
                    generator=generators,
                    known=None if known is None else known[0],
                    known_mask=None if known is None else known[1],
                    callback=report_level,
                    **options,
                )
            )
        return indices

    @ignoring_caller_settings()
    def _check_classifier(self, labels: list[int] | None, height: int, width: int) -> None:
        """Judge a blank image, so that a classifier that does not fit says so before anything is drawn."""
        name, prior = self._top_prior
        if self.classifier is None:
            raise ValueError(
                "keep ranks images by a classifier, and the pipeline has none; give it one, or leave keep out."
            )
        if labels is None:
            raise ValueError(
                f"keep ranks images by the probability of their class label, and {name} has no classes; leave it out."
            )
        channels = prior.data_channels if self.vae is None else LatentCodec(self.vae).channels
        self._score(torch.zeros(1, channels, height, width), labels[:1])

    def _score(self, images: Tensor, labels: list[int]) -> Tensor:
        """The probability of each image's label, float64 (B,)."""
        onload(self.classifier)
        probabilities = class_probabilities(self.classifier, images, self._num_classes)
        return probabilities[torch.arange(len(labels)), torch.tensor(labels)]

    @ignoring_caller_settings()
    def partial_images(self, indices: Sequence[Tensor], done: Tensor) -> list[Image.Image]:
        """Half-sampled indices, as a callback gets them -> images.

        What is not sampled yet shows the commonest index of the level (`most_frequent` of the prior's config), and
        levels not begun their mean codeword (HierarchicalVQ.decode_indices).

        Args:
            indices: int64 (B, h, w) or (B, C, h, w), top level first; levels not begun are absent.
            done: bool (B, h, w), the positions of the last level that are known or drawn.
        """
        *above, last = indices
        prior = list(self.priors.values())[len(above)]
        commonest = torch.tensor(prior.config.most_frequent or (0,), device=last.device).view(-1, 1, 1)
        filled = torch.where(done[:, None] if prior.has_channels else done, last, commonest)
        return as_output(list(self._decode([*above, filled])), "pil")


def check_known(
    prior: Prior, known: Tensor | None, known_mask: Tensor | None, num_images: int
) -> tuple[Tensor, Tensor]:
    """`known` and `known_mask` of a sampling, checked, for each of `num_images`: (B, ..., h, w) and (B, h, w).

    Raises:
        ValueError: if one is missing, or for other dtypes, shapes or indices.
    """
    if known is None or known_mask is None:
        raise ValueError("known and known_mask belong together; give both or neither.")
    form = (prior.data_channels, "h", "w") if prior.has_channels else ("h", "w")
    counts = sorted({1, num_images})
    check_shape(known, "known", form, *((count, *form) for count in counts), dtype=torch.int64)
    size = tuple(known.shape[-2:])
    check_shape(known_mask, "known_mask", size, *((count, *size) for count in counts), dtype=torch.bool)
    known = known.expand(num_images, *known.shape[-len(form) :])
    mask = known_mask.to(known.device).expand(num_images, *size)
    kept = known.masked_fill(~(mask[:, None] if prior.has_channels else mask), 0)
    check_range(kept, prior.num_values, "known", f"indices of the prior, a {type(prior).__name__}")
    return kept, mask


def image_generators(generator: Generators, num_images: int) -> list[torch.Generator]:
    """One random number generator for each image, so that no image depends on the batch it is drawn in.

    Of one generator, or None (torch's own), each image gets a seed in order: more images are the same first ones
    and further ones.

    Raises:
        ValueError: for a list of another length.
    """
    if isinstance(generator, Sequence):
        if len(generator) != num_images:
            raise ValueError(
                f"expected one generator, or one for each of {num_images} images, got {len(generator)}"
            )
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (num_images,), generator=generator, device=device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def labelled_generators(
    seed: int, labels: Sequence[int | str] | None, num_images: int
) -> list[torch.Generator]:
    """A random number generator for every image, by its label and its number among the label's: more images are the same first ones.

    Args:
        labels: as `labels_by_number` gives them.
        num_images: of every label.
    """
    numbers = [label if isinstance(label, int) else 0 for label in labels or [0]]
    streams = [
        np.random.default_rng((seed, label, number)) for label in numbers for number in range(num_images)
    ]
    return [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in streams]


def labels_by_number(pipe: SamplingPipeline, given: Sequence[str] | None) -> list[int | str] | None:
    """Labels that a person typed, as numbers; what is neither a name nor a number is left for the pipeline to refuse.

    Returns:
        None: every class, or None where the priors have none.
    """
    if given is None:
        counts = [prior.config.num_classes for prior in pipe.priors.values()]
        return next((list(range(count)) for count in counts if count is not None), None)
    names = pipe.config.class_names or []
    return [
        names.index(label) if label in names else int(label) if label.isdecimal() else label
        for label in given
    ]


class Pace:
    """When a preview of half-sampled images is due: at most twice a second, and a fifth of the time.

    if pace.is_due:
        with pace: ...  # make the preview
    """

    def __init__(self):
        self.due = self._began = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.due

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exception) -> None:
        now = time.monotonic()
        self.due = now + max(0.5, 4 * (now - self._began))


def onload(component: nn.Module) -> None:
    """Bring a component to its device where `enable_model_cpu_offload` has taken it away: its hook is called only by `forward`.

    Raises:
        ValueError: if its weights are nowhere, as `enable_sequential_cpu_offload` leaves them.
    """
    hook = getattr(component, "_hf_hook", None)
    if hook is None:
        return
    if next(component.parameters()).device.type == "meta":
        raise ValueError(
            f"the weights of {type(component).__name__} are brought layer by layer, and sampling reads them all the "
            "time; use enable_model_cpu_offload."
        )
    hook.pre_forward(component)


def check_indices(name: str, prior: Prior, level: str, vae, codebook_size: int) -> None:
    """Check that a prior is over the indices of a codebook.

    Raises:
        ValueError: for other data, or another size of the codebook, naming both.
    """
    kind, codec = type(prior).__name__, type(vae).__name__
    data = prior.config.get("data", "codes")
    if data != "codes":
        raise ValueError(f"{name} is a {kind} over {data}, and vae a {codec}, whose images are indices.")
    if prior.num_values != codebook_size:
        raise ValueError(
            f"{name} is a {kind} with codebook_size {prior.num_values}, and {level}, a {codec}, has a codebook of "
            f"{codebook_size}; load the prior that was trained on this codec."
        )
