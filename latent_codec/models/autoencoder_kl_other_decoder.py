"""AutoencoderKLOtherDecoder: an AutoencoderKL whose decoder has widths of its own, or decodes to larger images."""

from collections.abc import Sequence
from inspect import signature

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn import functional as F

from latent_codec.errors import SettingError
from latent_codec.models.own_weights import OwnWeights


class AutoencoderKLOtherDecoder(OwnWeights, AutoencoderKL):
    """An AutoencoderKL's encoder and latents, with another decoder: a smaller one, or one that enlarges.

        image --encoder--> --quant_conv--> posterior over latents
        image, `upscale` times as large <--subpixels to pixels-- decoder <--post_quant_conv-- latents

    Pipelines take it for an AutoencoderKL, which it is. It is a class of its own because AutoencoderKL has one
    `block_out_channels` for encoder and decoder.

    Args:
        in_channels, out_channels, down_block_types, up_block_types, block_out_channels: as in AutoencoderKL.
        layers_per_block, act_fn, latent_channels, norm_num_groups, sample_size: as in AutoencoderKL.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: as in AutoencoderKL.
        use_quant_conv, use_post_quant_conv, mid_block_add_attention: as in AutoencoderKL.
        decoder_block_out_channels: widths of the decoder, finest resolution first; None: `block_out_channels`.
        decoder_layers_per_block: of the decoder, which has one residual block more than these; None: `layers_per_block`.
        upscale: how many times as large as the encoded image the decoded one is, per side (sub-pixel convolution,
            arXiv:1609.05158).

    Raises:
        ValueError: for widths or an enlargement that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_block: int | None = None,
        upscale: int = 1,
    ):
        widths = block_out_channels if decoder_block_out_channels is None else decoder_block_out_channels
        if len(widths) != len(block_out_channels):
            raise ValueError(
                f"decoder_block_out_channels has {len(widths)} entries; expected {len(block_out_channels)}, one per resolution"
            )
        if upscale < 1:
            raise ValueError(f"upscale is {upscale}; expected an integer of 1 or more")
        inherited = signature(AutoencoderKL.__init__).parameters
        super().__init__(**{name: self.config[name] for name in inherited if name in self.config})
        layers = layers_per_block if decoder_layers_per_block is None else decoder_layers_per_block
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels * upscale**2,
            up_block_types=up_block_types,
            block_out_channels=widths,
            layers_per_block=layers,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """As AutoencoderKL has it, tiles included, which are blended before their subpixels become pixels."""
        subpixels = super()._decode(z).sample
        images = F.pixel_shuffle(subpixels, self.config.upscale)
        return DecoderOutput(sample=images) if return_dict else (images,)


def with_other_decoder(
    autoencoder: ModelMixin,
    *,
    width: float = 1.0,
    widths: Sequence[int] | None = None,
    layers_per_block: int | None = None,
    upscale: int = 1,
) -> "AutoencoderKLOtherDecoder":
    """A copy of an AutoencoderKL with another decoder, whose weights are new.

    Args:
        width: of the decoder's channels, as a share of what they are, in steps of the group norms' number of groups.
        widths: of the decoder, finest resolution first; None: by `width`.
        layers_per_block: of the decoder; None: as it is.
        upscale: how many times as large the decoded image gets; 1: as it is.

    Raises:
        SettingError: for another class than AutoencoderKL and this one, or a larger decoder than there is.
    """
    kind, config = type(autoencoder), autoencoder.config
    if kind not in (AutoencoderKL, AutoencoderKLOtherDecoder):
        expected = "an AutoencoderKL, where another decoder is asked for"
        raise SettingError("model.pretrained", expected, kind.__name__)
    blocks, groups = autoencoder.decoder.up_blocks, config.norm_num_groups
    most = [block.resnets[0].out_channels for block in reversed(blocks)]
    if widths is None:
        widths = [groups * max(round(width * each / groups), 1) for each in most]
    elif len(widths) != len(most) or any(not 0 < mine <= each for mine, each in zip(widths, most)):
        raise SettingError("model.widths", f"at most those that it has, {most}", list(widths))
    num_layers = len(blocks[0].resnets) - 1
    if layers_per_block is None:
        layers_per_block = num_layers
    elif layers_per_block > num_layers:
        expected = f"at most as many as it has, {num_layers}"
        raise SettingError("model.layers_per_block", expected, layers_per_block)
    arguments = signature(AutoencoderKLOtherDecoder.__init__).parameters
    decoder = {
        "decoder_block_out_channels": list(widths),
        "decoder_layers_per_block": layers_per_block,
        "upscale": upscale if upscale > 1 else config.get("upscale", 1),
    }
    known = {name: config[name] for name in arguments if name in config}
    other = AutoencoderKLOtherDecoder(**known | decoder)
    for name, part in autoencoder.named_children():
        if name != "decoder":
            getattr(other, name).load_state_dict(part.state_dict())
    return other
