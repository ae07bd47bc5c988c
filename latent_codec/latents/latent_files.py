"""Latent files: latents or codebook indices of images, with what is needed to open them safely.

A safetensors file. Keys are `latents.IMAGE` with a tensor (C, h, w), or `indices.IMAGE.LEVEL` with an int64
grid (h, w); the metadata names both fingerprints of the codec, the images' names and sizes, and the version.
Where the latents are those of a pipeline that was named there is also `pipeline`, its class.
Where images have labels there is also `labels`, a JSON list with an int, a dict or null for each image. Files
without it are the same version as those with it, because a reader that knows no labels loses nothing else. So it
is with `captions`, a JSON list with a text or null for each image, and with `origins`, a JSON list with null for an
image of 8 bits and an object for every other (`latent_codec.images.origins`).
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from latent_codec.components.weight_files import LATENTS, metadata_of
from latent_codec.files import check_is_file, named_in_utf8, replacing
from latent_codec.images.origins import Origin, UnknownOriginError, origin_from_json
from latent_codec.tensors import check_dense, check_floating, check_shape
from latent_codec.torch_settings import ignoring_caller_settings

Label = int | dict | None

VERSION = "1"
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """What a latent file holds; exactly one of `latents` and `indices` is None."""

    path: Path
    codec_name: str
    space_fingerprint: str
    fingerprint: str
    pipeline: str | None = None
    """The class name of the pipeline whose latents these are; None: the usual ones of the codec."""
    names: list[str]
    """Where each image is from; not checked, so never a path to write to as it is."""
    sizes: list[tuple[int, int]]
    """Each image's (height, width)."""
    labels: list[Label]
    """Each image's class, or dict of attributes; None where it has no label."""
    captions: list[str | None]
    """Each image's text; None where it has none."""
    origins: list[Origin | None]
    """What each image stands for; None: 8 bits in sRGB."""
    latents: list[Tensor] | None = None
    """One (1, C, h, w) for each image: what `LatentCodec.decode` takes."""
    indices: list[list[Tensor]] | None = None
    """For each image one int64 grid (1, h, w) per level: what `LatentCodec.decode_indices` takes."""

    @property
    def kind(self) -> str:
        return "latents" if self.indices is None else "indices"

    def check(self, codec) -> str | None:
        """Whether `codec` may decode this file.

        Returns:
            None, or a sentence that says its decoder is another one than the encoding codec's.

        Raises:
            ValueError: if the codec's latent space is another one, naming both.
        """
        if self.space_fingerprint != codec.space_fingerprint:
            own = _named(self.codec_name, self.pipeline)
            raise ValueError(
                f"{self.path.name} holds {self.kind} of {own} (space {self.space_fingerprint}), not of "
                f"{_named(codec.name, codec.pipeline)} (space {codec.space_fingerprint}). Decode it with the codec {own}."
            )
        if self.fingerprint != codec.fingerprint:
            return (
                f"{self.path.name} was encoded by {self.codec_name} ({self.fingerprint}); {codec.name} "
                f"({codec.fingerprint}) shares its latent space and decodes it, with a decoder of its own"
            )
        return None


@ignoring_caller_settings()
def save_latents(
    path: str | os.PathLike,
    latents: Tensor | Sequence[Tensor],
    *,
    codec,
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    labels: Sequence[Label] | None = None,
    origins: Sequence[Origin | None] | None = None,
) -> None:
    """Write latents as `LatentCodec.encode` gives them: (B, C, h, w), or a list of such tensors.

    Args:
        codec: the LatentCodec that made them.
        names: of the images, one each.
        sizes: (height, width) of the images, one each.
        labels: an int, a dict or None for each image; None: there are none. What JSON has no word for inside a
            dict, such as a date, is stored as its text.
        origins: what each image stands for (`ImageSource.origin`); None: all are of 8 bits.

    Raises:
        ValueError: if names, sizes, labels, origins and latents differ in number, or for a label of another type.
        OSError: if the file cannot be written; then `path` is as it was.
    """
    batches = [latents] if isinstance(latents, Tensor) else list(latents)
    for batch in batches:
        check_floating(batch, "latents")
        check_shape(batch, "latents", ("B", "C", "h", "w"))
    images = [image for batch in batches for image in batch]
    _write(
        Path(path), latent_file(images, codec=codec, names=names, sizes=sizes, labels=labels, origins=origins)
    )


@ignoring_caller_settings()
def save_indices(
    path: str | os.PathLike,
    grids: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    codec,
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    labels: Sequence[Label] | None = None,
    origins: Sequence[Origin | None] | None = None,
) -> None:
    """Write indices as `LatentCodec.encode_indices` gives them: a list of int64 grids (B, h, w), top level first,
    or a list of such lists where images differ in size.

    The other arguments and the errors are those of `save_latents`; images have one number of levels.
    """
    batches = [grids] if isinstance(grids[0], Tensor) else list(grids)
    for grid in (grid for batch in batches for grid in batch):
        check_dense(grid, "indices")
        check_shape(grid, "indices", ("B", "h", "w"), dtype=torch.int64)
    images = [image for batch in batches for image in zip(*batch, strict=True)]
    if len({len(image) for image in images}) > 1:
        raise ValueError("expected images with one number of levels, got several: give those of one codec")
    _write(
        Path(path), latent_file(images, codec=codec, names=names, sizes=sizes, labels=labels, origins=origins)
    )


def latent_file(
    images: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    codec,
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    labels: Sequence[Label] | None = None,
    captions: Sequence[str | None] | None = None,
    origins: Sequence[Origin | None] | None = None,
) -> bytes:
    """The content of a latent file; equal arguments give equal bytes.

    Args:
        images: of each its latents (C, h, w), or a list of its indices (h, w), int64, top level first.
        codec, names, sizes, labels, origins: as for `save_latents`.
        captions: a text or None for each image; None: there are none.

    Raises:
        ValueError: as `save_latents`.
    """
    labels = [None] * len(images) if labels is None else list(labels)
    captions = [None] * len(images) if captions is None else list(captions)
    origins = [None] * len(images) if origins is None else list(origins)
    lists = {"names": names, "sizes": sizes, "labels": labels, "captions": captions, "origins": origins}
    for what, given in lists.items():
        if len(given) != len(images):
            raise ValueError(f"expected as many {what} as images, {len(images)}, got {len(given)}")
    for name, label in zip(names, labels):
        if not _is_label(label):
            raise ValueError(f"the label of {name} is {label!r}; a label is an int, a dict or None")
    metadata = {
        "format": LATENTS,
        "version": VERSION,
        "codec": codec.name,
        "space_fingerprint": codec.space_fingerprint,
        "fingerprint": codec.fingerprint,
        "names": json.dumps([str(name) for name in names]),
        "sizes": json.dumps([[int(height), int(width)] for height, width in sizes]),
    }
    if codec.pipeline is not None:
        metadata["pipeline"] = codec.pipeline
    if any(label is not None for label in labels):
        metadata["labels"] = json.dumps(labels, default=str)
    if any(caption is not None for caption in captions):
        metadata["captions"] = json.dumps(captions)
    if any(origin is not None for origin in origins):
        metadata["origins"] = json.dumps([origin and origin.to_json() for origin in origins])
    tensors = {}
    for index, image in enumerate(images):
        if isinstance(image, Tensor):
            tensors[f"latents.{index}"] = image
        else:
            tensors |= {f"indices.{index}.{level}": grid for level, grid in enumerate(image)}
    # Compact clones: safetensors refuses tensors that share memory, as images of a batch do, or have gaps.
    return _in_order(
        save(
            {
                key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in tensors.items()
            },
            metadata,
        )
    )


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in order, which safetensors writes in any."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


@ignoring_caller_settings()
def load_latents(path: str | os.PathLike, *, codec=None) -> LatentFile:
    """Read a latent file; with `codec`, check that it may decode it, and warn if its decoder is another one.

    Raises:
        ValueError: for a file that is no latent file, damaged, of a newer version, or of another latent space.
        OSError: if it cannot be read.
    """
    path = Path(path)
    check_is_file(path)
    with path.open("rb") as file:  # the system's own words if it is forbidden
        num_bytes = path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != LATENTS:
                raise ValueError(f"{path} is a safetensors file, but not a latent file of latent-codec")
            if metadata.get("version") != VERSION:
                got = f"{metadata.get('version')}; update latent-codec"
                raise ValueError(f"{path}: expected version {VERSION} of the latent file, got {got}")
            if len(stored.keys()) > num_bytes:  # each of which would take memory and time
                raise ValueError(f"{path} is damaged: {len(stored.keys())} tensors in {num_bytes} bytes")
        tensors = load(path.read_bytes())  # `get_tensor` takes ten times as long for each of many small grids
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that torch has not
        raise ValueError(f"{path} is no latent file, or a truncated one: {error}") from error
    try:
        found = _parse(path, metadata, tensors)
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except UnknownOriginError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if codec is not None and (warning := found.check(codec)):
        warnings.warn(warning, stacklevel=2)
    return found


def is_latent_file(path: str | os.PathLike) -> bool:
    """Whether a file says of itself that it is a latent file; it may be damaged all the same."""
    return metadata_of(path).get("format") == LATENTS


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as written:
        written.write_bytes(content)


def _named(codec: str, pipeline: str | None) -> str:
    return codec if pipeline is None else f"{codec} for {pipeline}"


def _is_label(label) -> bool:
    return label is None or isinstance(label, dict) or type(label) is int  # which True is not


def _parse(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> LatentFile:
    names, sizes = json.loads(metadata["names"]), json.loads(metadata["sizes"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its names are no list of strings")
    if not all(isinstance(side, int) and side > 0 for height, width in sizes for side in (height, width)):
        raise ValueError("its sizes are no list of (height, width)")
    if len(names) != len(sizes) or not names:
        raise ValueError(f"it names {len(names)} images and {len(sizes)} sizes")
    labels = json.loads(metadata["labels"]) if "labels" in metadata else [None] * len(names)
    if not isinstance(labels, list) or not all(map(_is_label, labels)):
        raise ValueError("its labels are no list of integers, objects and nulls")
    if len(labels) != len(names):
        raise ValueError(f"it has {len(names)} images and {len(labels)} labels")

    captions = json.loads(metadata["captions"]) if "captions" in metadata else [None] * len(names)
    if not isinstance(captions, list) or not all(isinstance(each, str | None) for each in captions):
        raise ValueError("its captions are no list of strings and nulls")
    if len(captions) != len(names):
        raise ValueError(f"it has {len(names)} images and {len(captions)} captions")

    origins = json.loads(metadata["origins"]) if "origins" in metadata else [None] * len(names)
    if not isinstance(origins, list) or len(origins) != len(names):
        raise ValueError("its origins are no list with one for each image")
    origins = [None if each is None else origin_from_json(each) for each in origins]

    fingerprints = metadata["space_fingerprint"], metadata["fingerprint"]
    pipeline = metadata.get("pipeline")
    is_printable = (metadata["codec"] + (pipeline or "")).isprintable()
    if not is_printable or not all(map(_FINGERPRINT.fullmatch, fingerprints)):
        raise ValueError("its codec or fingerprints are malformed")

    latents = indices = None
    num_images = len(names)
    if "latents.0" in tensors:
        latents = [tensors.pop(f"latents.{index}")[None] for index in range(num_images)]
        if not all(each.ndim == 4 and each.is_floating_point() and each.numel() for each in latents):
            raise ValueError("its latents are not floats of shape (C, h, w)")
    else:
        num_levels = sum(key.startswith("indices.0.") for key in tensors)
        indices = [
            [tensors.pop(f"indices.{index}.{level}")[None] for level in range(num_levels)]
            for index in range(num_images)
        ]
        grids = [grid for levels in indices for grid in levels]
        are_grids = all(each.ndim == 3 and each.dtype == torch.int64 and each.numel() for each in grids)
        if not grids or not are_grids:
            raise ValueError("it holds neither latents nor int64 grids of indices")
    if tensors:
        raise ValueError(f"{len(tensors)} tensors belong to no image ({min(tensors)} ...)")
    return LatentFile(
        path=path,
        codec_name=metadata["codec"],
        pipeline=pipeline,
        space_fingerprint=metadata["space_fingerprint"],
        fingerprint=metadata["fingerprint"],
        names=names,
        sizes=[(height, width) for height, width in sizes],
        labels=labels,
        captions=captions,
        origins=origins,
        latents=latents,
        indices=indices,
    )
