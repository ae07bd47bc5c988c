"""Encoders and decoders of AutoencoderKL and VQModel a tile at a time, layer by layer over the whole image.

    feature map --read a tile and its halo--> group norm --> activation --> convolution --write the tile--> feature map
                                                  ^                                            |
                                                  +------ statistics over all of the map <-----+

Whatever reaches across a tile's border is the untiled network's: a convolution's neighbors are read from the
map, a group norm's statistics are complete before anything is normalized, attention sees every position. So is the
result, up to the rounding of sums. Only a tile's working set is in the device's memory; maps are in scratch files
(feature_maps.py), three of a resolution at most.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product, zip_longest
from math import isqrt

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.models.feature_maps import FeatureMap
from latent_codec.torch_settings import uncompiled

QUERY_SIDE = 32
"""Of a tile of queries. Fewer at a time are slower; more may be too many where a device keeps a table of all scores."""


@torch.no_grad()
def encode_tiled(encoder: Encoder, quant_conv: nn.Module | None, images: Tensor, tile: int) -> Tensor:
    """Compute `quant_conv(encoder(images))` tile by tile.

    Args:
        encoder: diffusers' own, of AutoencoderKL or VQModel.
        images: (B, C, H, W), whose sides are multiples of the downsampling factor.
        tile: side, in pixels, of the tiles at the image's resolution, at least 1; deeper layers,
            whose positions have more channels, work on tiles of as many values.

    Returns:
        Moments of a posterior, or raw latents, (B, C, h, w).

    Raises:
        ValueError: for a network with other layers than those classes build by default or with attention.
        OSError: if the scratch files find no room.
    """
    tiles = Tiles(int(tile) ** 2 * encoder.conv_in.out_channels)
    images = images.to(encoder.conv_in.weight.dtype)
    return torch.cat([tiles.encode(encoder, quant_conv, image) for image in images.split(1)])


@torch.no_grad()
def decode_tiled(
    decoder: Decoder, post_quant_conv: nn.Module | None, raw_latents: Tensor, tile: int
) -> Tensor:
    """Raw latents or codewords, (B, C, h, w) -> images, as `decoder(post_quant_conv(...))` gives them, tile by tile.

    Nothing is quantized here, and the decoder's norms must be group norms. `tile` and errors are those of
    `encode_tiled`.
    """
    tiles = Tiles(int(tile) ** 2 * decoder.conv_out.in_channels)
    raw_latents = raw_latents.to(decoder.conv_in.weight.dtype)
    return torch.cat([tiles.decode(decoder, post_quant_conv, each) for each in raw_latents.split(1)])


@dataclass(frozen=True)
class Tiles:
    """Runs one image through a network, each layer over all tiles before the next begins."""

    values: int
    """Values of a tile, the larger of what a layer takes and what it gives."""

    def encode(self, encoder: Encoder, quant_conv: nn.Module | None, image: Tensor) -> Tensor:
        x = self.layer(encoder.conv_in, FeatureMap.of(image), channels=encoder.conv_in.out_channels)
        x = self.blocks([*encoder.down_blocks, encoder.mid_block], x)
        return self.conv_out(encoder, quant_conv, x)

    def decode(self, decoder: Decoder, post_quant_conv: nn.Module | None, raw_latents: Tensor) -> Tensor:
        conv_in = sequence(post_quant_conv, decoder.conv_in)
        x = self.layer(conv_in, FeatureMap.of(raw_latents), channels=decoder.conv_in.out_channels)
        x = self.blocks([decoder.mid_block, *decoder.up_blocks], x)
        return self.conv_out(decoder, None, x)

    def blocks(self, blocks: list[nn.Module], x: FeatureMap) -> FeatureMap:
        for block in blocks:
            for module in _layers(block):
                if type(module) is ResnetBlock2D:
                    x = self.resnet(module, x)
                elif type(module) is Attention:
                    x = self.attention(module, x)
                elif type(module) is Downsample2D:
                    x = self.layer(module, x, channels=module.out_channels, input_scale=2)
                elif type(module) is Upsample2D:
                    x = self.layer(module, x, channels=module.out_channels, output_scale=2)
                else:
                    raise ValueError(f"a {type(module).__name__} has no tiled form; leave tile=None")
        return x

    def resnet(self, block: ResnetBlock2D, x: FeatureMap) -> FeatureMap:
        """shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))))))."""
        shortcut = block.conv_shortcut or nn.Identity()

        def second(normalized: Tensor, x: Tensor) -> Tensor:
            return block.conv2(normalized).add_(shortcut(x)).div_(block.output_scale_factor)

        before = x.normalization(block.norm1, block.nonlinearity)
        hidden = self.layer(block.conv1, x, before=before, channels=block.out_channels)
        before = hidden.normalization(block.norm2, block.nonlinearity)
        return self.layer(second, hidden, x, before=before, channels=block.out_channels)

    def attention(self, attention: Attention, x: FeatureMap) -> FeatureMap:
        """x + attention(norm(x)): the keys and values of all positions are held, and queries come a tile at a time."""

        def by_head(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        def attend(normalized: Tensor, x: Tensor) -> Tensor:
            queries = by_head(attention.to_q(normalized.flatten(2).mT))
            attended = F.scaled_dot_product_attention(queries, keys, values)
            attended = attention.to_out[0](attended.transpose(1, 2).flatten(2))
            return (attended.mT.unflatten(2, x.shape[2:]) + x) / attention.rescale_output_factor

        before = x.normalization(attention.group_norm)
        tokens = x.read(*x.everywhere, before).flatten(2).mT
        keys, values = by_head(attention.to_k(tokens)), by_head(attention.to_v(tokens))
        del tokens
        return self.layer(attend, x, x, before=before, channels=x.shape[0], halo=0, side=QUERY_SIDE)

    def conv_out(self, network: Encoder | Decoder, last: nn.Module | None, x: FeatureMap) -> Tensor:
        before = x.normalization(network.conv_norm_out, network.conv_act)
        conv_out = sequence(network.conv_out, last)
        output = self.layer(conv_out, x, before=before, channels=conv_out[-1].out_channels)
        return output.read(*output.everywhere).contiguous()

    def layer(
        self,
        function: Callable[..., Tensor],
        x: FeatureMap,
        *others: FeatureMap,
        channels: int,
        before: Callable[[Tensor], Tensor] | None = None,
        input_scale: int = 1,
        output_scale: int = 1,
        halo: int = 1,
        side: int | None = None,
    ) -> FeatureMap:
        """`function` of `before(x)` and `others`, maps of one size, over all tiles.

        Tiles are laid out on the coarser of the two grids, whose positions are `input_scale` input positions or
        `output_scale` output positions wide; `function` looks at positions within `halo` of its own. At a tile's
        inner borders it pads as if the image ended there; what comes of that is cut off.

        Args:
            channels: of the output.
            side: of the tiles, in positions of the grid; None means as large as `values` allows.
        """
        height, width = (side // input_scale for side in x.shape[1:])
        output = FeatureMap((channels, height * output_scale, width * output_scale), x.dtype, x.device)
        per_position = [
            channels * output_scale**2,
            *(each.shape[0] * input_scale**2 for each in (x, *others)),
        ]
        side = side or max(1, isqrt(self.values // max(per_position)))
        spans = [_spans(length, side, halo, input_scale, output_scale) for length in (height, width)]
        for (from_rows, kept_rows, to_rows), (from_columns, kept_columns, to_columns) in product(*spans):
            tile = function(
                x.read(from_rows, from_columns, before),
                *(each.read(from_rows, from_columns) for each in others),
            )
            output.write(to_rows, to_columns, tile[..., kept_rows, kept_columns])
            del tile  # before the next one is made
        return output


def _layers(block: nn.Module) -> Iterator[nn.Module]:
    """The layers of a block of an encoder or decoder, in the order in which it runs them."""
    for pair in zip_longest(block.resnets, getattr(block, "attentions", ())):
        yield from (uncompiled(layer) for layer in pair if layer is not None)
    for name in ("downsamplers", "upsamplers"):
        yield from map(uncompiled, getattr(block, name, None) or ())


def sequence(*modules: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(*(module for module in modules if module is not None))


def _spans(
    length: int, side: int, halo: int, input_scale: int, output_scale: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Along one side: what a tile reads of the input, what of its result is kept, and where that goes."""
    for start in range(0, length, side):
        stop = min(start + side, length)
        first, last = max(0, start - halo), min(length, stop + halo)
        yield (
            slice(first * input_scale, last * input_scale),
            slice((start - first) * output_scale, (stop - first) * output_scale),
            slice(start * output_scale, stop * output_scale),
        )
