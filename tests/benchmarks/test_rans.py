"""The entropy coder alone on a grid of 64 x 64 x 4 values, next to constriction's coder of float models where installed.

    pytest tests/benchmarks/test_rans.py -s -o addopts=          some seconds of one idle core

Each of 64 tables is a Gaussian of another width, and each value has its own table, as with a context model. Times are
the best of many turns, in milliseconds of the wall and of the processor, which differ where the core is shared. Both
coders are timed twice: with models that are there before, as our entropy models are (constriction's are 64 tables of
integers, whose values it codes table by table), and with models that are made from the widths within the time
(constriction makes them value by value).
"""

import math
import time

import numpy as np
import pytest
from tables import table

from latent_codec.bitstream.rans import Decoder, encode
from latent_codec.bitstream.tables import Tables, pmf_to_quantized_cdf

COUNT = 64 * 64 * 4
HALF = 32
GOAL = 15


def gaussian(widths: np.ndarray) -> np.ndarray:
    """What constriction's QuantizedGaussian is: the share of each unit interval, (num_tables, 2 HALF + 1)."""
    edges = np.append(np.arange(-HALF, HALF + 1) - 0.5, HALF + 0.5)
    edges[[0, -1]] = -np.inf, np.inf
    return np.diff(np.vectorize(math.erf)(edges / (widths[:, None] * math.sqrt(2))))


def make_tables(widths: np.ndarray) -> Tables:
    return Tables.concatenate(
        list(pmf_to_quantized_cdf(gaussian(widths))), [-HALF] * len(widths), escapes=False
    )


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
    numbers = random_state.integers(0, 64, COUNT)
    tables = make_tables(widths)
    symbols = tables.ends.searchsorted((numbers << 16) + random_state.integers(0, 1 << 16, COUNT), "right")
    values, _ = tables.symbols(symbols, numbers, b"")
    ideal = tables.code_lengths(values, numbers).sum() / 8
    (stream,) = encode(tables, [symbols])

    def decode(tables):
        decoder = Decoder(tables)
        found, _ = decoder.decode(stream, numbers)
        decoder.finish()
        return found

    np.testing.assert_array_equal(decode(tables), symbols)
    size = len(stream), len(stream) - ideal
    at_hand = [
        ["ours, encode", *best_times(lambda: encode(tables, [symbols])), *size],
        [f"ours, decode (goal {GOAL} ms)", *best_times(lambda: decode(tables)), *size],
    ]
    made = [
        ["ours, encode", *best_times(lambda: encode(make_tables(widths), [symbols])), *size],
        ["ours, decode", *best_times(lambda: decode(make_tables(widths))), *size],
    ]
    constriction = _constriction()
    if constriction is not None:
        order = np.argsort(numbers, kind="stable")
        parts = np.split(
            values[order].astype(np.int32) + HALF, np.bincount(numbers, minlength=64).cumsum()[:-1]
        )
        models = [
            constriction.stream.model.Categorical(each, perfect=False)
            for each in gaussian(widths).astype(np.float32)
        ]

        def encode_parts():
            coder = constriction.stream.stack.AnsCoder()
            for part, model in zip(reversed(parts), reversed(models)):
                coder.encode_reverse(part, model)
            return coder.get_compressed()

        def decode_parts():
            coder = constriction.stream.stack.AnsCoder(words_of_parts)
            return np.concatenate([coder.decode(model, len(part)) for part, model in zip(parts, models)])

        family = constriction.stream.model.QuantizedGaussian(-HALF, HALF)
        means, spreads = np.zeros(COUNT, np.float32), widths[numbers].astype(np.float32)

        def encode_each():
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(values.astype(np.int32), family, means, spreads)
            return coder.get_compressed()

        def decode_each():
            return constriction.stream.stack.AnsCoder(words).decode(family, means, spreads)

        words_of_parts, words = encode_parts(), encode_each()
        np.testing.assert_array_equal(decode_parts(), np.concatenate(parts))
        np.testing.assert_array_equal(decode_each(), values)
        for rows, coded, functions in (
            (at_hand, words_of_parts, (encode_parts, decode_parts)),
            (made, words, (encode_each, decode_each)),
        ):
            for name, function in zip(("encode", "decode"), functions):
                size = coded.nbytes, coded.nbytes - ideal
                rows.append([f"constriction, {name}", *best_times(function), *size])
    for title, rows in (("models made before", at_hand), ("models made within the time", made)):
        table(
            f"{COUNT} values, {ideal:.0f} bytes by their model; {title}",
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
