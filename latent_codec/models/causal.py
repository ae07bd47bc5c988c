"""Causal layers: a position knows what precedes it in raster order, and nothing else.

Two stacks of features run side by side, so that no part of the past is out of sight (Gated PixelCNN, van den Oord et
al., arXiv:1606.05328, section 2.2):

    code embeddings --shift_down---> vertical:    (i, j) knows rows above i, on both sides of j
           |                            | rows' features, already complete
           |                            v
           +---------shift_right--> horizontal:  (i, j) knows row i left of j, and what the vertical stack knows

The shift alone keeps a code from its own position. Every layer after it therefore includes the position it
computes: masking that again would lose one more row or column of the past per layer.

A layer has two forms that share its weights: `forward` over the whole grid, for training, and a pair for sampling.
`row` runs the vertical stack over one row as soon as the row above it is complete, and prepares all that the
horizontal stack needs from it; `step` computes the horizontal stack at one position from the cached positions
to its left, so that a position costs the same wherever it lies, attention's look back aside.

Layout: whole grids are (B, C, H, W); rows (W, B, C), so that a column is one slice; the stream of a position (B, C),
which `step` changes in place.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def shift_down(x: Tensor) -> Tensor:
    """Row i - 1 of `x` (B, C, H, W) in row i, and zeros in row 0."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    """Column j - 1 of `x` (B, C, H, W) in column j, and zeros in column 0."""
    return F.pad(x, (1, 0))[..., :-1]


def shift_raster(x: Tensor) -> Tensor:
    """Position p - 1 of `x` (B, C, H, W) at p, row after row, and zeros at position 0."""
    return F.pad(x.flatten(2), (1, 0))[..., :-1].view_as(x)


class Surroundings(NamedTuple):
    """What layers may use anywhere, for it is known before the first code or holds earlier ones alone."""

    context: Tensor | None
    """(B, D, H, W), or (B, D, 1, 1) where it is the same everywhere: labels, and the level above."""
    previous: Tensor
    """(B, E, H, W): the embedding of the code before each position in raster order."""
    background: Tensor
    """(1, 2, H, W): each position's coordinates."""


class VerticalConv(nn.Conv2d):
    """A convolution over rows i - kernel_height + 1 to i, and kernel_width columns around j."""

    def __init__(self, in_channels: int, out_channels: int, kernel_height: int, kernel_width: int):
        padding = (kernel_height - 1, kernel_width // 2)
        super().__init__(in_channels, out_channels, (kernel_height, kernel_width), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, : x.shape[2]]

    def begin(self, batch: int, width: int) -> "VerticalCache":
        return VerticalCache(self, batch, width)

    def row(self, cache: "VerticalCache", x: Tensor) -> Tensor:
        """The next row (W, B, in_channels) of the input -> that row of the output, (W, B, out_channels)."""
        width, batch, _ = x.shape
        cache.rows = cache.rows.roll(-1, 0)
        cache.rows[-1, self.padding[1] : self.padding[1] + width] = x
        patches = cache.rows.unfold(1, self.kernel_size[1], 1).permute(
            1, 2, 0, 4, 3
        )  # W, B, height, width, C
        patches = patches.reshape(width * batch, len(cache.weight))
        return torch.addmm(self.bias, patches, cache.weight).view(width, batch, -1)


class VerticalCache:
    """The latest rows of a vertical convolution's input, and its weight as a matrix."""

    def __init__(self, conv: VerticalConv, batch: int, width: int):
        height, padding = conv.kernel_size[0], conv.padding[1]
        self.rows = conv.weight.new_zeros(height, width + 2 * padding, batch, conv.in_channels)
        self.weight = conv.weight.permute(2, 3, 1, 0).reshape(-1, conv.out_channels).contiguous()


class HorizontalConv(nn.Conv2d):
    """A convolution over columns j - kernel_width + 1 to j of a row."""

    def __init__(self, in_channels: int, out_channels: int, kernel_width: int):
        super().__init__(in_channels, out_channels, (1, kernel_width), padding=(0, kernel_width - 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : x.shape[3]]

    def begin(self, batch: int, width: int) -> "HorizontalCache":
        return HorizontalCache(self, batch, width)

    def step(self, cache: "HorizontalCache", column: int, bias: Tensor, out: Tensor) -> Tensor:
        """The output at `column` into `out`, (B, out_channels), once `cache.slots[column]` holds the input.

        `bias` (B, out_channels) stands for the convolution's own, which `row` has added to it.
        """
        return torch.addmm(bias, cache.windows[column], cache.weight, out=out)


class HorizontalCache:
    """A row of a horizontal convolution's input, and its weight as a matrix.

    One row's columns lie side by side in memory, so that the columns under the kernel are a matrix product's
    operand as they are. `slots` are the columns to write, `windows` what the kernel sees at each.
    """

    def __init__(self, conv: HorizontalConv, batch: int, width: int):
        channels, reach = conv.in_channels, conv.kernel_size[1] - 1
        row = conv.weight.new_zeros(batch, (reach + width) * channels)
        starts = [column * channels for column in range(width + 1)]
        self.windows = [row[:, start : start + (reach + 1) * channels] for start in starts[:-1]]
        self.slots = [row[:, end + (reach - 1) * channels : end + reach * channels] for end in starts[1:]]
        self.weight = conv.weight[:, :, 0].permute(2, 1, 0).reshape(-1, conv.out_channels).contiguous()


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, which is a matrix product at rows and positions."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def matrix(self) -> Tensor:
        """The weight as (in_channels, out_channels): a row vector's product with it is several times faster."""
        return self.weight[:, :, 0, 0].T.contiguous()


def gate(x: Tensor, dim: int) -> Tensor:
    """tanh(a) sigmoid(b) of the halves a and b of `x` (arXiv:1606.05328, equation 2)."""
    a, b = x.chunk(2, dim)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """A layer of the Gated PixelCNN (arXiv:1606.05328, figure 2 and, for the context, equation 4).

        vertical ---conv---+--------------gate--+--> vertical
                           | 1x1                |
                           v      (residual) ---+
        horizontal --conv--+--gate---1x1--------+--> horizontal

    The vertical stack is residual too, unlike the paper's: gates halve what they pass, so that rows far above
    would fade from a deep stack.
    """

    def __init__(self, channels: int, kernel_size: int, context_channels: int = 0, dropout: float = 0.0):
        super().__init__()
        reach = kernel_size // 2 + 1
        self.vertical_conv = VerticalConv(channels, 2 * channels, reach, kernel_size)
        self.vertical_to_horizontal = PointwiseConv(2 * channels, 2 * channels)
        self.horizontal_conv = HorizontalConv(channels, 2 * channels, reach)
        self.horizontal_out = PointwiseConv(channels, channels, bias=False)
        self.from_context = (
            PointwiseConv(context_channels, 4 * channels, bias=False) if context_channels else None
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, around: Surroundings) -> tuple[Tensor, Tensor]:
        above = self.vertical_conv(vertical)
        beside = self.horizontal_conv(horizontal) + self.vertical_to_horizontal(above)
        if self.from_context is not None:
            for_vertical, for_horizontal = self.from_context(around.context).chunk(2, 1)
            above, beside = above + for_vertical, beside + for_horizontal
        return vertical + gate(above, 1), horizontal + self.horizontal_out(self.dropout(gate(beside, 1)))

    def begin(self, batch: int, height: int, width: int) -> "GatedLayerCache":
        return GatedLayerCache(self, batch, width)

    def row(self, cache: "GatedLayerCache", vertical: Tensor, around: Surroundings) -> Tensor:
        above = self.vertical_conv.row(cache.vertical, vertical)
        beside = cache.bias + above @ cache.vertical_to_horizontal
        if self.from_context is not None:
            for_vertical, for_horizontal = (around.context @ cache.from_context).chunk(2, 2)
            above, beside = above + for_vertical, beside + for_horizontal
        cache.beside = beside.unbind(0)
        return vertical + gate(above, 2)

    def step(self, cache: "GatedLayerCache", column: int, stream: Tensor, previous: Tensor) -> None:
        cache.horizontal.slots[column].copy_(stream)
        self.horizontal_conv.step(cache.horizontal, column, cache.beside[column], out=cache.gates)
        torch.mul(cache.candidates.tanh_(), cache.openings.sigmoid_(), out=cache.gated)
        stream.addmm_(cache.gated, cache.horizontal_out)


class GatedLayerCache:
    """A `GatedLayer`'s two convolutions' caches, what a row adds to each of its positions, and room to compute."""

    def __init__(self, layer: GatedLayer, batch: int, width: int):
        self.vertical = layer.vertical_conv.begin(batch, width)
        self.horizontal = layer.horizontal_conv.begin(batch, width)
        self.vertical_to_horizontal = layer.vertical_to_horizontal.matrix()
        self.bias = layer.vertical_to_horizontal.bias + layer.horizontal_conv.bias
        self.from_context = layer.from_context and layer.from_context.matrix()
        self.horizontal_out = layer.horizontal_out.matrix()
        self.beside: tuple[Tensor, ...] = ()
        self.gates = self.vertical.weight.new_empty(batch, layer.horizontal_conv.out_channels)
        self.candidates, self.openings = self.gates.chunk(2, 1)
        self.gated = torch.empty_like(self.candidates)


class GatedResidual(nn.Module):
    """The gated residual block of PixelSNAIL (arXiv:1712.09763, figure 3a) in two stacks, as PixelCNN++ has them.

        x + a sigmoid(b),  (a, b) = conv(elu(conv(elu(x)) + 1x1(elu(vertical)))) + 1x1(context)

    The vertical stack's own block lacks the term from itself; the horizontal one's takes the vertical result
    (arXiv:1701.05517, section 2.3 and figure 2).
    """

    def __init__(self, channels: int, kernel_size: int, context_channels: int = 0, dropout: float = 0.0):
        super().__init__()
        reach = kernel_size // 2 + 1
        self.vertical_conv1 = VerticalConv(channels, channels, reach, kernel_size)
        self.vertical_conv2 = VerticalConv(channels, 2 * channels, reach, kernel_size)
        self.vertical_to_horizontal = PointwiseConv(channels, channels)
        self.horizontal_conv1 = HorizontalConv(channels, channels, reach)
        self.horizontal_conv2 = HorizontalConv(channels, 2 * channels, reach)
        self.from_context = (
            PointwiseConv(context_channels, 4 * channels, bias=False) if context_channels else None
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, around: Surroundings) -> tuple[Tensor, Tensor]:
        above = self.vertical_conv2(self.dropout(F.elu(self.vertical_conv1(F.elu(vertical)))))
        if self.from_context is not None:
            for_vertical, for_horizontal = self.from_context(around.context).chunk(2, 1)
            above = above + for_vertical
        vertical = vertical + F.glu(above, 1)
        hidden = self.horizontal_conv1(F.elu(horizontal)) + self.vertical_to_horizontal(F.elu(vertical))
        beside = self.horizontal_conv2(self.dropout(F.elu(hidden)))
        if self.from_context is not None:
            beside = beside + for_horizontal
        return vertical, horizontal + F.glu(beside, 1)

    def begin(self, batch: int, height: int, width: int) -> "GatedResidualCache":
        return GatedResidualCache(self, batch, width)

    def row(self, cache: "GatedResidualCache", vertical: Tensor, around: Surroundings) -> Tensor:
        above = F.elu(self.vertical_conv1.row(cache.vertical1, F.elu(vertical)))
        above = self.vertical_conv2.row(cache.vertical2, above)
        beside = self.horizontal_conv2.bias.expand(1, above.shape[1], -1)
        if self.from_context is not None:
            for_vertical, for_horizontal = (around.context @ cache.from_context).chunk(2, 2)
            above, beside = above + for_vertical, beside + for_horizontal
        vertical = vertical + F.glu(above, 2)
        hidden = cache.bias + F.elu(vertical) @ cache.vertical_to_horizontal
        cache.hidden, cache.beside = hidden.unbind(0), beside.expand(len(vertical), -1, -1).unbind(0)
        return vertical

    def step(self, cache: "GatedResidualCache", column: int, stream: Tensor, previous: Tensor) -> None:
        cache.horizontal1.slots[column].copy_(F.elu(stream))
        hidden = cache.horizontal2.slots[column]
        F.elu_(self.horizontal_conv1.step(cache.horizontal1, column, cache.hidden[column], out=hidden))
        self.horizontal_conv2.step(cache.horizontal2, column, cache.beside[column], out=cache.gates)
        stream.addcmul_(cache.candidates, cache.openings.sigmoid_())


class GatedResidualCache:
    """A `GatedResidual`'s four convolutions' caches, what a row adds to each position, and room to compute."""

    def __init__(self, layer: GatedResidual, batch: int, width: int):
        self.vertical1 = layer.vertical_conv1.begin(batch, width)
        self.vertical2 = layer.vertical_conv2.begin(batch, width)
        self.horizontal1 = layer.horizontal_conv1.begin(batch, width)
        self.horizontal2 = layer.horizontal_conv2.begin(batch, width)
        self.vertical_to_horizontal = layer.vertical_to_horizontal.matrix()
        self.bias = layer.vertical_to_horizontal.bias + layer.horizontal_conv1.bias
        self.from_context = layer.from_context and layer.from_context.matrix()
        self.hidden: tuple[Tensor, ...] = ()
        self.beside: tuple[Tensor, ...] = ()
        self.gates = self.vertical1.weight.new_empty(batch, layer.horizontal_conv2.out_channels)
        self.candidates, self.openings = self.gates.chunk(2, 1)


class CausalAttention(nn.Module):
    """The attention block of PixelSNAIL (arXiv:1712.09763, section 3 and figure 3b), and the 1x1 block that merges it.

        horizontal, previous code, coordinates --1x1--> query, key, value --softmax over positions up to this--> a
        horizontal + glu(1x1(elu(1x1(elu(horizontal)) + 1x1(elu(a)))))

    What a position offers is known before its own code: horizontal features, and the code before it in raster
    order. So it may look at itself, the first position has something to look at, and one block reaches the whole
    past whatever the convolutions see.
    """

    def __init__(self, channels: int, attention_channels: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if attention_channels % num_heads:
            raise ValueError(
                f"attention_channels is {attention_channels} and num_heads {num_heads}; give a multiple of the heads."
            )
        self.num_heads = num_heads
        self.query_key_value = PointwiseConv(2 * channels + 2, 3 * attention_channels)
        self.conv_in = PointwiseConv(channels, channels)
        self.attention_in = PointwiseConv(attention_channels, channels, bias=False)
        self.conv_out = PointwiseConv(channels, 2 * channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, around: Surroundings) -> tuple[Tensor, Tensor]:
        batch, _, height, width = horizontal.shape
        background = around.background.to(horizontal.dtype).expand(batch, -1, -1, -1)
        seen = torch.cat([horizontal, around.previous.to(horizontal.dtype), background], 1)
        projected = self.query_key_value(seen).view(batch, 3, self.num_heads, -1, height * width)
        query, key, value = projected.transpose(3, 4).unbind(1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(2, 3).reshape(batch, -1, height, width)
        hidden = self.conv_in(F.elu(horizontal)) + self.attention_in(F.elu(attended))
        return vertical, horizontal + F.glu(self.conv_out(self.dropout(F.elu(hidden))), 1)

    def begin(self, batch: int, height: int, width: int) -> "AttentionCache":
        return AttentionCache(self, batch, height * width)

    def row(self, cache: "AttentionCache", vertical: Tensor, around: Surroundings) -> Tensor:
        static = torch.addmm(cache.qkv_bias, around.background[:, 0], cache.background_to_qkv)
        cache.static = static[:, None].expand(-1, vertical.shape[1], -1).unbind(0)
        return vertical

    def step(self, cache: "AttentionCache", column: int, stream: Tensor, previous: Tensor) -> None:
        torch.addmm(cache.static[column], stream, cache.stream_to_qkv, out=cache.qkv)
        cache.qkv.addmm_(previous, cache.previous_to_qkv)
        cache.append()
        weights = torch.bmm(cache.query, cache.keys.narrow(2, 0, cache.length)).softmax(2)
        torch.bmm(weights, cache.values.narrow(1, 0, cache.length), out=cache.attended)
        hidden = torch.addmm(cache.conv_in_bias, F.elu(stream), cache.conv_in)
        hidden.addmm_(F.elu_(cache.merged), cache.attention_in)
        torch.addmm(cache.conv_out_bias, F.elu_(hidden), cache.conv_out, out=cache.gates)
        stream.addcmul_(cache.candidates, cache.openings.sigmoid_())


class AttentionCache:
    """Keys (batch x heads, d, positions) and values (batch x heads, positions, d) so far; weights as matrices.

    The query's part of the weights holds the scale 1 / sqrt(d).
    """

    def __init__(self, layer: CausalAttention, batch: int, num_positions: int):
        heads, channels, attention_channels = (
            layer.num_heads,
            layer.conv_in.in_channels,
            layer.attention_in.in_channels,
        )
        dim = attention_channels // heads
        matrix, self.qkv_bias = layer.query_key_value.matrix(), layer.query_key_value.bias.clone()
        matrix[:, :attention_channels] /= math.sqrt(dim)
        self.qkv_bias[:attention_channels] /= math.sqrt(dim)
        self.stream_to_qkv, self.previous_to_qkv, self.background_to_qkv = matrix.split(
            [channels, channels, 2]
        )
        self.conv_in, self.conv_in_bias = layer.conv_in.matrix(), layer.conv_in.bias
        self.conv_out, self.conv_out_bias = layer.conv_out.matrix(), layer.conv_out.bias
        self.attention_in = layer.attention_in.matrix()
        self.static: tuple[Tensor, ...] = ()
        self.length = 0
        self.keys = matrix.new_empty(batch * heads, dim, num_positions)
        self.values = matrix.new_empty(batch * heads, num_positions, dim)
        self.query = matrix.new_empty(batch * heads, 1, dim)
        self.attended = torch.empty_like(self.query)
        self.merged = self.attended.view(batch, attention_channels)
        self.qkv = matrix.new_empty(batch, 3 * attention_channels)
        self._latest = self.qkv.view(batch, 3, heads, dim).unbind(1)
        self._by_batch = (
            self.query.view(batch, heads, dim),
            self.keys.view(batch, heads, dim, num_positions),
            self.values.view(batch, heads, num_positions, dim),
        )
        self.gates = matrix.new_empty(batch, 2 * channels)
        self.candidates, self.openings = self.gates.chunk(2, 1)

    def append(self) -> None:
        """Take the query, key and value of the next position from `qkv`."""
        queries, keys, values = self._by_batch
        query, key, value = self._latest
        queries.copy_(query)
        keys.select(3, self.length).copy_(key)
        values.select(2, self.length).copy_(value)
        self.length += 1
