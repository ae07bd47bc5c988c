"""`latent-codec attribute fit`."""

import argparse

from latent_codec.analysis.attributes import fit_attribute
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data, settings_of
from latent_codec.cli.work.printing import print_json


def run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    source = open_data(args)
    codec = load_codec(args)
    with showing("encoding") as report:
        settings = settings_of(args, "without", "method", "held_out", "limit", "seed")
        found = fit_attribute(codec, source, args.label, on_progress=report, **settings)
    found.save(args.out)
    if args.json:
        print_json({"path": str(args.out)} | found.to_dict())
        return
    without = f" without {', '.join(found.without)}" if found.without else ""
    print(
        f"{found.label}{without}: AUC {found.auc:.3f} on {found.num_held_out:,} held-out images; fitted to {found.num_images:,}, of "
        f"which {found.num_positive:,} have it; length {found.direction.norm():.2f} in the latents of {found.codec}, see {args.out}"
    )
