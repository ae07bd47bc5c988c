"""Writers of folders that are killed at every call which may change a file; imports nothing heavy, since it forks often."""

import io
import os
import signal
import sys
from pathlib import Path

from latent_codec.files import read_folder, replacing


def write_codec(path: Path, generation: str) -> None:
    with replacing(path, superseded=("weights*",)) as new:
        new.mkdir()
        (new / "config").write_text(generation)
        (new / "weights").write_text(generation)


def codec_with_notes(path: Path) -> None:
    """A folder of generation "old", with shards of its own and what its user put there."""
    (path / "papers").mkdir(parents=True)
    (path / "papers" / "mine.txt").write_text("mine")
    (path / "notes.txt").write_text("notes")
    (path / "latest").symlink_to("papers/mine.txt")
    (path / "weights.shard").write_text("old")
    for name in ("config", "weights"):
        (path / name).write_text("old")


def assert_whole(path: Path) -> str:
    """The generation of a codec, old or new, and never a mixture; the user's files are all there."""
    found = read_folder(path, lambda: [(path / name).read_text() for name in ("config", "weights")])
    assert found in (["old", "old"], ["new", "new"])
    assert (path / "notes.txt").read_text() == "notes"
    assert (path / "latest").readlink() == Path("papers/mine.txt")
    assert (path / "latest").read_text() == "mine"
    assert (path / "weights.shard").exists() == (found[0] == "old")
    return found[0]


def in_child(action) -> int:
    """The exit status of a forked process that runs `action`; negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


READING = {"fspath", "stat", "lstat", "listdir", "scandir", "getpid", "readlink", "fsencode", "access"}


def dying_at(number: int, action):
    """`action`, killed before its call `number` of the system that may change a file."""

    def count(frame, event, called):
        nonlocal number
        if event != "c_call" or called.__name__ in READING:
            return
        if called.__module__ in ("posix", "fcntl") or isinstance(called.__self__, io.IOBase):
            number -= 1
            if number == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def run():
        sys.setprofile(count)
        action()

    return run


def outcomes(folder: Path) -> list[str]:
    """What readers find, "old" or "new", after a writer was killed before its first call, its second, ... to its last."""
    found = []
    while True:
        path = folder / str(len(found)) / "codec"
        codec_with_notes(path)
        status = in_child(dying_at(len(found) + 1, lambda: write_codec(path, "new")))  # noqa: B023  runs at once
        found.append(assert_whole(path))
        write_codec(path, "new")
        assert assert_whole(path) == "new"
        assert [each.name for each in path.parent.iterdir()] == ["codec"]
        if status == 0:
            return found
        assert status == -signal.SIGKILL
