"""TAESD (madebyollin/taesd): encoder and decoder in a file each, layers numbered through; and diffusers' layout of it.

encoder: 0 conv, blocks, [stride-2 conv, blocks] ..., conv; decoder: 0 clamp, 1 conv, 2 ReLU, blocks, [upsampling,
conv, blocks] ..., conv. Only the convolutions between levels lack a bias. diffusers has no layer for the clamp, so
that its decoder counts one less.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from latent_codec.conversion.diffusers_files import own_layout
from latent_codec.conversion.renaming import ConversionError, Format, Rename, Scale, Shapes, refuse_others

if TYPE_CHECKING:
    pass

PARTS = ("", ".conv.0", ".conv.2", ".conv.4")
"""Parts of a layer that have weights: a convolution itself, or the three of a block."""
FIXED = "the original code, whose activation is relu"
SCALE = Scale(1.0, 0.0, "a tiny autoencoder's latents are already those that a denoiser sees")
_CLAMP = {"encoder": 0, "decoder": 1}
ORIGINAL = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64,) * 4,
    "decoder_block_out_channels": (64,) * 4,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_magnitude": 3,
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
"""The one network that the original code can load; only latent_channels vary."""


def is_original(shapes: Shapes) -> bool:
    """Whether these are the layers of both halves, under the original's numbers."""
    return "encoder.0.weight" in shapes and "decoder.1.weight" in shapes


def is_diffusers(shapes: Shapes) -> bool:
    """Whether these are the layers of both halves, under diffusers' names."""
    return "encoder.layers.0.weight" in shapes and "decoder.layers.0.weight" in shapes


def has_norms(shapes: Shapes) -> bool:
    """Whether blocks have TAEF2's branch with a group norm."""
    return any(".pool." in key for key in shapes)


def infer_tiny(shapes: Shapes, infix: str = "") -> dict:
    """Channels, widths and blocks of a tiny autoencoder.

    Args:
        infix: "layers." in diffusers' layout.

    Raises:
        ConversionError: if the halves do not agree on latents or on the number of levels.
    """
    encoder, decoder = (_levels(shapes, f"{side}.{infix}") for side in ("encoder", "decoder"))
    if encoder["out"] != decoder["in"]:
        raise ConversionError(
            f"the encoder gives {encoder['out']} latent channels and the decoder takes {decoder['in']}; they are not of "
            "one model."
        )
    if len(encoder["widths"]) != len(decoder["widths"]):
        raise ConversionError(
            f"the encoder has {len(encoder['widths'])} levels and the decoder {len(decoder['widths'])}; they are not of "
            "one model."
        )
    return {
        "in_channels": encoder["in"],
        "out_channels": decoder["out"],
        "latent_channels": encoder["out"],
        "encoder_block_out_channels": tuple(encoder["widths"]),
        "decoder_block_out_channels": tuple(decoder["widths"]),
        "num_encoder_blocks": tuple(encoder["blocks"]),
        "num_decoder_blocks": tuple(decoder["blocks"]),
    }


def _levels(shapes: Shapes, prefix: str) -> dict:
    """Channels in and out of a half, and each level's width and number of blocks."""
    inner = {key.removeprefix(prefix) for key in shapes if key.startswith(prefix)}
    indices = sorted({int(key.partition(".")[0]) for key in inner})
    first = shapes[f"{prefix}{indices[0]}.weight"]
    widths, blocks = [first[0]], [0]
    for index in indices[1:-1]:
        if f"{index}.conv.0.weight" in inner:
            blocks[-1] += 1
        elif f"{index}.weight" in inner and f"{index}.bias" not in inner:
            widths.append(shapes[f"{prefix}{index}.weight"][0])
            blocks.append(0)
        else:
            raise ConversionError(
                f"{prefix}{index} is neither a block nor a convolution between two levels, which has no bias."
            )
    out = shapes[f"{prefix}{indices[-1]}.weight"][0]
    return {"in": first[1], "out": out, "widths": widths, "blocks": blocks}


def infer(shapes: Shapes, infix: str = "") -> dict:
    """`infer_tiny` for AutoencoderTiny, each half of which has one width.

    Raises:
        ConversionError: as `infer_tiny`, and for a half of several widths.
    """
    config = infer_tiny(shapes, infix)
    for side in ("encoder", "decoder"):
        widths = config[f"{side}_block_out_channels"]
        if len(set(widths)) > 1:
            raise ConversionError(
                f"its {side}'s levels are {', '.join(map(str, widths))} wide; AutoencoderTiny's all have one width."
            )
    return config


def layer_table(parts: tuple[str, ...]) -> Callable[[Mapping], list[Rename]]:
    """The table of the original's layers, whose weights are in `parts`."""

    def table(config: Mapping) -> list[Rename]:
        return [
            Rename(f"{side}.{index + _CLAMP[side]}{part}", f"{side}.layers.{index}{part}")
            for side, index in _layers(config)
            for part in parts
        ]

    return table


def _layers(config: Mapping) -> list[tuple[str, int]]:
    """Every layer of both halves as diffusers counts them, those without weights too."""
    encoder, decoder = config["num_encoder_blocks"], config["num_decoder_blocks"]
    counts = {"encoder": len(encoder) + sum(encoder) + 1, "decoder": 2 * len(decoder) + sum(decoder) + 1}
    return [(side, index) for side, count in counts.items() for index in range(count)]


FORMAT = Format(
    names=("taesd",),
    title="TAESD",
    class_name="AutoencoderTiny",
    anchor="encoder.0.weight",
    fixed=FIXED,
    recognizes=lambda shapes: is_original(shapes) and not has_norms(shapes),
    infer=infer,
    table=layer_table(PARTS),
    refuses=lambda component: refuse_others(component.config, ORIGINAL),
    scale=SCALE,
    halves=True,
)
DIFFUSERS = own_layout(
    "AutoencoderTiny",
    "encoder.layers.0.weight",
    not_shown="act_fn and the scale of its latents",
    recognizes=lambda shapes: is_diffusers(shapes) and not has_norms(shapes),
    infer=lambda shapes: infer(shapes, "layers."),
    own_keys=r"(encoder|decoder)\.layers\.\d+\.",
    scale=SCALE,
)
