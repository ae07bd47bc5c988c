"""`latent-codec encode`."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from latent_codec.cli.encode import IMAGES_PER_SHARD
from latent_codec.cli.progress import LINE_EVERY, Part, showing
from latent_codec.cli.work.opening import NamedImages, limited, load_codec, open_data, settings_of
from latent_codec.cli.work.printing import print_json
from latent_codec.errors import SettingError
from latent_codec.files import human_bytes
from latent_codec.images.sources import FolderImages, ImageSource, LabelError
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.engines.accounting import Accounting
from latent_codec.latents.latent_files import save_indices, save_latents
from latent_codec.latents.plan import EncodingOptions
from latent_codec.latents.shards import SHARDS

_OPTIONS = (
    "size",
    "buckets",
    "bucket_step",
    "upscale",
    "flip",
    "augment",
    "posterior",
    "labels",
    "seed",
)
"""Arguments that are options of a data set under the same names."""


def run(args: argparse.Namespace) -> int:
    source = open_data(args)
    if args.container or args.images_per_shard or not isinstance(source, FolderImages):
        _encode_data_set(limited(source, args.limit), args)
        return 0
    for name in (*_OPTIONS, "store_dtype", "engine", "ray_address", "num_workers", "json"):
        if getattr(args, name) != args.parser.get_default(name):
            advice = "or a data set: add `container=webdataset`"
            raise SettingError(name, "none of images in a file each", getattr(args, name), advice=advice)
    images = NamedImages(source, args)
    codec = load_codec(args)
    as_indices = args.indices or (codec.indices_suffice and not args.latents)
    if as_indices and not codec.is_discrete:
        raise ValueError(f"{codec.name} has no codebook, and so no indices; leave --indices out")
    if as_indices and args.tile:
        raise ValueError("indices have no tiled form; leave --tile out")
    save = save_indices if as_indices else save_latents
    is_one_file = args.out.endswith(".safetensors")
    wholes: dict[Path, list] = {}  # what goes into one file: all images, the slices of a volume, or an image
    for index, name, image in images.read(codec.channels, "encoding"):
        file_name = Path(source.name(index)).name
        values = codec.encode_indices(image) if as_indices else codec.encode(image, tile=args.tile)
        origin, size = source.origin(index), tuple(image.shape[-2:])
        if is_one_file:
            file_name = (name.parent / file_name).as_posix()
        whole = name if origin is None or origin.whole is None else Path(origin.whole)
        out = Path(args.out) if is_one_file else Path(args.out) / f"{whole}.safetensors"
        wholes.setdefault(out, []).append((file_name, size, origin, values))
        if not is_one_file and (origin is None or len(wholes[out]) == origin.count):
            _save(save, codec, out, wholes.pop(out))
    for out, encoded in wholes.items():
        _save(save, codec, out, encoded)
    return 2 if images.failed else 0


def _save(save: Callable, codec, out: Path, encoded: list[tuple]) -> None:
    names, sizes, origins, values = zip(*encoded)
    save(out, values, codec=codec, names=names, sizes=sizes, origins=origins)
    print(out)


def _encode_data_set(source: ImageSource, args: argparse.Namespace) -> None:
    if args.out.endswith(".safetensors"):
        raise ValueError(f"this data goes into a folder of several files; {args.out} names a single one")
    if args.tile:
        raise ValueError("--tile is for plain images in a file each; leave it out of this")
    settings = settings_of(args, "num_workers")
    if args.engine == "ray":
        settings |= settings_of(args, "ray_address", "device")
        args.device = "cpu"  # of this process, which does not compute
    elif args.ray_address is not None:
        raise SettingError("ray_address", "none without Ray", args.ray_address, advice="add `engine=ray`")
    codec = load_codec(args)
    as_indices = args.indices or (codec.indices_suffice and not args.latents and args.posterior == "mean")
    options = EncodingOptions(
        container=args.container or "safetensors",
        kind="indices" if as_indices else "latents",
        dtype=args.store_dtype,
        images_per_shard=args.images_per_shard or IMAGES_PER_SHARD,
        **settings_of(args, *_OPTIONS),
    )
    try:
        with showing("encoding") as part:
            index, counts = encode_data_set(
                codec,
                source,
                args.out,
                options,
                engine=args.engine,
                batch_size=args.batch_size,
                on_progress=_Report(part, args.json and _is_first()),
                **settings,
            )
    except LabelError as error:
        raise ValueError(f"{error}; leave labels out by --no-labels") from error
    if not _is_first():
        return
    if args.json:
        print_json({"event": "done", "out": args.out} | counts.to_json() | _totals(index))
        return
    for shard in index["shards"]:
        print("/".join([args.out.rstrip("/"), SHARDS, shard["name"]]))
    if counts.seconds > LINE_EVERY:
        print(_summary(index, counts), file=sys.stderr)


def _is_first() -> bool:
    """Of the processes that `accelerate launch` has started: one prints."""
    return os.environ.get("RANK", "0") == "0"


class _Report:
    """Shows counts on the progress line, or, for machines, as a JSON line now and then."""

    def __init__(self, part: Part, as_json: bool):
        self.part, self.as_json = part, as_json
        self.due = time.monotonic() + 1

    def __call__(self, counts: Accounting) -> None:
        self.part(counts.kept + counts.done, counts.total)
        if self.as_json and time.monotonic() >= self.due:
            self.due = time.monotonic() + 1
            print_json({"event": "progress"} | counts.to_json())
            sys.stdout.flush()


def _totals(index: dict) -> dict:
    return {name: index[name] for name in ("images", "samples", "skipped", "bytes")} | {
        "shards": len(index["shards"])
    }


def _summary(index: dict, counts: Accounting) -> str:
    line = (
        f"{index['samples']:,} {index['kind']} of {index['images']:,} images, {human_bytes(index['bytes'])} in "
        f"{len(index['shards']):,} shards; {counts.images_per_second:.1f} images/s, "
        f"{counts.megapixels_per_second:.2f} megapixels/s, the slowest stage is {counts.slowest_stage}"
    )
    failures = "; ".join(f"{count:,} {reason}" for reason, count in counts.failures.most_common())
    return f"{line}; left out: {failures}" if failures else line
