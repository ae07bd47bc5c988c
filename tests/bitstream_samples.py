"""Small compressed files of values that are computed by whole numbers, so that they are the same everywhere.

Run as a script it writes tests/golden, which is right only for a new version of the format.
"""

from pathlib import Path

import numpy as np

from latent_codec.bitstream.coding import encode_values
from latent_codec.bitstream.container import Header, Level
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
    """Whole numbers around 0, the sum of four dice; one of 64 is far off."""
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
        steps=steps,
        shifts=(np.tile(np.arange(8), 6) - 3).astype(np.float32) / -64,
    )


def index_model() -> StaticEntropy:
    """Two levels, of 5 and of 16 codewords."""
    top, bottom = np.array([0, 30000, 40000, 50000, 65535]), np.arange(16) * 4000
    tables = Tables.concatenate([top, bottom], [0, 0], escapes=False)
    return StaticEntropy(tables=tables, space_fingerprint=SPACE, codec_name="golden")


def outline(levels: tuple[Level, ...], **fields) -> Header:
    size = {"height": 75, "width": 101}
    return Header(**(size | {"levels": levels, "num_layers": 1, "space_fingerprint": SPACE} | fields))


def latent_outline(**fields) -> Header:
    fingerprint = latent_model().fingerprint
    return outline((Level(side=8, channels=3),), steps_index=1, entropy_fingerprint=fingerprint, **fields)


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


def samples() -> dict[str, bytes]:
    """Files by name."""
    plain, tiled = latent_outline(), latent_outline(tile=4)
    indices, index_tiles = index_outline(), index_outline(tile=3)
    return {
        "latents": encode_values(latent_model(), latent_values(plain), plain),
        "latents-tiled": encode_values(latent_model(), latent_values(tiled), tiled),
        "indices": encode_values(index_model(), index_values(indices), indices),
        "indices-tiled": encode_values(index_model(), index_values(index_tiles), index_tiles),
        "indices-fixed": encode_values(None, index_values(indices), indices),
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, data in samples().items():
        (GOLDEN / f"{name}.lcf").write_bytes(data)
    latent_model().save(GOLDEN / "latents.entropy.safetensors")
    index_model().save(GOLDEN / "indices.entropy.safetensors")
