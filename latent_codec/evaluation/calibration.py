"""Measure a codec's latent space and its half-precision safety, and write both into its config.

Diffusers' pipelines disagree on which entries they read: Stable Diffusion 1 and 2 take
only `scaling_factor`, Stable Diffusion 3 and FLUX.1 add `shift_factor`, SDXL has
`latents_mean` and `latents_std`, which are all that FLUX.2, Wan and Qwen-Image have. One
set of raw latents can be described in four ways:

    scale      latents = (raw - shift_factor) * scaling_factor, one of each for all channels
    channels   latents = (raw - latents_mean) / latents_std, in config or weights, as the family has it
    normalize  mean and std folded into quant_conv and post_quant_conv: raw latents have mean 0
               and standard deviation 1, and every pipeline agrees on them
    keep       as they are; for a codec whose latents are in use
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from latent_codec import metrics
from latent_codec.codec import LatentCodec, NonFiniteError, to_precision
from latent_codec.conversion.folding import normalize_latents
from latent_codec.evaluation.one_vector import fit_image
from latent_codec.families.latent_space import pack_positions
from latent_codec.families.pipeline_spaces import MEAN_AND_STD, PIPELINES
from latent_codec.images.batches import iter_images
from latent_codec.images.sources import Data, ImageSource, open_source, spread
from latent_codec.images.tensors import central_window, shrunk_by
from latent_codec.latents.data_set import LatentDataset
from latent_codec.torch_settings import ignoring_caller_settings

Convention = Literal["scale", "channels", "normalize", "keep"]

HALVES = (torch.bfloat16, torch.float16)
FLOAT16_MAX = 65504.0
TOLERATED_LOSS = 0.05  # dB by which float16 may fall behind float32 before pipelines must upcast
HEADROOM = 4.0  # other images may go higher than those measured
MAX_SIDE = 512
NUM_PARITY_IMAGES = 4
EMULATED_SIDE = 128  # of the crops where half precision is emulated, at several times the cost of float32
LEAST_BUDGET = 20.0  # seconds that the half-precision check may take, or a tenth of what the latents took
MAX_PSNR = 100.0  # dB; an image that comes back exactly would make every mean infinite
MIN_RELATIVE_STD = 1e-3  # a channel that hardly varies is rounding noise, and not worth blowing up


@dataclass(frozen=True)
class PrecisionParity:
    """One arithmetic precision against float32, over encode and decode."""

    dtype: str
    psnr: float | None
    """Of the reconstruction, dB, mean over images; None where it was not finite."""
    psnr_lost: float | None
    """Against float32, dB; 0 where nothing was lost."""


@dataclass(frozen=True)
class Calibration:
    """What was measured; `scaling_factor` and `shift_factor` are what the measurement asks for."""

    num_images: int
    mean: tuple[float, ...]
    """Of the raw latents, per channel as they are normalized (packed ones of FLUX.2), posterior noise included."""
    std: tuple[float, ...]
    scaling_factor: float
    """1 / standard deviation of all raw latents."""
    shift_factor: float
    """Mean of all raw latents."""
    largest_activation: float
    """Largest absolute value that any layer put out, in float32."""
    parity: tuple[PrecisionParity, ...]
    parity_num_images: int
    """Images that `parity` was measured on: the middle of each, at most `parity_side` pixels a side."""
    parity_side: int
    parity_emulated: bool
    """On a CPU: half precision is float32 whose weights and layers' outputs are rounded to it, as a GPU does it."""
    force_upcast: bool
    """float16 overflows, comes within a factor of 4 of it, or loses more than 0.05 dB."""
    skipped: tuple[str, ...] = ()
    """One line for each image that could not be read, naming it and the reason."""

    @property
    def parity_note(self) -> str:
        """What `parity` was measured on, in words."""
        one = self.parity_num_images == 1
        images = "the middle of 1 image" if one else f"the middle of {self.parity_num_images} images"
        emulated = "; half precision is float32 rounded after every layer, as a GPU computes it"
        return f"{images}, at most {self.parity_side}x{self.parity_side}{emulated * self.parity_emulated}"

    @property
    def divisors(self) -> tuple[float, ...]:
        """`std`, but at least 0.1 % of the largest: a dead channel is left dead, not turned into noise."""
        least = MIN_RELATIVE_STD * max(self.std)
        return tuple(max(std, least) for std in self.std)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@ignoring_caller_settings()
def measure(
    codec: LatentCodec,
    source: ImageSource | LatentDataset,
    *,
    num_images: int = 256,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Measure latents and precision on images spread over `source`, cut to at most 512 px a side.

    All images are encoded; four of them, spread as well, are decoded and go through every precision. On a CPU, which
    emulates half precision, these are cut to 128 px a side, and are fewer where they would take more than a tenth of
    the time that the latents took, or 20 s if that is more.

    Args:
        codec: in float32.
        source: images of the kind that the codec is for; or its latents, of which those for the check of half precision
            are decoded. What they lack of the posterior's noise, where only means are stored, the std lacks, too.
        num_images: at most; unreadable ones are left out.
        on_progress: called with (images done, images in all, phase).

    Raises:
        ValueError: if the codec is not in float32, no image can be read, or the latents are the same
            everywhere; `NonFiniteError` if they are not finite even in float32.
    """
    if codec.dtype != torch.float32:
        raise ValueError(f"the codec is in {codec.dtype}; calibration wants float32")
    is_encoded = isinstance(source, LatentDataset)
    if is_encoded and source.is_discrete:
        raise ValueError(f"{source.index.location} holds indices; expected latents, or images")
    report = on_progress or (lambda done, total, phase: None)
    chosen = spread(len(source), num_images)
    between_parity_images = max(len(chosen) // NUM_PARITY_IMAGES, 1)
    parity_images: list[Tensor] = []
    skipped: list[str] = []
    totals = squares = torch.zeros(1, dtype=torch.float64)
    positions = num_measured = 0
    codecs = {torch.float32: codec} | {dtype: _in_half_precision(codec, dtype) for dtype in HALVES}
    peak = _PeakActivation()
    start = time.thread_time()
    hooks = [layer.register_forward_hook(peak) for layer in codec.autoencoder.modules()]
    try:
        moments = _moments_of_latents if is_encoded else _moments_of_images
        for mean, variance, image in moments(
            codec,
            source,
            chosen,
            on_skip=skipped.append,
            on_progress=lambda done, total: report(done, total, "measuring latents"),
        ):
            totals = totals + mean.sum(1)
            squares = squares + (mean.square() + variance).sum(1)
            positions += mean.shape[1]
            if num_measured % between_parity_images == 0 and len(parity_images) < NUM_PARITY_IMAGES:
                parity_images.append(image())
            num_measured += 1
        if not num_measured:
            raise ValueError(f"no image could be read; the first of {len(skipped)}: {skipped[0]}")
        emulated = codec.device.type == "cpu"
        side = EMULATED_SIDE if emulated else MAX_SIDE
        parity, num_parity_images = _parity(
            codecs,
            [_center(image, codec, side) for image in parity_images],
            budget=max(LEAST_BUDGET, (time.thread_time() - start) / 10),
            on_progress=report,
        )
    finally:
        for hook in hooks:
            hook.remove()
    if parity[0].psnr is None or not torch.isfinite(squares).all():
        raise NonFiniteError(f"{codec.name} is not finite even in float32: its weights are damaged")
    mean = totals / positions
    std = (squares / positions - mean.square()).clamp_min(0).sqrt()
    overall_mean = mean.mean()
    overall_std = ((squares / positions).mean() - overall_mean.square()).clamp_min(0).sqrt()
    if overall_std < 1e-6:
        raise ValueError(
            f"the latents of {num_measured} images are the same everywhere, so that no scale can be taken; "
            "give more images, or look at how the codec was trained"
        )
    lost = next(each.psnr_lost for each in parity if each.dtype == "float16")
    return Calibration(
        num_images=num_measured,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        scaling_factor=float(1 / overall_std),
        shift_factor=float(overall_mean),
        largest_activation=peak.value,
        parity=parity,
        parity_num_images=num_parity_images,
        parity_side=side,
        parity_emulated=emulated,
        force_upcast=lost is None or lost > TOLERATED_LOSS or peak.value * HEADROOM > FLOAT16_MAX,
        skipped=tuple(skipped),
    )


def usual_convention(codec: LatentCodec) -> Convention:
    """What the codec's pipelines read: one scale where they read that, else mean and std of each channel.

    Raises:
        ValueError: if they read neither, so that there is nothing to calibrate.
    """
    reads = codec.family.reads(codec.pipeline)
    usual = "scale" if "scaling_factor" in reads else "channels"
    check_convention(codec, usual)
    return usual


def check_convention(codec: LatentCodec, convention: Convention) -> None:
    """Whether what `convention` writes would be read.

    Raises:
        ValueError: if the codec's class or pipeline has no place for it.
    """
    kind, reads = type(codec.autoencoder).__name__, codec.family.reads(codec.pipeline)
    if convention == "keep":
        return
    fixed = None if codec.pipeline is None else PIPELINES[codec.pipeline].scale
    if fixed is not None:
        raise ValueError(
            f"{codec.pipeline} takes a scaling_factor of {fixed}, whatever the config says; keep the space as it is"
        )
    if not reads:
        reason = codec.family.uncalibrated
        raise ValueError(f"no pipeline reads a scale from this {kind}: {reason}; keep the space as it is")
    instead = "a scale" if "scaling_factor" in reads else "mean and std of each channel"
    if convention == "normalize" and not codec.family.folds_statistics:
        raise ValueError(
            f"this {kind} has no quant convolutions to fold mean and std into; write {instead} instead"
        )
    missing = {"channels": set(MEAN_AND_STD), "scale": {"scaling_factor"}}.get(convention, set()) - set(reads)
    if missing:
        reader = codec.pipeline or f"a pipeline of {kind}"
        raise ValueError(
            f"expected {instead}, which is all that {reader} reads, got {' and '.join(sorted(missing))}"
        )


def calibrate(
    codec: LatentCodec,
    data: Data | ImageSource | LatentDataset | Calibration,
    convention: Convention | None = None,
    *,
    limit: int = 256,
    split: str = "train",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Calibration:
    """Measure a codec's latents and half-precision safety, and write both into its config, in memory.

        measured = latent_codec.calibrate(codec, "photos/")
        codec.save_pretrained("calibrated")

    `force_upcast` is written in every convention, and what a class's config lacks is left out:
    `shift_factor` and `force_upcast` exist for some classes only. A VQModel's shift stays 0: the pipelines that it is
    made for, latent diffusion's, know none. What equals the measured statistics up to rounding stays, so that the
    latent space does.

    Args:
        codec: in float32; changed in place.
        data: images as `open_source` takes them, an open source, latents of this codec, or what `measure` found of it.
        convention: what becomes of scale and shift, as the module's head explains; None: `usual_convention`.
        limit: at most N images, spread evenly over `data`.
        split: of data that has splits.
        on_progress: called with (images done, images in all, phase).

    Raises:
        ValueError: if the codec's class has no place for `convention`, or as `measure` does; nothing is changed then.
    """
    convention = convention or usual_convention(codec)
    check_convention(codec, convention)
    if isinstance(data, Calibration):
        measured = data
    else:
        source = data if isinstance(data, (ImageSource, LatentDataset)) else open_source(data, split=split)
        measured = measure(codec, source, num_images=limit, on_progress=on_progress)
    if "force_upcast" in codec.autoencoder.config:
        codec.autoencoder.register_to_config(force_upcast=measured.force_upcast)
    if convention == "keep":
        return measured
    reads = codec.family.reads(codec.pipeline)
    multiplier = 1.0 if codec.pipeline is None else PIPELINES[codec.pipeline].multiplier
    scale, shift, mean, std = multiplier, 0.0, None, None
    if convention == "scale":
        scale *= measured.scaling_factor
        shift = measured.shift_factor if "shift_factor" in reads else 0.0
    elif convention == "channels":
        mean = measured.mean
        std = tuple(max(each, codec.family.least_std(codec.pipeline)) for each in measured.divisors)
    else:
        normalize_latents(codec.autoencoder, measured.mean, measured.divisors)
        codec.weights_changed()
        mean, std = (0.0,) * len(measured.mean), (1.0,) * len(measured.mean)
    space = dataclasses.replace(
        codec.latent_space, scaling_factor=scale, shift_factor=shift, mean=mean, std=std
    )
    if convention == "normalize" or not codec.latent_space.is_close(space):
        codec.latent_space = space
    return measured


def _moments_of_images(
    codec: LatentCodec,
    source: ImageSource,
    chosen: list[int],
    *,
    on_skip: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[Tensor, Tensor, Callable[[], Tensor]]]:
    """`_raw_moments` of images, cut to MAX_SIDE, and a function that gives the image."""
    for _, image in iter_images(
        source, channels=codec.channels, indices=chosen, on_skip=on_skip, on_progress=on_progress
    ):
        image = _center(fit_image(image, codec), codec).to(codec.device)
        yield *_raw_moments(codec, image), lambda image=image: image


def _moments_of_latents(
    codec: LatentCodec,
    dataset: LatentDataset,
    chosen: list[int],
    *,
    on_skip: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[Tensor, Tensor, Callable[[], Tensor]]]:
    """The same of latents that are stored; the image is decoded."""
    space = codec.latent_space
    unit = torch.tensor(space.statistics()[1], dtype=torch.float64).square().view(-1, 1)
    for done, number in enumerate(chosen, 1):
        latents = dataset[number]["latents"][None]
        log_variance = dataset.log_variance(number)
        raw_latents = space.denormalize(latents)
        if space.packed:
            raw_latents = pack_positions(raw_latents, space.packed)
        mean = raw_latents[0].flatten(1).double()
        if log_variance is None:
            variance = torch.zeros_like(mean)
        else:
            if space.packed and space.unpacked_again:
                log_variance = pack_positions(log_variance[None], space.packed)[0]
            variance = log_variance.double().exp().flatten(1) * unit
        yield (
            mean,
            variance,
            lambda latents=latents: _center(codec.decode(latents, output_type="pt")[0], codec),
        )
        on_progress(done, len(chosen))


def _raw_moments(codec: LatentCodec, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the raw latents under the posterior, as they are normalized, (C, positions) each, float64."""
    latents, posterior, _ = codec.encode_all(image)
    if posterior is None:
        mean = codec.latent_space.denormalize(latents)
        variance = torch.zeros_like(mean)
    else:
        mean, variance = posterior.mean, posterior.var
    order = codec.latent_space.packed
    if order:
        mean, variance = pack_positions(mean, order), pack_positions(variance, order)
    return mean[0].flatten(1).cpu().double(), variance[0].flatten(1).cpu().double()


def _center(image: Tensor, codec: LatentCodec, side: int = MAX_SIDE) -> Tensor:
    height, width = image.shape[-2:]
    return central_window(image, codec.family.only_size or (min(height, side), min(width, side)))


def _parity(
    codecs: dict[torch.dtype, LatentCodec],
    images: list[Tensor],
    *,
    budget: float,
    on_progress: Callable[[int, int, str], None],
) -> tuple[tuple[PrecisionParity, ...], int]:
    """PSNR in each precision, and on how many of the images: at least one, and no more than `budget` allows.

    Args:
        codecs: by precision, float32 first.
        budget: seconds of this thread's processor time, which other programs do not use up.
    """
    figures: dict[torch.dtype, list[float | None]] = {dtype: [] for dtype in codecs}
    start, num_images = time.thread_time(), 0
    for image in images:
        for dtype, each in codecs.items():
            figures[dtype].append(_psnr(each, image))
        num_images += 1
        on_progress(num_images, len(images), "checking half precision")
        spent = time.thread_time() - start
        if spent + spent / num_images > budget:
            break
    means = {dtype: None if None in found else fmean(found) for dtype, found in figures.items()}
    reference = means[torch.float32]
    return tuple(
        PrecisionParity(
            str(dtype).removeprefix("torch."),
            psnr,
            None if psnr is None or reference is None else max(reference - psnr, 0.0),
        )
        for dtype, psnr in means.items()
    ), num_images


def _in_half_precision(codec: LatentCodec, dtype: torch.dtype) -> LatentCodec:
    """A copy, as rounding the weights themselves would be for good.

    On a CPU it computes in float32 and rounds what each layer puts out, as on a GPU, where products are summed in
    float32: CPUs without arithmetic in a dtype take 20 to 80 times as long over it. Parts that the class keeps in
    float32 are not rounded.
    """
    autoencoder = to_precision(copy.deepcopy(codec.autoencoder), dtype)
    if "force_upcast" in autoencoder.config:
        autoencoder.register_to_config(force_upcast=False)  # or float16 would run as float32
    if codec.device.type == "cpu":
        for part in autoencoder.children():
            if any(parameter.dtype == dtype for parameter in part.parameters()):
                for layer in part.modules():
                    layer.register_forward_hook(partial(_round_output, dtype))
        autoencoder.float()
    return LatentCodec(autoencoder, name=codec.name, pipeline=codec.pipeline)


def _psnr(codec: LatentCodec, image: Tensor) -> float | None:
    """Of the reconstruction, dB; None where it is not finite."""
    try:
        decoded = codec.decode(codec.encode(image), size=tuple(image.shape[-2:]), output_type="pt")
    except NonFiniteError:
        return None
    return metrics.psnr(shrunk_by(decoded, codec.upscale), image[None]).clamp(max=MAX_PSNR).item()


def _round_output(dtype: torch.dtype, layer: nn.Module, inputs, output):
    return output.to(dtype).float() if isinstance(output, Tensor) and output.is_floating_point() else output


class _PeakActivation:
    """A hook that keeps the largest absolute value of all outputs; NaN counts as infinite."""

    def __init__(self):
        self.value = 0.0

    def __call__(self, layer: nn.Module, inputs, output) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            peak = float(output.abs().max())
            self.value = math.inf if math.isnan(peak) else max(self.value, peak)
