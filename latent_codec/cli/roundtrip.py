"""Send images through a codec and back, and show what is lost.

  latent-codec roundtrip                    the sample photograph that comes with matplotlib
  latent-codec roundtrip cat.jpg dog.png    images of your own, a line each
  latent-codec roundtrip photos/ --codec runs/mine --out results

For each image NAME it writes NAME-roundtrip.png: original | reconstruction | difference, where mid-grey means equal. A denoising codec shows the image denoised. Of a codec with a codebook it prints
the grid of indices and the bits per pixel that they take at fixed length, log2(codewords) each; with
several levels it also writes NAME-levels.png, the image from the top level alone to all of them.
Of a.png and a.jpg in one folder both keep their suffix in NAME.

Sizes are height x width. An image that cannot be read is left out and named on stderr; the exit status is then 2.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_json_argument,
    add_tile_argument,
    by,
    check_paths,
    load_codec,
    named_images,
)
from latent_codec.cli.progress import with_progress

SAMPLE_SIZE = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images, or folders of them")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="where to write (default: the current folder)"
    )
    add_codec_arguments(parser)
    add_tile_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    check_paths(args.images)

    from latent_codec.images.tensors import ImageError, center_crop, to_image

    images = named_images(args.images)
    codec = load_codec(args)
    if not images:
        sample = _sample_photograph()
        image = center_crop(to_image(sample, channels=codec.channels), SAMPLE_SIZE)
        results, failed = [_roundtrip(codec, image, Path(sample.stem), args)], []
    else:
        results, failed = [], []
        for path, name in with_progress(images, "round trips"):
            try:
                image = to_image(path, channels=codec.channels)
            except ImageError as error:
                failed.append(str(error))
                print(f"latent-codec roundtrip: {error}", file=sys.stderr)
                continue
            results.append(_roundtrip(codec, image, name, args))
    if args.json:
        found = {"codec": codec.name, "fingerprint": codec.fingerprint, "images": results, "failed": failed}
        print(json.dumps(found))
    return 2 if failed else 0


def _roundtrip(codec, image, name: Path, args: argparse.Namespace) -> dict:
    from latent_codec.images.tensors import hstack_images, write_image
    from latent_codec.metrics import psnr, round_to_8_bits, ssim

    start = time.perf_counter()
    latents = codec.encode(image, tile=args.tile)
    _finish(codec)
    encoded = time.perf_counter()
    (reconstruction,) = codec.decode(latents, size=tuple(image.shape[-2:]), output_type="pt", tile=args.tile)
    _finish(codec)
    decoded = time.perf_counter()

    reconstruction = round_to_8_bits(reconstruction.cpu())
    difference = (reconstruction - image).clamp(-1, 1)
    if codec.channels == 4:
        difference[3] = 1  # opaque, or an equal alpha would hide the difference of the colours
    path = Path(args.out) / name.with_name(f"{name.name}-roundtrip.png")
    write_image(hstack_images([image, reconstruction, difference]), path)
    codes = _look_at_codes(codec, image, path) if codec.indices_suffice else {}
    result = {
        "name": str(name),
        "psnr": psnr(reconstruction[None], image[None]).item(),
        "ssim": ssim(reconstruction[None], image[None]).item() if min(image.shape[-2:]) >= 11 else None,
        "size": list(image.shape[-2:]),
        "latent_shape": list(latents.shape[1:]),
        "encode_seconds": encoded - start,
        "decode_seconds": decoded - encoded,
        "path": str(path),
        **codes,
    }
    if not args.json:
        _print(result)
    return result


def _print(result: dict) -> None:
    ssim = "n/a (under 11 px)" if result["ssim"] is None else f"{result['ssim']:.4f}"
    seen = " and ".join(result[key] for key in ("path", "levels_path") if key in result)
    print(
        f"{result['name']}: PSNR {result['psnr']:.2f} dB, SSIM {ssim}, "
        f"{by(result['size'])} -> {_between(result)}, "
        f"encode {result['encode_seconds']:.2f} s, decode {result['decode_seconds']:.2f} s, see {seen}"
    )


def _look_at_codes(codec, image, roundtrip_path: Path) -> dict:
    """Sizes of the grids of indices and of the codebooks, top level first, and what they cost; with several
    levels an image of them: the top alone, the top and the next one, and so on to all."""
    from latent_codec.evaluation.codes import fixed_length_bits_per_pixel
    from latent_codec.images.tensors import hstack_images, write_image

    size = tuple(image.shape[-2:])
    grids = codec.encode_indices(image)
    codes = {
        "grids": [list(grid.shape[1:]) for grid in grids],
        "codebook_sizes": codec.codebook_sizes,
        "bits_per_pixel_at_fixed_length": fixed_length_bits_per_pixel(codec, *size),
    }
    if len(grids) > 1:
        stages = [codec.decode_indices(grids[: n + 1], size=size)[0] for n in range(len(grids))]
        path = roundtrip_path.with_name(roundtrip_path.name.removesuffix("-roundtrip.png") + "-levels.png")
        write_image(hstack_images(stages), path)
        codes["levels_path"] = str(path)
    return codes


def _between(result: dict) -> str:
    """What lies between image and reconstruction, in words."""
    if "grids" not in result:
        return f"latents {by(result['latent_shape'])}"
    grids = " + ".join(
        f"{by(grid)} of {codebook_size:,}"
        for grid, codebook_size in zip(result["grids"], result["codebook_sizes"])
    )
    return f"indices {grids}, {result['bits_per_pixel_at_fixed_length']:.4f} bits per pixel at fixed length"


def _finish(codec) -> None:
    """Wait for the device, so that the clock shows the work and not its queueing."""
    import torch

    if codec.device.type == "cuda":
        torch.cuda.synchronize(codec.device)


def _sample_photograph() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
