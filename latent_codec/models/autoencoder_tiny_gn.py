"""AutoencoderTinyGN: TAESD's network with the group norms of TAEF2, which diffusers' AutoencoderTiny lacks."""

from collections import OrderedDict
from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for it in a component's module
from torch import Tensor, nn

from latent_codec.models.hierarchical_vq import CheckpointedSequential
from latent_codec.models.tiny_autoencoder import Clamp, TinyAutoencoder


class AutoencoderTinyGN(TinyAutoencoder):
    """A tiny autoencoder that imitates a large one's latents: TAESD, or TAEF2 for FLUX.2 (madebyollin/taesd).

        image --to [0, 1]--> conv --> [blocks --stride 2--> ... ] blocks + norms --> conv --> latents
        image <--to [-1, 1]-- conv <-- [blocks <--nearest x2, conv-- ... ] blocks + norms <-- conv <-- m tanh(z / m)

    It is called as diffusers' AutoencoderTiny is, whose keys it has too (`encoder.layers.N`, `decoder.layers.N`), with
    a `pool` next to the `conv` of blocks with norms. Four things differ. Levels may differ in width. The clamp's m is
    `latent_magnitude`. `forward` does not round latents to bytes, and checkpointing keeps the image's range, so that
    gradients are right. There is no tiling: a group norm's statistics are those of the whole image.

    Args:
        in_channels, out_channels: of the image and its reconstruction.
        encoder_block_out_channels, decoder_block_out_channels: widths in the order of the layers, one per level.
        latent_channels: of the latents.
        num_encoder_blocks, num_decoder_blocks: residual blocks of each level, in the same order.
        use_midblock_gn: norms in the blocks of the coarsest level, the encoder's last and the decoder's first.
        latent_magnitude, latent_shift: of `scale_latents`, and the clamp's limit.
        scaling_factor, shift_factor: what pipelines do to the latents; 1 and 0, as this is trained on latents that a
            denoiser sees (of FLUX.2: normalized, and not packed).
        force_upcast: SDXL's pipelines then decode in float32.

    Raises:
        ValueError: for widths, blocks or levels that do not fit together.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        latent_channels: int = 32,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        use_midblock_gn: bool = True,
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        shapes = (
            encoder_block_out_channels,
            num_encoder_blocks,
            decoder_block_out_channels,
            num_decoder_blocks,
        )
        lengths = [len(each) for each in shapes]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                "encoder_block_out_channels, num_encoder_blocks, decoder_block_out_channels and num_decoder_blocks have "
                f"{', '.join(map(str, lengths))} entries; expected one per level in each"
            )
        if latent_magnitude <= 0:
            raise ValueError(f"latent_magnitude is {latent_magnitude}; expected a number above 0")
        self.encoder = encoder(
            in_channels, encoder_block_out_channels, num_encoder_blocks, latent_channels, use_midblock_gn
        )
        self.decoder = decoder(
            latent_channels, decoder_block_out_channels, num_decoder_blocks, out_channels, use_midblock_gn
        )
        # Pipelines take the downsampling factor from its length.
        self.register_to_config(block_out_channels=tuple(decoder_block_out_channels))

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        """As diffusers has it, without its warning of `block_out_channels`, which is no argument."""
        config_dict = {key: value for key, value in config_dict.items() if key != "block_out_channels"}
        return super().extract_init_dict(config_dict, **kwargs)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents -> [0, 1], clamped, for storing them as an image."""
        return (x / (2 * self.config.latent_magnitude) + self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """[0, 1] -> latents."""
        return (x - self.config.latent_shift) * (2 * self.config.latent_magnitude)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(Clamp(self.config.latent_magnitude)(latents))


def encoder(
    in_channels: int,
    widths: Sequence[int],
    num_blocks: Sequence[int],
    out_channels: int,
    use_midblock_gn: bool,
) -> nn.Sequential:
    """(B, in_channels, H, W) in [0, 1] -> (B, out_channels, ceil(H / f), ceil(W / f))."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
    for level, (width, count) in enumerate(zip(widths, num_blocks)):
        if level:
            layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1, bias=False))
        layers += blocks(width, count, use_midblock_gn and level == len(widths) - 1)
    layers.append(nn.Conv2d(widths[-1], out_channels, 3, padding=1))
    return nn.Sequential(OrderedDict(layers=CheckpointedSequential(*layers)))


def decoder(
    in_channels: int,
    widths: Sequence[int],
    num_blocks: Sequence[int],
    out_channels: int,
    use_midblock_gn: bool,
) -> nn.Sequential:
    """(B, in_channels, h, w) -> (B, out_channels, h f, w f) in [0, 1]."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1), nn.ReLU()]
    for level, (width, count) in enumerate(zip(widths, num_blocks)):
        if level:
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(widths[level - 1], width, 3, padding=1, bias=False))
        layers += blocks(width, count, use_midblock_gn and level == 0)
    layers.append(nn.Conv2d(widths[-1], out_channels, 3, padding=1))
    return nn.Sequential(OrderedDict(layers=CheckpointedSequential(*layers)))


def blocks(width: int, count: int, with_norm: bool) -> list[nn.Module]:
    """`count` residual blocks of one width."""
    if with_norm:
        return [NormedBlock(width) for _ in range(count)]
    return [AutoencoderTinyBlock(width, width, "relu") for _ in range(count)]


class NormedBlock(AutoencoderTinyBlock):
    """relu(y + conv(y)), y = x + pool(x): each channel sees the whole image's statistics through a group norm."""

    def __init__(self, width: int):
        super().__init__(width, width, "relu")
        # `pool` is its name in TAEF2's files, although nothing is pooled; 4 groups are TAEF2's too.
        self.pool = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.GroupNorm(4, 4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))
