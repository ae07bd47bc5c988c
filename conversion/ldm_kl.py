"""The KL autoencoder of latent-diffusion and Stable Diffusion, with quant convs or (SD3, FLUX) without."""

from collections.abc import Mapping

from latent_codec.conversion.encoder_decoder import (
    ANCHOR,
    FIXED,
    LDM,
    NORM_GROUPS,
    infer_levels,
    ldm_table,
    refuse_for_ldm,
)
from latent_codec.conversion.renaming import ConversionError, Format, LeftOut, Rename, Shapes

LOSS = LeftOut(r"loss\.", "loss.*, the training's losses and discriminator")
EMA = LeftOut(r"model_ema\.", "model_ema.*, moving averages of the weights")


def recognizes(shapes: Shapes) -> bool:
    return ANCHOR in shapes and not any(key.startswith("quantize.") for key in shapes)


def infer(shapes: Shapes) -> dict:
    return infer_levels(shapes, LDM) | infer_latents(shapes) | {"norm_num_groups": NORM_GROUPS}


def infer_latents(shapes: Shapes) -> dict:
    """Latent channels and quant convs of a KL autoencoder.

    Raises:
        ConversionError: if moments are not twice the latents, and for an embed_dim other than z_channels.
    """
    z_channels, moments = shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_out.weight"][0]
    if moments != 2 * z_channels:
        raise ConversionError(
            f"the encoder gives {moments} channels and the decoder takes {z_channels}; a KL autoencoder gives mean and "
            "log variance, twice as many as it takes."
        )
    quant, post_quant = shapes.get("quant_conv.weight"), shapes.get("post_quant_conv.weight")
    embed_dims = {
        shape[at] // part for shape, at, part in ((quant, 0, 2), (post_quant, 1, 1)) if shape is not None
    }
    if embed_dims - {z_channels}:
        raise ConversionError(
            f"embed_dim is {max(embed_dims - {z_channels})} and z_channels {z_channels}; AutoencoderKL has one latent "
            "width, which both would have to be."
        )
    return {
        "latent_channels": z_channels,
        "use_quant_conv": quant is not None,
        "use_post_quant_conv": post_quant is not None,
    }


def table(config: Mapping) -> list[Rename]:
    return [
        *ldm_table(config),
        Rename("quant_conv", "quant_conv"),
        Rename("post_quant_conv", "post_quant_conv"),
    ]


FORMAT = Format(
    names=("ldm",),
    title="latent-diffusion KL autoencoder",
    class_name="AutoencoderKL",
    anchor=ANCHOR,
    fixed=FIXED,
    recognizes=recognizes,
    infer=infer,
    table=table,
    left_out=(LOSS, EMA),
    refuses=refuse_for_ldm,
)
