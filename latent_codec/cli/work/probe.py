"""`latent-codec probe`."""

import argparse
import sys
from functools import partial

from latent_codec.analysis.probes import Probe, mistakes_sheet, plot_confusion, probe
from latent_codec.cli.progress import showing
from latent_codec.cli.work.features import describe
from latent_codec.cli.work.opening import check_writable, load_codec, open_data, settings_of
from latent_codec.cli.work.printing import finish_report, table, write_json
from latent_codec.errors import SettingError
from latent_codec.images.labels import class_names
from latent_codec.images.sources import FolderImages, ImageSource, TarImages, open_source
from latent_codec.images.tensors import write_image

FEW = 30
"""Test images below which the normal distribution says little of a share's error."""


def run(args: argparse.Namespace) -> int:
    check_writable(args.out / "confusion.png")
    source, test = open_data(args), None
    if args.test_data or args.test_split:
        test = open_source(
            args.test_data or args.data,
            split=args.test_split or "test",
            value_range=args.value_range,
            axis=args.axis,
        )
        _check_others(source, args)
    codec = load_codec(args)
    with showing("encoding") as report:
        settings = settings_of(args, "held_out", "pooling", "layer", "side", "limit", "seed")
        found = probe(source, codec, test=test, label=args.label or "class", on_progress=report, **settings)
    for reason in found.skipped:
        print(f"latent-codec probe: {reason}", file=sys.stderr)

    names = class_names(source, found.label, found.classes)
    files = [args.out / name for name in ("confusion.png", "mistakes.png", "probe.json")]
    with showing(f"writing {args.out}"):
        title = f"{codec.name}, {found.features.num_features} features: {found.features.accuracy:.1%} of {found.num_test:,}"
        plot_confusion(found, files[0], names, title=title)
        mistakes = mistakes_sheet(found, source if test is None else test, names)
        if mistakes is None:
            files.pop(1).unlink(missing_ok=True)  # an earlier probe's
        else:
            write_image(mistakes, files[1])
        result = {"data": args.data} | found.to_dict() | {"class_names": names}
        write_json(result, files[-1])
    finish_report(args, result, files, (), partial(_print, found))
    return 2 if found.skipped else 0


def _check_others(source: ImageSource, args: argparse.Namespace) -> None:
    """Refuse to test on the images that are learned from.

    Raises:
        SettingError: if --test-split names what is learned from.
    """
    has_splits = not isinstance(source, (FolderImages, TarImages))
    if args.test_data is None and (args.test_split == args.split or not has_splits):
        reason = "DATA is read from it" if has_splits else "DATA has no splits"
        advice = f"{reason}; name others by `test_data`, or leave it out"
        raise SettingError("test_split", "another split of DATA", args.test_split, advice=advice)


def _print(found: Probe) -> None:
    print(describe(found.test))
    rows = [
        (each.name, f"{each.num_features:,}", f"{each.accuracy:.4f}", f"{each.standard_error:.4f}")
        for each in (found.features, found.pca, found.pixels)
    ]
    rows.append(("the most frequent class", "0", f"{found.largest_share:.4f}", ""))
    table(("logistic regression on", "numbers", "accuracy", "std. error"), rows)
    lead, low, high = found.lead_over_pca
    print(
        f"{len(found.classes)} classes, learned from {found.num_train:,} images, tested on {found.num_test:,} others.\n"
        f"Features against principal components: {lead:+.4f} [{low:+.4f}, {high:+.4f}], 95 % interval, paired."
    )
    if found.num_test < FEW:
        print(f"Note: test on {FEW} images or more; errors and intervals of fewer are too small.")
    for each in (found.features, found.pca, found.pixels):
        if not each.has_converged:
            print(f"Note: the regression on {each.name} was stopped before its optimum.")
