"""`latent-codec cluster`."""

import argparse
from functools import partial

from latent_codec.analysis.clusters import Clusters, contact_sheet, find_clusters, plane_map
from latent_codec.cli.progress import showing
from latent_codec.cli.work.features import describe, features_of
from latent_codec.cli.work.opening import check_writable, load_codec, open_data
from latent_codec.cli.work.printing import finish_report, table, write_json
from latent_codec.images.labels import check_labels, class_names, shown_name
from latent_codec.images.tensors import write_image


def run(args: argparse.Namespace) -> int:
    check_writable(args.out / "clusters.png")
    source = open_data(args)
    codec = load_codec(args)
    if args.label is not None:
        check_labels(source, args.limit, args.label)
    features = features_of(source, codec, args)
    with showing("clustering"):
        found = find_clusters(features, args.num_clusters, label=args.label, seed=args.seed)
    names = None
    if found.classes is not None:
        classes = found.classes.unique().tolist()
        names = dict(zip(classes, class_names(source, found.label, classes)))
    files = [args.out / name for name in ("clusters.png", "map.png", "clusters.json")]
    with showing(f"writing {args.out}"):
        write_image(contact_sheet(found, source, class_names=names), files[0])
        write_image(plane_map(found, source, method=args.map, seed=args.seed), files[1])
        images = dict(zip(features.names, found.assignments.tolist()))
        result = {"data": args.data} | found.to_dict()
        write_json(result | {"images": images}, files[2])
    finish_report(args, result, files, (), partial(_print, found, names))
    return 2 if features.skipped else 0


def _print(found: Clusters, names: dict[int, str] | None) -> None:
    print(describe(found.features))
    main = found.main_classes()
    if main is None:
        table(
            ("cluster", "images"),
            [(str(each), f"{size:,}") for each, size in enumerate(found.sizes)],
            justify="r",
        )
        return
    rows = [
        (str(each), f"{size:,}", shown_name(names[number], 60), f"{share:.1%}")
        for each, (size, (number, share)) in enumerate(zip(found.sizes, main))
    ]
    table(("cluster", "images", "most frequent class", "share"), rows, justify="rrlr")
    print(f"Purity {found.purity:.4f}, NMI {found.nmi:.4f}, against {len(names)} classes ({found.label}).")
