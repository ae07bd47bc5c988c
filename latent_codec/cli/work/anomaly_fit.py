"""`latent-codec anomaly fit`."""

import argparse
from dataclasses import replace
from pathlib import Path

from latent_codec.analysis.anomalies import fit_detector
from latent_codec.analysis.anomaly_sheet import plot_references
from latent_codec.analysis.detectors import Detector, check_detector_folder
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data, settings_of
from latent_codec.cli.work.printing import print_json, table


def run(args: argparse.Namespace) -> int:
    check_writable(check_detector_folder(args.out) / "scores.png")
    source, codec = open_data(args), load_codec(args)
    with showing("learning what is normal") as report:
        names = "error", "pooling", "layer", "side", "held_out", "false_alarms", "label", "normal", "limit"
        fitted = fit_detector(source, codec, on_progress=report, **settings_of(args, *names))
    detector = replace(fitted, codec_path=_lasting(args.codec))
    detector.save(args.out)
    plot_references(detector, args.out / "scores.png")
    if args.json:
        print_json({"data": args.data, "detector": str(args.out)} | detector.to_dict())
    else:
        _print(detector)
        print(f"Written: {args.out}, with scores.png")
    return 0


def _lasting(name_or_path: str) -> str:
    """What `--codec` names, from every folder."""
    path = Path(name_or_path)
    return str(path.resolve()) if path.exists() else name_or_path


def _print(detector: Detector) -> None:
    found = detector.to_dict()
    thresholds = [[name, f"{value:.4g}"] for name, value in found["thresholds"].items()]
    table(
        ("", ""),
        [
            ["codec", f"{detector.codec} ({detector.fingerprint})"],
            [
                "features",
                f"{found['num_features']:,}, {detector.pooling}, of {detector.num_fitted:,} normal images",
            ],
            [
                "held out",
                f"{detector.num_held_out:,} normal images, {detector.false_alarms:.1%} of them above a threshold",
            ],
            [],
            *thresholds,
        ],
        justify="lr",
    )
