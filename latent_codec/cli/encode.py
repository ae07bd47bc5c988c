"""Turn pictures into latent files, which `latent-codec decode` turns back.

  latent-codec encode cat.jpg                       writes latents/cat.safetensors
  latent-codec encode photos/ --out latents         one file for each picture; subfolders are kept
  latent-codec encode photos/ --out all.safetensors one file for all

A codec with a codebook gives indices, every other codec latents. With --latents a codec with a codebook
gives the latents that a denoiser takes. So does without it a codec whose latents pipelines decode
without the codebook (Kandinsky's MoVQ); --indices then gives indices.

A latent file records names, sizes and the codec's fingerprints, so that it is not decoded by mistake
with a codec of another latent space.
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_tile_argument,
    load_codec,
    named_pictures,
    with_progress,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="pictures, or folders of them")
    parser.add_argument(
        "--out",
        default="latents",
        metavar="PATH",
        help="a folder, for a file each (default: latents), or NAME.safetensors, for one file",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--indices", action="store_true", help="store codebook indices, or refuse")
    kind.add_argument("--latents", action="store_true", help="store latents, of a codec with a codebook too")
    add_codec_arguments(parser)
    add_tile_argument(parser)


def run(args: argparse.Namespace) -> None:
    from latent_codec.evaluation.codes import decodes_codewords

    pictures = named_pictures(args.pictures)
    codec = load_codec(args)
    args.indices = args.indices or (decodes_codewords(codec) and not args.latents)
    if args.indices and args.tile:
        raise ValueError("indices have no tiled form; leave --tile out")
    if args.out.endswith(".safetensors"):
        _encode_into_one(codec, pictures, args)
        return
    for path, name in with_progress(pictures, "encode"):
        out = Path(args.out) / name.with_name(f"{name.name}.safetensors")
        codes, size = _encode(codec, path, args)
        _save(out, [codes], codec, names=[path.name], sizes=[size], args=args)
        print(out)


def _encode_into_one(codec, pictures: list[tuple[Path, Path]], args: argparse.Namespace) -> None:
    encoded = [_encode(codec, path, args) for path, _ in with_progress(pictures, "encode")]
    names = [(name.parent / path.name).as_posix() for path, name in pictures]
    sizes = [size for _, size in encoded]
    _save(Path(args.out), [codes for codes, _ in encoded], codec, names, sizes, args)
    print(args.out)


def _encode(codec, path: Path, args: argparse.Namespace):
    """Latents (or index grids) of one picture, and its (height, width)."""
    from latent_codec.pictures import to_image

    image = to_image(path, channels=codec.channels)
    codes = codec.encode_indices(image) if args.indices else codec.encode(image, tile=args.tile)
    return codes, tuple(image.shape[-2:])


def _save(out: Path, codes, codec, names: list[str], sizes: list, args: argparse.Namespace) -> None:
    from latent_codec.latent_files import save_indices, save_latents

    save = save_indices if args.indices else save_latents
    save(out, codes, codec=codec, names=names, sizes=sizes)
