"""What ComfyUI, A1111 and InvokeAI (2026) make of a codec's folder or weight file."""

import math
from collections.abc import Iterator

from latent_codec.codec import LatentCodec
from latent_codec.conversion.scales import SCALES
from latent_codec.evaluation.host_findings import (
    CHANGES_LATENTS,
    RELEASED_FACTOR,
    Finding,
    factor_limits,
    image_limits,
    limit,
    no,
    note,
)
from latent_codec.families import LatentSpace

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


def in_comfyui(codec: LatentCodec) -> Iterator[Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if kind == "AutoencoderTiny":
        yield from _tiny_in_comfyui(codec)
        return
    if kind != "AutoencoderKL":
        yield no(f"it has no network for {kind}")
        return
    upscaler = len(config.block_out_channels) == 3
    problems = _differences(config, UPSCALER if upscaler else STABLE_DIFFUSION)
    if config.use_quant_conv != config.use_post_quant_conv:
        reason = "one quant convolution without the other: it looks only for post_quant_conv and takes both or none"
        problems.append(no(reason))
    channels = codec.latent_space.channels
    if channels == 64:
        problems.append(no("it takes latents of 64 channels for HunyuanImage's, of another network"))
    yield from problems
    if problems:
        return
    if upscaler:
        yield no("diffusers' keys of three levels are renamed as if there were four", TO_LDM)
    else:
        yield note("what it takes is the weight file, diffusion_pytorch_model.safetensors, under models/vae")
    if channels in FAMILIES:
        yield from _scale_limits(codec, FAMILIES[channels])
    else:
        yield limit(
            f"images can be encoded and decoded, and no denoiser here takes latents of {channels} channels"
        )


def _tiny_in_comfyui(codec: LatentCodec) -> Iterator[Finding]:
    problems = _differences(codec.autoencoder.config, TAESD)
    if (codec.latent_space.scaling_factor, codec.latent_space.shift_factor) != (1.0, 0.0):
        problems.append(no("it takes a tiny autoencoder's latents as they are, and these are scaled"))
    yield from problems
    yield no(
        "it knows a tiny autoencoder by the names of TAESD's two files, and these are diffusers' keys",
        None
        if problems
        else "`latent-codec convert CODEC FOLDER --to taesd`, its files then named taesd_encoder and taesd_decoder "
        "(SDXL: taesdxl_, SD3: taesd3_, FLUX: taef1_) under models/vae_approx",
    )


def in_a1111(codec: LatentCodec) -> Iterator[Finding]:
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if kind != "AutoencoderKL":
        yield no(f"it has no network for {kind}")
        return
    problems = _differences(config, STABLE_DIFFUSION)
    quant_convs = (config.use_quant_conv, config.use_post_quant_conv)
    channels = codec.latent_space.channels
    wanted = {4: (True, True), 16: (False, False)}.get(channels)
    if wanted is None:
        problems.append(no(f"its models have latents of 4 or 16 channels, and these have {channels}"))
    elif quant_convs != wanted:
        has = "has both quant convolutions" if wanted[0] else "(SD3) has no quant convolution"
        problems.append(no(f"it loads strictly, and its model of these channels {has}"))
    yield from problems
    yield no(
        "it loads latent-diffusion's keys, strictly, and these are diffusers'",
        None if problems else TO_LDM,
    )
    if not problems:
        yield from _scale_limits(codec, ("sd1", "sdxl") if channels == 4 else ("sd3",))


def in_invokeai(codec: LatentCodec) -> Iterator[Finding]:
    kind, channels = type(codec.autoencoder).__name__, codec.latent_space.channels
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        yield no(f"it takes AutoencoderKL and AutoencoderTiny by their _class_name, and this is {kind}")
        return
    if channels not in FAMILIES:
        yield no(f"its denoisers have latents of 4 or 16 channels, and these have {channels}")
        return
    yield from factor_limits(codec, by_config=RELEASED_FACTOR)
    yield from image_limits(codec)
    yield from _invokeai_4_channels(codec) if channels == 4 else _invokeai_16_channels(codec)


def _invokeai_4_channels(codec: LatentCodec) -> Iterator[Finding]:
    autoencoder, config = codec.autoencoder, codec.autoencoder.config
    if codec.latent_space.shift_factor or not codec.latent_space.is_plain:
        yield limit(
            "it reads only scaling_factor, and ignores shift_factor, latents_mean and latents_std",
            f"`latent-codec calibrate DATA --codec CODEC --normalize`; {CHANGES_LATENTS}"
            if codec.family.folds_statistics
            else None,
        )
    if type(autoencoder).__name__ == "AutoencoderKL" and not (
        config.use_post_quant_conv and config.mid_block_add_attention
    ):
        yield limit(
            "with fp32 on, it asks for post_quant_conv and for attention in the middle, and one is absent",
            "decode with fp32 off",
        )
    if config.get("force_upcast"):
        yield note("force_upcast is set and it does not look: decode with fp32 on")
    if not (config.scaling_factor == SCALES["sdxl"][0] and config.get("sample_size") in (512, 1024)):
        yield note("it files this under Stable Diffusion 1; for SDXL the folder's name has to end in xl")


def _invokeai_16_channels(codec: LatentCodec) -> Iterator[Finding]:
    config = codec.autoencoder.config
    is_kl = type(codec.autoencoder).__name__ == "AutoencoderKL"
    if not is_kl or not _families(codec.latent_space, FAMILIES[16]):
        yield no(
            "it takes an AutoencoderKL of 16 channels for SD3's or FLUX's by its scaling_factor and shift_factor "
            f"({_spelled(*FAMILIES[16])}), and this is neither",
            _convert_scale(FAMILIES[16]) if is_kl else None,
        )
        return
    is_flux_file = _families(codec.latent_space, ("flux",)) and not (
        config.use_quant_conv or config.use_post_quant_conv or _differences(config, STABLE_DIFFUSION)
    )
    yield limit(
        "only recent versions take a folder of 16 channels; older ones take FLUX's as a file, and none of SD3",
        TO_LDM if is_flux_file else None,
    )


def _differences(config, network: dict[str, tuple]) -> list[Finding]:
    """One finding for all entries of `config` that are not the network's; empty where there are none."""
    found = []
    for key, allowed in network.items():
        value = config[key]
        value = tuple(value) if isinstance(value, list) else value
        if value not in allowed:
            found.append(f"{key} {_short(value)} for its {_short(allowed[0])}")
    return [no(f"it builds another network than this one, which has {', '.join(found)}")] if found else []


def _scale_limits(codec: LatentCodec, families: tuple[str, ...]) -> Iterator[Finding]:
    if not _families(codec.latent_space, families):
        yield limit(
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
        if space.is_plain
        and math.isclose(space.scaling_factor, SCALES[name][0])
        and math.isclose(space.shift_factor, SCALES[name][1] or 0.0)
    ]


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
