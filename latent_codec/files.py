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
    A folder that already stands at `path` is swapped out, then removed. Weights
    get the permissions of other new files: safetensors keeps them to their owner.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    written = holder / path.name
    try:
        yield written
        _let_others_read(written)
        if path.is_dir():
            os.rename(path, holder / (path.name + ".replaced"))
        os.replace(written, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _let_others_read(written: Path) -> None:
    """Give safetensors files, `written` itself or in it, the mode that the umask leaves to new files."""
    weights = [written, *written.rglob("*.safetensors")] if written.is_dir() else [written]
    weights = [file for file in weights if file.suffix == ".safetensors" and file.is_file()]
    if weights:
        probe = written.with_name(
            written.name + ".mode"
        )  # since reading the umask would change it for other threads
        probe.touch()
        for file in weights:
            file.chmod(probe.stat().st_mode)
        probe.unlink()


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1024: `7.8 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
