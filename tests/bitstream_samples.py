"""Small compressed files of values that are computed by integers, so that they are the same everywhere.

Run as a script it writes tests/golden, which is right only for a new version of the format.
"""

from pathlib import Path

import numpy as np

from latent_codec.bitstream.coding import encode_values
from latent_codec.bitstream.container import Header, Level
from latent_codec.bitstream.context_entropy import IndexContextEntropy, LatentContextEntropy
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.bitstream.integer_inference import IntegerLayer, IntegerNetwork
from latent_codec.bitstream.static_entropy import StaticEntropy
from latent_codec.bitstream.tables import Tables

GOLDEN = Path(__file__).parent / "golden"
SPACE = "0123456789abcdef"


def numbers(count: int, seed: int) -> np.ndarray:
    """Of 0 to 2^16 - 1: the high bits of a linear congruential generator (Knuth's MMIX)."""
    found, state = [], seed
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append(state >> 48)
    return np.array(found, np.int64)


def bell(count: int, seed: int) -> np.ndarray:
    """Integers around 0, the sum of four dice; one of 64 is far off."""
    dice = sum(numbers(count, seed + number) % 5 - 2 for number in range(4))
    return np.where(numbers(count, seed + 9) % 64 == 0, dice * 1000, dice)


def latent_model() -> StaticEntropy:
    """Two step sizes of three channels, tables of seven values and an escape."""
    weights = np.array([1, 3, 6, 8, 6, 3, 1, 1]) * 2**11
    starts = np.cumsum(weights) - weights
    starts = np.where(np.arange(8) > 0, starts + 64, 0)
    steps = np.array([[0.5, 0.25, 1.0], [0.25, 0.125, 0.5]], np.float32)
    return StaticEntropy(
        tables=Tables.concatenate([starts] * 6, [-3, -3, -3, -4, -4, -4], escapes=True),
        space_fingerprint=SPACE,
        codec_name="golden",
        step_sizes=steps,
        shifts=(np.tile(np.arange(8), 6) - 3).astype(np.float32) / -64,
    )


def index_model() -> StaticEntropy:
    """Two levels, of 5 and of 16 codewords."""
    top, bottom = np.array([0, 30000, 40000, 50000, 65535]), np.arange(16) * 4000
    tables = Tables.concatenate([top, bottom], [0, 0], escapes=False)
    return StaticEntropy(tables=tables, space_fingerprint=SPACE, codec_name="golden")


def layer(inputs: int, outputs: int, seed: int, largest: int, shift: int) -> IntegerLayer:
    """Weights, biases and shifts that differ from row to row."""
    weights = numbers(inputs * outputs, seed).reshape(outputs, inputs) % (2 * largest + 1) - largest
    return IntegerLayer(
        weights=weights.astype(np.int8),
        biases=(numbers(outputs, seed + 1) % 2048 - 512).astype(np.int32),
        shifts=(numbers(outputs, seed + 2) % 3 + shift).astype(np.int8),
    )


def network(inputs: int, hidden: int, outputs: int, seed: int) -> IntegerNetwork:
    """Of two layers, or of three where there are outputs."""
    layers = [layer(inputs, hidden, seed, 40, 5), layer(hidden, hidden, seed + 10, 100, 5)]
    if outputs:
        layers.append(layer(hidden + inputs, outputs, seed + 20, 20, 4))
    return IntegerNetwork(tuple(layers))


def peak(mean: int, width: int) -> np.ndarray:
    """Starts of the table of -width to width and an escape, whose probabilities fall with the distance from mean / 16."""
    distances = np.abs(16 * np.arange(-width, width + 1) - mean)
    frequencies = np.append(2**20 // (16 + distances**2 // width), 2**8)
    ends = frequencies.cumsum() * (2**16 - len(frequencies)) // frequencies.sum() + np.arange(
        1, len(frequencies) + 1
    )
    return np.append(0, ends[:-1])


def latent_context_model() -> LatentContextEntropy:
    """Two step sizes of three channels, coded in groups of two and one; five deviations."""
    drops = np.array([0, 1, 2, 3, 4], np.int32)
    starts = [
        peak(((place << drop) + (1 << drop) // 2) - 8, width)
        for drop, width in zip(drops.tolist(), (1, 2, 4, 9, 20))
        for place in range(16 >> drop)
    ]
    tables = Tables.concatenate(starts, [-((len(each) - 2) // 2) for each in starts], escapes=True)
    groups = [(0, 0, 3), *((phase, first, 2 - first // 2) for phase in range(1, 5) for first in (0, 2))]
    return LatentContextEntropy(
        tables=tables,
        space_fingerprint=SPACE,
        codec_name="golden",
        networks=tuple(
            network(16 * 4 + 5 * first if phase else 0, 4, 2 * count, 100 * phase + first)
            for phase, first, count in groups
        ),
        step_sizes=np.array([[0.5, 0.25, 1.0], [0.3, 0.125, 0.7]], np.float32),
        shifts=((numbers(len(tables.starts), 5) % 6001 - 3000) / 10000).astype(np.float32),
        firsts=np.array([0, 16, 24, 28, 30], np.int32),
        drops=drops,
        feature_multipliers=np.array([[2 << 20, 3 << 19, 2 << 20], [1400000, 999999, 2000001]], np.int32),
        mean_multipliers=np.array([[9 << 13, 7 << 13, 5 << 13], [40000, 50001, 33333]], np.int32),
        deviation_offsets=np.array([[4, 5, 6], [3, 5, 4]], np.int32),
    )


def index_context_model(leaves: list[list[int]], seed: int = 0) -> IndexContextEntropy:
    """Trees over each level's codewords, a table for each of 81 logits."""
    levels, size, hidden = range(len(leaves)), 3, 6
    num_codewords = sum(leaf >= 0 for tree in leaves for leaf in tree)
    embeddings = numbers(num_codewords * size, seed + 7).reshape(num_codewords, size) % 255 - 127
    return IndexContextEntropy(
        tables=Tables.concatenate(
            [np.array([0, 2**16 * (81 - number) // 82]) for number in range(81)], [0] * 81, escapes=False
        ),
        space_fingerprint=SPACE,
        codec_name="golden",
        networks=tuple(
            network(
                (16 * (1 + size + size * (level > 0)) if phase else 0) + 5 * size * (level > 0),
                hidden,
                0,
                seed + 1000 * level + 100 * phase,
            )
            for level in levels
            for phase in range(5)
        ),
        forks=tuple(
            layer(hidden, len(tree) - 1, seed + 50 + level, 100, 7) for level, tree in enumerate(leaves)
        ),
        embeddings=embeddings.astype(np.int8),
        leaves=np.concatenate(leaves).astype(np.int32),
    )


TOP_TREE = [3, 0, 4, -1, 1, -1, 2, -1]
"""Of 5 codewords."""
BOTTOM_TREE = [5, 12, 0, 9, 15, 3, 7, 1, 14, 10, 2, 8, 4, 13, 6, 11]


def models() -> dict[str, EntropyModel]:
    """Entropy models by the names of their sidecars."""
    return {
        "latents": latent_model(),
        "indices": index_model(),
        "latents-context": latent_context_model(),
        "indices-context": index_context_model([TOP_TREE, BOTTOM_TREE]),
        "grid-context": index_context_model([BOTTOM_TREE], seed=1),
    }


def model_name(name: str) -> str | None:
    """The model of a file by its name; None: fixed length."""
    return None if name.endswith("fixed") else name.removesuffix("-tiled").removesuffix("-top")


def outline(levels: tuple[Level, ...], **fields) -> Header:
    size = {"height": 75, "width": 101}
    return Header(**(size | {"levels": levels, "num_layers": 1, "space_fingerprint": SPACE} | fields))


def latent_outline(**fields) -> Header:
    fingerprint = latent_model().fingerprint
    return outline((Level(side=8, channels=3),), step_size_index=1, entropy_fingerprint=fingerprint, **fields)


def index_outline(**fields) -> Header:
    return outline((Level(side=16, codebook_size=5), Level(side=4, codebook_size=16)), **fields)


def latent_values(header: Header) -> list[np.ndarray]:
    return [bell(int(np.prod(shape)), 1).reshape(shape) for shape in header.shapes]


def index_values(header: Header) -> list[np.ndarray]:
    sizes = [level.codebook_size for level in header.levels]
    return [
        (numbers(int(np.prod(shape)), size) * size >> 16).reshape(shape)
        for shape, size in zip(header.shapes, sizes)
    ]


def outlines() -> dict[str, Header]:
    """Headers of files by name; number of layers and entropy fingerprint aside."""
    return {
        "latents": latent_outline(),
        "latents-tiled": latent_outline(tile=4),
        "indices": index_outline(),
        "indices-tiled": index_outline(tile=3),
        "indices-fixed": index_outline(),
        "latents-context": latent_outline(),
        "latents-context-tiled": latent_outline(tile=6),
        "indices-context": index_outline(),
        "indices-context-tiled": index_outline(tile=3),
        "indices-context-top": outline((Level(side=16, codebook_size=5),)),
        "grid-context": outline((Level(side=8, codebook_size=16),)),
        "grid-context-tiled": outline((Level(side=8, codebook_size=16),), tile=5),
    }


def values_of(name: str) -> list[np.ndarray]:
    """Of a file."""
    header = outlines()[name]
    return index_values(header) if header.is_indices else latent_values(header)


def samples() -> dict[str, bytes]:
    """Files by name."""
    found = models()
    return {
        name: encode_values(found.get(model_name(name)), values_of(name), header)
        for name, header in outlines().items()
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, data in samples().items():
        (GOLDEN / f"{name}.lcf").write_bytes(data)
    for name, model in models().items():
        model.save(GOLDEN / f"{name}.entropy.safetensors")
