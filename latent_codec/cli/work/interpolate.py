"""`latent-codec interpolate`."""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

from latent_codec.analysis.morphs import morph
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, few_images, load_codec
from latent_codec.cli.work.printing import by, print_json
from latent_codec.errors import SettingError
from latent_codec.images.animations import check_animation, write_animation
from latent_codec.images.labels import shown_name
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import enlarged_to, to_pil, write_image

SIDE = 96
"""Pixels that frames are enlarged to, in the strip; in the animation twice as many."""


def run(args: argparse.Namespace) -> None:
    check_writable(args.out, is_image=True)
    if args.animation is not None:
        check_animation(args.animation)
        check_writable(args.animation)
    source = few_images(args)
    if len(source) < 2:
        raise SettingError("data", "two images or more", len(source))
    codec = load_codec(args)
    names = [Path(source.name(index)).stem for index in range(len(source))]
    images = [source.image(index, codec.channels) for index in range(len(source))]
    with showing("morphing") as report:
        found = morph(codec, images, steps=args.steps, way=args.way, on_progress=report)
    shares = [f"{step / (args.steps - 1):.0%}" for step in range(args.steps)]
    titles = [f"{start}\n{end}" for start, end in pairwise(map(shown_name, names))]
    write_image(sheet(found.legs, row_titles=titles, column_titles=shares, side=SIDE), args.out)
    if args.animation is not None:
        write_animation([enlarged_to(to_pil(frame), 2 * SIDE) for frame in found.frames], args.animation)

    if args.json:
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint, "images": names} | found.to_dict()
        facts |= {"path": str(args.out), "animation": None if args.animation is None else str(args.animation)}
        print_json(facts)
        return
    if found.note:
        print(f"Note: {found.note}", file=sys.stderr)
    where = args.out if args.animation is None else f"{args.out} and {args.animation}"
    print(
        f"{len(found.frames)} frames of {by(found.frames.shape[-2:])} through {len(images)} images, {args.way}, see {where}"
    )
