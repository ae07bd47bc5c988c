"""Causal layers: a position knows what precedes it in raster order, and nothing else.

Two stacks of features run side by side, so that no part of the past is out of sight (Gated PixelCNN, van den Oord et
al., arXiv:1606.05328, section 2.2):

    index embeddings -shift_down---> vertical:    (i, j) knows rows above i, on both sides of j
           |                            | rows' features, already complete
           |                            v
           +---------shift_right--> horizontal:  (i, j) knows row i left of j, and what the vertical stack knows

Only the shift keeps an index from its own position. Every layer after it therefore includes the position it
computes: masking that again would lose one more row or column of the past per layer.

A layer has two forms that share its weights: `forward` over the whole grid, for training, and a pair for sampling.
`row` runs the vertical stack over one row as soon as the row above it is complete, and prepares all that the
horizontal stack needs from it; `advance` computes the horizontal stack at one position from the cached positions
to its left, so that a position costs the same wherever it is, but for attention's look back.

Layout: whole grids are (B, C, H, W); rows (C, W, B), which a convolution's weight multiplies as it is; what a row
leaves for its positions (W, B, C), so that a column is one slice; the stream of a position (B, C), which `advance` changes
in place.
"""

import math
from itertools import pairwise
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


class CausalContext(NamedTuple):
    """Inputs that layers may use at every position: known before the first index, or of earlier indices only."""

    context: Tensor | None
    """(B, D, H, W), or (B, D, 1, 1) where it is the same everywhere: labels, and the level above."""
    previous: Tensor
    """(B, E, H, W): the embedding of the index before each position in raster order."""
    background: Tensor
    """(1, 2, H, W): each position's coordinates."""


class VerticalConv(nn.Conv2d):
    """A convolution over rows i - kernel_height + 1 to i, and kernel_width columns around j."""

    def __init__(self, in_channels: int, out_channels: int, kernel_height: int, kernel_width: int):
        padding = (kernel_height - 1, kernel_width // 2)
        super().__init__(in_channels, out_channels, (kernel_height, kernel_width), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, : x.shape[2]]

    def row(self, cache: "VerticalCache", x: Tensor) -> Tensor:
        """The next row (in_channels, W, B) of the input -> that row of the output, (out_channels, W, B)."""
        for above, below in pairwise(cache.rows):
            above.copy_(below)
        cache.rows[-1].copy_(x)
        patches = cache.patches.reshape(cache.weight.shape[1], -1)
        return torch.addmm(cache.bias, cache.weight, patches).view(-1, *x.shape[1:])


class VerticalCache:
    """The latest rows of a vertical convolution's input, and its weight as a matrix.

    `rows` are the rows under the kernel, (in_channels, W, B) each; `patches` is what the kernel sees of them at each
    position, (in_channels, kernel_height, kernel_width, W, B), as a view.
    """

    def __init__(self, conv: VerticalConv, batch: int, width: int):
        (height, kernel_width), side = conv.kernel_size, conv.padding[1]
        padded = conv.weight.new_zeros(conv.in_channels, height, side + width + side, batch)
        self.rows = padded[:, :, side : side + width].unbind(1)
        self.patches = padded.unfold(2, kernel_width, 1).permute(0, 1, 4, 2, 3)
        self.weight, self.bias = conv.weight.flatten(1), conv.bias[:, None]


class HorizontalConv(nn.Conv2d):
    """A convolution over columns j - kernel_width + 1 to j of a row."""

    def __init__(self, in_channels: int, out_channels: int, kernel_width: int):
        super().__init__(in_channels, out_channels, (1, kernel_width), padding=(0, kernel_width - 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : x.shape[3]]


class HorizontalCache:
    """A row of a horizontal convolution's input, and its weight as a matrix.

    One row's columns are adjacent in memory, so that the columns under the kernel are a matrix product's
    operand as they are. `row` is all of them, (W, B, C); `slots` are the columns to write, `windows` what the kernel
    sees at each.
    """

    def __init__(self, conv: HorizontalConv, batch: int, width: int):
        channels, reach = conv.in_channels, conv.kernel_size[1] - 1
        padded = conv.weight.new_zeros(batch, (reach + width) * channels)
        self.row = padded[:, reach * channels :].view(batch, width, channels).transpose(0, 1)
        self.slots = self.row.unbind(0)
        self.windows = padded.unfold(1, (reach + 1) * channels, channels).unbind(1)
        self.weight = conv.weight[:, :, 0].permute(2, 1, 0).reshape(-1, conv.out_channels).contiguous()

    def add(self, column: int, to: Tensor) -> Tensor:
        """Add the output at `column`, bias aside, to `to` (B, out_channels), once the slot of `column` is written."""
        return to.addmm_(self.windows[column], self.weight)


class GateCache:
    """The gates of a row, (W, B, 2 channels), to which `advance` adds; their columns, and the halves of each."""

    def __init__(self, like: Tensor, width: int, batch: int, channels: int):
        self.row = like.new_empty(width, batch, 2 * channels)
        self.columns = self.row.unbind(0)
        candidates, openings = self.row.chunk(2, 2)
        self.candidates, self.openings = candidates.unbind(0), openings.unbind(0)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, which is a matrix product at rows and positions."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def matrix(self) -> Tensor:
        """The weight as (in_channels, out_channels): a row vector's product with it is several times faster."""
        return self.weight[:, :, 0, 0].T.contiguous()


def at_positions(x: Tensor, weight: Tensor) -> Tensor:
    """A row (C, W, B) times a matrix (C, D): what it gives to its positions, (W, B, D)."""
    return (x.flatten(1).T @ weight).view(*x.shape[1:], -1)


def gate(x: Tensor, dim: int) -> Tensor:
    """tanh(a) sigmoid(b) of the halves a and b of `x` (arXiv:1606.05328, equation 2)."""
    a, b = x.chunk(2, dim)
    return a.tanh() * b.sigmoid()


def reach_of(kernel_size: int) -> int:
    """Number of positions under a causal kernel on one side, its own included.

    Raises:
        ValueError: for a kernel_size that is even or below 3.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; expected an odd number of at least 3")
    return kernel_size // 2 + 1


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
        reach = reach_of(kernel_size)
        self.vertical_conv = VerticalConv(channels, 2 * channels, reach, kernel_size)
        self.vertical_to_horizontal = PointwiseConv(2 * channels, 2 * channels)
        self.horizontal_conv = HorizontalConv(channels, 2 * channels, reach)
        self.horizontal_out = PointwiseConv(channels, channels, bias=False)
        self.from_context = (
            PointwiseConv(context_channels, 4 * channels, bias=False) if context_channels else None
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, around: CausalContext) -> tuple[Tensor, Tensor]:
        above = self.vertical_conv(vertical)
        sideways = self.horizontal_conv(horizontal) + self.vertical_to_horizontal(above)
        if self.from_context is not None:
            for_vertical, for_horizontal = self.from_context(around.context).chunk(2, 1)
            above, sideways = above + for_vertical, sideways + for_horizontal
        return vertical + gate(above, 1), horizontal + self.horizontal_out(self.dropout(gate(sideways, 1)))

    def begin(self, batch: int, height: int, width: int) -> "GatedLayerCache":
        return GatedLayerCache(self, batch, width)

    def row(self, cache: "GatedLayerCache", vertical: Tensor, around: CausalContext) -> Tensor:
        above = self.vertical_conv.row(cache.vertical, vertical)
        torch.add(at_positions(above, cache.vertical_to_horizontal), cache.bias, out=cache.gates.row)
        if self.from_context is not None:
            for_vertical, for_horizontal = at_positions(around.context, cache.from_context).chunk(2, 2)
            above += for_vertical.permute(2, 0, 1)
            cache.gates.row += for_horizontal
        return vertical + gate(above, 0)

    def advance(self, cache: "GatedLayerCache", column: int, stream: Tensor, previous: Tensor) -> None:
        cache.horizontal.slots[column].copy_(stream)
        cache.horizontal.add(column, to=cache.gates.columns[column])
        gated = cache.gates.candidates[column].tanh_().mul_(cache.gates.openings[column].sigmoid_())
        stream.addmm_(gated, cache.horizontal_out)


class GatedLayerCache:
    """A `GatedLayer`'s two convolutions' caches, and the gates that a row prepares for its positions."""

    def __init__(self, layer: GatedLayer, batch: int, width: int):
        self.vertical = VerticalCache(layer.vertical_conv, batch, width)
        self.horizontal = HorizontalCache(layer.horizontal_conv, batch, width)
        self.horizontal_out = layer.horizontal_out.matrix()
        self.bias = layer.vertical_to_horizontal.bias + layer.horizontal_conv.bias
        self.vertical_to_horizontal = layer.vertical_to_horizontal.weight.flatten(1).T
        self.from_context = layer.from_context and layer.from_context.weight.flatten(1).T
        self.gates = GateCache(self.horizontal_out, width, batch, layer.horizontal_out.in_channels)


class GatedResidual(nn.Module):
    """The gated residual block of PixelSNAIL (arXiv:1712.09763, figure 3a) in two stacks, as PixelCNN++ has them.

        x + a sigmoid(b),  (a, b) = conv(elu(conv(elu(x)) + 1x1(elu(vertical)))) + 1x1(context)

    The vertical stack's own block lacks the term from itself; the horizontal one's takes the vertical result
    (arXiv:1701.05517, section 2.3 and figure 2).
    """

    def __init__(self, channels: int, kernel_size: int, context_channels: int = 0, dropout: float = 0.0):
        super().__init__()
        reach = reach_of(kernel_size)
        self.vertical_conv1 = VerticalConv(channels, channels, reach, kernel_size)
        self.vertical_conv2 = VerticalConv(channels, 2 * channels, reach, kernel_size)
        self.vertical_to_horizontal = PointwiseConv(channels, channels)
        self.horizontal_conv1 = HorizontalConv(channels, channels, reach)
        self.horizontal_conv2 = HorizontalConv(channels, 2 * channels, reach)
        self.from_context = (
            PointwiseConv(context_channels, 4 * channels, bias=False) if context_channels else None
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, around: CausalContext) -> tuple[Tensor, Tensor]:
        above = self.vertical_conv2(self.dropout(F.elu(self.vertical_conv1(F.elu(vertical)))))
        if self.from_context is not None:
            for_vertical, for_horizontal = self.from_context(around.context).chunk(2, 1)
            above = above + for_vertical
        vertical = vertical + F.glu(above, 1)
        hidden = self.horizontal_conv1(F.elu(horizontal)) + self.vertical_to_horizontal(F.elu(vertical))
        sideways = self.horizontal_conv2(self.dropout(F.elu(hidden)))
        if self.from_context is not None:
            sideways = sideways + for_horizontal
        return vertical, horizontal + F.glu(sideways, 1)

    def begin(self, batch: int, height: int, width: int) -> "GatedResidualCache":
        return GatedResidualCache(self, batch, width)

    def row(self, cache: "GatedResidualCache", vertical: Tensor, around: CausalContext) -> Tensor:
        above = F.elu_(self.vertical_conv1.row(cache.vertical1, F.elu(vertical)))
        above = self.vertical_conv2.row(cache.vertical2, above)
        cache.gates.row.copy_(self.horizontal_conv2.bias)
        if self.from_context is not None:
            for_vertical, for_horizontal = at_positions(around.context, cache.from_context).chunk(2, 2)
            above += for_vertical.permute(2, 0, 1)
            cache.gates.row += for_horizontal
        vertical = vertical + F.glu(above, 0)
        hidden = at_positions(F.elu(vertical), cache.vertical_to_horizontal)
        torch.add(hidden, cache.bias, out=cache.horizontal2.row)
        return vertical

    def advance(self, cache: "GatedResidualCache", column: int, stream: Tensor, previous: Tensor) -> None:
        F.elu_(cache.horizontal1.slots[column].copy_(stream))
        F.elu_(cache.horizontal1.add(column, to=cache.horizontal2.slots[column]))
        cache.horizontal2.add(column, to=cache.gates.columns[column])
        stream.addcmul_(cache.gates.candidates[column], cache.gates.openings[column].sigmoid_())


class GatedResidualCache:
    """A `GatedResidual`'s four convolutions' caches, and the gates that a row prepares for its positions.

    A row also prepares the slots of the second horizontal convolution, for the first to add to.
    """

    def __init__(self, layer: GatedResidual, batch: int, width: int):
        self.vertical1 = VerticalCache(layer.vertical_conv1, batch, width)
        self.vertical2 = VerticalCache(layer.vertical_conv2, batch, width)
        self.horizontal1 = HorizontalCache(layer.horizontal_conv1, batch, width)
        self.horizontal2 = HorizontalCache(layer.horizontal_conv2, batch, width)
        self.bias = layer.vertical_to_horizontal.bias + layer.horizontal_conv1.bias
        self.vertical_to_horizontal = layer.vertical_to_horizontal.weight.flatten(1).T
        self.from_context = layer.from_context and layer.from_context.weight.flatten(1).T
        self.gates = GateCache(self.horizontal2.weight, width, batch, layer.horizontal_conv2.in_channels)


class CausalAttention(nn.Module):
    """The attention block of PixelSNAIL (arXiv:1712.09763, section 3 and figure 3b), and the 1x1 block that merges it.

        horizontal, previous index, coordinates --1x1--> query, key, value --softmax over positions up to this--> a
        horizontal + glu(1x1(elu(1x1(elu(horizontal)) + 1x1(elu(a)))))

    What a position offers is known before its own index: horizontal features, and the index before it in raster
    order. So it may look at itself, the first position has something to look at, and one block reaches the whole
    past whatever the convolutions see.
    """

    def __init__(self, channels: int, attention_channels: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if attention_channels % num_heads:
            raise ValueError(f"expected attention_channels for {num_heads} heads, got {attention_channels}")
        self.num_heads = num_heads
        self.query_key_value = PointwiseConv(2 * channels + 2, 3 * attention_channels)
        self.conv_in = PointwiseConv(channels, channels)
        self.attention_in = PointwiseConv(attention_channels, channels, bias=False)
        self.conv_out = PointwiseConv(channels, 2 * channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, around: CausalContext) -> tuple[Tensor, Tensor]:
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
        return AttentionCache(self, batch, height, width)

    def row(self, cache: "AttentionCache", vertical: Tensor, around: CausalContext) -> Tensor:
        torch.addmm(cache.qkv_bias, around.background.flatten(1).T, cache.background_to_qkv, out=cache.placed)
        return vertical

    def advance(self, cache: "AttentionCache", column: int, stream: Tensor, previous: Tensor) -> None:
        torch.addmm(cache.columns[column], stream, cache.stream_to_qkv, out=cache.qkv)
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

    def __init__(self, layer: CausalAttention, batch: int, height: int, width: int):
        num_positions = height * width
        heads, channels = layer.num_heads, layer.conv_in.in_channels
        attention_channels = layer.attention_in.in_channels
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
        self.placed = matrix.new_empty(width, 3 * attention_channels)
        """Contribution of a row's coordinates to query, key and value."""
        self.columns = self.placed.unbind(0)
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
