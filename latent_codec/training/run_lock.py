"""One training at a time on a run folder: a lock that the system releases when its process ends, however it ends."""

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from latent_codec.errors import SettingError
from latent_codec.training.processes import is_main_process
from latent_codec.training.run_folder import check_run_folder

NAME = ".lock"
_LOCKED_BYTE = 1 << 30  # far behind what the file holds: Windows lets nobody read what is locked
_held: set[Path] = set()
logger = logging.getLogger(__name__)


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keep other processes from training in the run folder `out`, which is made if need be.

    The main process of a run holds the lock for all. A process that it forks does not hold it: a loader process that
    outlives it is in nobody's way. Where this process holds the lock already, nothing happens.

    Raises:
        ValueError: if another process holds it, naming process, host and time; or if `out` is no run's folder.
    """
    key = out.resolve()
    if key in _held or not is_main_process():
        yield
        return
    check_run_folder(out)
    made = [folder for folder in (key, *key.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with _open_locked(out) as file:
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        }
        file.truncate(0)
        file.write(json.dumps(holder).encode())
        file.flush()
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            if os.listdir(out) == [NAME]:  # nothing was begun
                with contextlib.suppress(OSError):
                    (out / NAME).unlink()
                    for folder in made:
                        folder.rmdir()


def _open_locked(out: Path) -> BinaryIO:
    """RUN/.lock, locked for this process."""
    while True:
        file = (out / NAME).open("a+b")
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            with file:
                holder = _holder(file)
            raise SettingError(
                "run_folder",
                "a run folder that no other process trains in",
                str(out),
                advice=f"{holder} does: wait for it, stop it, or give another `run_folder`",
            ) from None
        except OSError as error:
            logger.warning(
                f"Note: {out} cannot be locked ({error.strerror}), as on some network drives: make sure that nothing else "
                "trains in it."
            )
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (out / NAME).stat()):
                return file
        file.close()  # its holder has removed it meanwhile
        out.mkdir(parents=True, exist_ok=True)


def _lock(file: BinaryIO) -> None:
    """Lock one byte for this process, without waiting; closing the file unlocks it.

    POSIX record locks are the process's own: a forked child neither holds them nor keeps them alive.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it is only just being written
        return "another process"
