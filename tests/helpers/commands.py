"""Commands in this process, and the files that they read and write."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np

from latent_codec.cli import main


def fails(capsys, *argv) -> str:
    """Run a command that must fail: status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"latent-codec {argv[0]}: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def without_progress(stderr: str) -> str:
    """What a process said, less the lines that it shows while libraries load on a busy machine."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("loading libraries: "))


def files_in(folder: str | Path) -> dict[str, bytes]:
    """Contents by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of `array`, packed if the name ends in .gz."""
    shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
    content = bytes((0, 0, 8, array.ndim)) + shape + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of files, by their names."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path
