"""`latent-codec info` of a data set of latents: counts, checksums, a contact sheet."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.cli.progress import progress
from latent_codec.cli.work.opening import check_writable, device_of
from latent_codec.components.codec_facts import shipped_name
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import spread
from latent_codec.images.tensors import write_image
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.data_set_index import DataSetIndex, read_index

_IN_SHEET, _COLUMNS = 24, 6
_SIDE = 96
"""Pixels to which small images of a sheet are enlarged."""
_SIZES = 8
"""That are listed for people."""


def describe_data_set(args: argparse.Namespace) -> dict:
    """What a data set of latents holds, and which of its shards are missing or damaged."""
    if args.sheet is not None:
        check_writable(args.sheet, is_image=True)
    index = read_index(args.thing, {})
    options = index.options
    facts = {
        "kind": f"data set of {index.kind}",
        "codec": index.codec_name,
        "pipeline": index.pipeline,
        "space_fingerprint": index.space_fingerprint,
        "fingerprint": index.fingerprint,
        "latent_channels": index.latent_space.channels,
        "downsampling_factor": index.latent_space.downsampling_factor,
        "container": index.container,
        "dtype": options["dtype"],
        "posterior": options["posterior"],
        "flipped": options["flip"],
        "augmented": options["augment"],
        "images": index.images,
        "samples": index.samples,
        "skipped": index.entries["skipped"],
        "labelled": index.num_labels,
        "captioned": index.num_captions,
        "sizes": _sizes(index, args),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
    }
    if args.no_checksums:
        sizes = index.folder.sizes()
        damage = [f"{index.path(each)} is missing" for each in index.shards if each.name not in sizes]
        facts["checksums"] = "not computed"
    else:
        found = ((shard, index.damage(shard)) for shard in progress(index.shards, "computing checksums"))
        damage = [f"{index.path(shard)} {what}" for shard, what in found if what]
        facts["checksums"] = (
            f"{len(index.shards) - len(damage)} of {len(index.shards)} shards are as they were written"
        )
    if damage:
        facts["damaged_shards"] = damage
        facts["damage"] = (
            f"{'; '.join(damage[:10])}{' ...' if len(damage) > 10 else ''}; "
            "`latent-codec encode` with the same arguments writes what is missing; delete what is damaged"
        )
    elif args.sheet is not None:
        facts["sheet"] = str(args.sheet)
        facts["sheet_shows"] = _write_sheet(index, args)
    return facts


def _sizes(index: DataSetIndex, args: argparse.Namespace) -> dict[str, int]:
    """Samples of each (height)x(width), of which people are shown the most frequent."""
    sizes = {f"{height}x{width}": count for (height, width), count in index.sizes.items()}
    if args.json or len(sizes) <= _SIZES:
        return sizes
    shown = dict(sorted(sizes.items(), key=lambda each: -each[1])[: _SIZES - 1])
    return shown | {f"{len(sizes) - len(shown)} more": sum(sizes.values()) - sum(shown.values())}


def _write_sheet(index: DataSetIndex, args: argparse.Namespace) -> str:
    """Write samples spread over the data set, decoded where the codec is found; says what is shown."""
    dataset = LatentDataset(args.thing, sample=False)
    samples = [dataset[number] for number in progress(spread(len(dataset), _IN_SHEET), "reading samples")]
    codec = _find_codec(index, args)
    if codec is not None:
        images = [_decoded(codec, sample) for sample in progress(samples, "decoding")]
        what = f"images decoded by {codec.name}"
    elif dataset.is_discrete:
        raise ValueError(
            f"{index.codec_name}, whose indices these are, is not found here; name it by --codec"
        )
    else:
        images = principal_colors([sample["latents"] for sample in samples])
        what = f"the latents' three principal components, as {index.codec_name} is not found here: --codec names it"
    rows = [images[start : start + _COLUMNS] for start in range(0, len(images), _COLUMNS)]
    write_image(sheet(rows, side=_SIDE), args.sheet)
    return what


def _find_codec(index: DataSetIndex, args: argparse.Namespace) -> LatentCodec | None:
    """The codec that is named, or the shipped one of that latent space."""
    if args.codec is not None:
        codec = LatentCodec.from_pretrained(
            args.codec, pipeline=args.for_pipeline or index.pipeline, device=device_of(args)
        )
        index.check(codec)
        return codec
    name = shipped_name(index.space_fingerprint, index.pipeline)
    return name and LatentCodec.from_pretrained(name, pipeline=index.pipeline, device=device_of(args))


def _decoded(codec: LatentCodec, sample: dict) -> Tensor:
    if "indices" in sample:
        return codec.decode_indices([level[None] for level in sample["indices"]], output_type="pt")[0].cpu()
    return codec.decode(sample["latents"][None], output_type="pt")[0].cpu()


def principal_colors(latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents (C, h, w) as images (3, h, w) in [-1, 1]: their three principal components, over all of them."""
    rows = torch.cat([each.flatten(1).T for each in latents]).double()
    mean = rows.mean(0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    axes = vectors.flip(1)[:, :3]
    scale = 2 * ((rows - mean) @ axes).std(0).clamp_min(1e-12)
    images = []
    for each in latents:
        colors = ((each.flatten(1).T.double() - mean) @ axes / scale).clamp(-1, 1).float()
        colors = torch.nn.functional.pad(colors, (0, 3 - colors.shape[1]))
        images.append(colors.T.reshape(3, *each.shape[1:]))
    return images
