"""`latent-codec encode`."""

import argparse
from pathlib import Path

from latent_codec.cli.encode import IMAGES_PER_FILE
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import NamedImages, limited, load_codec, open_data
from latent_codec.images.sources import FolderImages, ImageSource, LabelError
from latent_codec.latents.encoded_images import encode_source
from latent_codec.latents.latent_files import save_indices, save_latents


def run(args: argparse.Namespace) -> int:
    source = open_data(args)
    if args.shard is not None or not isinstance(source, FolderImages):
        _encode_data_set(limited(source, args.limit), args)
        return 0
    for flag, is_given in (("--no-labels", args.no_labels), ("--mirrored", args.mirrored)):
        if is_given:
            raise ValueError(f"{flag} goes with files of many images; add --shard {IMAGES_PER_FILE}")
    images = NamedImages(source, args)
    codec = load_codec(args)
    as_indices = args.indices or (codec.indices_suffice and not args.latents)
    if as_indices and not codec.is_discrete:
        raise ValueError(f"{codec.name} has no codebook, and so no indices; leave --indices out")
    if as_indices and args.tile:
        raise ValueError("indices have no tiled form; leave --tile out")
    save = save_indices if as_indices else save_latents
    is_one_file = args.out.endswith(".safetensors")
    names, sizes, encoded = [], [], []
    for index, name, image in images.read(codec.channels, "encoding"):
        file_name = Path(source.name(index)).name
        values = codec.encode_indices(image) if as_indices else codec.encode(image, tile=args.tile)
        size = tuple(image.shape[-2:])
        if is_one_file:
            names.append((name.parent / file_name).as_posix())
            sizes.append(size)
            encoded.append(values)
            continue
        out = Path(args.out) / name.with_name(f"{name.name}.safetensors")
        save(out, [values], codec=codec, names=[file_name], sizes=[size])
        print(out)
    if encoded:
        save(Path(args.out), encoded, codec=codec, names=names, sizes=sizes)
        print(args.out)
    return 2 if images.failed else 0


def _encode_data_set(source: ImageSource, args: argparse.Namespace) -> None:
    if args.out.endswith(".safetensors"):
        raise ValueError(f"this data goes into a folder of several files; {args.out} names a single one")
    if args.tile:
        raise ValueError("--tile is for plain images in a file each; leave it out of this")
    codec = load_codec(args)
    try:
        with showing("encoding") as report:
            files = encode_source(
                codec,
                source,
                args.out,
                images_per_file=IMAGES_PER_FILE if args.shard is None else args.shard,
                batch_size=args.batch_size,
                mirrored=args.mirrored,
                indices=True if args.indices else False if args.latents else None,
                labels=not args.no_labels,
                on_progress=report,
            )
    except LabelError as error:
        raise ValueError(f"{error}; leave labels out by --no-labels") from error
    for file in files:
        print(file)
