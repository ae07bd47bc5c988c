"""The VQGANs of taming-transformers and the VQ autoencoders of latent-diffusion, which name everything alike.

The Gumbel variant chooses a codeword by a linear layer, `quantize.proj`, and keeps its codebook as `quantize.embed`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from latent_codec.conversion.encoder_decoder import (
    ANCHOR,
    FIXED,
    LDM,
    NORM_GROUPS,
    infer_levels,
    ldm_table,
    refuse_for_ldm,
)
from latent_codec.conversion.ldm_kl import EMA, LOSS
from latent_codec.conversion.renaming import ConversionError, Format, LeftOut, Rename, Scale, Shapes

if TYPE_CHECKING:
    from torch import nn

AVERAGES = LeftOut(
    r"quantize\.embedding\.(cluster_size|embed_avg)$",
    "quantize.embedding.*, what the codebook's moving averages count",
)


def recognizes(shapes: Shapes) -> bool:
    codebooks = ("quantize.embedding.weight", "quantize.embed.weight")
    return ANCHOR in shapes and any(key in shapes for key in codebooks)


def infer(shapes: Shapes) -> dict:
    codebook = infer_codebook(shapes, "quantize.embed.weight")
    return infer_levels(shapes, LDM) | codebook | {"norm_num_groups": NORM_GROUPS}


def infer_codebook(shapes: Shapes, linear_codebook: str) -> dict:
    """Latent channels, codebook and assignment of a VQ autoencoder.

    Raises:
        ConversionError: for shapes of encoder, codebook and decoder that do not follow from one another.
    """
    linear = "quantize.proj.weight" in shapes
    codebook = shapes[linear_codebook if linear else "quantize.embedding.weight"]
    z_channels = shapes["encoder.conv_out.weight"][0]
    for key in ("quant_conv.weight", "post_quant_conv.weight"):
        if key not in shapes:
            raise ConversionError(f"{key} is missing; is the file whole?")
    chain = (
        shapes["quant_conv.weight"][:2],
        shapes["post_quant_conv.weight"][:2],
        shapes["decoder.conv_in.weight"][1],
    )
    if chain != ((codebook[1], z_channels), (z_channels, codebook[1]), z_channels):
        raise ConversionError(
            f"the encoder gives {z_channels} channels, the codewords have {codebook[1]}, and quant_conv, post_quant_conv and "
            f"the decoder's conv_in are {tuple(chain[0])}, {tuple(chain[1])} and {chain[2]}; they do not follow."
        )
    return {
        "latent_channels": z_channels,
        "num_vq_embeddings": codebook[0],
        "vq_embed_dim": codebook[1],
        "assignment": "linear" if linear else "nearest",
    }


def table(config: Mapping) -> list[Rename]:
    is_linear = config.get("assignment") == "linear"
    rows = [Rename("quantize.embed" if is_linear else "quantize.embedding", "quantize.embedding")]
    names = ("quant_conv", "post_quant_conv", *(["quantize.proj"] if is_linear else []))
    return [*ldm_table(config), *rows, *(Rename(name, name) for name in names)]


def refuses(component: "nn.Module") -> str | None:
    if component.config.get("l2_normalized"):
        return "its codewords are l2-normalized; the original compares them as they are"
    return refuse_for_ldm(component)


FORMAT = Format(
    names=("taming", "ldm"),
    title="taming-transformers VQGAN or latent-diffusion VQ autoencoder",
    class_name="AutoencoderVQ",
    anchor=ANCHOR,
    fixed=FIXED,
    recognizes=recognizes,
    infer=infer,
    table=table,
    left_out=(LOSS, EMA, AVERAGES),
    refuses=refuses,
    scale=Scale(1.0, None, "codewords are used as they are"),
)
