"""What ComfyUI, A1111 and InvokeAI make of a codec's folder or weight file, by the rows of conversion/hosts.py."""

import math
from collections.abc import Iterator
from functools import partial

from latent_codec.codec import LatentCodec
from latent_codec.conversion.embedding import QUANT_CONVS
from latent_codec.conversion.hosts import (
    FAMILY_SCALES,
    HOSTS,
    INVOKEAI,
    TITLES,
    Row,
    row_for,
    rows_of,
    short,
)
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


def in_host(codec: LatentCodec, host: str) -> Iterator[Finding]:
    """What a user interface makes of the codec, by the row for its class, depth and channels."""
    row = _row(codec, host)
    if row is None:
        yield no(_no_row(codec, host))
        return
    if row.version is not HOSTS[host.lower()]:
        yield no(f"{HOSTS[host.lower()]} has no network for it; {row.version} has")
    config = codec.autoencoder.config
    misfits = row.misfits(config)
    differences = [
        f"{key} {short(value)} for its {short(built)}"
        for key, (value, built) in row.differences(config).items()
    ]
    channels = codec.latent_space.channels
    export = None if misfits else export_command(row, channels)
    if differences:
        exactly = (
            f"; nor is it a part of that one: {'; '.join(misfits)}" if misfits else ", of which it is a part"
        )
        yield no(
            f"it builds another network than this one, which has {', '.join(differences)}{exactly}", export
        )
    elif row.quant_convs and tuple(config[key] for key in QUANT_CONVS) not in row.quant_convs:
        yield no(_quant_convs(row), export)
    elif not row.takes_folder:
        yield no(_what_it_takes(row), export)
    elif row.place:
        yield note(
            f"what it takes is the weight file, diffusion_pytorch_model.safetensors, under {row.place}"
        )
    if misfits:
        return
    if row.version is INVOKEAI:
        yield from _invokeai_limits(codec, row)
    if row.families or (row.format == "ldm" and row.version.host == "ComfyUI"):
        yield from _scale_limits(codec, row)


in_comfyui, in_a1111, in_invokeai = (partial(in_host, host=host) for host in ("ComfyUI", "A1111", "InvokeAI"))


def export_command(row: Row, channels: int, option: str = "", choices: tuple[str, ...] = ()) -> str:
    """The command that writes what a row takes, with CODEC for the codec's name.

    Args:
        channels: of the latents.
        option, choices: a further flag, and what it may be.
    """
    out = f"{row.version.host}/{row.place}" if row.place else "OUT"
    command = f"latent-codec convert CODEC {out} --host {row.version.host.lower()}"
    families = row.families_of_names.get(channels, ())
    if len(families) > 1:
        option, choices = "--family", families
    if not choices:
        return f"`{command}`"
    others = f" (or {', '.join(choices[1:])})" if choices[1:] else ""
    return f"`{command} {option} {choices[0]}`{others}"


def _row(codec: LatentCodec, host: str) -> Row | None:
    kind, channels = type(codec.autoencoder).__name__, codec.latent_space.raw_channels
    return row_for(host, kind, codec.autoencoder.config, channels)


def _no_row(codec: LatentCodec, host: str) -> str:
    kind, channels = type(codec.autoencoder).__name__, codec.latent_space.raw_channels
    rows = [row for row in rows_of(host) if row.class_name == kind]
    if not rows:
        return f"it loads no {kind}"
    if any(channels in row.other_channels for row in rows):
        return f"it takes latents of {channels} channels for those of another network"
    levels = [row.num_levels for row in rows if row.num_levels]
    known = sorted({each for row in rows for each in row.channels or ()})
    if known and channels not in known:
        return (
            f"its models have latents of {' or '.join(map(str, known))} channels, and these have {channels}"
        )
    depth = len(codec.autoencoder.config["block_out_channels"])
    return f"its networks have {' or '.join(map(str, sorted(set(levels))))} levels, and this one {depth}"


def _quant_convs(row: Row) -> str:
    if len(row.quant_convs) > 1:
        return "one quant convolution without the other: it looks only for post_quant_conv and takes both or none"
    has = "has both quant convolutions" if all(row.quant_convs[0]) else "has no quant convolution"
    return f"it loads strictly, and its model of these channels {has}"


def _what_it_takes(row: Row) -> str:
    if row.format == "taesd":
        names = ", ".join(dict.fromkeys(row.names.values()))
        return (
            f"it knows a tiny autoencoder by the names of two files of the original's keys ({names}: each with "
            f"_encoder{row.suffix} and _decoder{row.suffix}), and these are diffusers' keys"
        )
    if row.version is INVOKEAI:
        return (
            "it files every folder under Stable Diffusion 1 or XL, whose latents have 4 channels, and takes 16 channels only "
            "as one file of latent-diffusion's keys, as FLUX's"
        )
    if row.num_levels == 3:
        return "diffusers' keys of three levels are renamed as if there were four"
    strictly = ", strictly," if row.version.host == "A1111" else ""
    return f"it loads the original's keys{strictly} and these are diffusers'"


def _invokeai_limits(codec: LatentCodec, row: Row) -> Iterator[Finding]:
    """What InvokeAI's nodes make of a folder that its classifier files under Stable Diffusion."""
    config, kind = codec.autoencoder.config, type(codec.autoencoder).__name__
    if row.format != "diffusers" or kind not in ("AutoencoderKL", "AutoencoderTiny"):
        return
    yield from factor_limits(codec, by_config=RELEASED_FACTOR)
    yield from image_limits(codec)
    if codec.latent_space.shift_factor or not codec.latent_space.is_plain:
        yield limit(
            "it reads only scaling_factor, and ignores shift_factor, latents_mean and latents_std",
            "`latent-codec convert CODEC FOLDER --fold-scale sd1`" if kind == "AutoencoderKL" else None,
        )
    if kind == "AutoencoderKL" and not (config.use_post_quant_conv and config.mid_block_add_attention):
        yield limit(
            "with fp32 on, it asks for post_quant_conv and for attention in the middle, and one is absent",
            f"{export_command(row, codec.latent_space.channels)}, which adds them; or decode with fp32 off",
        )
    if config.get("force_upcast"):
        yield note("force_upcast is set and it does not look: decode with fp32 on")
    if not (config.scaling_factor == SCALES["sdxl"][0] and config.get("sample_size") in (512, 1024)):
        yield note("it files this under Stable Diffusion 1; for SDXL the folder's name has to end in xl")


def _scale_limits(codec: LatentCodec, row: Row) -> Iterator[Finding]:
    channels = codec.latent_space.channels
    families = row.families.get(channels, ())
    if not families:
        yield limit(
            f"images can be encoded and decoded, and no denoiser here takes latents of {channels} channels"
        )
        return
    if not any(_is_scaled_as(codec.latent_space, name) for name in families):
        yield limit(
            f"it scales latents by its denoiser's own figures ({_spelled(*families)}) and reads no config: with these, "
            "the denoiser sees other latents than this codec's",
            _scale_remedy(codec, row, families),
        )


def _scale_remedy(codec: LatentCodec, row: Row, families: tuple[str, ...]) -> str | None:
    known = [name for name in families if name in SCALES]
    if not known or row.class_name != "AutoencoderKL":
        return None
    if (True, True) in row.quant_convs:
        command = export_command(row, codec.latent_space.channels, "--fold-scale", tuple(known))
        return f"{command}, for a denoiser trained on this codec's latents"
    commands = " or ".join(f"`latent-codec convert CODEC FOLDER --scale {name}`" for name in known)
    return f"{commands}; {CHANGES_LATENTS}"


def _is_scaled_as(space: LatentSpace, family: str) -> bool:
    scaling_factor, shift_factor = FAMILY_SCALES[family]
    return (
        space.is_plain
        and math.isclose(space.scaling_factor, scaling_factor, rel_tol=1e-6)
        and math.isclose(space.shift_factor, shift_factor or 0.0)
    )


def _spelled(*families: str) -> str:
    return ", ".join(
        f"{TITLES[name]}: {scale:.5g}" + ("" if shift is None else f", shift {shift}")
        for name, (scale, shift) in ((name, FAMILY_SCALES[name]) for name in families)
    )
