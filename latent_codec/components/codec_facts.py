"""What a codec's folder says of it, without torch or diffusers: config.json, the weight file's header, and hashes of its tensors.

Only folders whose weight file carries the very config that is next to it are read here, and lone copies of such a file,
as everything that this package writes does: that they fit was checked when they were written. All others are to be built
(`LatentCodec`).
"""

import hashlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latent_codec.components.codec_folders import (
    ASSETS,
    SHIPPED,
    SHIPPED_PIPELINES,
    find_weights,
    is_foreign_file,
    pipeline_of,
    short_name,
)
from latent_codec.components.weight_files import CONFIG, config_in, metadata_of, read_config_file
from latent_codec.conversion.checkpoints import open_checkpoint
from latent_codec.families import LatentSpace, family_class
from latent_codec.families.pipeline_spaces import PIPELINES
from latent_codec.files import read_folder

if TYPE_CHECKING:
    from latent_codec.codec import LatentCodec

_DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8"}
"""Of torch; bfloat16 is the upper half of a float32."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last names of a batch norm's tensors that are no parameters."""


@dataclass(frozen=True, kw_only=True)
class CodecFacts:
    """A codec as its folder says it is; the attributes are those of `LatentCodec`."""

    name: str
    class_name: str
    config: dict
    pipeline: str | None
    latent_space: LatentSpace
    num_parameters: int
    space_fingerprint: str | None
    fingerprint: str | None

    @property
    def channels(self) -> int:
        return family_class(self.class_name, self.config).image_channels(self.config)

    @property
    def codebook_sizes(self) -> list[int]:
        """Of each level, top first; empty where there is no codebook."""
        return [size for size, _ in self._levels]

    @property
    def position_sides(self) -> list[int | Fraction]:
        """Pixels that an index of each level, or a position of the latents, stands for, along one side, top first."""
        return [side for _, side in self._levels] or [self.latent_space.downsampling_factor]

    @property
    def _levels(self) -> Sequence[tuple[int, int | Fraction]]:
        return family_class(self.class_name, self.config).level_shapes(self.config)

    def describe(self) -> dict[str, Any]:
        """What `latent-codec info` shows, ready for JSON; of levels, top first."""
        return {
            "kind": "codec",
            "name": self.name,
            "class": self.class_name,
            "parameters": self.num_parameters,
            "image_channels": self.channels,
            "latent_channels": self.latent_space.channels,
            "downsampling_factor": self.latent_space.downsampling_factor,
            "pipeline": self.pipeline,
            "latents": self._describe_latents(),
            "packing": self.latent_space.describe_packing(),
            **(self._describe_codebooks() if self.codebook_sizes else {}),
            **self.latent_space.to_config(),
            "force_upcast": bool(self.config.get("force_upcast")),
            "space_fingerprint": self.space_fingerprint,
            "fingerprint": self.fingerprint,
        }

    def _describe_latents(self) -> str:
        """Whose they are."""
        if self.pipeline is not None:
            return f"as {self.pipeline} sees them ({PIPELINES[self.pipeline].title})"
        usual = family_class(self.class_name, self.config).usual_pipeline
        if usual is not None:
            return f"as {PIPELINES[usual].title}'s pipelines see them, the usual ones of {self.class_name}"
        return f"as the config says, the usual ones of {self.class_name}"

    def _describe_codebooks(self) -> dict[str, Any]:
        """Index maps and bits are those of a square image of `sample_size`, 256 where the config has none."""
        sizes, side = self.codebook_sizes, self.config.get("sample_size") or 256
        grids = grid_shapes(self.position_sides, side, side)
        dim = family_class(self.class_name, self.config).codeword_dim(self.config)
        return {
            "codebook_sizes": sizes,
            "codeword_dims": [dim] * len(sizes),
            "sample_size": side,
            "grids": [list(shape) for shape in grids],
            "bits_per_pixel_at_fixed_length": round(fixed_length_bits(grids, sizes) / side**2, 6),
        }


def grid_shapes(sides: Sequence[int | Fraction], height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each level's index map, for an image that is padded to positions of the top level.

    Args:
        sides: pixels that an index of each level stands for, along one side, top first.
    """
    rows, columns = (-(-length // sides[0]) for length in (height, width))
    return [(rows * sides[0] // side, columns * sides[0] // side) for side in sides]


def fixed_length_bits(shapes: Sequence[tuple[int, int]], sizes: Sequence[int]) -> float:
    """Add up log2(codebook_size) bits for every index of index maps of these shapes."""
    return sum(math.prod(shape) * math.log2(size) for shape, size in zip(shapes, sizes, strict=True))


def facts_of(codec: "LatentCodec", *, fingerprints: bool = True) -> CodecFacts:
    """The facts of a codec that was built; without `fingerprints` these are None, and no weight is read."""
    return CodecFacts(
        name=codec.name,
        class_name=type(codec.autoencoder).__name__,
        config=dict(codec.autoencoder.config),
        pipeline=codec.pipeline,
        latent_space=codec.latent_space,
        num_parameters=codec.num_parameters,
        space_fingerprint=codec.space_fingerprint if fingerprints else None,
        fingerprint=codec.fingerprint if fingerprints else None,
    )


@lru_cache
def shipped_name(space_fingerprint: str, pipeline: str | None = None) -> str | None:
    """What `find_weights` takes for the shipped codec with this latent space, for a pipeline; None if there is none."""
    names = (*SHIPPED, *(str(ASSETS / folder) for folder in SHIPPED_PIPELINES))
    facts = ((name, read_facts(name, pipeline)) for name in names)
    return next((name for name, each in facts if each and each.space_fingerprint == space_fingerprint), None)


def read_facts(name_or_path: str | os.PathLike, pipeline: str | None = None) -> CodecFacts | None:
    """Read a codec without building it; None where only building tells whether its files fit.

    Args:
        pipeline: as for `LatentCodec.from_pretrained`.

    Raises:
        ValueError: if there is no codec.
        OSError: if its files cannot be read.
    """
    if is_foreign_file(name_or_path):
        path = Path(name_or_path)
        return _read(path, path.stem, pipeline or pipeline_of(path)) if _is_own_copy(path) else None
    weights = find_weights(name_or_path, None)
    pipeline = pipeline or pipeline_of(weights)
    return read_folder(weights.parent, lambda: _read(weights, short_name(name_or_path), pipeline))


def digest(values: np.ndarray) -> str:
    """SHA-256 of an array's shape and float32 values."""
    header = struct.pack(f"<{values.ndim + 1}q", values.ndim, *values.shape)
    return hashlib.sha256(header + np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def fingerprint(digests: Mapping[str, str], space: LatentSpace) -> str:
    """16 hex digits over the digests of weights by their names, and over a latent space's scale and shift."""
    entries = {key: digest(np.asarray(value, np.float32)) for key, value in space.identity().items()}
    lines = [f"{key} {each}\n" for key, each in sorted((dict(digests) | entries).items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _is_own_copy(path: Path) -> bool:
    """Whether a lone weight file has diffusers' own key layout and carries the config that its shapes show."""
    from latent_codec.conversion.foreign import read_foreign

    if config_in(metadata_of(path)) is None:
        return False
    try:
        foreign = read_foreign(path)
    except ValueError:  # building says what is wrong
        return False
    is_own = "diffusers" in foreign.format.names and not foreign.prefix
    return is_own and not foreign.count_keys_by_name()["unexpected"]


def _read(weights: Path, name: str, pipeline: str | None) -> CodecFacts | None:
    if weights.suffix != ".safetensors" or not weights.is_file():
        return None
    try:
        neighbor = None if is_foreign_file(weights) else read_config_file(weights.parent / CONFIG)
        stored = open_checkpoint(weights)
        own = config_in(stored.metadata)
        config = own if neighbor is None else neighbor
        if own is None or own != {key: each for key, each in config.items() if key in own}:
            return None
        class_name = config["_class_name"]
        family = family_class(class_name, config)
        num_parameters, digests, statistics = 0, {}, {}
        with weights.open("rb") as file:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)  # values follow the header
            for key, shape in stored.shapes.items():
                dtype = np.dtype(_DTYPES[stored.dtype_names[key]])
                values = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
                if stored.dtype_names[key] == "bfloat16":
                    values = (values.astype("<u4") << 16).view("<f4")
                digests[key] = digest(values)
                if key in family.statistics_keys:
                    statistics[key] = values
                if not key.startswith("usage_") and key.rpartition(".")[2] not in _STATISTICS:
                    num_parameters += values.size
        space = LatentSpace.read(class_name, config, pipeline, statistics)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None  # building says what is wrong
    decoder_keys = family.decoder_keys(config)
    in_space = {key: each for key, each in digests.items() if not key.startswith(decoder_keys)}
    return CodecFacts(
        name=name,
        class_name=class_name,
        config=config,
        pipeline=pipeline,
        latent_space=space,
        num_parameters=num_parameters,
        space_fingerprint=fingerprint(in_space, space),
        fingerprint=fingerprint(digests, space),
    )
