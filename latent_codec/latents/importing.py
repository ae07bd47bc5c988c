"""Latents that another program cached, as a data set of latents: `import_latents`.

    kohya's .npz, arrays (.npy, .npz), tensors (.pt, .safetensors) --of a stated codec--> samples --> shards, index.json

Nothing in such files says which codec made them, so it is stated, and whether they are as the encoder gave them (raw) or
as a denoiser takes them (scaled). kohya's caches of SD, SDXL and SD3 are raw, those of FLUX.1 are scaled
(`sd-scripts`, library/strategy_*.py), which their names tell.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.files import find_files, named_in_utf8
from latent_codec.images.buckets import Frame
from latent_codec.latents.latent_files import is_latent_file
from latent_codec.latents.plain_latents import PlainLatents, read_plain_latents
from latent_codec.latents.plan import EncodingOptions, Shard, plan_shards
from latent_codec.latents.samples import MIRRORED, Sample, Unreadable
from latent_codec.latents.shards import DataSetFolder, Job, ShardBuilder

Values = Literal["raw", "scaled"]

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")
CAPTIONS = (".txt", ".caption")
_KOHYA = {"sd": "raw", "sdxl": "raw", "sd3": "raw", "flux": "scaled"}
"""What the values of kohya's caches are, by the end of their names."""
_KOHYA_NAME = re.compile(r"(?P<stem>.+?)(?:_\d{4,}x\d{4,})?_(?P<kind>sd|sdxl|sd3|flux)")
_TEXT = re.compile(r".+_te(?:_outputs)?")
"""Text embeddings, which kohya keeps next to latents."""
_ENTRY = re.compile(r"latents(?P<size>_\d+x\d+)?")


class CachedLatents:
    """Files of latents, as a source whose names `plan_shards` cuts into shards; an array (N, C, h, w) in a .npy file counts as N.

    Where all are in subfolders of one folder, the subfolder is the class, as of folders of images.

    Args:
        paths: files, or folders of them, which are walked to the bottom.

    Raises:
        ValueError: if there are none.
    """

    reading = ""
    """There is one way to read them."""

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self._paths: list[Path] = []
        self._names: list[str] = []
        self._items: list[tuple[int, int | None]] = []
        for path in map(Path, paths):
            for file in find_files(path, SUFFIXES) if path.is_dir() else [path]:
                if not _TEXT.fullmatch(file.stem):
                    rows = _rows(file)
                    self._items += [
                        (len(self._paths), row) for row in ([None] if rows is None else range(rows))
                    ]
                    self._paths.append(file)
                    self._names.append(
                        (file.relative_to(path) if path.is_dir() else Path(file.name)).as_posix()
                    )
        if not self._items:
            expected = f"files of latents ({', '.join(SUFFIXES)})"
            raise ValueError(f"expected {expected}, got none in {', '.join(map(str, paths))}")
        tops = [name.split("/")[:-1][:1] for name in self._names]
        self._classes = sorted({top[0] for top in tops}) if all(tops) and len(paths) == 1 else None

    def __len__(self) -> int:
        return len(self._items)

    def name(self, number: int) -> str:
        file, row = self._items[number]
        return self._names[file] + ("" if row is None else f"[{row}]")

    def key(self, number: int) -> str:
        """Of the sample: the name without the file's suffix, and without dots, at which tars cut it."""
        file, row = self._items[number]
        folder, slash, _ = self._names[file].rpartition("/")
        stem = _stem(self._paths[file]).replace(".", "_")
        return folder + slash + stem + ("" if row is None else f"-{row:06d}")

    def path(self, number: int) -> Path:
        return self._paths[self._items[number][0]]

    def arrays(self, number: int) -> PlainLatents:
        """What the file has; of an array (N, C, h, w) only this row.

        Raises:
            ValueError: if it cannot be read.
        """
        path, row = self.path(number), self._items[number][1]
        if row is not None:
            array = np.array(np.load(path, mmap_mode="r", allow_pickle=False)[row])
            return PlainLatents(path=path, kind="a NumPy array (.npy)", arrays={"": torch.from_numpy(array)})
        found = _read_safetensors(path) if path.suffix == ".safetensors" else read_plain_latents(path)
        if found is None:
            raise ValueError(f"{path} is no file of arrays or tensors")
        return found

    def label(self, number: int) -> int | None:
        top = self.name(number).split("/")[0]
        return None if self._classes is None else self._classes.index(top)

    def caption(self, number: int) -> str | None:
        """The text next to the file, under the name that its image had."""
        path = self.path(number)
        for stem in dict.fromkeys((_stem(path), path.stem)):
            for suffix in CAPTIONS:
                text = path.with_name(stem + suffix)
                if text.is_file():
                    return text.read_text(encoding="utf-8", errors="replace").strip()
        return None


def _rows(path: Path) -> int | None:
    """Of an array (N, C, h, w) in a .npy file; None of everything else."""
    if path.suffix != ".npy":
        return None
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (ValueError, OSError):  # said when it is read
        return None
    return shape[0] if len(shape) == 4 else None


def _read_safetensors(path: Path) -> PlainLatents:
    if is_latent_file(path):
        raise ValueError(f"{path} is a latent file of latent-codec, which needs no import")
    with named_in_utf8(path) as name:
        try:
            return PlainLatents(path=path, kind="a safetensors file", arrays=load_file(name))
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error


@dataclass(frozen=True)
class _Latents:
    """One image's, as a file has them."""

    values: Tensor
    """(C, h, w), or (2C, h, w): mean and log variance."""
    is_raw: bool
    flipped: Tensor | None = None
    original: tuple[int, int] | None = None
    """(height, width) of the image."""
    corner: tuple[int, int] = (0, 0)
    """(top, left) of what was encoded, in the resized image."""


def import_latents(
    codec: LatentCodec,
    paths: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    options: EncodingOptions | None = None,
    *,
    values: Values | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Bring latents of another program into a data set below `folder`; a run that was stopped goes on where it was.

    Captions are read from STEM.txt or STEM.caption next to a file. Arrays with twice the codec's channels are mean and log variance, as
    diffusers' `latent_dist.parameters` has them, and are stored as such. Files that cannot be read are left out and listed.

    Args:
        codec: whose latents they are.
        paths: files of kohya's sd-scripts (.npz), NumPy (.npy, .npz), torch.save (.pt) or safetensors, or folders of them.
        options: container, dtype and images per shard; what concerns images is left at its default.
        values: "raw", as the encoder gave them; "scaled", as a denoiser takes them; None: as kohya's names tell.
        on_progress: called with (files done, files in all).

    Returns:
        The index, with `skipped_files`, a line for each file that was left out.

    Raises:
        SettingError: if nothing tells whether they are raw or scaled.
        ValueError: if there are none, or `folder` holds something else.
        OSError: if it cannot be written.
    """
    source = CachedLatents(paths)
    report = on_progress or (lambda done, total: None)
    reading = _Reading(codec, source, values)
    options = reading.completed(options or EncodingOptions(container="webdataset"))
    target = DataSetFolder(folder)
    plan = [_named_by(values, shard) for shard in plan_shards(source, options, codec)]
    job = _ImportJob(codec, source, options, target, plan, reading=reading)
    for shard in job.missing():
        builder = ShardBuilder(shard, options, codec)
        for number in shard.numbers:
            found = job.prepare(number)
            if isinstance(found, Unreadable):
                builder.skip(found)
            else:
                builder.add(found)
            report(number + 1, len(source))
        target.commit(builder.build(), options)
    index = job.finish()
    markers = target.markers(shard.name for shard in plan).values()
    return index | {"skipped_files": [": ".join(each) for marker in markers for each in marker["skipped"]]}


def _named_by(values: Values | None, shard: Shard) -> Shard:
    """The shard under a name that depends on what its values are taken for, too."""
    digest = hashlib.sha256(f"{shard.name} {values}".encode()).hexdigest()[:8]
    return replace(shard, name=f"{shard.name.partition('-')[0]}-{digest}")


@dataclass(frozen=True, kw_only=True)
class _ImportJob(Job):
    reading: "_Reading"

    @property
    def prepare(self) -> Callable[[int], list[Sample] | Unreadable]:
        return partial(self.reading.samples, options=self.options)


@dataclass(frozen=True)
class _Reading:
    codec: LatentCodec
    source: CachedLatents
    values: Values | None

    def completed(self, options: EncodingOptions) -> EncodingOptions:
        """The options, with what the first file that can be read has: flipped versions, and a posterior."""
        reason = ""
        for number in range(min(len(self.source), 100)):
            try:
                first = self._read(number)[0]
            except SettingError:
                raise
            except (ValueError, OSError) as error:
                reason = reason or str(error)
            else:
                posterior = "both" if self._has_posterior(first) else "mean"
                return replace(options, flip=first.flipped is not None, posterior=posterior)
        raise ValueError(f"no latents of {self.codec.name} in {len(self.source)} files; the first: {reason}")

    def samples(self, number: int, options: EncodingOptions) -> list[Sample] | Unreadable:
        try:
            found = self._read(number)
            return [
                sample
                for place, each in enumerate(found)
                for sample in self._samples_of(number, each, options, place if len(found) > 1 else None)
            ]
        except SettingError:
            raise
        except (ValueError, OSError) as error:
            path = self.source.path(number)
            reason = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
            return Unreadable(number, self.source.name(number), reason)

    def _read(self, number: int) -> list[_Latents]:
        """Each image's latents in a file.

        Raises:
            SettingError: if nothing tells whether they are raw.
            ValueError: if it holds none of this codec.
        """
        plain = self.source.arrays(number)
        is_raw = self._values_of(plain) == "raw"
        space = self.codec.latent_space
        channels = space.raw_channels if is_raw else space.channels
        entries = [found for name in plain.arrays if (found := _ENTRY.fullmatch(name))]
        if not entries or not any(name.startswith("original_size") for name in plain.arrays):
            return [_Latents(values[0], is_raw) for values in plain.latents(channels, 2 * channels)]
        return [_of_kohya(plain, entry["size"] or "", channels, is_raw) for entry in entries]

    def _samples_of(
        self, number: int, found: _Latents, options: EncodingOptions, place: int | None
    ) -> Iterator[Sample]:
        name, key = self.source.name(number), self.source.key(number)
        if place is not None:
            name, key = f"{name}[{place}]", f"{key}-{place:06d}"
        caption = self.source.caption(number)
        if options.flip != (found.flipped is not None):
            raise ValueError("it has flipped latents and the first file has none, or the other way round")
        for version, values in enumerate((found.values, found.flipped) if options.flip else (found.values,)):
            arrays = self._arrays(replace(found, values=values), options)
            factor = self.codec.latent_space.downsampling_factor
            height, width = (side * factor for side in next(iter(arrays.values())).shape[-2:])
            yield Sample(
                number=number,
                version=version + 2 * (place or 0),
                name=name + (MIRRORED if version else ""),
                key=key + ("-flipped" if version else ""),
                original=found.original or (height, width),
                frame=Frame((height, width), (*found.corner, height, width), bool(version)),
                label=self.source.label(number) if options.labels else None,
                sidecars={} if caption is None else {"txt": caption.encode()},
                arrays=arrays,
            )

    def _arrays(self, found: _Latents, options: EncodingOptions) -> dict[str, Tensor]:
        """Ready for a denoiser, in the stored dtype."""
        space, values = self.codec.latent_space, found.values.float()[None]
        if self._has_posterior(found) != (options.posterior == "both"):
            raise ValueError("it has a log variance and the first file has none, or the other way round")
        if options.posterior == "both":
            mean, log_variance = values.chunk(2, 1)
            arrays = {"mean": mean, "logvar": log_variance.clamp(-30, 20)}  # as diffusers clamps it
            if found.is_raw:
                arrays = {
                    "mean": space.normalize(mean),
                    "logvar": space.normalize_log_variance(arrays["logvar"]),
                }
        else:
            arrays = {"latents": space.normalize(values) if found.is_raw else values}
        dtype = getattr(torch, options.stored_dtype(self.codec))
        arrays = {name: array[0].to(dtype) for name, array in arrays.items()}
        if not all(torch.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"its values are not finite, or overflow {dtype}")
        return arrays

    def _has_posterior(self, found: _Latents) -> bool:
        space = self.codec.latent_space
        return len(found.values) == 2 * (space.raw_channels if found.is_raw else space.channels)

    def _values_of(self, plain: PlainLatents) -> Values:
        if self.values is not None:
            return self.values
        if any(name.startswith("original_size") for name in plain.arrays):  # of kohya's
            named = _KOHYA_NAME.fullmatch(plain.path.stem)
            if named or "original_size" in plain.arrays:
                return _KOHYA[named["kind"] if named else "sd"]  # older names do not say SD or SDXL
        expected = '"raw", as the encoder gave them, or "scaled", as a denoiser takes them'
        raise SettingError("values", f"{expected}, which {plain.path.name} does not tell")


def _of_kohya(plain: PlainLatents, end: str, channels: int, is_raw: bool) -> _Latents:
    """The entries of kohya's whose names end in `end`."""
    values = plain.arrays[f"latents{end}"]
    if values.ndim != 3 or values.shape[0] != channels:
        raise ValueError(f"{plain.path} is {plain}; expected latents (C, h, w) with C = {channels}")
    original = plain.arrays.get(f"original_size{end}")
    crop = plain.arrays.get(f"crop_ltrb{end}")
    return _Latents(
        values,
        is_raw,
        plain.arrays.get(f"latents_flipped{end}"),
        None if original is None else (int(original[1]), int(original[0])),
        (0, 0) if crop is None else (int(crop[1]), int(crop[0])),
    )


def _stem(path: Path) -> str:
    """The stem of the image that a file's latents are of."""
    named = _KOHYA_NAME.fullmatch(path.stem)
    return named["stem"] if named and path.suffix == ".npz" else path.stem
