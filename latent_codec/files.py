"""Writing files so that they are complete or absent, never half there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside `path` to write to, and rename it to `path` once the block ends well.

    The block may create a file or a folder there. If the block raises (a full
    disk, an interrupt) what it wrote is removed and `path` is as it was.
    A folder that already stands at `path` is swapped out, then removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    written = holder / path.name
    try:
        yield written
        if path.is_dir():
            os.rename(path, holder / "replaced")
        os.replace(written, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1024: `7.8 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
