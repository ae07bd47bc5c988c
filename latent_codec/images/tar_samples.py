"""The samples of an uncompressed tar: where each image and its label are, and what of the tar is left out."""

import io
import os
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from latent_codec.images.decoding import SUFFIXES, UNSUPPORTED_SUFFIXES, open_regular
from latent_codec.images.files import UNSUPPORTED, LeftOut, Waiting, reason_by_content

Place = tuple[int, int]
"""Offset and size of a member's bytes in the tar."""

_BLOCK = 512
_MAX_HEADER = 2**20  # bytes of a member's headers; GNU tar writes some hundreds
_MAX_PADDING = 2**20  # bytes of zeros behind the last member; GNU tar writes 10,240 at most by default
_SPECIAL = {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe"}
_TWICE = "a name that is in the tar again further on, where it is read, as by tar itself"
_FURTHER = "a further image of its sample, of which the first is read"
_DANGLING = "a link to a member that is not in the tar"
_SPARSE = "a sparse file, which is not supported: write it to the tar as a plain file"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image in a tar."""

    name: str
    """Tar and member."""
    tar: int
    """The tar's number."""
    place: Place
    label: tuple[str, int, int] | None
    """Kind ("json" or "cls"), offset and size; None where there is none."""
    others: tuple[tuple[str, Place], ...] = ()
    """Suffix and place of each further member."""


def read_tar_samples(path: Path, number: int, column: str | None) -> tuple[list[Sample], LeftOut]:
    """The samples of a tar, in its order, and what is left out.

    A sample are the members that share their name up to the first dot. Its image is the first member with an image's
    suffix, else the first whose content is one. Hidden members are passed over.

    Args:
        number: the tar's, which the samples get.
        column: the suffix of the image; None: the first image.

    Raises:
        ValueError: if the tar is damaged, compressed, or does not end in its end-of-archive block.
        OSError: if it cannot be read.
    """
    left_out = LeftOut()
    with open_regular(path) as file:
        members = _members(path, file, left_out)
        groups: dict[str, dict[str, Place]] = {}
        for name, place in members.items():
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if stem:
                groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix] = place
        samples = []
        for key, group in groups.items():
            suffix = _image_suffix(key, group, column, file, left_out)
            if suffix is None:
                continue
            places = {each.lower(): place for each, place in group.items()}
            label = next(((kind, *places[kind]) for kind in ("json", "cls") if kind in places), None)
            name = f"{path.name}/{_member_name(key, suffix.lower())}"
            used = {suffix.lower(), label[0] if label else None}
            others = tuple((each, place) for each, place in places.items() if each not in used)
            samples.append(Sample(name, number, group[suffix], label, others))
    return samples, left_out


def _member_name(key: str, suffix: str) -> str:
    return f"{key}.{suffix}" if suffix else key


def _image_suffix(
    key: str, group: dict[str, Place], column: str | None, file: BinaryIO, left_out: LeftOut
) -> str | None:
    """The suffix of a sample's image; where it has none, its members are left out."""
    if column is not None:
        column = column.lower().removeprefix(".")
        found = next((suffix for suffix in group if suffix.lower() == column), None)
        if found is None:
            left_out.add(f"a sample without a .{column} member", key)
        return found
    images = [suffix for suffix in group if _last(suffix) in SUFFIXES]
    for further in images[1:]:
        left_out.add(_FURTHER, _member_name(key, further))
    if images:
        return images[0]
    reasons = {}
    for suffix, place in group.items():
        reason = UNSUPPORTED
        if _last(suffix) not in UNSUPPORTED_SUFFIXES:
            reason = reason_by_content(io.BufferedReader(_Part(file, *place)))
        if reason is None:
            return suffix
        reasons[suffix] = reason
    for suffix, reason in reasons.items():
        left_out.add(reason, _member_name(key, suffix))
    return None


def _last(suffix: str) -> str:
    """ "photo.PNG" -> ".png"."""
    return f".{suffix.rpartition('.')[2].lower()}"


def _members(path: Path, file: BinaryIO, left_out: LeftOut) -> dict[str, Place]:
    """Name -> place of every file in a tar, links resolved, in its order."""
    end = os.fstat(file.fileno()).st_size
    places: dict[str, Place | None] = {}
    links: dict[str, str] = {}
    count, offset = 0, 0
    waiting = Waiting(f"reading the headers of {path}: %d members")
    try:
        headers = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which would hold every header
                headers.num_read = 0
                count += 1
                waiting.say(count)
                if member.size < 0 or member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} ends beyond the file")
                name = member.name
                if member.isdir():
                    continue
                if member.issparse():
                    left_out.add(_SPARSE, name)
                elif member.isreg() or member.islnk() or member.issym():
                    if name in places:
                        left_out.add(_TWICE, name)
                    links.pop(name, None)
                    places[name] = (member.offset_data, member.size) if member.isreg() else None
                    if member.islnk():
                        links[name] = member.linkname
                    elif member.issym():
                        folder = posixpath.dirname(name)
                        links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
                else:
                    left_out.add(_SPECIAL.get(member.type, "of an unknown kind"), name)
            offset = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        reason = "headers in headers" if isinstance(error, RecursionError) else " ".join(str(error).split())
        what = "no whole, uncompressed tar"
        raise ValueError(f"{path} is {what} ({reason}): unpack or copy it again") from None
    if damage := _damage_at_end(file, offset, end):
        raise ValueError(
            f"{path} is damaged: {damage}; {count:,} members before that can be read: copy or download it again"
        )
    return _resolved(places, links, left_out)


def _resolved(places: dict[str, Place | None], links: dict[str, str], left_out: LeftOut) -> dict[str, Place]:
    """The places with those of links; a link to nothing, or to itself, is left out."""
    found = {}
    for name, place in places.items():
        target, seen = name, set()
        while place is None and target in links and target not in seen:
            seen.add(target)
            target = links[target]
            place = places.get(target)
        if place is None:
            left_out.add(_DANGLING, name)
        else:
            found[name] = place
    return found


def _damage_at_end(file: BinaryIO, offset: int, end: int) -> str | None:
    """What is wrong with the end of a tar, whose headers end at `offset`: a block of zeros and nothing but zeros is due."""
    file.seek(offset)
    tail = file.read(_MAX_PADDING + 1)
    if not tail.strip(b"\0") and _BLOCK <= len(tail) <= _MAX_PADDING:
        return None
    if len(tail) < _BLOCK:
        return f"it ends at byte {end:,} without an end-of-archive block"
    if tail[:_BLOCK].strip(b"\0"):
        return f"the header at byte {offset:,} cannot be read"
    if tail.strip(b"\0"):
        return f"more follows the end-of-archive block at byte {offset:,} (a lost header, or several tars joined)"
    return f"{end - offset:,} bytes of zeros follow its last member (a download that was interrupted?)"


class _Headers:
    """A file for `tarfile` to read headers from: forward only, and no more than `_MAX_HEADER` for a member."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._furthest = 0
        self.num_read = 0
        """Bytes read for the member at hand, to be set to 0 for the next."""

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        if offset < self._furthest - _BLOCK:
            raise tarfile.ReadError("a size below 0")
        self._furthest = max(self._furthest, offset)
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        self.num_read += max(size, 0)
        if size < 0 or self.num_read > _MAX_HEADER:
            raise tarfile.ReadError(f"a member whose header has {max(size, self.num_read):,} bytes")
        return self._file.read(size)


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(offset + (0, self._place, self._size)[whence], 0)
        return self._place

    def readinto(self, buffer) -> int:
        self._file.seek(self._offset + self._place)
        read = self._file.read(max(min(len(buffer), self._size - self._place), 0))
        buffer[: len(read)] = read
        self._place += len(read)
        return len(read)
