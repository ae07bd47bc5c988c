"""`latent-codec disentanglement`."""

import argparse
from functools import partial

from latent_codec.analysis.disentanglement import (
    Disentanglement,
    factors_of,
    measure_disentanglement,
    plot_mutual_information,
)
from latent_codec.analysis.features import extract_features
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data
from latent_codec.cli.work.printing import finish_report, table, write_json
from latent_codec.evaluation.one_vector import vector_side

FEW = 2000
"""Images below which mutual information, by bins, is much overestimated: by about (bins - 1) (values - 1) / 2N nats."""


def run(args: argparse.Namespace) -> None:
    check_writable(args.out / "disentanglement.png")
    source = open_data(args)
    codec = load_codec(args)
    if vector_side(codec) is None:
        raise ValueError(
            f"{codec.name} makes a grid of latents of an image, whose numbers follow places before factors; train a codec of "
            "one vector: latent-codec train shapes-global --data shapes:20000x32"
        )
    with showing("encoding") as report:
        features = extract_features(source, codec, limit=args.limit, on_progress=report)
    factors = factors_of(features, args.factor)
    with showing("measuring"):
        found = measure_disentanglement(features.vectors, factors)
        image = args.out / "disentanglement.png"
        plot_mutual_information(found, image, title=f"{codec.name}: what each dimension says of each factor")
    told = {"data": args.data} | features.to_dict() | found.to_dict()
    figures = args.out / "disentanglement.json"
    write_json(told, figures)
    show = partial(_print, found, codec.name, " ".join(args.data))
    finish_report(args, told, [image, figures], features.skipped, show)


def _print(found: Disentanglement, codec: str, data: str) -> None:
    print(f"{codec} on {data}: {found.num_images} images")
    rows = []
    for name, shares, gap, accuracy, baseline in zip(
        found.factors, found.mutual_information, found.gaps, found.accuracies, found.baselines
    ):
        best = max(range(len(shares)), key=shares.__getitem__)
        rows.append(
            (name, str(best), f"{shares[best]:.3f}", f"{gap:.3f}", f"{accuracy:.1%}", f"{baseline:.1%}")
        )
    table(("factor", "dimension", "share", "gap", "guessed", "without"), rows)
    print(
        f"MIG {found.mig:.3f}, disentanglement {found.disentanglement:.3f}, completeness {found.completeness:.3f}, "
        f"informativeness {found.informativeness:.3f}\n"
        "Dimension: which says most of the factor. Share: of the factor's entropy. Gap: to the second. Guessed: by a\n"
        "random forest, on held-out images. Without: the most frequent value."
    )
    if found.num_images < FEW:
        print(f"Note: give {FEW:,} images or more; shares and gaps of fewer are too large.")
