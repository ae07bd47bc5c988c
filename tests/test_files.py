"""Files and folders that are complete or absent, whenever their writer dies, and whoever reads them meanwhile."""

import errno
import os
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.killed_writers import assert_whole, codec_with_notes, in_child, write_codec
from helpers.processes import run_fresh
from safetensors.torch import save_file

from latent_codec import files
from latent_codec.files import check_is_file, read_folder, replacing, restore

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX permissions")


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder) -> list[str]:
    return sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*"))


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@POSIX
@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_weights_are_readable_by_whom_the_umask_lets(tmp_path, umask, name):
    """safetensors alone leaves 0600, and a codec in a shared folder could not be opened."""
    with replacing(tmp_path / name) as new:
        weights = new
        if name == "folder":
            weights = new / "vae" / "weights.safetensors"
            weights.parent.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, weights)
    (written,) = tmp_path.rglob("*.safetensors")
    assert mode(written) == 0o666 & ~umask
    assert sorted(tmp_path.iterdir()) == [tmp_path / name]


def test_what_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as new:
        new.mkdir()
        (new / "half").write_text("ha")
        raise OSError("disk full")
    assert [each.name for each in tmp_path.rglob("*")] == ["folder", "old"]


@pytest.fixture(params=["names exchanged", "two renames"])
def system(request, monkeypatch):
    """This system, and one that has no call to exchange two names."""
    if request.param == "two renames":
        monkeypatch.setattr(sys, "platform", "aix")
    return request.param


@pytest.mark.parametrize("name", ["codec", "replaced", "a.partial", "b\n(c)"])
def test_a_folder_is_replaced_and_files_of_others_stay(tmp_path, system, name):
    path = tmp_path / name
    codec_with_notes(path)
    write_codec(path, "new")
    assert assert_whole(path) == "new"
    assert names_in(path) == ["config", "latest", "notes.txt", "papers", "papers/mine.txt", "weights"]
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_file_that_was_noted_while_the_new_folder_was_written_stays(tmp_path, system):
    codec_with_notes(tmp_path / "codec")
    with replacing(tmp_path / "codec") as new:
        new.mkdir()
        (new / "config").write_text("new")
        (tmp_path / "codec" / "late.txt").write_text("late")
    assert (tmp_path / "codec" / "late.txt").read_text() == "late"


def test_folders_of_superseded_files_alone_go_and_empty_ones_stay(tmp_path):
    path = tmp_path / "pipeline"
    for name in ("prior/weights", "vae/weights", "vae/mine"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("old")
    (path / "empty").mkdir()
    with replacing(path, superseded=("*/weights",)) as new:
        (new / "vae").mkdir(parents=True)
        (new / "vae" / "weights").write_text("new")
    assert names_in(path) == ["empty", "vae", "vae/mine", "vae/weights"]
    assert (path / "vae" / "weights").read_text() == "new"


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    codec_with_notes(tmp_path / "codec")
    (tmp_path / "link").symlink_to("codec", target_is_directory=True)
    write_codec(tmp_path / "link", "new")
    assert (tmp_path / "link").readlink() == Path("codec")
    assert assert_whole(tmp_path / "codec") == "new"


def test_a_folder_never_gives_way_to_a_file_nor_a_file_to_a_folder(tmp_path):
    codec_with_notes(tmp_path / "codec")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IsADirectoryError, match="codec"), replacing(tmp_path / "codec") as new:
        new.write_text("new")
    with pytest.raises(NotADirectoryError, match="file"), replacing(tmp_path / "file") as new:
        new.mkdir()
    assert assert_whole(tmp_path / "codec") == "old"
    assert (tmp_path / "file").read_text() == "mine"


KILLED = """
import sys
from pathlib import Path
if sys.argv[2] == "two renames":
    sys.platform = "aix"
from helpers.killed_writers import outcomes
print(*outcomes(Path(sys.argv[1])))
"""  # in an interpreter of its own: one that has imported torch takes 30 times longer to fork


@POSIX
def test_a_writer_killed_at_any_call_loses_nothing(tmp_path, system):
    tests = str(ROOT / "tests")
    told = run_fresh(KILLED, tmp_path, system, PYTHONPATH=f"{ROOT}{os.pathsep}{tests}").stdout
    outcomes = told.split()
    assert len(outcomes) > 30
    assert outcomes == sorted(outcomes, reverse=True)  # "old" until the exchange, "new" from it on


@POSIX
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    def killed():
        with replacing(tmp_path / "one.txt") as new:
            new.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    def another():
        with replacing(tmp_path / "two.txt") as new:
            new.write_text("two")

    assert in_child(killed) == -signal.SIGKILL
    assert any(each.name.endswith(".partial") for each in tmp_path.iterdir())
    with replacing(tmp_path / "living.txt") as living:
        living.write_text("living")
        assert in_child(another) == 0
        assert names_in(tmp_path)[1:] == [
            living.relative_to(tmp_path).as_posix(),
            "two.txt",
        ]
    assert names_in(tmp_path) == ["living.txt", "two.txt"]


@POSIX
def test_a_folder_that_version_0_1_lost_is_found_again(tmp_path):
    """Killed between its two renames, it left the folder in a hidden one."""
    holder = tmp_path / ".codec.abcd_123.partial"
    holder.mkdir()
    codec_with_notes(holder / "codec.replaced")
    write_codec(holder / "codec", "new")
    assert assert_whole(tmp_path / "codec") == "old"
    assert names_in(tmp_path)[0] == "codec"


def test_nothing_is_restored_where_nothing_was(tmp_path):
    restore(tmp_path / "codec")
    restore(tmp_path / "no" / "codec")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        read_folder(tmp_path / "codec", lambda: (tmp_path / "codec" / "config").read_text())


def test_a_reader_next_to_a_writer_never_meets_half_of_two(tmp_path, system):
    path, stop, failures = tmp_path / "codec", threading.Event(), []
    write_codec(path, "0")

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            write_codec(path, str(number))

    def read():
        return [(path / name).read_text() for name in ("config", "weights")]

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        while len(seen) < 20:
            config, weights = read_folder(path, read)
            seen.add(config)
            failures += [(config, weights)] * (config != weights)
    finally:
        stop.set()
        writer.join()
    assert not failures


def test_an_error_of_a_steady_folder_is_raised_at_once(tmp_path):
    write_codec(tmp_path / "codec", "new")
    calls = []

    def read():
        calls.append(1)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        read_folder(tmp_path / "codec", read)
    assert len(calls) == 1


@POSIX
@pytest.mark.parametrize("kind", ["bytes", "safetensors", "folder"])
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path, kind):
    import resource  # which Windows has not

    path, before = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.mkdir() if kind == "folder" else path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, replacing(path) as new:
            if kind == "folder":
                new.mkdir()
            if kind == "safetensors":
                save_file({"a": torch.zeros(10_000)}, new)
            else:
                (new / "a" if kind == "folder" else new).write_bytes(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in str(caught.value) and ".partial" not in str(caught.value)
    assert names_in(tmp_path) == ["full"]


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "new"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")
    assert caught.value.errno == errno.ENOENT


@POSIX
def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a named pipe"):
        check_is_file(tmp_path / "pipe")
    with pytest.raises(ValueError, match="folder"):
        check_is_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_is_file(tmp_path / "nothing")
    (tmp_path / "file").touch()
    check_is_file(tmp_path / "file")


@POSIX
def test_a_pipe_in_a_folder_is_carried_over(tmp_path):
    codec_with_notes(tmp_path / "codec")
    os.mkfifo(tmp_path / "codec" / "pipe")
    write_codec(tmp_path / "codec", "new")
    assert stat.S_ISFIFO((tmp_path / "codec" / "pipe").stat().st_mode)


@POSIX
def test_where_folders_have_no_locks_nothing_is_taken_from_a_writer(tmp_path, monkeypatch):
    """As on Windows: no folder of a writer is removed, and a lost one comes back once a living writer had its time."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    holder = tmp_path / ".codec.abcd_123.partial"
    holder.mkdir()
    codec_with_notes(holder / "codec.replaced")
    assert assert_whole(tmp_path / "codec") == "old"
    write_codec(tmp_path / "codec", "new")
    assert assert_whole(tmp_path / "codec") == "new"
    assert holder.is_dir()
