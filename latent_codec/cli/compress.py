"""Compress images to small files, which `latent-codec decompress` turns back.

  latent-codec compress cat.jpg                              writes compressed/cat.lcf
  latent-codec compress photos/ --out small                  one file for each image; subfolders are kept
  latent-codec compress photos/ --quality 30                 coarser than the default, smaller
  latent-codec compress photos/ --target-bpp 0.25            the finest that takes 0.25 bits per pixel at most
  latent-codec compress photos/ --target-bytes 2000 --psnr   2000 bytes at most; and what is lost by it
  latent-codec compress photos/ --codec default-vq           indices of a codebook

Latents are quantized: --quality chooses one of the entropy model's step sizes, 0 the coarsest. Indices of a codebook
are stored as they are, at one rate; with a target a codec of several levels leaves out the lowest that do not fit.
Of a.png and a.jpg in one folder both keep their suffix: a.png.lcf, a.jpg.lcf.
What is written is entropy coded by the model that lies beside the codec as entropy.safetensors, which
`latent-codec fit-entropy` makes, or that --entropy names; indices do without one, too, at fixed length. A file names its
codec and entropy model by their fingerprints and is decoded with these alone: keep both.

Each file is decoded to its very values before it is written. For each it prints bytes, bits per pixel of the original, and in
brackets the bits per pixel without overhead: what the entropy model (at fixed length, log2 of the codebook's size)
says that the values cost, before header and rounding. With several images the last line has all of them together.

Images of more than --tile pixels a side are coded in tiles, which --region of decompress decodes by themselves.
An image that cannot be read, or cannot be as small as the target, is left out and named on stderr; the exit status
is then 2.
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_json_argument,
    check_paths,
    load_codec,
    named_images,
)
from latent_codec.cli.compressed_files import add_entropy_argument
from latent_codec.cli.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images, or folders of them")
    parser.add_argument(
        "--out", default="compressed", metavar="DIR", help="where to write NAME.lcf (default: compressed)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quality", type=int, metavar="Q", help="of latents, 0 being the coarsest (default: 50)"
    )
    size.add_argument(
        "--target-bpp",
        type=float,
        metavar="B",
        help="bits per pixel of the original, at most, header included",
    )
    size.add_argument("--target-bytes", type=int, metavar="N", help="bytes of each file, at most")
    parser.add_argument(
        "--tile",
        type=int,
        default=1024,
        metavar="PIXELS",
        help="side of the tiles of larger images; 0: never tile (default: %(default)s)",
    )
    parser.add_argument("--psnr", action="store_true", help="decode every file to pixels, and compare")
    add_entropy_argument(parser)
    add_codec_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    import json
    import sys

    _check_flags(args)

    from latent_codec.bitstream import load_entropy_model
    from latent_codec.bitstream.compression import sidecar
    from latent_codec.images.tensors import ImageError

    images = named_images(args.images)
    codec = load_codec(args)
    model = sidecar(codec) if args.entropy is None else load_entropy_model(args.entropy, codec=codec)
    _check(args, codec, model)
    results, failed = [], []
    for path, name in progress(images, "compressing"):
        try:
            result = _compress(codec, model, path, name, args)
        except ValueError as error:
            reason = " ".join(str(error).split())
            failed.append(reason if isinstance(error, ImageError) else f"{path}: {reason}")
            print(f"latent-codec compress: {failed[-1]}", file=sys.stderr)
            continue
        results.append(result)
        if not args.json:
            print(f"{result['path']}: {_figures(result)}{_how(result, codec)}")
    total = _total(results) if results else None
    if args.json:
        found = {
            "codec": codec.name,
            "space_fingerprint": codec.space_fingerprint,
            "entropy_fingerprint": model and model.fingerprint,
            "images": results,
            "total": total,
            "failed": failed,
        }
        print(json.dumps(found, allow_nan=False))
    elif len(results) > 1:
        print(f"{len(results)} images: {_figures(total)}")
    return 2 if failed else 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that fit no codec, before one is loaded."""
    check_paths(args.images)
    if args.quality is not None and args.quality < 0:
        raise ValueError(f"expected --quality of at least 0, got {args.quality}")
    if args.tile < 0:
        raise ValueError(f"expected --tile of at least 0, got {args.tile}; 0 is for no tiles")
    if args.target_bpp is not None and not 0 < args.target_bpp < float("inf"):
        raise ValueError(f"--target-bpp is {args.target_bpp}; above 0")
    if args.target_bytes is not None and args.target_bytes < 1:
        raise ValueError(f"--target-bytes is {args.target_bytes}; at least 1")


def _check(args: argparse.Namespace, codec, model) -> None:
    """Refuse flags that fit no image, before the first is read."""

    multiple = codec.family.side_multiple
    if args.tile % multiple:
        raise ValueError(
            f"--tile is {args.tile}; {codec.name} needs a multiple of {multiple} pixels, or 0 for no tiles"
        )
    if codec.indices_suffice:
        if args.quality is not None:
            raise ValueError(
                f"--quality is {args.quality}; indices of {codec.name} are stored as they are: leave it out"
            )
        return
    if model is None:
        raise ValueError(
            f"latents of {codec.name} need an entropy model, and no entropy.safetensors lies beside it: make one by "
            "`latent-codec fit-entropy`, or name one by --entropy"
        )
    if args.quality is not None and not 0 <= args.quality < model.num_step_sizes:
        raise ValueError(
            f"--quality is {args.quality}; this entropy model has 0 (coarsest) to {model.num_step_sizes - 1}"
        )


def _compress(codec, model, path: Path, name: Path, args: argparse.Namespace) -> dict:
    from latent_codec.bitstream import prepare
    from latent_codec.bitstream.container import SUFFIX
    from latent_codec.errors import SettingError
    from latent_codec.files import replacing
    from latent_codec.images.tensors import to_image

    image = to_image(path, channels=codec.channels)
    height, width = image.shape[-2:]
    target = args.target_bytes
    if args.target_bpp is not None:
        target = int(args.target_bpp * height * width / 8)
    try:
        prepared = prepare(codec, image, entropy_model=model, tile=args.tile or None)
        data, decoded = prepared.compress_and_read(quality=args.quality, target_bytes=target)
    except SettingError as error:
        if args.target_bpp is None:
            raise
        raise ValueError(
            f"--target-bpp: expected {error.expected}, got {args.target_bpp:g}, which allows {target}"
        ) from error
    header, bits = decoded.container.header, decoded.code_length
    out = Path(args.out) / name.with_name(f"{name.name}{SUFFIX}")
    result = {
        "name": name.as_posix(),
        "path": str(out),
        "size": [height, width],
        "bytes": len(data),
        "bits_per_pixel": 8 * len(data) / (height * width),
        "bits_without_overhead": bits,
        "bits_per_pixel_without_overhead": bits / (height * width),
        "coding": "fixed length" if header.entropy_fingerprint is None else "entropy coded",
        "tiles": header.num_tiles,
    }
    result |= {"levels": len(header.levels)} if header.is_indices else {"quality": header.step_size_index}
    if args.psnr:
        result["psnr"] = _psnr(decoded.image(output_type="pt"), image)
    with replacing(out) as written:
        written.write_bytes(data)
    return result


def _psnr(decoded, image) -> float | None:
    """In dB, of the image as it would be written; None where nothing differs, which JSON has no word for."""
    from latent_codec.metrics import psnr, round_to_8_bits

    found = psnr(round_to_8_bits(decoded.cpu())[None], image.cpu()[None]).item()
    return found if found < float("inf") else None


def _total(results: list[dict]) -> dict:
    pixels = sum(result["size"][0] * result["size"][1] for result in results)
    total = {key: sum(result[key] for result in results) for key in ("bytes", "bits_without_overhead")}
    total |= {
        "bits_per_pixel": 8 * total["bytes"] / pixels,
        "bits_per_pixel_without_overhead": total["bits_without_overhead"] / pixels,
    }
    if "psnr" in results[0]:
        finite = [result["psnr"] for result in results if result["psnr"] is not None]
        total["psnr"] = sum(finite) / len(finite) if finite else None
    return total


def _figures(found: dict) -> str:
    text = (
        f"{found['bytes']:,} bytes, {found['bits_per_pixel']:.4f} bits per pixel "
        f"({found['bits_per_pixel_without_overhead']:.4f} without overhead)"
    )
    if "psnr" in found:
        text += ", PSNR infinite" if found["psnr"] is None else f", PSNR {found['psnr']:.2f} dB"
    return text


def _how(result: dict, codec) -> str:
    if "quality" in result:
        return f", quality {result['quality']}"
    fixed = ", fixed length" if result["coding"] == "fixed length" else ""
    levels = len(codec.codebook_sizes)
    return fixed + (f", {result['levels']} of {levels} levels" if result["levels"] < levels else "")
