"""What diffusers' pipelines (0.42) make of a codec's autoencoder as their `vae`."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from latent_codec.codec import LatentCodec
from latent_codec.evaluation.calibration import can_normalize
from latent_codec.evaluation.host_findings import (
    CHANGES_LATENTS,
    Finding,
    factor_limits,
    image_limits,
    limit,
    no,
    note,
)


@dataclass(frozen=True)
class Pipeline:
    """What one of diffusers' pipelines takes from its `vae`."""

    name: str
    denoiser_channels: int
    """Of the latents of released denoisers."""
    reads_shift: bool = False
    reads_mean_and_std: bool = False
    upcasts: bool = False
    """Whether it decodes in float32 where weights are float16 and force_upcast is set."""
    passes_generator: bool = False
    packing: int = 1
    """Channels of the denoiser per channel of the latents."""


PIPELINES = (
    Pipeline("diffusers StableDiffusion (1, 2)", 4, passes_generator=True),
    Pipeline("diffusers StableDiffusionXL", 4, reads_mean_and_std=True, upcasts=True),
    Pipeline("diffusers StableDiffusion3", 16, reads_shift=True),
    Pipeline("diffusers Flux", 16, reads_shift=True, packing=4),
)


def in_diffusers(codec: LatentCodec, pipeline: Pipeline) -> Iterator[Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if "block_out_channels" not in config:
        yield no(f"it counts block_out_channels when it is built, and {kind}'s config has no such entry")
        return
    yield from _failures(codec, pipeline)
    yield from factor_limits(codec, by_config=2 ** (len(config.block_out_channels) - 1))
    yield from image_limits(config)
    yield from _unread(codec, pipeline)
    yield from _precision_limits(codec, pipeline)
    if not type(codec.autoencoder).__module__.startswith("diffusers."):
        package = type(codec.autoencoder).__module__.partition(".")[0]
        yield limit(
            f"{kind} is a class of {package}: a saved pipeline reloads after `import {package}` only"
            + _as_plain_vq(config),
            f"`import {package}` before from_pretrained, or pass vae=codec.autoencoder",
        )


def _failures(codec: LatentCodec, pipeline: Pipeline) -> Iterator[Finding]:
    """What raises, or shows noise, whatever the settings."""
    autoencoder, space, channels = codec.autoencoder, codec.latent_space, codec.latent_space.channels
    config, kind = autoencoder.config, type(autoencoder).__name__
    if codec.is_discrete and not codec.indices_suffice:
        yield no(
            "norm_type is spatial: of this MoVQ, Kandinsky's pipelines decode the latents as they are, and this one "
            "would scale and quantize them",
        )
    if config.get("scaling_factor") is None:
        yield no("it divides by scaling_factor, which is not set", _register(scaling_factor="1.0"))
    if pipeline.passes_generator and not _takes_generator(autoencoder.decode):
        yield no(
            f"it calls decode(..., generator=...), and {kind}.decode has no generator",
            "open the folder with latent_codec.AutoencoderVQ.from_pretrained" if kind == "VQModel" else None,
        )
    if pipeline.reads_shift and config.get("shift_factor") is None:
        has_place = "shift_factor" in config
        convert = (
            f"`latent-codec convert CODEC FOLDER --scaling-factor {space.scaling_factor} --shift-factor 0`"
        )
        yield no(
            "it adds shift_factor, which is not set", convert if has_place else _register(shift_factor="0.0")
        )
    if channels != pipeline.denoiser_channels:
        yield no(
            f"its released denoisers take latents of {pipeline.denoiser_channels} channels, and these have {channels}",
            f"train a denoiser with in_channels={channels * pipeline.packing}",
        )
    if pipeline.reads_mean_and_std and space.mean is not None and channels != 4:
        yield no(
            f"it takes latents_mean and latents_std for 4 channels whatever the denoiser, and these have {channels}",
            f"`latent-codec calibrate DATA --codec CODEC` writes a scale instead; {CHANGES_LATENTS}",
        )


def _takes_generator(decode: Callable) -> bool:
    """Also where diffusers (before 0.42) hides the method in a wrapper without its signature."""
    method = inspect.getclosurevars(decode.__func__).nonlocals.get("method", decode)
    return "generator" in inspect.signature(method).parameters


def _unread(codec: LatentCodec, pipeline: Pipeline) -> Iterator[Finding]:
    """Scale entries that the pipeline ignores, so that its latents are not the codec's."""
    space = codec.latent_space
    entries = []
    if space.shift_factor and not pipeline.reads_shift:
        entries.append(f"shift_factor {space.shift_factor:.5g}")
    if not pipeline.reads_mean_and_std and not space.is_plain:
        entries.append("latents_mean and latents_std")
    if not entries:
        return
    convention = ""
    if can_normalize(codec.autoencoder):
        convention = " --normalize"
    elif pipeline.reads_mean_and_std:
        convention = " --per-channel"
    helps = convention or pipeline.reads_shift
    yield limit(
        f"it ignores {' and '.join(entries)}: images come out right only with a denoiser trained through it",
        f"`latent-codec calibrate DATA --codec CODEC{convention}`; {CHANGES_LATENTS}" if helps else None,
    )


def _precision_limits(codec: LatentCodec, pipeline: Pipeline) -> Iterator[Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if not pipeline.upcasts:
        if config.get("force_upcast"):
            yield note(
                "force_upcast is set and it does not look: in float16 images may turn black, unless "
                "`latent-codec calibrate` finds float16 safe",
            )
    elif "force_upcast" not in config:
        yield limit(
            f"in float16, and in image-to-image, it reads force_upcast, which {kind}'s config lacks",
            _register(force_upcast="False"),
        )
    elif config.force_upcast and not codec.family.has_post_quant_conv:
        yield limit(
            "force_upcast is set, and in float16 it then asks post_quant_conv for its dtype, which is absent",
            "run it in float32 or bfloat16; or let `latent-codec calibrate DATA --codec CODEC --keep-space` find out "
            "whether float16 is safe",
        )


def _as_plain_vq(config) -> str:
    if config.get("assignment") != "linear":
        return ""
    return (
        "; loaded as a plain VQModel it lacks quantize.proj, and is exact from indices only: latents are snapped to "
        "other codewords"
    )


def _register(**entry: str) -> str:
    ((key, value),) = entry.items()
    return f"codec.autoencoder.register_to_config({key}={value})"
