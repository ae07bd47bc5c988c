"""The entropy coder alone on a grid of 64 x 64 x 4 values, beside constriction's coder of float models where installed.

    pytest tests/benchmarks/test_rans.py -s -o addopts=          some seconds of one idle core

Each of 64 tables is a Gaussian of another width, and each value has its own table, as with a context model. Times are
the best of many turns, in seconds of the wall and of the processor, which differ where the core is shared.
"""

import math
import time

import numpy as np
import pytest
from tables import table

from latent_codec.bitstream.rans import Decoder, encode
from latent_codec.bitstream.tables import Tables, cumulative_tables

COUNT = 64 * 64 * 4
HALF = 32
GOAL = 15


def gaussian(widths: np.ndarray) -> np.ndarray:
    """What constriction's QuantizedGaussian is: the share of each unit interval, (num_tables, 2 HALF + 1)."""
    edges = np.append(np.arange(-HALF, HALF + 1) - 0.5, HALF + 0.5)
    edges[[0, -1]] = -np.inf, np.inf
    return np.diff(np.vectorize(math.erf)(edges / (widths[:, None] * math.sqrt(2))))


def best_times(function, turns: int = 30) -> tuple[float, float]:
    """Milliseconds of the wall and of the processor."""
    times = []
    for _ in range(turns):
        wall, processor = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return tuple(1000 * min(column) for column in zip(*times))


@pytest.mark.parametrize("narrowest, widest", [(0.2, 0.5), (0.2, 3.0), (2.0, 8.0)])
def test_coder_alone(narrowest, widest):
    random_state = np.random.default_rng(0)
    widths = np.geomspace(narrowest, widest, 64)
    tables = Tables.concatenate(list(cumulative_tables(gaussian(widths))), [-HALF] * 64, escapes=False)
    numbers = random_state.integers(0, 64, COUNT)
    symbols = tables.ends.searchsorted((numbers << 16) + random_state.integers(0, 1 << 16, COUNT), "right")
    values, _ = tables.values(symbols, numbers, b"")
    ideal = tables.bits(values, numbers) / 8
    (stream,) = encode(tables, [symbols])

    def decode():
        decoder = Decoder(tables)
        found, _ = decoder.decode(stream, numbers)
        decoder.finish()
        return found

    np.testing.assert_array_equal(decode(), symbols)
    rows = [
        ["ours, encode", *best_times(lambda: encode(tables, [symbols])), len(stream), len(stream) - ideal],
        [f"ours, decode (goal {GOAL} ms)", *best_times(decode), len(stream), len(stream) - ideal],
    ]
    constriction = _constriction()
    if constriction is not None:
        family = constriction.stream.model.QuantizedGaussian(-HALF, HALF)
        means, spreads = np.zeros(COUNT), widths[numbers]

        def peer_encode():
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(values.astype(np.int32), family, means, spreads)
            return coder.get_compressed()

        words = peer_encode()

        def peer_decode():
            return constriction.stream.stack.AnsCoder(words).decode(family, means, spreads)

        np.testing.assert_array_equal(peer_decode(), values)
        for name, function in (("encode", peer_encode), ("decode", peer_decode)):
            rows.append([f"constriction, {name}", *best_times(function), words.nbytes, words.nbytes - ideal])
    table(
        f"{COUNT} values, {ideal:.0f} bytes by their model",
        ["coder", "wall ms", "processor ms", "bytes", "above the model"],
        rows,
    )
    assert len(stream) <= 1.005 * ideal + 64


def _constriction():
    try:
        import constriction
    except ImportError:
        return None
    return constriction
