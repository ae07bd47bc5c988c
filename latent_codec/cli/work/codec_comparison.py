"""`latent-codec evaluate` of several codecs."""

import argparse

from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import load_codecs, open_data
from latent_codec.cli.work.printing import write_json
from latent_codec.cli.work.summaries import Table, finish_tables
from latent_codec.evaluation.codec_comparison import (
    DRIFT,
    QUALITY,
    CodecComparison,
    compare_codecs,
    crops_sheet,
)
from latent_codec.evaluation.intervals import Interval
from latent_codec.images.tensors import write_image


def compare(args: argparse.Namespace) -> None:
    source, codecs = open_data(args), load_codecs(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with showing("comparing") as report:
        found = compare_codecs(source, codecs, limit=args.limit, on_progress=report)
    files = [args.out / "crops.png", args.out / "comparison.json"]
    with showing(f"writing {args.out}"):
        write_image(crops_sheet(codecs, source, found), files[0])
    as_json = {"data": args.data} | found.to_dict()
    write_json(as_json, files[1])
    finish_tables(args, as_json, files, found.skipped, _tables(found, " ".join(args.data)))


def _tables(found: CodecComparison, data: str) -> list[Table]:
    names = [each.name for each in found.codecs]
    figures = [
        (title, *(_number(each.mean(figure)) for each in found.codecs)) for figure, title in QUALITY.items()
    ]
    for what in ("encode", "decode"):
        seconds = (getattr(each, f"{what}_seconds_per_megapixel") for each in found.codecs)
        figures.append((f"{what}, s per megapixel", *(f"{each:.3g}" for each in seconds)))
    differences = [
        (title, *(_interval(each) for each in found.differences(figure).values()))
        for figure, title in QUALITY.items()
    ]
    drift = [
        (
            title,
            *(f"{_interval(each.drift(channel))}\nstd {each.spread(channel):.2f}" for each in found.codecs),
        )
        for channel, title in DRIFT.items()
    ]
    drift.append(("contrast, %", *(_interval(each.contrast(), 100) for each in found.codecs)))
    return [
        Table(
            title=f"{len(found.codecs)} codecs on {data}: {len(found.codecs[0].images)} images",
            headings=("", *names),
            rows=figures,
            note=(
                "Sharpness: slopes of the reconstruction over the original's. Edge error: slopes lost or false\n"
                "at the original's steepest tenth, outlines and letters; 0 is none."
            ),
        ),
        Table(
            title=f"Minus {names[0]}, image by image: mean, and its 95 % interval",
            headings=("", *names[1:]),
            rows=differences,
            note="* The interval excludes 0: a difference that these images show.",
        ),
        Table(
            title="Drift of colors: mean of the error and its 95 % interval, and its standard deviation in an image",
            headings=("", *names),
            rows=drift,
            note="Contrast: standard deviation of L* against the original's.",
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _interval(found: Interval | None, times: float = 1) -> str:
    if found is None:
        return "-"
    mean, low, high = (each * times for each in (found.mean, found.low, found.high))
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]{'*' * found.excludes_0}"
