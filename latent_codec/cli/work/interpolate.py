"""`latent-codec interpolate`."""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from latent_codec.analysis.morphs import morph
from latent_codec.cli.progress import showing
from latent_codec.cli.work.decoded_files import check_vocoder, load_vocoder, write_sounds
from latent_codec.cli.work.opening import check_writable, few_images, load_codec
from latent_codec.cli.work.printing import by, print_json
from latent_codec.errors import SettingError
from latent_codec.images.animations import check_animation, write_animation
from latent_codec.images.image_source import ImageSource
from latent_codec.images.labels import shown_name
from latent_codec.images.origins import Origin
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
    vocoder = load_vocoder(args)
    images = [source.image(index, codec.channels) for index in range(len(source))]
    origin = _sound(source, images, vocoder)
    if origin is not None:  # recordings begin together; the shorter ones are followed by silence
        width = max(image.shape[-1] for image in images)
        images = [F.pad(image, (0, width - image.shape[-1]), value=-1.0) for image in images]
    with showing("morphing") as report:
        found = morph(codec, images, steps=args.steps, way=args.way, on_progress=report)
    shares = [f"{step / (args.steps - 1):.0%}" for step in range(args.steps)]
    titles = [f"{start}\n{end}" for start, end in pairwise(map(shown_name, names))]
    if origin is None:
        strip = sheet(found.legs, row_titles=titles, column_titles=shares, side=SIDE)
    else:  # wide images, one below the other
        strip = sheet(list(zip(*found.legs)), row_titles=shares, column_titles=titles, side=SIDE)
    write_image(strip, args.out)
    if args.animation is not None:
        write_animation([enlarged_to(to_pil(frame), 2 * SIDE) for frame in found.frames], args.animation)

    sounds = [] if origin is None else write_sounds(found.frames, origin, args.out, vocoder)

    if args.json:
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint, "images": names} | found.to_dict()
        facts |= {"path": str(args.out), "animation": None if args.animation is None else str(args.animation)}
        if sounds:
            facts["sounds"] = [str(path) for path in sounds]
        print_json(facts)
        return
    if found.note:
        print(f"Note: {found.note}", file=sys.stderr)
    written = [args.out, *filter(None, [args.animation])]
    written += [f"{sounds[0]} to {sounds[-1].name}"] if sounds else []
    where = " and ".join(map(str, written))
    print(
        f"{len(found.frames)} frames of {by(found.frames.shape[-2:])} through {len(images)} images, {args.way}, see {where}"
    )


def _sound(source: ImageSource, images: list[Tensor], vocoder) -> Origin | None:
    """What a frame stands for where all images are spectrograms: the longest of the sounds.

    Raises:
        SettingError: for a vocoder where they are not.
    """
    origins = [source.origin(index) for index in range(len(source))]
    if any(origin is None or origin.kind != "sound" for origin in origins):
        check_vocoder(None, vocoder)
        return None
    return max(origins, key=lambda origin: origin.num_samples)
