"""AutoencoderTinyVideo: TAEHV (madebyollin/taehv), a tiny autoencoder of video latents, for stills."""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks for it in a component's module
from torch import Tensor, nn

from latent_codec.models.tiny_autoencoder import Clamp, TinyAutoencoder


class AutoencoderTinyVideo(TinyAutoencoder):
    """A tiny autoencoder that imitates a video autoencoder's latents: TAEHV of Wan 2.1, Wan 2.2 and others, at one frame.

        image --repeat--> t frames --pool time, stride 2, blocks--> ... --conv--> latents of one frame
        image <--the last of t frames-- conv <--upsample, grow time, blocks-- ... <-- m tanh(z / m)

    A block sees its frame and the one before it, zeros before the first. One frame is therefore encoded as t equal
    ones and decoded to t of which the last is kept, t being the downsampling factor in time, as the original code has
    it; only layers without memory of frames work on one.

    It is called as diffusers' AutoencoderTiny is, with images of four dimensions, and has the original's keys:
    `encoder.N`, `decoder.N`, layers numbered through.

    Args:
        in_channels, out_channels: of the image and its reconstruction.
        latent_channels: of the latents.
        patch_size: pixels per side that pixel_unshuffle packs into channels before the encoder.
        encoder_block_out_channels: widths of the first layer and of each level, in the order of the layers.
        decoder_block_out_channels: widths of each level and of the last layer, in the order of the layers.
        num_blocks: of each level.
        encoder_time_strides, decoder_time_strides: factors in time of each level, in the order of the layers.
        latent_magnitude: the clamp's limit m.
        scaling_factor, shift_factor: what pipelines do to the latents; 1 and 0, as this is trained on latents that a
            denoiser sees (of Wan: less latents_mean, over latents_std).

    Raises:
        ValueError: for widths and strides of different numbers of levels.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (256, 128, 64, 64),
        num_blocks: int = 3,
        encoder_time_strides: tuple[int, ...] = (2, 2, 1),
        decoder_time_strides: tuple[int, ...] = (1, 2, 2),
        latent_magnitude: float = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        levels = {len(encoder_time_strides) + 1, len(decoder_time_strides) + 1}
        if levels != {len(encoder_block_out_channels)} or levels != {len(decoder_block_out_channels)}:
            raise ValueError(
                "expected one width more than strides in time in each half, as many in both, got "
                f"{encoder_block_out_channels}, {encoder_time_strides} and {decoder_block_out_channels}, "
                f"{decoder_time_strides}"
            )
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder(F.pixel_unshuffle(images, self.config.patch_size))

    def _decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.decoder(latents), self.config.patch_size)


class Encoder(nn.Sequential):
    """(B, in_channels, H, W) -> (B, out_channels, H / 2^levels, W / 2^levels), by way of equal frames."""

    def __init__(self, config: FrozenDict):
        widths, strides = config.encoder_block_out_channels, config.encoder_time_strides
        layers: list[nn.Module] = [conv(config.in_channels * config.patch_size**2, widths[0]), nn.ReLU()]
        for before, width, stride in zip(widths, widths[1:], strides):
            layers += [TimePool(before, stride), conv(before, width, stride=2, bias=False)]
            layers += [MemoryBlock(width) for _ in range(config.num_blocks)]
        super().__init__(*layers, conv(widths[-1], config.latent_channels))
        self.num_frames = math.prod(strides)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        for index, layer in enumerate(self):
            if index == 2:  # before it, each frame is on its own, and all are equal
                x = x.repeat_interleave(self.num_frames, 0)
            x = layer(x, batch) if isinstance(layer, MemoryBlock) else layer(x)
        return x


class Decoder(nn.Sequential):
    """(B, in_channels, h, w) -> (B, out_channels, h 2^levels, w 2^levels), the last of the frames that it makes."""

    def __init__(self, config: FrozenDict):
        widths, strides = config.decoder_block_out_channels, config.decoder_time_strides
        layers: list[nn.Module] = [
            Clamp(config.latent_magnitude),
            conv(config.latent_channels, widths[0]),
            nn.ReLU(),
        ]
        for width, after, stride in zip(widths, widths[1:], strides):
            layers += [MemoryBlock(width) for _ in range(config.num_blocks)]
            layers += [nn.Upsample(scale_factor=2), TimeGrowth(width, stride), conv(width, after, bias=False)]
        super().__init__(*layers, nn.ReLU(), conv(widths[-1], config.out_channels * config.patch_size**2))
        self.last_memory = max(index for index, layer in enumerate(self) if isinstance(layer, MemoryBlock))

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        for index, layer in enumerate(self):
            x = layer(x, batch) if isinstance(layer, MemoryBlock) else layer(x)
            if index >= self.last_memory:  # from here on, each frame is on its own
                x = x.unflatten(0, (batch, -1))[:, -1]
        return x


class MemoryBlock(nn.Module):
    """relu(x + conv([x, the frame before x])), frames (B T, C, h, w), the first of each video after zeros."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)
        )

    def forward(self, x: Tensor, batch: int) -> Tensor:
        frames = x.unflatten(0, (batch, -1))
        past = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1).flatten(0, 1)
        return F.relu(x + self.conv(torch.cat([x, past], 1)))


class TimePool(nn.Module):
    """`stride` frames -> one, by a 1x1 convolution of their channels."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class TimeGrowth(nn.Module):
    """One frame -> `stride` frames, by a 1x1 convolution."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


def conv(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
