"""`latent-codec anomaly score`."""

import argparse
import csv
import os
import sys
from pathlib import Path

from latent_codec import LatentCodec
from latent_codec.analysis.anomalies import Anomalies, heat_map, image_as_seen, score_anomalies
from latent_codec.analysis.anomaly_sheet import anomaly_sheet
from latent_codec.analysis.detectors import Detector, load_detector
from latent_codec.analysis.heat_maps import blend
from latent_codec.cli.progress import progress, showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data, settings_of
from latent_codec.cli.work.printing import print_json, table, write_json
from latent_codec.errors import SettingError
from latent_codec.files import replacing
from latent_codec.images.labels import shown_name
from latent_codec.images.sources import FolderImages, ImageSource
from latent_codec.images.tensors import enlarged_to, hstack_images, to_pil, write_image

LONGEST_NAME = 180
"""Bytes of an image's name in that of its heat map."""
SIDE = 128
"""Pixels that smaller images are enlarged to next to their heat maps."""


def run(args: argparse.Namespace) -> int:
    check_writable(args.out / "report.png")
    source, detector = open_data(args), load_detector(args.detector)
    args.codec = args.codec or detector.codec_path
    if args.codec is None:
        raise SettingError("codec", f"{detector.codec}, which the detector was fitted to")
    codec = load_codec(args)
    with showing("scoring") as report:
        settings = settings_of(args, "by", "label", "normal", "limit")
        anomalies = score_anomalies(detector, source, codec, on_progress=report, **settings)
    with showing("drawing the report") as report:
        write_image(
            anomaly_sheet(detector, codec, source, anomalies, on_progress=report), args.out / "report.png"
        )
    _write_heat_maps(detector, codec, source, anomalies, args)
    _write_csv(anomalies, args.out / "scores.csv")
    found = {"data": args.data, "detector": str(args.detector)} | anomalies.to_dict()
    write_json(found, args.out / "anomalies.json")
    for reason in anomalies.skipped:
        print(f"latent-codec {args.verb}: {reason}", file=sys.stderr)
    if args.json:
        print_json(found | {"out": str(args.out)})
    else:
        _print(anomalies)
        print(f"Written: report.png, scores.csv, anomalies.json and heat-maps in {args.out}")
    return 2 if anomalies.skipped else 0


def _write_heat_maps(
    detector: Detector,
    codec: LatentCodec,
    source: ImageSource,
    anomalies: Anomalies,
    args: argparse.Namespace,
) -> None:
    """The most unusual images, each left of its heat map, as RANK-NAME.png; those of an earlier call go."""
    folder = args.out / "heat-maps"
    for earlier in folder.glob("[0-9][0-9][0-9]*-*.png"):
        earlier.unlink()
    for rank, place in progress(enumerate(anomalies.ranked()[: args.heat_maps], 1), "heat maps"):
        index = anomalies.indices[place]
        image = image_as_seen(detector, codec, source, index)
        pair = [image, blend(image, heat_map(detector, codec, image))]
        name = source.listing[index][1].stem if isinstance(source, FolderImages) else f"{index:06d}"
        name = os.fsdecode(os.fsencode(name)[:LONGEST_NAME])
        shown = hstack_images([enlarged_to(to_pil(each), SIDE) for each in pair])
        write_image(shown, folder / f"{rank:03d}-{name}.png")


def _write_csv(anomalies: Anomalies, path: Path) -> None:
    with (
        replacing(path) as written,
        open(written, "w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["name", "unusual", *anomalies.scores, *(["normal"] if anomalies.is_normal is not None else [])]
        )
        is_unusual = anomalies.is_unusual.tolist()
        for place in anomalies.ranked():
            labels = [] if anomalies.is_normal is None else [int(anomalies.is_normal[place])]
            scores = [f"{float(each[place]):.8g}" for each in anomalies.scores.values()]
            rows.writerow([anomalies.names[place], int(is_unusual[place]), *scores, *labels])


def _print(anomalies: Anomalies) -> None:
    found = anomalies.to_dict()
    print(
        f"{found['num_unusual']:,} of {found['num_images']:,} images are unusual: {anomalies.by} above {anomalies.threshold:.4g}, "
        f"as at most {anomalies.false_alarms:.1%} of normal images are"
    )
    if anomalies.auc is not None:
        print(
            f"Of normal images {found['measured_false_alarms']:.1%} are taken for unusual; of the others {found['detected']:.1%} are "
            "found"
        )
        table(
            ("score", "ROC AUC", "95 % interval"),
            [
                [name, f"{auc.value:.4f}", f"{auc.low:.4f} to {auc.high:.4f}"]
                for name, auc in anomalies.auc.items()
            ],
        )
    shown = [
        [
            f"{number}",
            shown_name("/".join(Path(image["name"]).parts[-2:]), 60),
            *(f"{image[name]:.4g}" for name in anomalies.scores),
        ]
        for number, image in enumerate(found["images"][:10], 1)
    ]
    table(("", "most unusual", *anomalies.scores), shown, justify="rlr")
