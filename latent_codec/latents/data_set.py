"""LatentDataset: what `latent-codec encode` wrote, for a trainer.

dataset = LatentDataset("latents/", codec=pipe.vae)     # or s3://..., gs://..., hf://datasets/...
for batch in dataset.stream(32, shuffle=True, num_workers=4):
    batch["latents"], batch["label"], batch["caption"]

index.json --> which shard and place a number is --> shard, opened once --> sample
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from latent_codec.errors import SettingError
from latent_codec.families import LatentSpace
from latent_codec.images.origins import origin_from_json
from latent_codec.latents.batch_order import BatchOrder
from latent_codec.latents.data_set_index import check_alike, read_index
from latent_codec.latents.latent_files import Label, LatentFile
from latent_codec.latents.shard_readers import Arrays, Fields, ShardReader, open_shard

Location = str | os.PathLike

_NUM_MAPPED, _NUM_HELD = 256, 8
"""Shards that are open at a time: local ones, mapped into memory, and others, held in it."""
_UNLABELLED = -1
"""The label of a sample without one, where labels are integers: what batches are made of cannot be None."""


class LatentDataset(Dataset):
    """The samples of one or several data sets of latents, by number: a map-style data set of torch.

    `DataLoader(dataset, batch_size=32, num_workers=4)` works as with any other, where all latents have one shape.
    Large and remote data sets, buckets and several ranks are better read by `stream`.

    A sample is a dict. What none of the samples has is not in it:
        latents: Tensor (C, h, w), as a denoiser takes them; or indices: a list of int64 tensors (h, w), top level first.
        key, name: of the sample in the shard; of the image in its source.
        size: int64 tensor, (height, width) of the original image in pixels.
        crop: int64 tensor, (top, left, height, width) of what was encoded, in the resized image.
        flipped: whether it is the mirror image.
        label: an int, -1 without; or a dict of attributes. caption: text, empty without.
        extra: other members by their suffix, as bytes; where they are asked for.

    Args:
        locations: a folder or URL (anything of fsspec: s3://, gs://, hf://, memory:// ...), or several of one latent space.
        codec: check that the latents are its: as `check` does.
        sample: whether latents are drawn from the posterior, where mean and log variance are stored, or are its mean; None:
            drawn where they are stored.
        dtype: of latents; None: as they are stored.
        extra: whether samples have `extra`.
        storage_options: for fsspec's file system.

    Raises:
        ValueError: if it is no data set, incomplete, of another latent space, or if shards are missing.
        SettingError: for `sample=True` where no log variance is stored.
        OSError: if it cannot be read.
    """

    def __init__(
        self,
        locations: Location | Sequence[Location],
        *,
        codec: Any = None,
        sample: bool | None = None,
        dtype: torch.dtype | None = torch.float32,
        extra: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ):
        listed = [locations] if isinstance(locations, (str, os.PathLike)) else list(locations)
        if not listed:
            raise ValueError("expected at least one data set of latents, got none")
        self.indexes = [read_index(location, storage_options or {}) for location in listed]
        self.index = self.indexes[0]
        for other in self.indexes[1:]:
            check_alike(self.index, other)
        for index in self.indexes:
            index.check_shards_are_there()
        self._shards = [(index, shard) for index in self.indexes for shard in index.shards]
        self._ends = np.array([shard.samples for _, shard in self._shards], np.int64).cumsum()
        has_posterior = all(index.has_posterior for index in self.indexes)
        if sample and not has_posterior:
            expected = "False, as no log variance is stored"
            raise SettingError("sample", expected, sample, advice="encode with `posterior=both`")
        self._sample = has_posterior if sample is None else sample
        self._has_labels = any(index.num_labels for index in self.indexes)
        self._has_captions = any(index.num_captions for index in self.indexes)
        self.dtype, self._has_extra = dtype, extra
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        if codec is not None:
            self.check(codec)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._sample_of(*self.read(number), None)

    def __repr__(self) -> str:
        index = self.index
        locations = ", ".join(str(each.location) for each in self.indexes)
        return f"LatentDataset({locations}: {len(self):,} {index.kind} of {index.codec_name}, space {index.space_fingerprint})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}  # a worker opens its own

    @property
    def latent_space(self) -> LatentSpace:
        return self.index.latent_space

    @property
    def is_discrete(self) -> bool:
        """Whether samples are indices of codewords."""
        return self.index.kind == "indices"

    def check(self, codec: Any) -> str | None:
        """Whether `codec` is the codec of these latents.

        Args:
            codec: a LatentCodec, an autoencoder such as a pipeline's `vae`, a pipeline, or what `LatentCodec.from_pretrained`
                takes.

        Returns:
            None, or a sentence that says its decoder is another one than the encoding codec's.

        Raises:
            ValueError: if its latent space is another one, naming both.
        """
        return self.index.check(codec)

    def label(self, number: int) -> Label:
        """A class, a dict of attributes, or None where there is no label."""
        return self.read(number)[0].get("label")

    def log_variance(self, number: int) -> Tensor | None:
        """Of a sample's posterior, as its mean is: (C, h, w); None where it is not stored."""
        found = self.read(number)[1].get("logvar")
        return None if found is None else torch.from_numpy(np.array(found)).float()

    def read(self, number: int) -> tuple[Fields, Arrays]:
        """What the shard has of a sample: its fields as they are stored, and its arrays."""
        number = range(len(self))[number]  # IndexError, and numbers from the end
        position = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._opened(position)
        start = int(self._ends[position]) - self._shards[position][1].samples
        try:
            return shard[number - start]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self._path(position)} is damaged: {error}") from error

    def latent_files(self) -> Iterator[LatentFile]:
        """What each shard would be as a latent file, for what learns from those: all of it, in memory."""
        start = 0
        for position, (index, shard) in enumerate(self._shards):
            samples = [self.read(number) for number in range(start, start + shard.samples)]
            start += shard.samples
            arrays = [
                [torch.from_numpy(np.array(each))[None] for name, each in found.items() if name != "logvar"]
                for _, found in samples
            ]
            yield LatentFile(
                path=Path(self._path(position)),
                codec_name=index.codec_name,
                space_fingerprint=index.space_fingerprint,
                fingerprint=index.fingerprint,
                pipeline=index.pipeline,
                names=[fields["name"] for fields, _ in samples],
                sizes=[size for size, count in shard.runs for _ in range(count)],
                labels=[fields.get("label") for fields, _ in samples],
                captions=[fields.get("caption") for fields, _ in samples],
                origins=[
                    fields.get("origin") and origin_from_json(fields["origin"]) for fields, _ in samples
                ],
                latents=None if self.is_discrete else [each for (each,) in arrays],
                indices=[[level.long() for level in each] for each in arrays] if self.is_discrete else None,
            )

    def stream(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer_size: int = 4096,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
    ) -> "LatentStream":
        """Batches of one shape, of this rank, in an order that depends on `seed` and epoch only.

        Args:
            shuffle: shards in random order, and the samples of neighboring ones among each other.
            buffer_size: samples that are shuffled together; about as many are read from as few shards.
            drop_last: leave out the last batch of each shape where it is not full.
            rank, world_size: of this process; None: as torch.distributed, or torchrun's environment, says.
            num_workers: processes that read; 0: this one.
        """
        if rank is None or world_size is None:
            rank, world_size = _process()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("buffer_size", buffer_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise SettingError(name, f"at least {least}", value)
        if not 0 <= rank < world_size:
            raise SettingError("rank", f"0 to {world_size - 1}, of {world_size} processes", rank)
        sizes: dict[tuple[int, int], int] = {}
        order = BatchOrder(
            shards=[
                [(sizes.setdefault(size, len(sizes)), count) for size, count in shard.runs]
                for _, shard in self._shards
            ],
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            buffer_size=buffer_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        return LatentStream(self, order, num_workers)

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read every shard, and compare it with its checksum: yields its path, and what is wrong with it or None."""
        for position, (index, shard) in enumerate(self._shards):
            yield self._path(position), index.damage(shard)

    def _path(self, position: int) -> str:
        index, shard = self._shards[position]
        return index.path(shard)

    def _opened(self, position: int) -> ShardReader:
        if position in self._open:
            self._open.move_to_end(position)
            return self._open[position]
        index, shard = self._shards[position]
        try:
            reader = open_shard(index.container, index.data(shard))
        except ValueError as error:
            raise ValueError(f"{self._path(position)} is damaged: {error}") from error
        if len(reader) != shard.samples:
            raise ValueError(
                f"{self._path(position)} is damaged: expected {shard.samples} samples, got {len(reader)}"
            )
        self._open[position] = reader
        if len(self._open) > (_NUM_MAPPED if index.folder.is_local else _NUM_HELD):
            self._open.popitem(last=False)
        return reader

    def _sample_of(self, fields: Fields, arrays: Arrays, generator: torch.Generator | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.is_discrete:
            found["indices"] = [torch.from_numpy(each.astype(np.int64)) for each in arrays.values()]
        else:
            found["latents"] = self._latents(arrays, generator)
        for name in ("key", "name"):
            if name in fields:
                found[name] = fields[name]
        if self._has_extra:
            found["extra"] = fields.get("extra", {})
        for name in ("size", "crop"):
            if fields.get(name) is not None:
                found[name] = torch.tensor(fields[name])
        if self.index.options["flip"] or self.index.options["augment"]:
            found["flipped"] = bool(fields.get("flipped"))
        if self._has_labels:
            label = fields.get("label")
            found["label"] = _UNLABELLED if label is None else label
        if self._has_captions:
            found["caption"] = fields.get("caption") or ""
        return found

    def _latents(self, arrays: Arrays, generator: torch.Generator | None) -> Tensor:
        mean = torch.from_numpy(np.array(arrays.get("latents", arrays.get("mean"))))
        mean = mean if self.dtype is None else mean.to(self.dtype)
        if not self._sample:
            return mean
        deviation = torch.from_numpy(np.array(arrays["logvar"])).float().mul(0.5).exp().to(mean.dtype)
        return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.dtype)


class LatentStream(IterableDataset):
    """Batches of a LatentDataset, made by its `stream`: each a dict of tensors and lists.

        for epoch in range(3):
            for batch in stream: ...            # each time the next epoch
            torch.save(stream.state_dict(), "position.pt")

    Iterated over as it is, it reads in `num_workers` processes and knows which batches it has given. `load_state_dict`
    goes on with the next of them, with any number of workers. It also works in `DataLoader(stream, batch_size=None,
    num_workers=4)`, whose processes share the batches, in the same order; torchdata's StatefulDataLoader keeps their state.
    """

    def __init__(self, dataset: LatentDataset, order: BatchOrder, num_workers: int):
        self.dataset, self.order, self.num_workers = dataset, order, num_workers
        self._epoch = self._batches = 0
        self._origin: int | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.order.num_batches(self._epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is None and self.num_workers:
            yield from self._from_workers()
            return
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, start = self._epoch, self._batches
        origin = self._origin = start if self._origin is None else self._origin
        for batch, samples in enumerate(self.order.batches(epoch)):
            if batch < start or (batch - origin) % count != number:
                continue
            self._batches = batch + 1
            yield self._batch(samples, epoch, batch)
        self._next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Where this stream is: plain numbers."""
        origin = {} if get_worker_info() is None else {"origin": self._origin}
        return self._settings() | {"epoch": self._epoch, "batches": self._batches} | origin

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream was that gave `state`.

        Raises:
            ValueError: if it had other settings, so that its batches were others.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(f"expected a stream with the {name} {state.get(name)}, got {value}")
        self._epoch, self._batches = int(state["epoch"]), int(state["batches"])
        self._origin = state.get("origin")

    def set_epoch(self, epoch: int) -> None:
        """Start with this epoch; of a stream in a DataLoader, whose processes cannot say when they ended one."""
        self._epoch, self._batches, self._origin = epoch, 0, None

    def _settings(self) -> dict[str, Any]:
        order = self.order
        names = ("batch_size", "shuffle", "seed", "buffer_size", "drop_last", "rank", "world_size")
        return {"samples": len(self.dataset)} | {name: getattr(order, name) for name in names}

    def _from_workers(self) -> Iterator[dict[str, Any]]:
        same = LatentStream(self.dataset, self.order, 0)
        same.load_state_dict(self.state_dict())
        for batch in DataLoader(same, batch_size=None, num_workers=self.num_workers):
            self._batches += 1
            yield batch
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.set_epoch(self._epoch + 1)

    def _batch(self, samples: np.ndarray, epoch: int, batch: int) -> dict[str, Any]:
        order = self.order
        generator = None
        if self.dataset._sample:
            seed = np.random.SeedSequence([order.seed, epoch, order.rank, batch]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))
        return collate(
            [self.dataset._sample_of(*self.dataset.read(int(number)), generator) for number in samples]
        )


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of one shape -> a batch: tensors stacked, numbers as a tensor, everything else in a list."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, Tensor):
            batch[name] = torch.stack(values)
        elif name == "indices":
            batch[name] = [torch.stack(levels) for levels in zip(*values, strict=True)]
        elif isinstance(first, (bool, int)) and all(isinstance(each, (bool, int)) for each in values):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


def _process() -> tuple[int, int]:
    """Rank and number of the processes of this training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
