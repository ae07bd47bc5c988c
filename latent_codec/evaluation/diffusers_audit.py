"""What diffusers' pipelines make of a codec's autoencoder, by the table of families/pipeline_spaces.py."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from latent_codec.codec import LatentCodec
from latent_codec.evaluation.host_findings import (
    CHANGES_LATENTS,
    Finding,
    factor_limits,
    image_limits,
    limit,
    no,
    note,
)
from latent_codec.families import LatentSpace
from latent_codec.families.pipeline_spaces import MEAN_AND_STD, ROWS, PipelineSpace


def made_for(codec: LatentCodec) -> list[str]:
    """Titles of the rows whose released denoisers were trained on such latents: by class, channels and scale."""
    return [row.title for row in ROWS if _is_made_for(codec, row)]


def in_diffusers(codec: LatentCodec, row: PipelineSpace) -> Iterator[Finding]:
    """What the pipelines of a row make of the codec's autoencoder."""
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    problem = _class_problem(codec, row)
    if problem is not None:
        yield no(problem)
        return
    failures = list(_failures(codec, row))
    if failures:
        yield from failures
        return
    if "AutoencoderKL" in row.autoencoders and "block_out_channels" in config:
        released = dict(row.released)[codec.latent_space.channels]
        yield from factor_limits(codec, 2 ** (len(config.block_out_channels) - 1), released)
        yield from image_limits(codec)
    yield from _deviations(codec, row)
    yield from _precision_limits(codec, row)
    if not type(codec.autoencoder).__module__.startswith("diffusers."):
        package = type(codec.autoencoder).__module__.partition(".")[0]
        reason = f"{kind} is a class of {package}: a saved pipeline reloads after `import {package}` only"
        missing = "proj" if config.get("assignment") == "linear" else None
        if config.get("quantizer") == "lfq-successive":
            missing = "feedback"
        if missing:
            reason += (
                f"; loaded as a plain VQModel it lacks quantize.{missing}, and is exact from indices only: latents are "
                "snapped to other codewords"
            )
        yield limit(reason, f"`import {package}` before from_pretrained, or pass vae=codec.autoencoder")


def _classes(codec: LatentCodec) -> set[str]:
    return {each.__name__ for each in type(codec.autoencoder).__mro__}


def _is_made_for(codec: LatentCodec, row: PipelineSpace) -> bool:
    if codec.pipeline is not None:
        return codec.pipeline in row.pipelines
    fits = _classes(codec) & set(row.autoencoders) and _class_problem(codec, row) is None
    if not fits or _channels(codec, row) not in dict(row.released):
        return False
    config = codec.autoencoder.config
    scale = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    return "AutoencoderKL" not in _classes(codec) or any(np.allclose(scale, each) for each in row.published)


def _channels(codec: LatentCodec, row: PipelineSpace) -> int:
    """Of latents, as the row's pipelines see them."""
    channels, _ = codec.family.latent_shape(codec.autoencoder.config)
    return channels // 4 if row.unpacked_again else channels


def _class_problem(codec: LatentCodec, row: PipelineSpace) -> str | None:
    """Why the class does not work there, whatever its config; None if it does."""
    kind, family = type(codec.autoencoder).__name__, codec.family
    if not _classes(codec) & set(row.autoencoders):
        takes = f"it takes {' or '.join(row.autoencoders)}, and this is {kind}"
        if "AutoencoderKL" not in row.autoencoders:
            return takes
        if family.packs or family.frames:
            return f"{takes}, which {'packs its latents' if family.packs else 'works on video'}"
        if "block_out_channels" not in codec.autoencoder.config:
            return f"it counts block_out_channels when it is built, and {kind}'s config has no such entry"
        if _takes(codec.autoencoder.decode, "num_frames"):
            return f"{takes}, whose decode wants a number of frames"
    if codec.is_discrete and not codec.indices_suffice and row.quantizes:
        return (
            "norm_type is spatial: of this MoVQ, Kandinsky's pipelines decode the latents as they are, and this one "
            "would scale and quantize them"
        )
    if codec.indices_suffice and not row.quantizes:
        return "it decodes latents without quantizing them, and this decoder works on codewords"
    return None


def _failures(codec: LatentCodec, row: PipelineSpace) -> Iterator[Finding]:
    """What raises, or shows noise, whatever the settings; the last one has the remedy, of one or several steps."""
    problems = list(_problems(codec, row))
    steps = [step for _, step in problems]
    remedy = None if None in steps else ", then ".join(steps)
    for number, (reason, _) in enumerate(problems, 1):
        yield no(reason, remedy if number == len(problems) else None)


def _problems(codec: LatentCodec, row: PipelineSpace) -> Iterator[tuple[str, str | None]]:
    """Each with the step that helps, None where none does."""
    autoencoder, space, channels = codec.autoencoder, codec.latent_space, _channels(codec, row)
    config, kind = autoencoder.config, type(autoencoder).__name__
    missing = {
        key
        for key in set(row.reads) - set(row.optional)
        if config.get(key) is None and not (key not in config and _classes(codec) & set(row.autoencoders))
    }
    if "scaling_factor" in missing and row.scale is None:
        yield "it divides by scaling_factor, which is not set", _register("scaling_factor", "1.0")
    if row.generator and not _takes(autoencoder.decode, "generator"):
        ours = "open the folder with latent_codec.AutoencoderVQ.from_pretrained"
        reason = f"it calls decode(..., generator=...), and {kind}.decode has no generator"
        yield reason, ours if kind == "VQModel" else None
    if "shift_factor" in missing:
        convert = (
            f"`latent-codec convert CODEC FOLDER --scaling-factor {space.scaling_factor} --shift-factor 0`"
        )
        remedy = convert if "shift_factor" in config else _register("shift_factor", "0.0")
        yield "it adds shift_factor, which is not set", remedy
    calibrate = "`latent-codec calibrate DATA --codec CODEC"
    if missing & set(MEAN_AND_STD):
        remedy = f"{calibrate} --per-channel`; {CHANGES_LATENTS}" if "latents_mean" in config else None
        yield "it reads latents_mean and latents_std, which are not set", remedy
    if set(MEAN_AND_STD) <= set(row.optional) and space.mean is not None and channels != 4:
        reason = f"it takes latents_mean and latents_std for 4 channels whatever the denoiser, and these have {channels}"
        yield reason, f"{calibrate}`, which writes a scale instead"
    if channels not in dict(row.released):
        wanted = " or ".join(str(each) for each, _ in row.released)
        reason = f"its released denoisers take latents of {wanted} channels, and these have {channels}"
        yield reason, f"train a denoiser with in_channels={channels * (row.tokens or 1) ** 2}"


def _takes(decode: Callable, parameter: str) -> bool:
    return parameter in inspect.signature(decode).parameters


def _deviations(codec: LatentCodec, row: PipelineSpace) -> Iterator[Finding]:
    """How far the pipelines' latents are from the codec's, in silence."""
    own, theirs = codec.latent_space, codec.family.latent_space(row.pipelines[0])
    config, difference = codec.autoencoder.config, _difference(own, theirs)
    entries = []
    if own.scaling_factor != theirs.scaling_factor and ("scaling_factor" not in row.reads or row.scale):
        entries.append(f"scaling_factor {own.scaling_factor:.5g}")
    if own.shift_factor and "shift_factor" not in row.reads:
        entries.append(f"shift_factor {own.shift_factor:.5g}")
    if not own.is_plain and "latents_mean" not in row.reads:
        entries.append("latents_mean and latents_std")
    if row.batch_norm_eps not in (None, config.get("batch_norm_eps")) and codec.pipeline not in row.pipelines:
        entries.append(f"batch_norm_eps {config.batch_norm_eps:g}, for {row.batch_norm_eps:g}")
    if entries and difference:
        per_channel = " --per-channel" if "latents_mean" in row.reads else ""
        convention = " --normalize" if codec.family.folds_statistics else per_channel
        made_for, remedy = _is_made_for(codec, row), None
        if (
            not made_for
            and own.scaling_factor == theirs.scaling_factor
            and (convention or "shift_factor" in row.reads)
        ):
            remedy = f"`latent-codec calibrate DATA --codec CODEC{convention}`; {CHANGES_LATENTS}"
        trained = (
            "as its released denoiser was trained"
            if made_for
            else "images come out right only with a denoiser trained through it"
        )
        yield limit(
            f"it ignores {' and '.join(entries)}, so that latents are {difference}: {trained}", remedy
        )
    elif difference or (own.packed, own.unpacked_again) != (theirs.packed, theirs.unpacked_again):
        how = difference or "packed otherwise"
        yield note(f"latents are {how} there: LatentCodec(..., pipeline={row.pipelines[0]!r}) gives them")
    for way, disagreeing in (("encodes", row.encodes), ("decodes", row.decodes)):
        for name, reads in disagreeing.items():
            channels, factor = theirs.channels, theirs.downsampling_factor
            difference = _difference(theirs, replace(row, reads=reads).latent_space(channels, factor, config))
            if difference:
                word = "without" if len(reads) < len(row.reads) else "with"
                odd = sorted(set(reads) ^ set(row.reads))
                yield note(f"{name} {way} {word} {' and '.join(odd)}: its latents are {difference}")


def _difference(own: LatentSpace, other: LatentSpace) -> str | None:
    """How latents of `other` are to `own`'s, where both hold the same raw latents; None: equal."""
    (mean, scale), (other_mean, other_scale) = _affine(own), _affine(other)
    offset, ratio = np.abs((mean - other_mean) * other_scale).max(), other_scale / scale
    parts = []
    if not np.allclose(ratio, 1, rtol=1e-7, atol=0):
        low, high = (f"{each:.6g}" for each in (ratio.min(), ratio.max()))
        parts.append(f"{low} times as large" if low == high else f"{low} to {high} times as large")
    if offset > 1e-7:
        parts.append(f"off by {'' if own.mean is other.mean is None else 'up to '}{offset:.3g}")
    return " and ".join(parts) or None


def _affine(space: LatentSpace) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale per channel: latents = (raw_latents - mean) * scale."""
    mean = [space.shift_factor] if space.mean is None else space.mean
    return np.array(mean), space.scaling_factor / np.array(1.0 if space.std is None else space.std)


def _precision_limits(codec: LatentCodec, row: PipelineSpace) -> Iterator[Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if not row.upcasts:
        if config.get("force_upcast"):
            yield note(
                "force_upcast is set and it does not look: in float16 images may turn black, unless "
                "`latent-codec calibrate` finds float16 safe",
            )
    elif "force_upcast" not in config:
        yield limit(
            f"in float16, and in image-to-image, it reads force_upcast, which {kind}'s config lacks",
            _register("force_upcast", "False"),
        )
    elif config.force_upcast and "post_quant_conv" in row.upcasts and not codec.family.has_post_quant_conv:
        yield limit(
            "force_upcast is set, and in float16 it then asks post_quant_conv for its dtype, which is absent",
            "run it in float32 or bfloat16; or let `latent-codec calibrate DATA --codec CODEC --keep-space` find out "
            "whether float16 is safe",
        )


def _register(key: str, value: str) -> str:
    return f"codec.autoencoder.register_to_config({key}={value})"
