"""What entropy models that can be stored have in common: arrays, a fingerprint over them, and their file."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors.numpy import save_file

from latent_codec.files import replacing

FILE_NAME = "entropy.safetensors"
FORMAT = "latent-codec-entropy"
VERSION = "1"


class StoredEntropy:
    """An entropy model of integer tables and, for latents, steps and shifts."""

    kind: ClassVar[str]
    """In the file's metadata."""
    space_fingerprint: str
    codec_name: str

    @property
    def num_steps(self) -> int:
        """Step sizes to choose from; 0 for indices."""
        return 0

    def codes(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Values are their own codes, unless a subclass says otherwise."""
        return list(values)

    def values(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inverse of `codes`."""
        return list(codes)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that decoding depends on but the space fingerprint, by the names in the file."""
        raise NotImplementedError

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], **names: str) -> "StoredEntropy":
        """The inverse of `arrays`, which are taken out one by one; `names` are space_fingerprint and codec_name.

        Raises:
            KeyError: for a missing array.
            ValueError: for arrays that do not belong together.
        """
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all arrays and the codec's space."""
        digest = hashlib.sha256(f"{self.kind} {self.space_fingerprint}\n".encode())
        for name, array in sorted(self.arrays().items()):
            little_endian = array.astype(array.dtype.newbyteorder("<"))
            digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode() + little_endian.tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike) -> None:
        """Write the sidecar, complete or not at all; a folder stands for its `entropy.safetensors`.

        Raises:
            OSError: if it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "codec": self.codec_name,
            "space_fingerprint": self.space_fingerprint,
        }
        with replacing(sidecar_path(path)) as written:
            save_file(self.arrays(), written, metadata)


def sidecar_path(path: str | os.PathLike) -> Path:
    """`path`, or the sidecar in it if it is a folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path
