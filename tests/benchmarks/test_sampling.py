"""Sampling from caches against the best loop without them, and how the cost of a position grows.

    pytest tests/benchmarks/test_sampling.py -s -o addopts=          about 4 minutes of one idle core

The loop without caches runs the whole-grid form over the rows up to each position, and the head at that position alone.
Times are of one thread and batch 1; the two sides of a ratio take turns.
"""

import statistics
import time

import pytest
import torch
from tables import table
from torch.utils._python_dispatch import TorchDispatchMode

from latent_codec.models.autoregressive import draw, draw_uniforms
from latent_codec.models.pixelcnn import PixelCNN
from latent_codec.models.pixelsnail import PixelSNAIL

pytestmark = pytest.mark.usefixtures("one_thread")

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm}
NUM_NAIVE = 64


@torch.inference_mode()
def naive_step(model, indices, row: int, column: int, generator) -> None:
    """Draw the index at a position from the rows up to it, without caches."""
    values, features = model._features(indices[:, : row + 1], None, None)
    at = features[:, :, row : row + 1, column : column + 1]
    logits = model.head.logits(at, values[:, :, row : row + 1, column : column + 1])[:, :, 0, 0, 0]
    indices[:, row, column] = draw(logits, draw_uniforms((1,), 1, generator, indices.device)[0])


class Products(TorchDispatchMode):
    """Remembers the matrix products that run under it, to run them alone."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)

    def run(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def seconds(function, *arguments, **options) -> float:
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


@pytest.mark.parametrize(("side", "goal"), [(32, 40), (64, 150)])
def test_pixelsnail_against_growing_rows(side, goal):
    torch.manual_seed(0)
    model = PixelSNAIL(codebook_size=512, hidden_channels=128, num_blocks=2, num_layers=2).eval()
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    assert millions <= 3
    generator = torch.Generator().manual_seed(0)
    shape = (1, side, side)
    model.sample((1, 8, 8))

    cached = [seconds(model.sample, shape, generator=generator)]
    indices = model.sample(shape, generator=generator)
    naive = []
    for number in range(NUM_NAIVE):
        position = int((number + 0.5) * side * side / NUM_NAIVE)
        naive.append(seconds(naive_step, model, indices, *divmod(position, side), generator))
    naive = statistics.mean(naive) * side * side
    cached.append(seconds(model.sample, shape, generator=generator))

    with Products() as products:
        model.sample(shape, generator=generator)
    with torch.inference_mode():
        products.run()
        bare = seconds(products.run)
    cached = statistics.mean(cached)
    per_position = 1000 / side**2
    table(
        f"PixelSNAIL, {millions:.2f} M parameters, {side}x{side}",
        ["naive s", "cached s", "ratio (goal)", "ms a position", "of which products", "above the products"],
        [
            [
                naive,
                cached,
                f"{naive / cached:.0f} ({goal})",
                cached * per_position,
                bare * per_position,
                cached / bare,
            ]
        ],
    )
    assert naive > cached


@pytest.mark.parametrize("batch", [1, 8])
def test_time_per_position_as_the_map_grows(batch):
    """Without attention a position costs no more on a larger map: the best of several turns.

    It costs more on a narrow map, whose rows read the vertical stack's weights for few positions.
    """
    torch.manual_seed(0)
    model = PixelCNN(codebook_size=512, hidden_channels=64, num_layers=8, kernel_size=5).eval()
    sides = (16, 24, 32, 48, 64)
    times = {side: [] for side in sides}
    for _ in range(4):
        for side in sides:
            times[side].append(seconds(model.sample, (batch, side, side)) / side**2 * 1000)
    best = {side: min(each) for side, each in times.items()}
    columns = [*(f"{side}x{side}" for side in sides), "largest / smallest (goal)"]
    ratio = max(best.values()) / min(best.values())
    table(f"PixelCNN, batch {batch}, ms a position", columns, [[*best.values(), f"{ratio:.2f} (1.2)"]])
    assert best[64] < 1.2 * best[16]
