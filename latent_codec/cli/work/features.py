"""`latent-codec features`."""

import argparse
import sys

from latent_codec.analysis.features import (
    Features,
    extract_features,
    features_of_latents,
    save_features,
    write_csv,
)
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data, open_latents, settings_of
from latent_codec.cli.work.printing import finish_report
from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.sources import ImageSource


def run(args: argparse.Namespace) -> int:
    check_writable(args.out)
    dataset = open_latents(args)
    if dataset is None:
        args.codec = args.codec or "default"
        features = features_of(open_data(args), load_codec(args), args)
    else:
        for name in ("layer", "side"):
            if getattr(args, name) is not None:
                raise SettingError(name, "images, which a layer or a side needs; leave it out of latents")
        with showing("reading latents") as report:
            settings = settings_of(args, "pooling", "limit")
            features = features_of_latents(dataset, on_progress=report, **settings)
    files = [args.out]
    save_features(features, args.out)
    if args.csv:
        files.append(args.out.with_suffix(".csv"))
        write_csv(features, files[-1])
    found = {"data": args.data} | features.to_dict()
    finish_report(args, found, files, (), lambda: print(describe(features)))
    return 2 if features.skipped else 0


def features_of(source: ImageSource, codec: LatentCodec, args: argparse.Namespace) -> Features:
    """As `--pooling`, `--layer`, `--side` and `--limit` say; what was skipped is reported."""
    with showing("encoding") as report:
        settings = settings_of(args, "pooling", "layer", "side", "limit")
        features = extract_features(source, codec, on_progress=report, **settings)
    for reason in features.skipped:
        print(f"latent-codec {args.verb}: {reason}", file=sys.stderr)
    return features


def describe(features: Features) -> str:
    """`5,000 images, 16 features each: latents of garments, whole`."""
    what = "latents" if features.layer is None else f"layer {features.layer}"
    resized = "" if features.side is None else f"; images resized to {features.side}x{features.side}"
    count, size = features.vectors.shape
    return f"{count:,} image{'s' * (count != 1)}, {size:,} features each: {what} of {features.codec}, {features.pooling}{resized}"
