"""Whether a codec's autoencoder loads and works in diffusers' pipelines and in three user interfaces, and why not.

The rules are what the hosts' code reads (diffusers 0.42; ComfyUI, A1111 and InvokeAI in 2026):

    SD 1, 2, SDXL, SD3, FLUX    their pipelines in diffusers take any autoencoder object, and read entries of its config
    ComfyUI                     a weight file, diffusers' or latent-diffusion's keys; rebuilds Stable Diffusion's network
    A1111                       a weight file of latent-diffusion's keys, loaded strictly into its model's network
    InvokeAI                    a diffusers folder, recognised by the class and the latents' channels in its config

"As it is" means that the host's latents are decoded as this codec decodes them. Whether a denoiser that was trained
on another's latents fits these is another question: `drop_in_audit`.
"""

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from latent_codec.codec import LatentCodec
from latent_codec.conversion.scales import SCALES
from latent_codec.evaluation.calibration import can_normalize
from latent_codec.latent_space import LatentSpace, is_movq

Verdict = Literal["as it is", "with limits", "no"]

RELEASED_FACTOR = 8
"""Pixels per latent position of every released denoiser here."""

STABLE_DIFFUSION = {
    "in_channels": (3,),
    "out_channels": (3,),
    "block_out_channels": ((128, 256, 512, 512),),
    "layers_per_block": (2,),
    "down_block_types": (("DownEncoderBlock2D",) * 4,),
    "up_block_types": (("UpDecoderBlock2D",) * 4,),
    "mid_block_add_attention": (True,),
    "norm_num_groups": (32,),
    "act_fn": ("silu", "swish"),
}
"""What the user interfaces build for latent-diffusion's keys, as AutoencoderKL's config: ch 128, ch_mult 1, 2, 4, 4."""

UPSCALER = STABLE_DIFFUSION | {
    "block_out_channels": ((128, 256, 512),),
    "down_block_types": (("DownEncoderBlock2D",) * 3,),
    "up_block_types": (("UpDecoderBlock2D",) * 3,),
}
"""ComfyUI's other network, which it takes for three levels."""

TAESD = {
    "in_channels": (3,),
    "out_channels": (3,),
    "encoder_block_out_channels": ((64,) * 4,),
    "decoder_block_out_channels": ((64,) * 4,),
    "num_encoder_blocks": ((1, 3, 3, 3),),
    "num_decoder_blocks": ((3, 3, 3, 1),),
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
}

FAMILIES = {4: ("sd1", "sdxl"), 16: ("sd3", "flux")}
"""Names in SCALES by the latents' channels."""

TO_LDM = "`latent-codec convert CODEC out.safetensors --to ldm`"
CHANGES_LATENTS = "it changes the latents, so before a denoiser is trained"


@dataclass(frozen=True)
class HostAudit:
    """One host's answer."""

    host: str
    verdict: Verdict
    """The worst of what was found: "no" where loading or decoding fails, "with limits" where some use of it does."""
    reasons: tuple[str, ...]
    """Why it is not better; where it works as it is, what to mind."""
    remedy: str | None
    """The export or setting that helps, with CODEC for the codec's name; None where nothing does or need."""

    def to_dict(self) -> dict:
        return asdict(self) | {"reasons": list(self.reasons)}


@dataclass(frozen=True)
class _Finding:
    verdict: Verdict
    reason: str
    remedy: str | None = None


def _no(reason: str, remedy: str | None = None) -> _Finding:
    return _Finding("no", reason, remedy)


def _limit(reason: str, remedy: str | None = None) -> _Finding:
    return _Finding("with limits", reason, remedy)


def _mind(reason: str) -> _Finding:
    return _Finding("as it is", f"mind: {reason}")


@dataclass(frozen=True)
class _Pipeline:
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
    _Pipeline("diffusers StableDiffusion (1, 2)", 4, passes_generator=True),
    _Pipeline("diffusers StableDiffusionXL", 4, reads_mean_and_std=True, upcasts=True),
    _Pipeline("diffusers StableDiffusion3", 16, reads_shift=True),
    _Pipeline("diffusers Flux", 16, reads_shift=True, packing=4),
)


def audit_hosts(codec: LatentCodec) -> list[HostAudit]:
    """Each host's verdict on `codec`, from its class, its config and its space; no weight is touched."""
    audits = [_summary(each.name, _in_diffusers(codec, each)) for each in PIPELINES]
    others = {"ComfyUI": _in_comfyui, "A1111": _in_a1111, "InvokeAI": _in_invokeai}
    return audits + [_summary(host, rules(codec)) for host, rules in others.items()]


def _summary(host: str, findings: Iterable[_Finding]) -> HostAudit:
    findings = list(findings)
    verdicts = {finding.verdict for finding in findings}
    verdict = next((each for each in ("no", "with limits") if each in verdicts), "as it is")
    remedies = dict.fromkeys(finding.remedy for finding in findings if finding.remedy)
    return HostAudit(
        host, verdict, tuple(finding.reason for finding in findings), "; ".join(remedies) or None
    )


# ------------------------------------------------------------------------------------------ diffusers


def _in_diffusers(codec: LatentCodec, pipeline: _Pipeline) -> Iterator[_Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if "block_out_channels" not in config:
        yield _no(f"it counts block_out_channels when it is built, and {kind}'s config has no such entry")
        return
    yield from _failures(codec, pipeline)
    yield from _factor_limits(codec, by_config=2 ** (len(config.block_out_channels) - 1))
    yield from _picture_limits(config)
    yield from _unread(codec, pipeline)
    yield from _precision_limits(codec.autoencoder, pipeline)
    if not type(codec.autoencoder).__module__.startswith("diffusers."):
        package = type(codec.autoencoder).__module__.partition(".")[0]
        yield _limit(
            f"{kind} is a class of {package}: a saved pipeline reloads after `import {package}` only"
            + _as_plain_vq(config),
            f"`import {package}` before from_pretrained, or pass vae=codec.autoencoder",
        )


def _failures(codec: LatentCodec, pipeline: _Pipeline) -> Iterator[_Finding]:
    """What raises, or shows noise, whatever the settings."""
    autoencoder, space, channels = codec.autoencoder, codec.space, codec.space.channels
    config, kind = autoencoder.config, type(autoencoder).__name__
    if is_movq(autoencoder):
        yield _no(
            "norm_type is spatial: of this MoVQ, Kandinsky's pipelines decode the latents as they are, and this one "
            "would scale and quantise them",
        )
    if config.get("scaling_factor") is None:
        yield _no("it divides by scaling_factor, which is not set", _register(scaling_factor="1.0"))
    if pipeline.passes_generator and "generator" not in inspect.signature(autoencoder.decode).parameters:
        yield _no(
            f"it calls decode(..., generator=...), and {kind}.decode has no generator",
            "open the folder with latent_codec.AutoencoderVQ.from_pretrained" if kind == "VQModel" else None,
        )
    if pipeline.reads_shift and config.get("shift_factor") is None:
        has_place = "shift_factor" in config
        convert = (
            f"`latent-codec convert CODEC FOLDER --scaling-factor {space.scaling_factor} --shift-factor 0`"
        )
        yield _no(
            "it adds shift_factor, which is not set", convert if has_place else _register(shift_factor="0.0")
        )
    if channels != pipeline.denoiser_channels:
        yield _no(
            f"its released denoisers take latents of {pipeline.denoiser_channels} channels, and these have {channels}",
            f"train a denoiser with in_channels={channels * pipeline.packing}",
        )
    if pipeline.reads_mean_and_std and space.mean is not None and channels != 4:
        yield _no(
            f"it takes latents_mean and latents_std for 4 channels whatever the denoiser, and these have {channels}",
            f"`latent-codec calibrate DATA --codec CODEC` writes a scale instead; {CHANGES_LATENTS}",
        )


def _factor_limits(codec: LatentCodec, by_config: int) -> Iterator[_Finding]:
    factor = codec.space.downsampling_factor
    if by_config != factor:
        yield _limit(
            f"it takes {by_config} pixels per latent position, and {factor} come out: pictures have another size than "
            "was asked for",
        )
    elif factor != RELEASED_FACTOR:
        yield _limit(
            f"a latent position is {factor}x{factor} pixels and {RELEASED_FACTOR}x{RELEASED_FACTOR} in released "
            f"denoisers: at the grid that they were trained on, pictures have {factor}/{RELEASED_FACTOR} of the side; "
            f"sides that are no multiple of {factor} shrink to one, of {2 * factor} where the denoiser takes 2x2 patches",
        )


def _picture_limits(config) -> Iterator[_Finding]:
    if (config.get("in_channels"), config.get("out_channels", config.get("in_channels"))) != (3, 3):
        yield _limit(
            f"pictures have {config.in_channels} channels: text-to-image works, and encoding fails, because pictures "
            "are given to the encoder in RGB",
        )


def _unread(codec: LatentCodec, pipeline: _Pipeline) -> Iterator[_Finding]:
    """Scale entries that the pipeline ignores, so that its latents are not the codec's."""
    space = codec.space
    entries = []
    if space.shift_factor and not pipeline.reads_shift:
        entries.append(f"shift_factor {space.shift_factor:.5g}")
    if not pipeline.reads_mean_and_std and not _is_plain(space):
        entries.append("latents_mean and latents_std")
    if not entries:
        return
    convention = ""
    if can_normalize(codec.autoencoder):
        convention = " --normalize"
    elif pipeline.reads_mean_and_std:
        convention = " --per-channel"
    helps = convention or pipeline.reads_shift
    yield _limit(
        f"it ignores {' and '.join(entries)}: pictures come out right only with a denoiser trained through it",
        f"`latent-codec calibrate DATA --codec CODEC{convention}`; {CHANGES_LATENTS}" if helps else None,
    )


def _precision_limits(autoencoder, pipeline: _Pipeline) -> Iterator[_Finding]:
    config, kind = autoencoder.config, type(autoencoder).__name__
    if not pipeline.upcasts:
        if config.get("force_upcast"):
            yield _mind(
                "force_upcast is set and it does not look: in float16 pictures may turn black, unless "
                "`latent-codec calibrate` finds float16 safe",
            )
    elif "force_upcast" not in config:
        yield _limit(
            f"in float16, and in image-to-image, it reads force_upcast, which {kind}'s config lacks",
            _register(force_upcast="False"),
        )
    elif config.force_upcast and getattr(autoencoder, "post_quant_conv", None) is None:
        yield _limit(
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


# ------------------------------------------------------------------------------------------ user interfaces


def _in_comfyui(codec: LatentCodec) -> Iterator[_Finding]:
    config, channels, kind = codec.autoencoder.config, codec.space.channels, type(codec.autoencoder).__name__
    if kind == "AutoencoderTiny":
        yield from _tiny_in_comfyui(codec)
        return
    if kind != "AutoencoderKL":
        yield _no(f"it has no network for {kind}")
        return
    upscaler = len(config.block_out_channels) == 3
    problems = _differences(config, UPSCALER if upscaler else STABLE_DIFFUSION)
    if config.use_quant_conv != config.use_post_quant_conv:
        problems.append(
            _no(
                "one quant convolution without the other: it looks for post_quant_conv alone and takes both or none",
            )
        )
    if channels == 64:
        problems.append(_no("it takes latents of 64 channels for HunyuanImage's, of another network"))
    yield from problems
    if not problems and upscaler:
        yield _no("diffusers' keys of three levels are renamed as if there were four", TO_LDM)
    elif not problems:
        yield _mind("what it takes is the weight file, diffusion_pytorch_model.safetensors, under models/vae")
    if not problems:
        yield from _family_limits(codec)


def _tiny_in_comfyui(codec: LatentCodec) -> Iterator[_Finding]:
    problems = _differences(codec.autoencoder.config, TAESD)
    if (codec.space.scaling_factor, codec.space.shift_factor) != (1.0, 0.0):
        problems.append(_no("it takes a tiny autoencoder's latents as they are, and these are scaled"))
    yield from problems
    yield _no(
        "it knows a tiny autoencoder by the names of TAESD's two files, and these are diffusers' keys",
        None
        if problems
        else "`latent-codec convert CODEC FOLDER --to taesd`, its files then named taesd_encoder and taesd_decoder "
        "(SDXL: taesdxl_, SD3: taesd3_, FLUX: taef1_) under models/vae_approx",
    )


def _in_a1111(codec: LatentCodec) -> Iterator[_Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if kind != "AutoencoderKL":
        yield _no(f"it has no network for {kind}")
        return
    problems = _differences(config, STABLE_DIFFUSION)
    quant_convs = (config.use_quant_conv, config.use_post_quant_conv)
    wanted = {4: (True, True), 16: (False, False)}.get(codec.space.channels)
    if wanted is None:
        problems.append(
            _no(f"its models have latents of 4 or 16 channels, and these have {codec.space.channels}")
        )
    elif quant_convs != wanted:
        problems.append(
            _no(
                "it loads strictly, and its model of these channels "
                + ("has both quant convolutions" if wanted[0] else "(SD3) has no quant convolution"),
            )
        )
    yield from problems
    yield _no(
        "it loads latent-diffusion's keys, strictly, and these are diffusers'",
        None if problems else TO_LDM,
    )
    if not problems:
        yield from _scale_limits(codec, ("sd1", "sdxl") if codec.space.channels == 4 else ("sd3",))


def _in_invokeai(codec: LatentCodec) -> Iterator[_Finding]:
    kind, channels = type(codec.autoencoder).__name__, codec.space.channels
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        yield _no(f"it takes AutoencoderKL and AutoencoderTiny by their _class_name, and this is {kind}")
        return
    if channels not in FAMILIES:
        yield _no(f"its denoisers have latents of 4 or 16 channels, and these have {channels}")
        return
    yield from _factor_limits(codec, by_config=RELEASED_FACTOR)
    yield from _picture_limits(codec.autoencoder.config)
    yield from _invokeai_4_channels(codec) if channels == 4 else _invokeai_16_channels(codec)


def _invokeai_4_channels(codec: LatentCodec) -> Iterator[_Finding]:
    autoencoder, config = codec.autoencoder, codec.autoencoder.config
    if codec.space.shift_factor or not _is_plain(codec.space):
        yield _limit(
            "it reads scaling_factor alone, and ignores shift_factor, latents_mean and latents_std",
            f"`latent-codec calibrate DATA --codec CODEC --normalize`; {CHANGES_LATENTS}"
            if can_normalize(autoencoder)
            else None,
        )
    if type(autoencoder).__name__ == "AutoencoderKL" and not (
        config.use_post_quant_conv and config.mid_block_add_attention
    ):
        yield _limit(
            "with fp32 on, it asks for post_quant_conv and for attention in the middle, and one is absent",
            "decode with fp32 off",
        )
    if config.get("force_upcast"):
        yield _mind("force_upcast is set and it does not look: decode with fp32 on")
    if not (config.scaling_factor == SCALES["sdxl"][0] and config.get("sample_size") in (512, 1024)):
        yield _mind("it files this under Stable Diffusion 1; for SDXL the folder's name has to end in xl")


def _invokeai_16_channels(codec: LatentCodec) -> Iterator[_Finding]:
    config = codec.autoencoder.config
    is_kl = type(codec.autoencoder).__name__ == "AutoencoderKL"
    if not is_kl or not _families(codec.space, FAMILIES[16]):
        yield _no(
            "it takes an AutoencoderKL of 16 channels for SD3's or FLUX's by its scaling_factor and shift_factor "
            f"({_spelled(*FAMILIES[16])}), and this is neither",
            _convert_scale(FAMILIES[16]) if is_kl else None,
        )
        return
    is_flux_file = _families(codec.space, ("flux",)) and not (
        config.use_quant_conv or config.use_post_quant_conv or _differences(config, STABLE_DIFFUSION)
    )
    yield _limit(
        "recent versions alone take a folder of 16 channels; older ones take FLUX's as a file, and none of SD3",
        TO_LDM if is_flux_file else None,
    )


def _differences(config, network: dict[str, tuple]) -> list[_Finding]:
    """One finding for all entries of `config` that are not the network's; empty where there are none."""
    found = []
    for key, allowed in network.items():
        value = config[key]
        value = tuple(value) if isinstance(value, list) else value
        if value not in allowed:
            found.append(f"{key} {_short(value)} for its {_short(allowed[0])}")
    return [_no(f"it builds another network than this one, which has {', '.join(found)}")] if found else []


def _family_limits(codec: LatentCodec) -> Iterator[_Finding]:
    families = FAMILIES.get(codec.space.channels)
    if families is None:
        yield _limit(
            f"pictures can be encoded and decoded, and no denoiser here takes latents of {codec.space.channels} channels",
        )
        return
    yield from _scale_limits(codec, families)


def _scale_limits(codec: LatentCodec, families: tuple[str, ...]) -> Iterator[_Finding]:
    if not _families(codec.space, families):
        yield _limit(
            f"it scales latents by its denoiser's own figures ({_spelled(*families)}) and reads no config: with these, "
            "the denoiser sees other latents than this codec's",
            _convert_scale(families),
        )


def _convert_scale(families: tuple[str, ...]) -> str:
    commands = " or ".join(f"`latent-codec convert CODEC FOLDER --scale {name}`" for name in families)
    return f"{commands}; {CHANGES_LATENTS}"


def _families(space: LatentSpace, names: tuple[str, ...]) -> list[str]:
    """Those of `names` whose latents are scaled and shifted as these are."""
    return [
        name
        for name in names
        if _is_plain(space)
        and math.isclose(space.scaling_factor, SCALES[name][0])
        and math.isclose(space.shift_factor, SCALES[name][1] or 0.0)
    ]


def _is_plain(space: LatentSpace) -> bool:
    """Whether latents_mean and latents_std, if any, change nothing."""
    return space.mean is None or (not any(space.mean) and set(space.std) == {1.0})


def _spelled(*families: str) -> str:
    names = {"sd1": "SD 1 and 2", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX"}
    return ", ".join(
        f"{names[name]}: {scale}" + ("" if shift is None else f", shift {shift}")
        for name, (scale, shift) in ((name, SCALES[name]) for name in families)
    )


def _short(value) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return (
        f"{len(value)} x {value[0]}"
        if len(set(value)) == 1 and len(value) > 1
        else ", ".join(map(str, value))
    )


def _register(**entry: str) -> str:
    ((key, value),) = entry.items()
    return f"codec.autoencoder.register_to_config({key}={value})"
