"""Measure rate and distortion of a codec against JPEG, WebP, AVIF and JPEG XL.

Everything goes through real files: written, measured by the file system, read
again, decoded. Bits per pixel (bpp) are those of the whole file over the
pixels of the original. Latents need an entropy model: entropy.safetensors in
the codec's folder, or the one of --entropy; indices of a codebook have one
rate, and do without.

It prints:

  curves       PSNR (dB), MS-SSIM, LPIPS (SqueezeNet; less is better), and two
               metrics that no codec here is trained on, GMSD (less is better)
               and HaarPSI (both need piq: `pip install piq`), at several
               rates, means over images
  BD-rate      how many percent fewer (negative) or more bytes the codec takes
               at equal quality: Bjontegaard's mean difference of log rate over
               the range of quality that both curves have (MS-SSIM in dB), by
               PCHIP. Nothing is extrapolated: it needs four rates of each
               curve and, of PSNR and MS-SSIM, 1 dB that both reach
  equal bytes  for each image, our file at --bpp, and of each format the finest
               quality whose file is not larger than ours, with the bytes of
               all its files against those of ours. Where a format's coarsest
               file is larger, it counts all the same, to its advantage, and a
               line says of how many images
  differences  ours minus each format's at equal bytes, paired by image: the
               mean, its 95 % interval by Student's t, and on how many images
               ours is better. Ours is ahead or behind only where the interval
               does not hold 0

In --out it leaves the curves (rd.png), images at equal bytes (grid.png), every
figure (rd.json), every file's (rd.csv), and the tables for a page or a paper
(summary.md, summary.tex). The dashed line of rd.png is the codec without
quantization, which its curve approaches.

Examples:
  latent-codec rd photos/                   the shipped codec
  latent-codec rd photos/ --codec runs/mine --limit 20
                                            your own, on 20 images
  latent-codec rd photos/ --against webp,avif --bpp 0.1,0.2
  latent-codec rd photos/ --no-curves       equal bytes only, in about a
                                            quarter of the time
  latent-codec rd photos/ --json > figures.json
"""

import argparse

from latent_codec.cli import arguments
from latent_codec.cli.compressed_files import add_entropy_argument
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, split="test")
    arguments.add_codec_arguments(parser)
    add_entropy_argument(parser)
    parser.add_argument(
        "--qualities",
        metavar="Q,Q,...",
        help="measure the codec's curve at these qualities, 0 being the coarsest, and the formats' from half to twice these rates (default: six of about 0.05 to 0.5 bits per pixel)",
    )
    parser.add_argument(
        "--bpp",
        metavar="BPP,...",
        help="compare at equal bytes at these rates, in bits per pixel (default: 0.15; indices: their own rate)",
    )
    parser.add_argument(
        "--against",
        metavar="FORMAT,...",
        help="compare with these of jpeg, webp, avif, jxl (default: all that are installed; jxl needs pillow-jxl-plugin)",
    )
    arguments.add_out_argument(parser, "latent-codec-out/rd", "curves, images and figures")
    parser.add_argument(
        "--no-curves", action="store_true", help="compare at equal bytes only; rd.png is not written"
    )
    parser.add_argument("--keep-files", action="store_true", help="keep the compressed files, in DIR/files")
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    args.bpp = _numbers("bpp", args.bpp, float)
    args.qualities = _numbers("qualities", args.qualities, int)


def words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _numbers(setting: str, given: str | None, kind: type) -> list | None:
    """ "10,20" -> [10, 20], rising and each once."""
    if given is None:
        return None
    try:
        numbers = sorted({kind(word) for word in words(given)})
        if not numbers or (kind is float and not 0 < numbers[0] <= numbers[-1] < float("inf")):
            raise ValueError
    except ValueError:
        what = "integers" if kind is int else "numbers above 0"
        raise SettingError(setting, f"{what}, separated by commas", given) from None
    return numbers
