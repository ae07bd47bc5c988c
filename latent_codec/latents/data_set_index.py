"""What the index of a data set of latents says, and whether its shards are there and whole."""

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from latent_codec.components.codec_facts import read_facts
from latent_codec.families import LatentSpace
from latent_codec.latents.locations import INDEX, SHARDS
from latent_codec.latents.shards import DataSetFolder

Size = tuple[int, int]


@dataclass(frozen=True)
class ShardEntry:
    """A shard, as the index has it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    runs: tuple[tuple[Size, int], ...]
    """(height, width) of its images as they were encoded, and how many samples in a row have it."""


class DataSetIndex:
    """A data set of latents, without its samples.

    Args:
        folder: of the data set.
        entries: of its index.json.

    Raises:
        ValueError: if an entry is missing, or is malformed.
    """

    def __init__(self, folder: DataSetFolder, entries: Mapping[str, Any]):
        self.folder, self.entries = folder, entries
        try:
            codec = entries["codec"]
            self.kind: str = entries["kind"]
            self.container: str = entries["container"]
            self.options: dict[str, Any] = entries["options"]
            self.codec_name: str = codec["name"]
            self.pipeline: str | None = codec["pipeline"]
            self.space_fingerprint: str = codec["space_fingerprint"]
            self.fingerprint: str = codec["fingerprint"]
            self.codebook_sizes: list[int] = codec["codebook_sizes"]
            self.latent_space = LatentSpace(**entries["latent_space"])
            self.images, self.samples = int(entries["images"]), int(entries["samples"])
            self.num_labels, self.num_captions = int(entries["labels"]), int(entries["captions"])
            self.shards = [_shard(each) for each in entries["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.location}/{INDEX} is damaged: {error!r}") from error

    @property
    def location(self) -> str:
        return self.folder.url.rstrip("/")

    @property
    def has_posterior(self) -> bool:
        """Whether mean and log variance are stored."""
        return self.options["posterior"] == "both"

    def path(self, shard: ShardEntry) -> str:
        """For messages."""
        return f"{self.location}/{SHARDS}/{shard.name}"

    def data(self, shard: ShardEntry) -> "bytes | mmap.mmap":
        """A shard's content: a local file is mapped into memory."""
        path = self.folder.path(SHARDS, shard.name)
        if not self.folder.is_local:
            return self.folder.fs.cat_file(path)
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check_shards_are_there(self) -> None:
        """Compare the list of files with the index.

        Raises:
            ValueError: if shards are missing or have other sizes, naming the first.
        """
        sizes = self.folder.sizes()
        damaged = [shard for shard in self.shards if sizes.get(shard.name) != shard.bytes]
        if damaged:
            first = damaged[0]
            state = (
                "is missing"
                if first.name not in sizes
                else f"has {sizes[first.name]:,} bytes instead of {first.bytes:,}"
            )
            more = f", as {len(damaged) - 1} more are or have" if len(damaged) > 1 else ""
            raise ValueError(
                f"{self.path(first)} {state}{more}; `latent-codec encode` with the same arguments writes it again"
            )

    def damage(self, shard: ShardEntry) -> str | None:
        """Read a shard, and compare it with its checksum; None, or what is wrong."""
        try:
            content = self.data(shard)
        except FileNotFoundError:
            return "is missing"
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            return f"cannot be read ({error})"
        if len(content) != shard.bytes:
            return f"has {len(content):,} bytes instead of {shard.bytes:,}"
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            return "is damaged: its checksum differs"
        return None

    def check(self, codec: Any) -> str | None:
        """As `LatentDataset.check`."""
        name, pipeline, space_fingerprint, fingerprint = _identity(codec, self.pipeline)
        own, other = _named(self.codec_name, self.pipeline), _named(name, pipeline)
        if space_fingerprint != self.space_fingerprint:
            raise ValueError(
                f"{self.location} holds {self.kind} of {own} (space {self.space_fingerprint}), not of {other} "
                f"(space {space_fingerprint}); use the codec {own}, or encode the images with {other}"
            )
        if fingerprint != self.fingerprint:
            return (
                f"{self.location} was encoded by {own} ({self.fingerprint}); {other} ({fingerprint}) shares its latent "
                "space and decodes it, with a decoder of its own"
            )
        return None

    @cached_property
    def sizes(self) -> dict[Size, int]:
        """(height, width) of the images as they were encoded, and how many samples have it."""
        found: dict[Size, int] = {}
        for shard in self.shards:
            for size, count in shard.runs:
                found[size] = found.get(size, 0) + count
        return dict(sorted(found.items()))


def read_index(location: str | os.PathLike, storage_options: Mapping[str, Any]) -> DataSetIndex:
    """Open the index of a data set of latents.

    Raises:
        ValueError: if there is none, or a damaged one.
        OSError: if it cannot be read.
    """
    folder = DataSetFolder(location, **storage_options)
    entries = folder.read_index()
    if entries is None:
        markers = sum(name.endswith(".json") for name in folder.sizes())
        if markers:
            raise ValueError(
                f"{folder} is not complete: {markers} of its shards are there, and no {INDEX}; `latent-codec encode` "
                "with the same arguments continues it"
            )
        raise ValueError(
            f"{folder} is no data set of latents: it has no {INDEX}; `latent-codec encode` writes them"
        )
    return DataSetIndex(folder, entries)


def check_alike(first: DataSetIndex, other: DataSetIndex) -> None:
    """Refuse data sets of two latent spaces or kinds.

    Raises:
        ValueError: naming both.
    """
    if (first.space_fingerprint, first.kind) != (other.space_fingerprint, other.kind):
        each = [
            f"{index.location} holds {index.kind} of {_named(index.codec_name, index.pipeline)} (space {index.space_fingerprint})"
            for index in (first, other)
        ]
        raise ValueError(f"{', '.join(each)}; open data sets of one latent space at a time")


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    runs = tuple(((int(height), int(width)), int(count)) for height, width, count in entry["runs"])
    if sum(count for _, count in runs) != entry["samples"]:
        raise ValueError(f"{entry['name']} has {entry['samples']} samples, and runs of others")
    return ShardEntry(entry["name"], entry["samples"], entry["bytes"], entry["sha256"], runs)


def _identity(codec: Any, pipeline: str | None) -> tuple[str, str | None, str | None, str | None]:
    """Name, pipeline, fingerprint of the latent space and of the whole."""
    from latent_codec.codec import LatentCodec

    if isinstance(codec, (str, os.PathLike)):
        facts = read_facts(codec, pipeline)
        codec = LatentCodec.from_pretrained(codec, pipeline=pipeline) if facts is None else facts
    elif not isinstance(codec, LatentCodec):
        if hasattr(codec, "components"):  # a pipeline
            parts = [codec.components.get(name) for name in ("vae", "vqvae", "movq")]
            codec = next((part for part in parts if part is not None), None)
        if not hasattr(codec, "config"):
            raise ValueError(
                f"expected a codec, an autoencoder, a pipeline or a path, got {type(codec).__name__}"
            )
        origin = codec.config.get("_name_or_path") or ""
        if codec.dtype != torch.float32:  # rounded weights have another fingerprint
            if os.path.isdir(origin):
                return _identity(origin, pipeline)
            dtype = str(codec.dtype).removeprefix("torch.")
            raise ValueError(
                f"the autoencoder is in {dtype}, so that its weights are not known as they were stored; give its folder"
            )
        codec = LatentCodec(codec, name=origin or type(codec).__name__, pipeline=pipeline)
    return codec.name, codec.pipeline, codec.space_fingerprint, codec.fingerprint


def _named(codec: str, pipeline: str | None) -> str:
    return codec if pipeline is None else f"{codec} for {pipeline}"
