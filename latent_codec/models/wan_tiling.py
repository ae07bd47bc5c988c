"""One frame through the networks of Wan and Qwen-Image a tile at a time, as models/tiling.py does it for AutoencoderKL.

A convolution that is causal in time sees zeros before the first frame, so that of its kernel the last step of time alone
counts; the convolutions over time of resampling layers leave the first frame as it is. Norms are of one position
each, and need no statistics.
"""

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.models.feature_maps import FeatureMap
from latent_codec.models.tiling import QUERY_SIDE, Tiles
from latent_codec.torch_settings import uncompiled


@torch.no_grad()
def encode_frame_tiled(autoencoder: nn.Module, images: Tensor, tile: int) -> Tensor:
    """The moments that `autoencoder.encode` gives of one frame, computed tile by tile.

    Args:
        autoencoder: AutoencoderKLWan, AutoencoderKLQwenImage or AutoencoderKLQwenImage21.
        images: (B, C, H, W), whose sides are multiples of the downsampling factor.
        tile: as for `tiling.encode_tiled`, whose errors these are, too.

    Returns:
        (B, 2 z_dim, h, w).
    """
    patch = autoencoder.config.get("patch_size") or 1
    encoder = autoencoder.encoder
    tiles = FrameTiles((int(tile) // patch) ** 2 * encoder.conv_in.out_channels or 1)
    images = patchify(images.to(encoder.conv_in.weight.dtype).unsqueeze(2), patch)[:, :, 0]
    return torch.cat([tiles.encode(encoder, autoencoder.quant_conv, each) for each in images.split(1)])


@torch.no_grad()
def decode_frame_tiled(autoencoder: nn.Module, raw_latents: Tensor, tile: int) -> Tensor:
    """Raw latents (B, z_dim, h, w) -> images (B, C, H, W), as `autoencoder.decode` gives one frame, but not clamped."""
    patch = autoencoder.config.get("patch_size") or 1
    decoder = autoencoder.decoder
    tiles = FrameTiles((int(tile) // patch) ** 2 * decoder.conv_out.in_channels or 1)
    raw_latents = raw_latents.to(decoder.conv_in.weight.dtype)
    frames = [tiles.decode(decoder, autoencoder.post_quant_conv, each) for each in raw_latents.split(1)]
    return unpatchify(torch.cat(frames).unsqueeze(2), patch)[:, :, 0]


class FrameTiles(Tiles):
    """Runs one frame through a network, each layer over all tiles before the next begins."""

    def encode(self, encoder: nn.Module, quant_conv: nn.Module, image: Tensor) -> Tensor:
        x = self.convolution(encoder.conv_in, FeatureMap.of(image))
        for block in encoder.down_blocks:
            x = self.block(uncompiled(block), x)
        return self.end(encoder, quant_conv, self.block(encoder.mid_block, x))

    def decode(self, decoder: nn.Module, post_quant_conv: nn.Module, raw_latents: Tensor) -> Tensor:
        x = self.convolution(post_quant_conv, FeatureMap.of(raw_latents))
        x = self.block(decoder.mid_block, self.convolution(decoder.conv_in, x))
        for block in decoder.up_blocks:
            x = self.block(uncompiled(block), x)
        return self.end(decoder, None, x)

    def block(self, block: nn.Module, x: FeatureMap) -> FeatureMap:
        match _kind(block):
            case "MidBlock":
                x = self.block(block.resnets[0], x)
                for attention, resnet in zip(block.attentions, block.resnets[1:]):
                    x = self.block(resnet, self.block(attention, x))
                return x
            case "ResidualBlock":
                return self.residual_block(block, x)
            case "AttentionBlock":
                return self.attention_block(block, x)
            case "Resample":
                return self.resample(block, x)
            case "UpBlock" | "ResidualDownBlock" | "ResidualUpBlock":
                return self.level(block, x)
        raise ValueError(f"a {type(block).__name__} has no tiled form; leave tile=None")

    def level(self, block: nn.Module, x: FeatureMap) -> FeatureMap:
        """resample(resnets(x)), and the average or the copies of x that a residual block adds."""
        before = x
        for resnet in block.resnets:
            x = self.block(resnet, x)
        for name in ("downsampler", "upsampler", "upsamplers"):
            last = getattr(block, name, None)
            for each in last if isinstance(last, nn.ModuleList) else filter(None, [last]):
                x = self.block(each, x)
        shortcut = getattr(block, "avg_shortcut", None)
        if shortcut is None:
            return x
        is_up = hasattr(shortcut, "repeats")

        def added(tile: Tensor) -> Tensor:
            frame = tile.unsqueeze(2)
            return (shortcut(frame, first_chunk=True) if is_up else shortcut(frame))[:, :, 0]

        scale = {"output_scale" if is_up else "input_scale": shortcut.factor_s}
        short = self.layer(added, before, channels=x.shape[0], halo=0, **scale)
        return self.layer(torch.add, x, short, channels=x.shape[0], halo=0)

    def residual_block(self, block: nn.Module, x: FeatureMap) -> FeatureMap:
        """shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))))))."""
        shortcut = block.conv_shortcut
        hidden = self.convolution(block.conv1, x, _normalization(block.norm1, block.nonlinearity))

        def second(normalized: Tensor, x: Tensor) -> Tensor:
            skipped = x if isinstance(shortcut, nn.Identity) else _on_one_frame(shortcut, x)
            return _on_one_frame(block.conv2, normalized) + skipped

        before = _normalization(block.norm2, block.nonlinearity)
        return self.layer(second, hidden, x, before=before, channels=block.conv2.out_channels)

    def attention_block(self, block: nn.Module, x: FeatureMap) -> FeatureMap:
        """x + proj(attention(norm(x))), of one head, over all positions."""
        before = _normalization(block.norm)
        weights, biases = block.to_qkv.weight.flatten(1).chunk(3), block.to_qkv.bias.chunk(3)
        tokens = x.read(*x.everywhere, before).flatten(2).mT
        keys, values = (F.linear(tokens, weights[part], biases[part]) for part in (1, 2))
        del tokens

        def attend(normalized: Tensor, x: Tensor) -> Tensor:
            queries = F.linear(normalized.flatten(2).mT, weights[0], biases[0])
            attended = F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])
            return x + block.proj(attended[:, 0].mT.unflatten(2, x.shape[2:]))

        return self.layer(attend, x, x, before=before, channels=x.shape[0], halo=0, side=QUERY_SIDE)

    def resample(self, block: nn.Module, x: FeatureMap) -> FeatureMap:
        if isinstance(block.resample, nn.Identity):
            return x
        scale = {"output_scale" if block.mode.startswith("up") else "input_scale": 2}
        return self.layer(block.resample, x, channels=block.resample[1].out_channels, **scale)

    def convolution(
        self, conv: nn.Conv3d, x: FeatureMap, before: Callable[[Tensor], Tensor] | None = None
    ) -> FeatureMap:
        return self.layer(
            lambda tile: _on_one_frame(conv, tile), x, before=before, channels=conv.out_channels
        )

    def end(self, network: nn.Module, last: nn.Module | None, x: FeatureMap) -> Tensor:
        x = self.convolution(network.conv_out, x, _normalization(network.norm_out, network.nonlinearity))
        if last is not None:
            x = self.convolution(last, x)
        return x.read(*x.everywhere).contiguous()


def _kind(module: nn.Module) -> str:
    """The layer's name without the family's."""
    name = type(uncompiled(module)).__name__
    for family in ("Wan", "QwenImage21", "QwenImage"):
        name = name.removeprefix(family)
    return name


def _on_one_frame(conv: nn.Conv3d | nn.Conv2d, tile: Tensor) -> Tensor:
    """A convolution that is causal in time, of a first frame (B, C, h, w); Qwen-Image 2.1's has no time."""
    weight = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight
    return F.conv2d(tile, weight, conv.bias, padding=conv.kernel_size[-1] // 2)


def _normalization(norm: nn.Module, activation: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    """RMS norm over the channels of each position and the activation behind it, as a function of lines (n, w, C)."""

    def normalize(lines: Tensor) -> Tensor:
        bias = norm.bias.flatten() if isinstance(norm.bias, Tensor) else norm.bias
        values = lines if lines.dtype == torch.float64 else lines.float()
        values = F.normalize(values, dim=-1).to(lines.dtype) * norm.scale * norm.gamma.flatten() + bias
        return activation(values) if activation else values

    return normalize
