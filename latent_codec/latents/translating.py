"""Latent files and data sets of one codec -> those of another, by a LatentTranslator."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_codec.files import replacing
from latent_codec.images.buckets import Frame
from latent_codec.images.origins import Origin, origin_from_json
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.latent_files import LatentFile, latent_file
from latent_codec.latents.plan import EncodingOptions, Shard
from latent_codec.latents.samples import Sample
from latent_codec.latents.shard_readers import Fields
from latent_codec.latents.shards import DataSetFolder, ShardBuilder, index_of
from latent_codec.models.latent_translator import LatentTranslator


def translate_file(found: LatentFile, path: Path, translator: LatentTranslator) -> None:
    """Write the target's latents of the images whose latents of the source `found` holds.

    Names, labels, captions and origins stay; sizes too, unless the translator enlarges.

    Raises:
        ValueError: for latents of another codec, naming both, indices, or latents that do not fit.
        OSError: if it cannot be written; then `path` is as it was.
    """
    _check(found, found.path.name, translator)
    if path.resolve() == found.path.resolve():
        raise ValueError(
            f"{path} would replace the latents that are translated; give another folder for the result"
        )
    sizes = [_enlarged(size, translator) for size in found.sizes]
    content = latent_file(
        [_translated(latents, size, translator) for latents, size in zip(found.latents or [], sizes)],
        codec=translator.target,
        names=found.names,
        sizes=sizes,
        labels=found.labels,
        captions=found.captions,
        origins=[_origin(*each, translator) for each in zip(found.origins, found.sizes)],
    )
    with replacing(path) as written:
        written.write_bytes(content)


def translate_data_set(
    dataset: LatentDataset,
    folder: str | os.PathLike,
    translator: LatentTranslator,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a data set of the target's latents: the same samples, shard by shard; a run that was stopped goes on where it was.

    Where mean and log variance are stored, the mean is translated, and there is no variance.

    Args:
        dataset: of one location.
        folder: for the new one, or the URL of a folder.
        on_progress: called with (samples done, samples in all).

    Returns:
        The index.

    Raises:
        ValueError: for latents of another codec, naming both, indices, or a folder that holds another data set.
        OSError: if it cannot be written.
    """
    index, target = dataset.index, DataSetFolder(folder)
    _check(index, index.location, translator)
    posterior = "sample" if index.options["posterior"] == "sample" else "mean"
    options = replace(EncodingOptions.of_json(index.options), posterior=posterior, container=index.container)
    weights = hashlib.sha256(
        b"".join(each.cpu().numpy().tobytes() for each in translator.state_dict().values())
    )
    start, plan = 0, []
    for number, entry in enumerate(index.shards):
        name = hashlib.sha256(f"{entry.sha256} {weights.hexdigest()}".encode()).hexdigest()[:8]
        plan.append(Shard(f"{number:05d}-{name}", start, start := start + entry.samples))
    if others := target.markers().keys() - {shard.name for shard in plan}:
        raise ValueError(
            f"{folder} holds another data set (shard {min(others)}); give another folder, or delete it"
        )
    for shard in plan:
        if not target.is_complete(shard):
            builder = ShardBuilder(shard, options, translator.target)
            for number in shard.numbers:
                builder.add([_sample(dataset, number, translator, options)])
                if on_progress:
                    on_progress(number + 1, len(dataset))
            target.commit(builder.build(), options)
    markers = target.markers(shard.name for shard in plan)
    found = index_of(translator.target, options, [markers[shard.name] for shard in plan])
    target.write_index(found)
    return found


def _sample(
    dataset: LatentDataset, number: int, translator: LatentTranslator, options: EncodingOptions
) -> Sample:
    fields, arrays = dataset.read(number)
    frame = _frame(fields, translator.config.upscale)
    latents = torch.from_numpy(np.array(arrays.get("latents", arrays.get("mean"))))[None]
    translated = _translated(latents, frame.size, translator)
    caption = fields.get("caption")
    return Sample(
        number=number,
        version=0,
        name=fields["name"],
        key=fields.get("key", fields["name"]),
        original=_enlarged(fields["size"], translator),
        frame=frame,
        label=fields.get("label"),
        origin=_origin(
            fields.get("origin") and origin_from_json(fields["origin"]), fields["size"], translator
        ),
        sidecars=fields.get("extra", {}) | ({} if caption is None else {"txt": caption.encode()}),
        arrays={"latents": translated.to(getattr(torch, options.dtype or "float32"))},
    )


def _origin(origin: Origin | None, size: tuple[int, int], translator: LatentTranslator) -> Origin | None:
    """Of the target's image, which may be enlarged."""
    is_same = origin is None or _enlarged(size, translator) == tuple(size)
    return origin if is_same else origin.without_place()


def _frame(fields: Fields, upscale: int) -> Frame:
    """How the image was brought to its size; of a latent file, which does not say it, that it had it."""
    size = fields["size"]
    resized, window = fields.get("resized", size), fields.get("crop", (0, 0, *size))
    height, width = (side * upscale for side in resized)
    top, left, rows, columns = (side * upscale for side in window)
    return Frame((height, width), (top, left, rows, columns), bool(fields.get("flipped")))


def _enlarged(size: tuple[int, int], translator: LatentTranslator) -> tuple[int, int]:
    height, width = size
    return height * translator.config.upscale, width * translator.config.upscale


def _translated(latents: Tensor, size: tuple[int, int], translator: LatentTranslator) -> Tensor:
    """(1, C, h, w) -> (C', h', w'), cut to what an image of `size` has."""
    rows, columns = translator.target.latent_shape(size)
    return translator.translate(latents)[0, :, :rows, :columns]


def _check(found: Any, name: str, translator: LatentTranslator) -> None:
    """Refuse a latent file, or the index of a data set, that is not of the source's latents."""
    if found.space_fingerprint != translator.source.space_fingerprint:
        raise ValueError(
            f"{name} holds {found.kind} of {found.codec_name} (space {found.space_fingerprint}), and this translator "
            f"takes latents of {translator.source}; train one for {found.codec_name}"
        )
    if found.kind != "latents":
        raise ValueError(
            f"{name}: expected latents, got indices of {found.codec_name}; encode the images' latents"
        )
