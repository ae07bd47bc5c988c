"""`latent-codec import-latents`."""

import argparse
import sys

import torch

from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import load_codec
from latent_codec.cli.work.printing import print_json
from latent_codec.errors import SettingError
from latent_codec.images.sources import spread
from latent_codec.latents.data_set import LatentDataset
from latent_codec.latents.importing import import_latents
from latent_codec.latents.plan import EncodingOptions

_EXPECTED = 0.4, 2.5
"""Standard deviations of latents that a denoiser may have been trained on."""


def run(args: argparse.Namespace) -> int:
    codec = load_codec(args)
    options = EncodingOptions(container=args.format, images_per_shard=args.shard)
    try:
        with showing("importing") as report:
            found = import_latents(
                codec, args.data, args.out, options, values=args.values, on_progress=report
            )
    except SettingError as error:
        if error.setting != "values":
            raise
        raise ValueError(f"expected --raw or --scaled: {error.expected}") from error
    for reason in found["skipped_files"]:
        print(f"latent-codec import-latents: {reason}", file=sys.stderr)
    deviation = _standard_deviation(args.out)
    if not _EXPECTED[0] < deviation < _EXPECTED[1]:
        other = "--raw" if args.values == "scaled" else "--scaled"
        print(
            f"latent-codec import-latents: Note: the standard deviation of the latents is {deviation:.3g}, where "
            f"denoisers are trained on about 1; if they should have been {other}, or of another codec, import them anew",
            file=sys.stderr,
        )
    facts = {
        "codec": codec.name,
        "space_fingerprint": codec.space_fingerprint,
        "path": args.out,
        "images": found["images"],
        "samples": found["samples"],
        "shards": len(found["shards"]),
        "standard_deviation": deviation,
        "skipped": found["skipped_files"],
    }
    if args.json:
        print_json(facts)
    else:
        print(
            f"{found['images']:,} images of {codec.name}, {found['samples']:,} latents in {len(found['shards'])} shards"
        )
        print(args.out)
    return 2 if found["skipped_files"] else 0


def _standard_deviation(folder: str) -> float:
    """Of the values of some samples."""
    dataset = LatentDataset(folder, sample=False)
    some = [dataset[number]["latents"].flatten() for number in spread(len(dataset), 64)]
    return float(torch.cat(some).std())
