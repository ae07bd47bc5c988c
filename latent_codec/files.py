"""Writing files and folders so that they are complete or absent, and reading folders that someone may be replacing.

    other files of the old folder --linked--> .codec.????????.partial/codec  <--names exchanged in one step-->  codec

A process may be killed at any moment, and others may read or write the same path meanwhile.
"""

import errno
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

_HOLDER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.partial", re.DOTALL)
_REPLACED = ".replaced"
_PATIENCE = 5.0
"""Seconds to wait for a folder that another process is between two renames of."""
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV}
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

_cleaned: set[Path] = set()
"""Folders in which this process has looked for what killed writers left."""


@contextmanager
def replacing(path: str | os.PathLike, *, superseded: Sequence[str] = ()) -> Iterator[Path]:
    """Give a path next to `path` to write to, and give it the name `path` once the block ends well.

    The block may create a file or a folder there. If the block raises (a full disk, an interrupt) what it wrote is
    removed and `path` is as it was; if the process is killed, `path` is the old or the new one.
    Other files of a folder at `path` stay: those that the block did not write are carried over, with their folders.
    Weights get the permissions of other new files: safetensors keeps them to their owner.

    Args:
        superseded: patterns (`fnmatch`, on paths relative to the folder) of files that are not carried over.

    Raises:
        OSError: if it cannot be written, naming `path`; if a file was written and `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        path = path.resolve()  # of a link, what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _cleaned:
        _cleaned.add(path.parent)
        _clean_up(path.parent)
    with _holder(path) as holder:
        written = holder / path.name
        try:
            yield written
            _let_others_read(written)
            if written.is_dir():
                restore(path)
                _clean_up(path.parent)
                _replace_folder(path, written, superseded)
            elif path.is_dir():
                raise IsADirectoryError(
                    errno.EISDIR, "is a folder, where a file is to be written; name another", str(path)
                )
            else:
                os.replace(written, path)
        except Exception as error:
            named = _naming(path, holder, error)
            if named is error:
                raise
            raise named from error


def restore(path: str | os.PathLike) -> None:
    """Give a folder its name back if a writer was killed while it replaced it; wait for a writer that lives.

    Only file systems that cannot exchange names in one step leave a moment without the folder.
    """
    path = Path(path)
    deadline = time.monotonic() + _PATIENCE
    while not os.path.lexists(path):
        waiting = False
        for holder in _holders(path.parent, path.name):
            if (holder / (path.name + _REPLACED)).is_dir():
                waiting = not _remove(holder, patience_is_over=time.monotonic() > deadline)
        if not waiting or time.monotonic() > deadline:
            return
        time.sleep(0.01)


def read_folder(folder: str | os.PathLike, read: Callable[[], Found]) -> Found:
    """Give what `read` makes of the files of `folder`, all of them of one writing.

    Where `folder` was replaced meanwhile, what was read may be of two writings, or missing: it is read again.
    """
    while True:
        restore(folder)
        with _identity(folder) as is_same:
            try:
                found = read()
            except Exception:
                restore(folder)
                if is_same():
                    raise
            else:
                if is_same():
                    return found


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """All files below with one of these suffixes, sorted; hidden ones and folders, in which unfinished files are, are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def check_is_file(path: str | os.PathLike) -> None:
    """Refuse what is no regular file before it is opened: a FIFO would wait for a writer.

    Raises:
        ValueError: naming what it is.
        OSError: if there is nothing.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"expected a file, got {path}, which is {special_kind(mode)}; give a file")


def special_kind(mode: int) -> str:
    """What `st_mode` says of something that is no regular file."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def _holder(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, locked as long as the block and this process last."""
    while True:
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            lock = _lock(holder)
        except (BlockingIOError, FileNotFoundError):
            continue  # someone who cleans up took it for a killed writer's
        if holder.is_dir():
            break
        _unlock(lock)
    try:
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        _unlock(lock)


def _replace_folder(path: Path, written: Path, superseded: Sequence[str]) -> None:
    is_new = not os.path.lexists(path)
    if not is_new:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        shutil.copymode(path, written)
        _carry_over(path, written, superseded)
    _flush(written.parent)
    if is_new:
        os.rename(written, path)
    elif not _exchange(written, path):
        former = written.with_name(path.name + _REPLACED)
        os.rename(path, former)
        try:
            os.rename(written, path)
        except OSError:
            os.rename(former, path)
            raise
    _flush_entry(path.parent)


def _carry_over(old: Path, new: Path, superseded: Sequence[str], inside: str = "") -> None:
    """Link, or else copy, all that `old` has and `new` has not; symbolic links stay what they are."""
    for entry in os.scandir(old):
        name, target = f"{inside}{entry.name}", new / entry.name
        if entry.is_dir(follow_symlinks=False):
            is_new = not os.path.lexists(target)
            if is_new:
                target.mkdir()
            elif target.is_symlink() or not target.is_dir():
                continue
            _carry_over(Path(entry.path), target, superseded, f"{name}/")
            if is_new and not any(target.iterdir()) and any(os.scandir(entry.path)):
                target.rmdir()  # all of it is superseded
            elif is_new:
                shutil.copystat(entry.path, target)
        elif not os.path.lexists(target) and not any(fnmatchcase(name, each) for each in superseded):
            with suppress(FileNotFoundError):  # removed by its owner meanwhile
                _link(entry, target)


def _link(entry: os.DirEntry, target: Path) -> None:
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), target)
        return
    try:
        os.link(entry.path, target)
    except FileNotFoundError:
        raise
    except OSError:
        if not entry.is_file():
            raise
        shutil.copy2(entry.path, target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step; False where the system or the file system cannot.

    Linux has renameat2 with RENAME_EXCHANGE, macOS renamex_np with RENAME_SWAP; both flags are 2.
    """
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform not in ("linux", "darwin"):
        return False
    import ctypes

    system = ctypes.CDLL(None, use_errno=True)
    function = getattr(system, "renameat2" if sys.platform == "linux" else "renamex_np", None)
    if function is None:
        return False
    here = -100  # AT_FDCWD: relative paths begin at the working directory
    arguments = (here, names[0], here, names[1], 2) if sys.platform == "linux" else (*names, 2)
    if function(*arguments) == 0:
        return True
    reason = ctypes.get_errno()
    if reason in _NO_EXCHANGE:
        return False
    raise OSError(reason, os.strerror(reason), str(other))


def _flush(folder: Path) -> None:
    """Let the disk have all files of a folder, and the folder itself, before their names are exchanged."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _flush(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            _flush_entry(entry.path)
    _flush_entry(folder)


def _flush_entry(path: str | os.PathLike) -> None:
    with suppress(PermissionError):  # of a file that was carried over, or of any folder on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # a system without it
                raise
        finally:
            os.close(descriptor)


def _holders(parent: Path, name: str | None = None) -> list[Path]:
    """Folders that writers of `name`, or of any, keep in `parent`."""
    try:
        with os.scandir(parent) as entries:
            found = [entry for entry in entries if entry.name.endswith(".partial")]
    except OSError:
        return []
    matches = [(Path(entry.path), _HOLDER.fullmatch(entry.name)) for entry in found]
    return [path for path, match in matches if match and name in (None, match["name"])]


def _clean_up(parent: Path) -> None:
    """Remove what killed writers left in `parent`; living ones keep a lock."""
    for holder in _holders(parent):
        _remove(holder)


def _remove(holder: Path, *, patience_is_over: bool = False) -> bool:
    """Remove a killed writer's folder, after giving back what it had taken away; False if the writer may be living."""
    try:
        lock = _lock(holder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if lock is None and not patience_is_over:
            return False
        path = holder.with_name(_HOLDER.fullmatch(holder.name)["name"])
        former = holder / (path.name + _REPLACED)
        if former.is_dir():
            if os.path.lexists(path):
                _carry_over(former, path, ())
            else:
                os.rename(former, path)
        if lock is not None:
            shutil.rmtree(holder, ignore_errors=True)
    except OSError:
        return False
    finally:
        _unlock(lock)
    return True


def _lock(folder: Path) -> int | None:
    """Lock a folder until `_unlock`, or the end of this process; None where folders have no locks.

    Raises:
        BlockingIOError: if another has locked it.
        FileNotFoundError: if it is gone.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # some network file systems
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextmanager
def _identity(folder: str | os.PathLike) -> Iterator[Callable[[], bool]]:
    """Whether `folder` is still the one it was; it is held open meanwhile, so that no other gets its number."""

    def number() -> tuple[int, int] | None:
        try:
            found = os.stat(folder)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    descriptor = None
    with suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        if descriptor is None:
            before = number()
        else:
            held = os.fstat(descriptor)
            before = held.st_dev, held.st_ino
        yield lambda: number() == before
    finally:
        _unlock(descriptor)


def _naming(path: Path, holder: Path, error: Exception) -> Exception:
    """An error of the disk, with the name of what was to be written; others as they are."""
    if type(error).__name__ == "SafetensorError":  # by name, so that safetensors need not be imported for it
        return OSError(f"cannot write {path}: {error}")
    if not isinstance(error, OSError) or not error.errno:
        return error
    named = None if error.filename is None else os.fspath(error.filename)
    inside = isinstance(named, str) and Path(named).is_relative_to(holder)
    if inside or (named is None and error.errno in _DISK_FAULTS):
        return OSError(error.errno, error.strerror, str(path))
    return error


def _let_others_read(written: Path) -> None:
    """Give safetensors files, `written` itself or in it, the mode that the umask leaves to new files."""
    weights = [written, *written.rglob("*.safetensors")] if written.is_dir() else [written]
    weights = [file for file in weights if file.suffix == ".safetensors" and file.is_file()]
    if weights:
        # Since reading the umask would change it for other threads.
        probe = written.with_name(written.name + ".mode")
        probe.touch()
        for file in weights:
            file.chmod(probe.stat().st_mode)
        probe.unlink()


@contextmanager
def named_in_utf8(path: Path) -> Iterator[Path]:
    """Give a name in UTF-8 for a file, as safetensors wants to open one: its own, or, during the block, that of a link."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def modified(path: str | os.PathLike) -> int:
    """When a file was last written, in ns; 0 where that cannot be told, as reading it will say."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def plain(found):
    """Lists and dicts for JSON, which knows no infinity: an infinite or undefined number becomes None."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1024: `7.8 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
