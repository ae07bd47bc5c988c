"""`latent-codec traverse`."""

import argparse

from latent_codec.analysis.traversals import traverse
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data
from latent_codec.cli.work.printing import print_json, table
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import write_image

SIDE = 64
"""Pixels that images have at least in the sheet."""


def run(args: argparse.Namespace) -> None:
    check_writable(args.out, is_image=True)
    source = open_data(args) if args.data else None
    codec = load_codec(args)
    with showing("encoding") as report:
        found = traverse(
            codec, source, image=args.image, values=args.values, limit=args.limit, on_progress=report
        )
    shown = found[: args.top]
    titles = [f"z{each.index}" + ("" if each.kl is None else f"\n{each.kl:.2f} nats") for each in shown]
    values = [f"{value:g}" for value in args.values]
    write_image(
        sheet([list(each.images) for each in shown], row_titles=titles, column_titles=values, side=SIDE),
        args.out,
    )

    measured = found[0].kl is not None
    total = sum(each.kl for each in found) if measured else None
    if args.json:
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint, "kl_nats": total}
        print_json(facts | {"dimensions": [each.to_dict() for each in found], "path": str(args.out)})
        return
    rows = [
        [str(each.index), "-" if each.kl is None else f"{each.kl:.3f}", f"{each.change:.3f}"]
        for each in found
    ]
    table(["dimension", "KL, nats", "change"], rows, justify="r")
    said = f"KL {total:.2f} nats in all" if measured else "no KL without DATA and a posterior"
    print(
        f"{codec.name}: {len(found)} dimensions, {said}; change is the RMS difference of pixels in [-1, 1] from {min(args.values):g} to {max(args.values):g}, see {args.out}"
    )
