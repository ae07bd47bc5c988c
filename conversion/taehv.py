"""TAEHV (madebyollin/taehv): tiny autoencoders of video latents, one file with the layers of both halves numbered through.

encoder: 0 conv, 1 ReLU, [pool over time, stride-2 conv, blocks] ..., conv; decoder: 0 clamp, 1 conv, 2 ReLU, [blocks,
upsampling, growth in time, conv] ..., ReLU, conv. AutoencoderTinyVideo has the same names. The file shows everything
but whose latents they are: taew2_1, taehv (HunyuanVideo) and taecvx (CogVideoX) are of one shape.
"""

import math

from latent_codec.conversion.diffusers_files import own_names
from latent_codec.conversion.renaming import ConversionError, Format, Scale, Shapes, count_keys, refuse_others

_ANCHOR = "encoder.2.conv.weight"
"""The first pool over time, which TAESD has not: its blocks have `conv.0.weight`."""
_UNSETTLED = 32
_ORIGINAL = {"latent_magnitude": 3}


def infer(shapes: Shapes) -> dict:
    """The config of an AutoencoderTinyVideo.

    Raises:
        ConversionError: for layers in another order, and for 32 latent channels, whose activation is not settled.
    """
    index, widths, strides, blocks = 2, [shapes["encoder.0.weight"][0]], [], []
    while pool := shapes.get(f"encoder.{index}.conv.weight"):
        strides.append(pool[1] // pool[0])
        widths.append(shapes[f"encoder.{index + 1}.weight"][0])
        blocks.append(count_keys(shapes, "encoder.*.conv.0.weight", index + 2))
        index += 2 + blocks[-1]
    latent_channels = shapes[f"encoder.{index}.weight"][0]

    index, decoder_widths, decoder_strides = 3, [shapes["decoder.1.weight"][0]], []
    while number := count_keys(shapes, "decoder.*.conv.0.weight", index):
        blocks.append(number)
        index += number
        growth = shapes[f"decoder.{index + 1}.conv.weight"]  # after the upsampling, which has no weights
        decoder_strides.append(growth[0] // growth[1])
        decoder_widths.append(shapes[f"decoder.{index + 2}.weight"][0])
        index += 3
    outputs = shapes[f"decoder.{index + 1}.weight"][0]
    if len(set(blocks)) != 1:
        raise ConversionError(f"its levels have {blocks} blocks; expected as many in each")
    if latent_channels == _UNSETTLED:
        raise ConversionError(
            f"it has {_UNSETTLED} latent channels (taehv1_5): its own repository has relu in every layer and ComfyUI leaky "
            "relu, so nothing says which one its weights are for"
        )
    patch_size = math.isqrt(outputs // 3)
    return {
        "in_channels": shapes["encoder.0.weight"][1] // patch_size**2,
        "out_channels": outputs // patch_size**2,
        "latent_channels": latent_channels,
        "patch_size": patch_size,
        "encoder_block_out_channels": tuple(widths),
        "decoder_block_out_channels": tuple(decoder_widths),
        "num_blocks": blocks[0],
        "encoder_time_strides": tuple(strides),
        "decoder_time_strides": tuple(decoder_strides),
    }


FORMAT = Format(
    names=("taehv", "diffusers"),
    title="tiny video autoencoder (TAEHV)",
    class_name="AutoencoderTinyVideo",
    anchor=_ANCHOR,
    defaults=lambda inferred: _ORIGINAL,
    fixed="the original code, whose activation is relu",
    recognizes=lambda shapes: _ANCHOR in shapes and "decoder.1.weight" in shapes,
    infer=infer,
    table=lambda config: own_names("AutoencoderTinyVideo", config),
    own_keys=r"(encoder|decoder)\.\d+\.",
    refuses=lambda component: refuse_others(component.config, _ORIGINAL),
    scale=Scale(
        1.0,
        0.0,
        "a tiny autoencoder's latents are already those that a denoiser sees; the file's name says whose",
    ),
)
