"""`latent-codec attribute apply`."""

import argparse
from pathlib import Path

from latent_codec.analysis.attributes import AttributeDirection, apply_attribute
from latent_codec.cli.progress import progress
from latent_codec.cli.work.opening import check_writable, few_images, load_codec
from latent_codec.cli.work.printing import print_json
from latent_codec.evaluation.one_vector import fit_image
from latent_codec.images.labels import shown_name
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import write_image

SIDE = 96
"""Pixels that images have at least in the sheet."""


def run(args: argparse.Namespace) -> None:
    check_writable(args.out, is_image=True)
    source = few_images(args)
    codec = load_codec(args)
    names = [Path(source.name(index)).stem for index in range(len(source))]
    images = [source.image(index, codec.channels) for index in range(len(source))]
    direction = AttributeDirection.load(args.direction, codec)
    rows = []
    for image in progress(images, "decoding"):
        moved = apply_attribute(codec, image, direction, args.amounts)
        rows.append([fit_image(image, codec), *moved.cpu()])
    titles = ["image", *(f"{amount:+g}" if amount else "0" for amount in args.amounts)]
    write_image(
        sheet(
            rows,
            row_titles=[*map(shown_name, names)] if len(names) > 1 else None,
            column_titles=titles,
            side=SIDE,
        ),
        args.out,
    )

    if args.json:
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint, "images": names}
        print_json(facts | {"label": direction.label, "amounts": args.amounts, "path": str(args.out)})
        return
    print(
        f"{direction.label} of {len(names)} image{'s' * (len(names) > 1)} at {len(args.amounts)} amounts, see {args.out}"
    )
