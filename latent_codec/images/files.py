"""Finding the images in folders: by suffix, else by content; what is left out is counted and named."""

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from latent_codec.files import special_kind
from latent_codec.images.decoding import (
    SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    ImageError,
    is_known_by_content,
    is_unsupported,
    open_regular,
    printable,
)
from latent_codec.images.volume_names import DICOM, is_dicom, is_volume_name, missing_package

logger = logging.getLogger(__name__)

UNSUPPORTED = "an image format that is not supported: save as JPEG, PNG or AVIF"
NO_IMAGE = "no image"
_LINKED_FOLDER = "a symbolic link to a folder, which is not followed: name the folder itself"
_NOWHERE = "a symbolic link that leads nowhere"
SIDECARS = ("caption", "txt", "json")
"""Suffixes of files that go with the image of the same name: captions, as trainers keep them, and what else is known."""
_MAX_NAMES = 5
_SECONDS_OF_SILENCE = 2.0


class LeftOut:
    """What is not read of a folder or tar: counted by reason and suffix; its text is one line."""

    def __init__(self):
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        self._counts[reason][Path(name).suffix.lower()] += 1
        if reason != NO_IMAGE and len(self._names[reason]) < _MAX_NAMES:
            self._names[reason].append(printable(name))

    def __bool__(self) -> bool:
        return bool(self._counts)

    @property
    def are_texts(self) -> bool:
        """Whether all of it may go with images of the same name, as captions do."""
        return all(
            reason == NO_IMAGE and {f".{each}" for each in SIDECARS}.issuperset(self._counts[reason])
            for reason in self._counts
        )

    def __str__(self) -> str:
        return "; ".join(map(self._reason, self._counts))

    def _reason(self, reason: str) -> str:
        counts, names = self._counts[reason], self._names[reason]
        most = counts.most_common(8)
        common = [f"{count:,} {printable(suffix) or 'without suffix'}" for suffix, count in most]
        more = [f"{len(counts) - len(common)} more suffixes"] if len(counts) > len(common) else []
        dots = ["..."] if names and counts.total() > len(names) else []
        named = f" ({', '.join([*names, *dots])})" if names else ""
        return f"{', '.join([*common, *more])}{named}: {reason}"


class Waiting:
    """Says on the log what work of unknown length is at, after two seconds, then more seldom, at least every ten.

    Args:
        text: with one %d for how much is done.
    """

    def __init__(self, text: str):
        self._text, self._start, self._due = printable(text), time.monotonic(), _SECONDS_OF_SILENCE

    def say(self, count: int) -> None:
        if time.monotonic() - self._start > self._due:
            self._due = min(2 * self._due, self._due + 10)
            logger.warning("Note: " + self._text + " so far", count)


def find_images(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Files as given; folders walked to the bottom, sorted by name, hidden ones left out.

    Of a folder every file is taken that has the suffix of a format that is read, or, whatever its suffix, the content
    of one. The rest is counted and named in a note on the log.

    Raises:
        ImageError: for a path that does not exist, or if no image is found at all.
    """
    return [path for path, _ in list_images(paths)]


def list_images(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[tuple[Path, Path]]:
    """`find_images`, each with its path relative to the folder given, or the name of the file given."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[tuple[Path, Path]] = []
    notes = []
    for path in map(Path, paths):
        if path.is_dir():
            left_out, known = LeftOut(), len(found)
            found += [(each, each.relative_to(path)) for each in _walk(path, left_out)]
            if left_out and not (left_out.are_texts and len(found) > known):
                notes.append(f"{printable(str(path))}: left out {left_out}")
        elif path.exists():
            found.append((path, Path(path.name)))
        elif path.is_symlink():
            raise ImageError(f"{path}: {_NOWHERE}")
        else:
            raise ImageError(f"{path}: no such file or folder")
    if not found:
        given = ", ".join(map(str, paths)) or "an empty list"
        raise ImageError("; ".join([f"no images in {given}", *notes]))
    for note in notes:
        logger.warning("Note: %s", note)
    return found


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """The images in a folder and then in its subfolders; says after two seconds that it is at work."""
    progress, num_seen = Waiting(f"looking for images in {folder}: %d files"), 0
    folders = [folder]
    while folders:
        current = folders.pop()
        name_below = os.path.relpath(current, folder) if current != folder else ""
        subfolders = []
        for entry in _entries(current, folder, left_out):
            num_seen += 1
            progress.say(num_seen)
            name = os.path.join(name_below, entry.name)
            reason = _reason_to_leave(entry)
            if reason is None:
                yield current / entry.name
            elif reason is _FOLDER:
                subfolders.append(current / entry.name)
            else:
                left_out.add(reason, name)
        folders += reversed(subfolders)


_FOLDER = "a folder"


def _entries(current: Path, folder: Path, left_out: LeftOut) -> list[os.DirEntry]:
    """What is in a folder, sorted by name, without hidden files and folders."""
    try:
        with os.scandir(current) as entries:
            visible = [each for each in entries if not each.name.startswith(".")]
        return sorted(visible, key=lambda each: each.name)
    except OSError as error:
        if current == folder:
            raise
        left_out.add(f"a folder that cannot be opened ({error.strerror})", os.path.relpath(current, folder))
        return []


def _reason_to_leave(entry: os.DirEntry) -> str | None:
    """Why an entry of a folder is left out; None for an image, `_FOLDER` for a folder to be walked."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return _FOLDER
        if entry.is_dir():
            return _LINKED_FOLDER
        if not entry.is_file():
            return special_kind(entry.stat().st_mode)
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in SUFFIXES:
            return None
        if suffix in UNSUPPORTED_SUFFIXES:
            return UNSUPPORTED
        if is_volume_name(entry.name):
            return missing_package(entry.name)
        with open_regular(entry.path) as file:
            return missing_package(DICOM) if is_dicom(file) else reason_by_content(file)
    except PermissionError:
        return "permission denied"
    except OSError:
        return _NOWHERE


def reason_by_content(file) -> str | None:
    """Why a file whose suffix tells nothing is left out; None for an image."""
    head = file.read(32)
    file.seek(0)
    if is_known_by_content(file):
        return None
    return UNSUPPORTED if is_unsupported(head) else NO_IMAGE
