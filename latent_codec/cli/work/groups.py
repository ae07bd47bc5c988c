"""`latent-codec groups`."""

import argparse

from latent_codec.analysis.groups import check_groups, measure_groups, redraw_groups
from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import check_writable, load_codec, open_data, settings_of
from latent_codec.cli.work.printing import print_json, table
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import to_image, write_image

SIDE = 64
"""Pixels that images have at least in the sheet."""


def run(args: argparse.Namespace) -> None:
    check_writable(args.out, is_image=True)
    codec = load_codec(args)
    check_groups(codec, "a sheet of groups")
    source = open_data(args)
    image = to_image(args.image, channels=codec.channels) if args.image else source.image(0, codec.channels)
    rows = redraw_groups(codec, image, num=args.num, temperature=args.temperature, seed=args.seed)
    with showing("measuring") as report:
        found = measure_groups(codec, source, limit=args.limit, seed=args.seed, on_progress=report)
    titles = ["the prior", *(f"top {count} kept" for count in range(1, len(rows)))]
    shown = [list(row) for row in rows[:-1]] + [[rows[-1][0], image]]
    titles[-1] = "all kept,\noriginal"
    write_image(sheet(shown, row_titles=titles, side=SIDE), args.out)

    if args.json:
        facts = {
            "codec": codec.name,
            "fingerprint": codec.fingerprint,
            **settings_of(args, "num", "seed", "temperature"),
            "num_images": found.num_images,
            "prior_bits_per_dim": found.prior_bits_per_dim,
        }
        print_json(facts | {"groups": [each.to_dict() for each in found.groups], "path": str(args.out)})
        return
    table(
        ["group", "pixels per position", "channels", "KL, nats", "-ELBO down to it, bits per dim"],
        [
            ["none", "-", "-", "-", f"{found.prior_bits_per_dim:.4f}"],
            *(
                [
                    str(each.group),
                    f"{each.side}x{each.side}",
                    str(each.channels),
                    f"{each.kl:.2f}",
                    f"{each.bits_per_dim:.4f}",
                ]
                for each in found.groups
            ),
        ],
        justify="r",
    )
    total = sum(each.kl for each in found.groups)
    print(
        f"{codec.name}: {len(found.groups)} groups, KL {total:.2f} nats in all, "
        f"{found.groups[-1].bits_per_dim:.4f} bits per dim of {found.num_images} images, see {args.out}"
    )
