"""The layers, each form against the other and against what it may see."""

import pytest
import torch

from latent_codec.models.causal import (
    CausalAttention,
    CausalContext,
    GatedLayer,
    GatedResidual,
    HorizontalConv,
    VerticalConv,
    shift_down,
    shift_raster,
    shift_right,
)

CHANNELS, CONTEXT = 4, 3
LAYERS = {
    "gated": lambda: GatedLayer(CHANNELS, 3),
    "gated-context": lambda: GatedLayer(CHANNELS, 5, CONTEXT),
    "residual": lambda: GatedResidual(CHANNELS, 3),
    "residual-context": lambda: GatedResidual(CHANNELS, 5, CONTEXT),
    "attention": lambda: CausalAttention(CHANNELS, 6, 3),
}


def noise(*shape) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_shifts_by_hand():
    x = torch.arange(1.0, 7).view(1, 1, 2, 3)
    assert shift_down(x).flatten().tolist() == [0, 0, 0, 1, 2, 3]
    assert shift_right(x).flatten().tolist() == [0, 1, 2, 0, 4, 5]
    assert shift_raster(x).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def seen_from(conv, row: int, column: int) -> list[tuple[int, int]]:
    """The positions of a 5x7 grid that an output depends on."""
    x = torch.ones(1, 1, 5, 7, requires_grad=True)
    torch.nn.init.ones_(conv.weight)
    conv(x)[0, 0, row, column].backward()
    return [tuple(place) for place in x.grad[0, 0].nonzero().tolist()]


def test_convolutions_see_their_own_position_and_what_precedes_it():
    assert seen_from(VerticalConv(1, 1, 2, 3), 2, 3) == [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)]
    assert seen_from(VerticalConv(1, 1, 2, 3), 0, 6) == [(0, 5), (0, 6)]
    assert seen_from(HorizontalConv(1, 1, 3), 2, 3) == [(2, 1), (2, 2), (2, 3)]
    assert seen_from(HorizontalConv(1, 1, 3), 2, 0) == [(2, 0)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", ["map", "vector"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_row_and_step_compute_what_forward_does(name, context, batch):
    torch.manual_seed(0)
    layer, (height, width) = LAYERS[name]().double().eval(), (4, 5)
    vertical, horizontal, previous = (noise(batch, CHANNELS, height, width) + k for k in range(3))
    sides = (height, width) if context == "map" else (1, 1)
    around = CausalContext(noise(batch, CONTEXT, *sides), previous, noise(1, 2, height, width))
    expected = layer(vertical, horizontal, around)

    cache = layer.begin(batch, height, width)
    for i in range(height):
        context_row = around.context[:, :, min(i, sides[0] - 1)].permute(1, 2, 0)
        row = CausalContext(context_row, previous, around.background[:, :, i].permute(1, 2, 0))
        found = layer.row(cache, vertical[:, :, i].permute(1, 2, 0), row)
        torch.testing.assert_close(found, expected[0][:, :, i].permute(1, 2, 0), rtol=0, atol=1e-12)
        for j in range(width):
            stream = horizontal[:, :, i, j].clone()
            layer.advance(cache, j, stream, previous[:, :, i, j])
            torch.testing.assert_close(stream, expected[1][:, :, i, j], rtol=0, atol=1e-12)


@torch.no_grad()
def test_attention_sees_itself_and_all_before_it_and_nothing_else():
    layer = CausalAttention(CHANNELS, 4, 2).double()
    horizontal, previous, background = noise(1, CHANNELS, 3, 4), noise(1, CHANNELS, 3, 4), noise(1, 2, 3, 4)
    before = layer(horizontal, horizontal, CausalContext(None, previous, background))[1].flatten(2)
    for place in range(12):
        changed = previous.clone()
        changed.view(1, CHANNELS, 12)[..., place] += 1
        after = layer(horizontal, horizontal, CausalContext(None, changed, background))[1].flatten(2)
        differs = (after != before).any(1)[0]
        assert differs.tolist() == [other >= place for other in range(12)]


def test_heads_must_divide_the_attention_channels():
    with pytest.raises(ValueError, match="attention_channels for 4 heads, got 6"):
        CausalAttention(CHANNELS, 6, 4)
