"""`latent-codec rd`."""

import argparse
import csv
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from latent_codec import LatentCodec, metrics
from latent_codec.cli.progress import showing
from latent_codec.cli.rd import words
from latent_codec.cli.work.compressed_files import needed_entropy_model
from latent_codec.cli.work.opening import load_codec, open_data
from latent_codec.cli.work.printing import finish_report, write_json
from latent_codec.cli.work.summaries import Table, write_summaries
from latent_codec.errors import SettingError
from latent_codec.evaluation.codec_compressor import CodecCompressor
from latent_codec.evaluation.image_formats import image_formats
from latent_codec.evaluation.rate_distortion import measure_rate_distortion
from latent_codec.evaluation.rate_distortion_images import equal_bytes_grid, plot_rate_distortion
from latent_codec.evaluation.rate_distortion_result import LESS_IS_BETTER, METRICS, RateDistortion, Rival
from latent_codec.evaluation.reconstruction import lpips_trained, reconstruct
from latent_codec.files import replacing
from latent_codec.images.tensors import write_image


def run(args: argparse.Namespace) -> None:
    others = image_formats(args.against and words(args.against))
    source = open_data(args)
    codec = load_codec(args)
    if codec.channels not in (1, 3):
        raise ValueError(
            f"{codec.name} takes images of {codec.channels} channels; expected gray or RGB, which the other formats hold at every rate: "
            "`latent-codec compress --psnr` measures this codec's own files, and `evaluate` its reconstructions"
        )
    ours = CodecCompressor(codec, needed_entropy_model(args, codec))
    _check(args, ours)
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known at once
    names = ("rd.png",) * (not args.no_curves) + ("grid.png", "rd.json", "rd.csv")
    files = {name: args.out / name for name in names}
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
                channels=codec.channels,
                qualities=[] if args.no_curves else args.qualities,
                rates=args.bpp or (0.15,),
                limit=args.limit,
                device=codec.device,
                reconstruct=None if codec.indices_suffice else partial(reconstruct, codec),
                on_progress=report,
            )
        with showing(f"writing {args.out}"):
            grid = equal_bytes_grid(result, [ours, *others], source, folder, channels=codec.channels)
            write_image(grid, files["grid.png"])
            if not args.no_curves:
                plot_rate_distortion(result, files["rd.png"])
    found = {"data": args.data} | result.to_dict()
    write_json(found, files["rd.json"])
    with replacing(files["rd.csv"]) as written, written.open("w", newline="") as file:
        columns = *(key for key in found["trials"][0] if key not in METRICS), *METRICS
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(found["trials"])
    tables = _tables(result)
    written = [*files.values(), *write_summaries(tables, args.out)]
    show = partial(_print_tables, result, codec, args.data, tables)
    finish_report(args, found, written, result.skipped, show)


def _check(args: argparse.Namespace, ours: CodecCompressor) -> None:
    """Refuse rates and qualities that the codec does not have, or that nothing reads."""
    for setting in ("bpp", "qualities"):
        given = getattr(args, setting)
        if given and len(ours.qualities) == 1:
            raise SettingError(setting, f"none for {ours.name}, which has one rate, its own", given)
        if given and setting == "qualities" and args.no_curves:
            raise SettingError(setting, "none without curves", given, advice="leave it or `no_curves` out")
    if not set(args.qualities or ()).issubset(ours.qualities):
        last = ours.qualities[-1]
        raise SettingError(
            "qualities", f"0 (coarsest) to {last}, those of this entropy model", args.qualities
        )


def _print_tables(result: RateDistortion, codec: LatentCodec, data: list[str], tables: list[Table]) -> None:
    print(f"{result.codec} on {' '.join(data)}: {result.num_images} images, on {result.device}")
    for each in tables:
        each.print()
    for note in _notes(result, codec):
        print(f"Note: {note}.")


def _tables(result: RateDistortion) -> list[Table]:
    tables = _curve_tables(result) if result.has_curves else []
    for comparison in result.comparisons:
        rivals = result.rivals(comparison)
        rows = []
        for rival in rivals:
            more_bytes = "" if rival.mean.compressor == result.codec else f"{rival.more_bytes:+.1%}"
            rate = f"{rival.mean.bits_per_pixel:.4f}"
            rows.append((rival.mean.compressor, rate, more_bytes, *_figures(rival.mean)))
        if result.ceiling is not None:
            rows.append(("unquantized", "-", "", *_figures(result.ceiling)))
        larger = "\n".join(
            f"{rival.mean.compressor}: of {rival.num_larger} images even the coarsest file is larger than ours."
            for rival in rivals[1:]
            if rival.num_larger
        )
        headings = ("", "bpp", "bytes", *METRICS.values())
        tables.append(Table(title=f"Equal bytes, at {comparison}", headings=headings, rows=rows, note=larger))
        if len(rivals) > 1:
            tables.append(_differences(result, rivals[1:], comparison))
    return tables


def _curve_tables(result: RateDistortion) -> list[Table]:
    rows = []
    for name in result.compressors:
        for each in result.curve(name):
            quality = "-" if each.quality is None else str(each.quality)
            rows.append((name, quality, f"{each.bits_per_pixel:.4f}", *_figures(each)))
        rows.append(())
    if result.ceiling is not None:
        rows.append((result.codec, "unquantized", "-", *_figures(result.ceiling)))
    title = f"Curves: means over {result.num_images} images"
    tables = [Table(title=title, headings=("", "quality", "bpp", *METRICS.values()), rows=rows)]
    if len(result.compressors) > 1:
        bd_rates = result.bd_rates()
        rows = [
            (name, *(_bd_figure(by_metric[metric]) for by_metric in bd_rates.values()))
            for metric, name in METRICS.items()
        ]
        title = (
            f"BD-rate of {result.codec}: bytes more (+) or fewer (-) at equal quality, over the range given"
        )
        tables.append(Table(title=title, headings=("against", *bd_rates), rows=rows, justify="l"))
    return tables


def _differences(result: RateDistortion, rivals: list[Rival], comparison: str) -> Table:
    """Ours minus each format's, a row for each metric."""
    verdicts = {True: "ahead", False: "behind", None: "no difference seen"}
    rows = []
    for rival in rivals:
        for metric, name in METRICS.items():
            found, form = rival.differences[metric], "+.2f" if metric == "psnr" else "+.4f"
            if found is None:
                continue
            rows.append(
                (
                    rival.mean.compressor,
                    name + " (less is better)" * (metric in LESS_IS_BETTER),
                    format(found.mean, form),
                    f"{found.low:{form}} to {found.high:{form}}",
                    f"{rival.num_ours_better[metric]} of {result.num_images}",
                    verdicts[found.ahead],
                )
            )
        rows.append(())
    return Table(
        title=f"{result.codec} minus each format, at {comparison}, paired by image",
        headings=("against", "", "difference", "95 % interval", "ours better", "ours is"),
        rows=rows,
        justify="l",
    )


def _notes(result, codec) -> list[str]:
    """What to know of the figures."""
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


def _figures(found) -> list[str]:
    values = {metric: getattr(found, metric) for metric in METRICS}
    return [
        "-" if value is None else format(value, ".2f" if metric == "psnr" else ".4f")
        for metric, value in values.items()
    ]


def _bd_figure(found) -> str:
    return found.note if found.percent is None else f"{found.percent:+.1f} %\n{found.note}"
