"""Shards of a data set of latents: encoded, written, and listed in its index.

    latents/
      index.json                      written last: the data set is complete
      shards/00000-1f0c9b3a.tar       or .parquet, .safetensors
      shards/00000-1f0c9b3a.json      its marker, written after it: the shard is complete

The folder may be any that fsspec opens: a path, s3://, gs://, memory:// ...
"""

import errno
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from latent_codec.codec import LatentCodec
from latent_codec.files import replacing
from latent_codec.images.decoding import NO_FILE
from latent_codec.images.image_source import ImageSource
from latent_codec.latents.containers import WRITERS
from latent_codec.latents.locations import INDEX, SHARDS
from latent_codec.latents.plan import EncodingOptions, Shard, encoding_id, stored_name
from latent_codec.latents.samples import Preparing, Sample, Unreadable, batches, encode_batch

logger = logging.getLogger(__name__)

FORMAT = "latent-codec data set"
VERSION = 1


@dataclass(frozen=True)
class EncodedShard:
    """A shard's content, and what its marker says."""

    shard: Shard
    content: bytes
    """Empty where none of its images can be read; there is no file then."""
    marker: dict[str, Any]
    waited: float = 0.0
    """Seconds for which the network waited for images."""


class ShardBuilder:
    """Collects a shard's samples, in any order, until it is complete."""

    def __init__(self, shard: Shard, options: EncodingOptions, codec: LatentCodec):
        self.shard, self.options, self.codec = shard, options, codec
        self._samples: list[Sample] = []
        self._unreadable: list[Unreadable] = []

    def add(self, samples: Iterable[Sample]) -> None:
        self._samples += samples

    def skip(self, image: Unreadable) -> None:
        self._unreadable.append(image)

    def build(self) -> EncodedShard:
        """The shard's file, its samples in the order of their images; those of buckets bucket by bucket.

        Raises:
            FileNotFoundError: if all of its images are gone, as where a disk is.
        """
        if not self._samples and {each.reason for each in self._unreadable} == {NO_FILE}:
            gone = f"{NO_FILE}, nor any other of the {len(self._unreadable)} images of this shard"
            raise FileNotFoundError(errno.ENOENT, gone, self._unreadable[0].name)
        by_bucket = self.options.buckets
        samples = sorted(
            self._samples, key=lambda each: (each.frame.size if by_bucket else (), each.number, each.version)
        )
        content = WRITERS[self.options.container](samples, self.codec) if samples else b""
        sizes = Counter("x".join(map(str, each.frame.size)) for each in samples)
        marker = {
            "name": self.shard.name,
            "encoding": encoding_id(self.options, self.codec),
            "kind": self.options.kind,
            "codec": self.codec.name,
            "space_fingerprint": self.codec.space_fingerprint,
            "images": len({each.number for each in samples}),
            "samples": len(samples),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "sizes": dict(sorted(sizes.items())),
            "runs": [
                [*size, len(list(run))] for size, run in groupby(samples, key=lambda each: each.frame.size)
            ],
            "labels": sum(each.label is not None for each in samples),
            "captions": sum(each.caption is not None for each in samples),
            "skipped": [
                [each.name, each.reason] for each in sorted(self._unreadable, key=lambda each: each.number)
            ],
        }
        return EncodedShard(self.shard, content, marker)


def encode_shard(
    codec: LatentCodec,
    source: ImageSource,
    shard: Shard,
    options: EncodingOptions,
    *,
    batch_size: int = 32,
    num_threads: int = 2,
) -> EncodedShard:
    """Encode one shard in this process. Its bytes repeat where torch computes with the same number of threads.

    Args:
        batch_size: samples of one size that are encoded together, at most.
        num_threads: that read images ahead.

    Raises:
        LabelError, OSError: as `Preparing`.
    """
    builder = ShardBuilder(shard, options, codec)
    prepare = Preparing.of(source, options, codec)
    waited = 0.0

    def readable() -> Iterator[Sample]:
        nonlocal waited
        upcoming = _ahead(prepare, shard.numbers, num_threads, batch_size)
        for _ in shard.numbers:
            began = time.monotonic()
            found = next(upcoming)
            waited += time.monotonic() - began
            if isinstance(found, Unreadable):
                builder.skip(found)
            else:
                yield from found

    for batch in batches(readable(), batch_size):
        encode_batch(codec, batch, options)
        builder.add(batch)
    return replace(builder.build(), waited=waited)


def _ahead(function, items: Iterable, num_threads: int, ahead: int) -> Iterator:
    """`map`, by threads, that are at most `ahead` items ahead."""
    items = iter(items)
    with ThreadPoolExecutor(num_threads) as threads:
        waiting = [threads.submit(function, item) for item in islice(items, ahead + 1)]
        while waiting:
            found = waiting.pop(0).result()
            waiting += [threads.submit(function, item) for item in islice(items, 1)]
            yield found


class _WrittenByAnother(Exception):
    """A shard is there already."""


class DataSetFolder:
    """Where a data set of latents is written: a folder, or the URL of one.

    Writers may be killed at any moment, and several may write the same shards at once: each shard is there in full, or not.
    """

    def __init__(self, url: str | os.PathLike, **storage_options: Any):
        self.url = os.fspath(url)
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **storage_options)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local and "://" not in self.url:
            self.root = self.url  # as it was given, for messages

    def __str__(self) -> str:
        return self.url

    def path(self, *parts: str) -> str:
        """Of a file in it, as its file system calls it."""
        return "/".join([self.root.rstrip("/"), *parts])

    def read_index(self) -> dict[str, Any] | None:
        """The index; None while there is none.

        Raises:
            ValueError: if it is damaged, of another program, or of a later version.
        """
        try:
            content = self.fs.cat_file(self.path(INDEX))
        except FileNotFoundError:
            return None
        return parsed_index(content, f"{self.url.rstrip('/')}/{INDEX}")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file among the shards, by its name."""
        try:
            found = self.fs.ls(self.path(SHARDS), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rpartition("/")[2]: each["size"] for each in found if each["type"] == "file"}

    def markers(self, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """What is known of complete shards, by name; a damaged marker is none.

        Args:
            names: of the shards; None: all that are there.
        """
        sizes = self.sizes()
        if names is None:
            names = [file.removesuffix(".json") for file in sizes if file.endswith(".json")]
        paths = {self.path(SHARDS, f"{name}.json"): name for name in names if f"{name}.json" in sizes}
        contents = self.fs.cat(list(paths), on_error="omit") if paths else {}
        if isinstance(contents, bytes):  # fsspec gives a lone file's as it is
            contents = dict.fromkeys(paths, contents)
        found = {}
        for path, content in contents.items():
            marker = _parsed(content)
            if isinstance(marker, dict) and isinstance(marker.get("bytes"), int):
                found[paths.get(path, path.rpartition("/")[2].removesuffix(".json"))] = marker
        return found

    def is_complete(self, shard: Shard) -> bool:
        return self.fs.exists(self.path(SHARDS, f"{shard.name}.json"))

    def commit(self, encoded: EncodedShard, options: EncodingOptions) -> bool:
        """Write a shard and then its marker; False if another writer was first, whose shard stays.

        Raises:
            OSError: if there is no room, or the system says no.
        """
        file = self.path(SHARDS, encoded.shard.name + options.suffix)
        marker = self.path(SHARDS, f"{encoded.shard.name}.json")
        text = as_json(encoded.marker)
        if self.is_complete(encoded.shard):
            return False
        if not self.is_local:
            self.fs.makedirs(self.path(SHARDS), exist_ok=True)
            if encoded.content:
                self.fs.pipe_file(file, encoded.content)
            self.fs.pipe_file(marker, text)
            return True
        try:
            # Both files get their names while the folder is locked, so that no marker is another writer's.
            with ExitStack() as locked, replacing(marker) as written:
                written.write_bytes(text)
                if encoded.content:
                    with replacing(file) as partial:
                        partial.write_bytes(encoded.content)
                        locked.enter_context(_locked(Path(file).parent))
                        if self.is_complete(encoded.shard):
                            raise _WrittenByAnother
        except _WrittenByAnother:
            return False
        return True

    def remove_marker(self, shard: Shard) -> None:
        """Let a shard be written anew."""
        self.fs.rm_file(self.path(SHARDS, f"{shard.name}.json"))

    def write_index(self, index: dict[str, Any]) -> None:
        """Write the index, complete or not at all; one that says the same stays as it is."""
        content = as_json(index)
        path = self.path(INDEX)
        if self.fs.exists(path) and self.fs.cat_file(path) == content:
            return
        if not self.is_local:
            self.fs.pipe_file(path, content)
            return
        with replacing(path) as written:
            written.write_bytes(content)


@dataclass(frozen=True)
class Job:
    """What an engine is to do: encode the shards of `plan` that are missing in `folder`."""

    codec: LatentCodec
    source: ImageSource
    options: EncodingOptions
    folder: DataSetFolder
    plan: Sequence[Shard]
    batch_size: int = 32

    def missing(self) -> list[Shard]:
        """The shards that are to be encoded: those without a file as their marker says, and those of whose unreadable images one can be read now.

        Raises:
            ValueError: if the folder holds another encoding.
        """
        sizes, markers = self.folder.sizes(), self.folder.markers()
        encoding = encoding_id(self.options, self.codec)
        for marker in markers.values():
            if marker.get("encoding") != encoding:
                raise ValueError(self._other_encoding(marker))
        missing = []
        for shard in self.plan:
            marker = markers.get(shard.name)
            size = sizes.get(shard.name + self.options.suffix)
            if marker is not None and marker["bytes"] == (size or 0) and not self._is_repaired(marker, shard):
                continue
            if marker is not None and size not in (None, marker["bytes"]):
                logger.warning("written anew: %s is damaged", shard.name + self.options.suffix)
            if f"{shard.name}.json" in sizes:
                self.folder.remove_marker(shard)
            missing.append(shard)
        return missing

    @property
    def prepare(self) -> Callable[[int], list[Sample] | Unreadable]:
        """What makes the samples of an image of the source."""
        return Preparing.of(self.source, self.options, self.codec)

    def _is_repaired(self, marker: dict[str, Any], shard: Shard) -> bool:
        """Whether one of the images that a shard lacks can be read now."""
        skipped = {name for name, _ in marker.get("skipped", [])}
        if not skipped:
            return False
        prepare = self.prepare
        numbers = [number for number in shard.numbers if stored_name(self.source, number) in skipped]
        return any(not isinstance(prepare(number), Unreadable) for number in numbers)

    def _other_encoding(self, marker: dict[str, Any]) -> str:
        theirs = [f"{marker.get('kind')} of {marker.get('codec')} (space {marker.get('space_fingerprint')})"]
        ours = [f"{self.options.kind} of {self.codec.name} (space {self.codec.space_fingerprint})"]
        if theirs == ours:
            index = self.folder.read_index() or {}
            before, now = index.get("options", {}), self.options.to_json()
            now["dtype"] = self.options.stored_dtype(self.codec)
            names = [name for name in now if name in before and before[name] != now[name]]
            theirs += [f"{name} {before[name]}" for name in names] or ["other options"]
            ours += [f"{name} {now[name]}" for name in names] or ["these options"]
        return f"{self.folder} holds {', '.join(theirs)}, not {', '.join(ours)}; give another folder, or delete this one"

    def finish(self) -> dict[str, Any]:
        """Write the index, once all shards are complete, and return it.

        Raises:
            ValueError: if one is not, or no image at all can be read.
        """
        markers = self.folder.markers(each.name for each in self.plan)
        if absent := [each.name for each in self.plan if each.name not in markers]:
            raise ValueError(
                f"{self.folder}: {len(absent)} of {len(self.plan)} shards are missing, the first is {absent[0]}; "
                "run the same command again"
            )
        listed = [markers[each.name] for each in self.plan]
        index = index_of(self.codec, self.options, listed)
        if not index["samples"]:
            first = self.source.name(0)
            raise ValueError(f"none of the {len(self.source)} images can be read, the first is {first}")
        self.folder.write_index(index)
        return index


def index_of(
    codec: LatentCodec, options: EncodingOptions, markers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What `index.json` says of a data set whose shards have these markers."""
    sizes = sum((Counter(each["sizes"]) for each in markers), Counter())
    return {
        "format": FORMAT,
        "version": VERSION,
        "container": options.container,
        "kind": options.kind,
        "codec": {
            "name": codec.name,
            "pipeline": codec.pipeline,
            "space_fingerprint": codec.space_fingerprint,
            "fingerprint": codec.fingerprint,
            "codebook_sizes": codec.codebook_sizes,
        },
        "latent_space": asdict(codec.latent_space),
        "options": options.to_json() | {"dtype": options.stored_dtype(codec)},
        "encoding": encoding_id(options, codec),
        "images": sum(each["images"] for each in markers),
        "samples": sum(each["samples"] for each in markers),
        "skipped": sum(len(each["skipped"]) for each in markers),
        "bytes": sum(each["bytes"] for each in markers),
        "sizes": dict(sorted(sizes.items())),
        "labels": sum(each["labels"] for each in markers),
        "captions": sum(each["captions"] for each in markers),
        "shards": [
            {"name": each["name"] + options.suffix}
            | {key: each[key] for key in ("images", "samples", "bytes", "sha256", "runs")}
            for each in markers
            if each["samples"]
        ],
    }


def parsed_index(content: bytes, name: str) -> dict[str, Any]:
    """An index, of which that is checked which every reader needs.

    Raises:
        ValueError: if it is damaged, of another program, or of a later version, naming it.
    """
    index = _parsed(content)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{name} is no index of a data set of latents, or a damaged one")
    if index.get("version") != VERSION:
        got = f"{index.get('version')}; update latent-codec"
        raise ValueError(f"{name}: expected version {VERSION} of the index, got {got}")
    shards = index.get("shards")
    if not isinstance(shards, list) or not all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and "/" not in each["name"]
        and isinstance(each.get("samples"), int)
        for each in shards
    ):
        raise ValueError(f"{name} is damaged: its list of shards cannot be read")
    return index


def as_json(found: dict[str, Any]) -> bytes:
    """Equal dicts give equal bytes."""
    return (json.dumps(found, indent=1, sort_keys=True) + "\n").encode()


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that write shards to a local folder waiting, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of some network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
