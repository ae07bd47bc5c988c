"""Rate and distortion of a codec, beside JPEG, WebP, AVIF and JPEG XL.

  latent-codec rd photos/                                the shipped codec
  latent-codec rd photos/ --codec runs/mine --limit 20   your own, on 20 images
  latent-codec rd photos/ --against webp,avif --bpp 0.1,0.2
  latent-codec rd photos/ --no-curves                    equal bytes only, in about a quarter of the time
  latent-codec rd photos/ --json > figures.json

Everything goes through real files: written, weighed by the file system, read back, decoded. Bits per pixel
(bpp) are those of the whole file over the pixels of the original. Latents need an entropy model, which lies
beside the codec as entropy.safetensors or is named by --entropy; indices of a codebook have one rate, and do
without.

prints four things:
  curves        PSNR (dB), MS-SSIM, LPIPS (SqueezeNet; less is better), and two metrics that no codec here is
                trained on, GMSD (less is better) and HaarPSI (both need piq: `pip install piq`),
                at several rates, means over images
  BD-rate       how many percent fewer (negative) or more bytes the codec takes at equal quality: Bjontegaard's
                mean difference of log rate over the range of quality that both curves have (MS-SSIM in dB), by
                PCHIP; "no overlap" where they have none, since nothing is extrapolated
  equal bytes   for each image, our file at --bpp, and of each format the finest quality whose file is not
                larger than ours, with the bytes of all its files against those of ours. Where a format's coarsest
                file is larger, it counts all the same, to its advantage, and a line says of how many images
  differences   ours minus each format's at equal bytes, paired by image: the mean, its 95 % interval by
                Student's t, and on how many images ours is better. Ours is ahead or behind only where the
                interval does not hold 0

and leaves in --out the curves (rd.png), images at equal bytes (grid.png), every figure (rd.json), and
every file's (rd.csv). The dashed line of rd.png is the codec without quantisation, which its curve nears.
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_argument,
    add_json_argument,
    add_limit_argument,
    load_codec,
)
from latent_codec.cli.compressed_files import add_entropy_argument
from latent_codec.cli.progress import showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser)
    add_codec_arguments(parser)
    add_entropy_argument(parser)
    parser.add_argument(
        "--qualities",
        metavar="Q,Q,...",
        help="of the codec's curve, 0 being the coarsest (default: six that take about 0.05 to 0.5 bpp)",
    )
    parser.add_argument(
        "--bpp",
        metavar="BPP,...",
        help="rates of the comparison at equal bytes (default: 0.15; indices: their own rate)",
    )
    parser.add_argument(
        "--against",
        metavar="FORMAT,...",
        help="of jpeg, webp, avif, jxl (default: all that are installed; jxl needs pillow-jxl-plugin)",
    )
    parser.add_argument("--split", default="test", help="of data that has splits (default: test)")
    add_limit_argument(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("latent-codec-out/rd"),
        metavar="DIR",
        help="where curves, images and figures go (default: %(default)s)",
    )
    parser.add_argument(
        "--no-curves", action="store_true", help="compare at equal bytes only; rd.png is not written"
    )
    parser.add_argument("--keep-files", action="store_true", help="keep the compressed files, in DIR/files")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    import json
    from contextlib import ExitStack
    from functools import partial
    from tempfile import TemporaryDirectory

    rates = _numbers("--bpp", args.bpp, float)
    asked = _numbers("--qualities", args.qualities, int)

    from rich.console import Console

    from latent_codec.evaluation.image_formats import image_formats
    from latent_codec.evaluation.rate_distortion import measure_rate_distortion
    from latent_codec.evaluation.rate_distortion_images import equal_bytes_grid, plot_rate_distortion
    from latent_codec.evaluation.reconstruction import reconstruct
    from latent_codec.files import replacing
    from latent_codec.images.sources import open_source
    from latent_codec.images.tensors import write_image

    others = image_formats(args.against and _words(args.against))
    source = open_source(args.data[0] if len(args.data) == 1 else args.data, split=args.split)
    ours = _compressor(args)
    qualities = _checked_qualities(asked, ours)
    if rates and len(ours.qualities) == 1:
        raise ValueError(f"{ours.name} has one rate, its own: leave --bpp {args.bpp} out")
    if args.no_curves:
        if qualities:
            raise ValueError(
                f"--qualities {args.qualities} are those of a curve: leave it or --no-curves out"
            )
        qualities = []
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known at once
    names = ("rd.png",) * (not args.no_curves) + ("grid.png", "rd.json", "rd.csv")
    files = {name: args.out / name for name in names}
    console = Console(stderr=True)
    with ExitStack() as stack:
        if args.keep_files:
            files["files"] = args.out / "files"
            former = ("[0-9]*/*",)  # a folder for each image
            folder = stack.enter_context(replacing(files["files"], superseded=former))
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="latent-codec-rd-")))
        with showing("compressing") as report:
            result = measure_rate_distortion(
                ours,
                others,
                source,
                folder,
                channels=ours.codec.channels,
                qualities=qualities,
                rates=rates or (0.15,),
                limit=args.limit,
                device=ours.codec.device,
                reconstruct=None if ours.codec.indices_suffice else partial(reconstruct, ours.codec),
                on_progress=report,
            )
        with showing(f"writing {args.out}"):
            grid = equal_bytes_grid(result, [ours, *others], source, folder, channels=ours.codec.channels)
            write_image(grid, files["grid.png"])
            if not args.no_curves:
                plot_rate_distortion(result, files["rd.png"])
    found = {"data": [str(each) for each in args.data]} | result.to_dict()
    with replacing(files["rd.json"]) as beside:
        beside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    _write_csv(found["trials"], files["rd.csv"])
    for reason in result.skipped:
        console.print(f"skipped {reason}", style="yellow", markup=False)
    if args.json:
        paths = [str(path) for path in files.values()]
        print(json.dumps(found | {"files": paths}, indent=1, allow_nan=False))
    else:
        _print_tables(result, " ".join(found["data"]))
        for note in _notes(result, ours.codec):
            print(f"Note: {note}.")
        print(f"Written: {', '.join(str(path) for path in files.values())}")


class CodecCompressor:
    """One of our codecs, by compressed files."""

    def __init__(self, codec, entropy_model):
        from latent_codec.bitstream.container import SUFFIX

        self.suffix = SUFFIX
        self.codec, self.entropy_model, self.name = codec, entropy_model, codec.name
        num_steps = 0 if entropy_model is None else entropy_model.num_step_sizes
        self.qualities = range(num_steps) if num_steps else [None]
        self._image, self._prepared = None, None

    def encode(self, image, quality: int | None) -> bytes:
        from latent_codec.bitstream import prepare

        if image is not self._image:
            self._image = image
            self._prepared = prepare(self.codec, image, entropy_model=self.entropy_model)
        return self._prepared.compress(quality=quality)

    def decode(self, data: bytes):
        from latent_codec.bitstream import decompress

        return decompress(self.codec, data, entropy_model=self.entropy_model)


def _compressor(args: argparse.Namespace) -> CodecCompressor:
    """The codec with its entropy model.

    Raises:
        ValueError: if latents have none, or the codec's images are transparent.
    """
    from latent_codec.bitstream import load_entropy_model, sidecar

    codec = load_codec(args)
    if codec.channels not in (1, 3):
        raise ValueError(
            f"{codec.name} takes images of {codec.channels} channels; grey and RGB can be compared, transparency cannot"
        )
    model = sidecar(codec) if args.entropy is None else load_entropy_model(args.entropy, codec=codec)
    if model is None and not codec.indices_suffice:
        raise ValueError(
            f"latents of {codec.name} need an entropy model, and no entropy.safetensors lies beside it: `latent-codec "
            "fit-entropy` makes one, --entropy names another"
        )
    return CodecCompressor(codec, model)


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]


def _numbers(flag: str, given: str | None, kind: type) -> list | None:
    """ "10,20" -> [10, 20], rising and each once."""
    if given is None:
        return None
    try:
        numbers = sorted({kind(word) for word in _words(given)})
        if not numbers or (kind is float and not 0 < numbers[0] <= numbers[-1] < float("inf")):
            raise ValueError
    except ValueError:
        what = "integers" if kind is int else "numbers above 0"
        raise ValueError(f"{flag} is {given!r}; {what} with commas between are needed") from None
    return numbers


def _checked_qualities(qualities: list[int] | None, ours: CodecCompressor) -> list[int] | None:
    if qualities is None:
        return None
    if len(ours.qualities) == 1:
        raise ValueError(f"{ours.name} has one rate, its own: leave --qualities out")
    if not all(quality in ours.qualities for quality in qualities):
        last = ours.qualities[-1]
        raise ValueError(
            f"--qualities are {', '.join(map(str, qualities))}; this entropy model has 0 (coarsest) to {last}"
        )
    return qualities


def _write_csv(trials: list[dict], path: Path) -> None:
    import csv

    from latent_codec.evaluation.rate_distortion_result import METRICS
    from latent_codec.files import replacing

    with replacing(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(key for key in trials[0] if key not in METRICS), *METRICS])
        writer.writeheader()
        writer.writerows(trials)


def _print_tables(result, data: str) -> None:
    from rich.console import Console

    from latent_codec.evaluation.rate_distortion_result import METRICS

    console = Console()
    console.print(
        f"{result.codec} on {data}: {result.num_images} images, on {result.device}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if result.has_curves:
        _print_curves(console, result)
    for comparison in result.comparisons:
        console.print(f"Equal bytes, at {comparison}", highlight=False)
        table = _table("", "bpp", "bytes", *METRICS.values())
        rivals = result.rivals(comparison)
        for rival in rivals:
            is_ours = rival.mean.compressor == result.codec
            more_bytes = "" if is_ours else f"{rival.more_bytes:+.1%}"
            rate = f"{rival.mean.bits_per_pixel:.4f}"
            table.add_row(rival.mean.compressor, rate, more_bytes, *_figures(rival.mean))
        if result.ceiling is not None:
            table.add_row("unquantised", "-", "", *_figures(result.ceiling))
        console.print(table)
        if len(rivals) > 1:
            _print_differences(console, result, rivals[1:])
        for rival in rivals[1:]:
            if rival.num_larger:
                console.print(
                    f"{rival.mean.compressor}: of {rival.num_larger} images even the coarsest file is larger than ours.",
                    highlight=False,
                    soft_wrap=True,
                )


def _print_curves(console, result) -> None:
    from latent_codec.evaluation.rate_distortion_result import METRICS

    table = _table("", "quality", "bpp", *METRICS.values())
    for name in result.compressors:
        for each in result.curve(name):
            quality = "-" if each.quality is None else str(each.quality)
            table.add_row(name, quality, f"{each.bits_per_pixel:.4f}", *_figures(each))
        table.add_section()
    if result.ceiling is not None:
        table.add_row(result.codec, "unquantised", "-", *_figures(result.ceiling))
    console.print(table)

    if len(result.compressors) > 1:
        console.print(
            f"BD-rate of {result.codec}: bytes more (+) or fewer (-) at equal quality, over the range given",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        bd_rates = result.bd_rates()
        table = _table("against", *bd_rates, justify="left")
        for metric, name in METRICS.items():
            table.add_row(name, *(_bd_figure(by_metric[metric]) for by_metric in bd_rates.values()))
        console.print(table)


def _print_differences(console, result, rivals) -> None:
    """Ours minus each format's, a row for each metric."""
    from latent_codec.evaluation.rate_distortion_result import LESS_IS_BETTER, METRICS

    verdicts = {True: "ahead", False: "behind", None: "no difference seen"}
    table = _table("against", "", "difference", "95 % interval", "ours better", "ours is", justify="left")
    for rival in rivals:
        for metric, name in METRICS.items():
            found, form = rival.differences[metric], "+.2f" if metric == "psnr" else "+.4f"
            if found is None:
                continue
            table.add_row(
                rival.mean.compressor,
                name + " (less is better)" * (metric in LESS_IS_BETTER),
                format(found.mean, form),
                f"{found.low:{form}} to {found.high:{form}}",
                f"{rival.num_ours_better[metric]} of {result.num_images}",
                verdicts[found.ahead],
            )
        table.add_section()
    console.print(table)
    console.print(
        f"Difference: {result.codec} minus the format, paired by image.", highlight=False, soft_wrap=True
    )


def _notes(result, codec) -> list[str]:
    """What to know of the figures."""
    from latent_codec import metrics
    from latent_codec.evaluation.reconstruction import lpips_trained

    mean, notes = result.rivals(result.comparisons[0])[0].mean, []
    for comparison in result.comparisons:
        num_larger = result.rivals(comparison)[0].num_larger
        if num_larger:
            notes.append(f"of {num_larger} images even our coarsest file takes more than {comparison}")
    if mean.ms_ssim is None:
        notes.append(f"no MS-SSIM, which needs {metrics.MS_SSIM_MIN_SIDE} px per side")
    if not metrics.lpips_available():
        notes.append(f"no LPIPS, whose weights {metrics.lpips_weights()} are not there")
    elif mean.lpips is None:
        notes.append(f"no LPIPS, which needs {metrics.LPIPS_MIN_SIDE['squeeze']} px per side")
    elif lpips_trained(codec):
        notes.append(f"{codec.name} was trained on LPIPS, which flatters it")
    if not metrics.piq_available():
        notes.append("no GMSD and no HaarPSI, which need piq: `pip install piq`")
    elif mean.gmsd is None:
        notes.append(f"no GMSD and no HaarPSI, which need {metrics.PIQ_MIN_SIDE} px per side")
    return notes


def _table(first: str, *headings: str, justify: str = "right"):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify=justify)
    return table


def _figures(found) -> list[str]:
    from latent_codec.evaluation.rate_distortion_result import METRICS

    values = {metric: getattr(found, metric) for metric in METRICS}
    return [
        "-" if value is None else format(value, ".2f" if metric == "psnr" else ".4f")
        for metric, value in values.items()
    ]


def _bd_figure(found) -> str:
    return found.note if found.percent is None else f"{found.percent:+.1f} %\n{found.note}"
