"""Mean and standard deviation of latents folded into an autoencoder's quant convs, so that its raw latents are others.

encoder -> conv_out -> quant_conv -> (raw - mean) / std           1x1 convolutions: exact but for rounding
raw std + mean -> post_quant_conv -> conv_in -> decoder
"""

from typing import TYPE_CHECKING

import torch

from latent_codec.conversion.embedding import QUANT_CONVS, as_network
from latent_codec.conversion.renaming import ConversionError, Scale
from latent_codec.families import family_of
from latent_codec.torch_settings import ignoring_caller_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import AutoencoderKL


@ignoring_caller_settings()
def normalize_latents(autoencoder: "AutoencoderKL", mean: "Sequence[float]", std: "Sequence[float]") -> None:
    """Fold (raw - mean) / std into quant_conv and its inverse into post_quant_conv.

    The moments become (mu - mean) / std and logvar - 2 log std; both convolutions are 1x1,
    so that this is exact up to rounding and the reconstruction stays the same. The latents
    change: earlier ones no longer decode.

    Args:
        autoencoder: changed in place.
        mean: of the raw latents, per channel.
        std: likewise; above 0.

    Raises:
        ValueError: if a quant convolution is missing.
    """
    if not family_of(autoencoder).folds_statistics:
        raise ValueError(f"this {type(autoencoder).__name__} has no quant convolutions")
    channels = len(mean)
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    # In float64 and on the CPU, because some devices have no float64.
    shift, scale = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    weight, bias = (parameter.detach().cpu().double() for parameter in (encode.weight, encode.bias))
    weight[:channels] /= scale.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - shift) / scale
    bias[channels:] -= 2 * scale.log()
    encode.weight.copy_(weight)
    encode.bias.copy_(bias)
    weight, bias = (parameter.detach().cpu().double() for parameter in (decode.weight, decode.bias))
    decode.bias.copy_(bias + weight[:, :, 0, 0] @ shift)
    decode.weight.copy_(weight * scale.view(1, -1, 1, 1))


def fold_scale(autoencoder: "AutoencoderKL", scale: Scale) -> "AutoencoderKL":
    """The AutoencoderKL whose raw latents, scaled and shifted by `scale`, are this one's latents.

        (raw' - shift_factor') scaling_factor' = latents = (raw - mean) / std

    So a host that scales by its denoiser's own figures hands a denoiser trained on this codec what it was trained on.
    Quant convs are added where there are none and latents have to be shifted, for the decoder pads raw latents with zeros.

    Args:
        autoencoder: is not changed.
        scale: of the host.
    """
    mean, std = family_of(autoencoder).latent_space().statistics()
    factor, shift = scale.scaling_factor, scale.shift_factor or 0.0
    std = [each * factor for each in std]
    mean = [each - shift * spread for each, spread in zip(mean, std)]
    has = {name: autoencoder.config[name] for name in QUANT_CONVS}
    folded = as_network(autoencoder, dict.fromkeys(QUANT_CONVS, True))
    normalize_latents(folded, mean, std)
    if not all(has.values()) and not any(mean):
        folded = as_network(folded, has)
    folded.register_to_config(scaling_factor=factor, shift_factor=shift, latents_mean=None, latents_std=None)
    return folded


def check_foldable(class_name: str) -> None:
    """Raise ConversionError for an autoencoder that has no place to fold a scale into."""
    if class_name != "AutoencoderKL":
        raise ConversionError(
            f"a scale is folded into an AutoencoderKL's quant convs, and this is an {class_name}"
        )
