"""Measure a codec on images that it was not trained on.

  latent-codec evaluate photos/                      the shipped codec on a folder
  latent-codec evaluate photos/ --codec runs/mine    your own
  latent-codec evaluate "test-{000..003}.tar" --json > figures.json

prints PSNR, SSIM, MS-SSIM, LPIPS and the Frechet distance of what comes back;
mean, spread and KL of every latent channel, and how far it is from a standard normal;
time per megapixel and the most memory held. In --out it leaves the worst, the median
and the best image (images.png), the latents' histograms (latents.png), and every
figure of every image (evaluation.json).

Of a codec with a codebook it prints how many codewords the images use, perplexity,
and the entropy of the indices in bits per index and per pixel, beside the bits that
indices of fixed length take; and leaves the codewords, each decoded (codebook.png),
and the median image's indices (indices.png).

With --prior it measures how likely a prior finds the images, instead:

  latent-codec evaluate photos/ --prior runs/joined            a pipeline, whose codec and priors they are
  latent-codec evaluate photos/ --prior runs/prior --codec runs/mine
  latent-codec evaluate codes/ --prior runs/prior --codec runs/mine     latent files of `latent-codec encode`

prints of every level bits per index, and beside them what two coders that know less would need of the
very same indices: one that knows how often each occurs (order 0), and one that knows only how many there
are (log2 K). Bits per dim are bits over height x width x channels of the images. Priors with classes
read each image's from its label; --label names the attribute where labels have several. A prior over
pixels needs no codec.

A figure that cannot be had (weights absent, images too small, too few crops) is
left empty with the reason; weights of metrics are never downloaded.
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import (
    add_codec_arguments,
    add_data_argument,
    add_json_argument,
    add_limit_argument,
    by,
    device_of,
    load_codec,
)
from latent_codec.cli.progress import showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser)
    add_codec_arguments(parser, None, "the one called default; with --prior the pipeline's own")
    parser.add_argument(
        "--prior",
        metavar="PATH",
        help="measure the likelihood under this prior: its folder, a run folder, or a pipeline's",
    )
    parser.add_argument(
        "--label",
        metavar="KEY",
        help='of priors with classes: an attribute of the labels (default: "class", labels that are numbers)',
    )
    parser.add_argument("--split", default="test", help="of data that has splits (default: test)")
    add_limit_argument(parser)
    parser.add_argument(
        "--frechet-crop",
        type=int,
        default=128,
        metavar="PX",
        help="side of the crops that the Frechet distance compares (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("latent-codec-out/evaluate"),
        metavar="DIR",
        help="where the images and figures go (default: %(default)s)",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    if args.prior is not None:
        _measure_prior(args)
        return
    if args.label is not None:
        raise ValueError(
            f"--label {args.label} names a prior's classes, and there is no --prior; leave it out"
        )
    args.codec = args.codec or "default"
    _measure_codec(args)


def _measure_codec(args: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from latent_codec.evaluation.codes import codeword_tiles
    from latent_codec.evaluation.comparison import codebook_sheet, comparison_image, index_sheet
    from latent_codec.evaluation.latents import plot_latent_histograms
    from latent_codec.evaluation.reconstruction import evaluate
    from latent_codec.files import replacing
    from latent_codec.images.sources import open_source
    from latent_codec.images.tensors import write_image

    source = open_source(args.data[0] if len(args.data) == 1 else args.data, split=args.split)
    codec = load_codec(args)
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known at once
    with showing("evaluating") as report:
        evaluation = evaluate(
            source, codec, limit=args.limit, frechet_crop=args.frechet_crop, on_progress=report
        )
    tiles = []
    for level in range(len(codec.codebook_sizes)):
        with showing("decoding codewords") as report:
            tiles.append(codeword_tiles(codec, level, on_progress=report))

    names = [
        "images.png",
        "latents.png",
        *(["codebook.png", "indices.png"] if tiles else []),
        "evaluation.json",
    ]
    files = {name: args.out / name for name in names}
    with showing(f"writing {args.out}"):
        write_image(comparison_image(codec, source, evaluation), files["images.png"])
        plot_latent_histograms(evaluation.latents, files["latents.png"], title=f"Latents of {codec.name}")
        if tiles:
            write_image(codebook_sheet(codec, evaluation, tiles), files["codebook.png"])
            write_image(index_sheet(codec, source, evaluation, tiles), files["indices.png"])
    found = {"data": [str(each) for each in args.data]} | evaluation.to_dict()
    with replacing(files["evaluation.json"]) as beside:
        beside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")

    for reason in evaluation.skipped:
        Console(stderr=True).print(f"skipped {reason}", style="yellow", markup=False, soft_wrap=True)
    if args.json:
        print(
            json.dumps(found | {"files": [str(path) for path in files.values()]}, indent=1, allow_nan=False)
        )
    else:
        _print_tables(evaluation, " ".join(found["data"]))
        print(f"Written: {', '.join(str(path) for path in files.values())}")


def _measure_prior(args: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from latent_codec.evaluation.likelihood import measure_likelihood
    from latent_codec.files import replacing
    from latent_codec.images.sources import open_source
    from latent_codec.latents.encoded_images import are_latent_files, open_encoded

    priors, codec = _open_priors(args)
    if are_latent_files(args.data):
        images = open_encoded(args.data, codec=codec)
    else:
        images = open_source(args.data[0] if len(args.data) == 1 else args.data, split=args.split)
    args.out.mkdir(parents=True, exist_ok=True)
    with showing("measuring") as report:
        likelihood = measure_likelihood(
            priors,
            images,
            codec,
            label=args.label or "class",
            limit=args.limit,
            on_progress=report,
        )
    found = {"data": [str(each) for each in args.data], "prior": args.prior} | likelihood.to_dict()
    file = args.out / "likelihood.json"
    with replacing(file) as beside:
        beside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    for reason in likelihood.skipped:
        Console(stderr=True).print(f"skipped {reason}", style="yellow", markup=False, soft_wrap=True)
    for note in likelihood.notes:
        Console(stderr=True).print(f"Note: {note}", style="yellow", markup=False, soft_wrap=True)
    if args.json:
        print(json.dumps(found | {"files": [str(file)]}, indent=1, allow_nan=False))
    else:
        _print_likelihood(likelihood, args.prior, " ".join(found["data"]))
        print(f"Written: {file}")


def _open_priors(args: argparse.Namespace) -> tuple:
    """The priors that `--prior` names, top level first, and their codec, None of pixels."""
    from latent_codec.components.prior_folders import load_prior
    from latent_codec.pipelines.folders import PRIORS, SHIPPED, find_pipeline

    given = Path(args.prior)
    folders = [given]
    if args.prior in SHIPPED or any(
        (each / "model_index.json").is_file() for each in (given, given / "pipeline")
    ):
        pipeline = find_pipeline(args.prior)
        folders = [pipeline / name for name in PRIORS if (pipeline / name).is_dir()]
        if args.codec is None and (pipeline / "vae").is_dir():
            args.codec = str(pipeline)
    with showing(f"opening {args.prior}"):
        priors = [load_prior(folder).to(device_of(args)) for folder in folders]
    return priors, None if args.codec is None else load_codec(args)


def _print_likelihood(likelihood, prior: str, data: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    whose = "" if likelihood.codec is None else f" of {likelihood.codec}"
    console.print(
        f"{prior}, {likelihood.kind}{whose}, on {data}: {likelihood.num_images} images",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE)
    headings = ["indices", "bits per\nindex", "order 0", "log2 K", "perplexity", "K", "bits per\ndim"]
    table.add_column("level")
    for heading in headings:
        table.add_column(heading, justify="right")
    for level in likelihood.levels:
        perplexity = "-" if level.perplexity is None else f"{level.perplexity:,.1f}"
        table.add_row(
            str(level.level),
            f"{level.num_indices:,}",
            f"{level.bits_per_index:.4f}",
            f"{level.order_0_bits_per_index:.4f}",
            f"{level.uniform_bits_per_index:.4f}",
            perplexity,
            f"{level.num_values:,}",
            f"{level.bits_per_dim:.5f}",
        )
    if len(likelihood.levels) > 1:
        table.add_row("all", *[""] * 6, f"{likelihood.bits_per_dim:.5f}")
    console.print(table)
    given = "" if likelihood.label is None else f", given {likelihood.label!r} of the label"
    lossy = "" if likelihood.kind == "pixels" else " Of a lossy code: not the images' own likelihood."
    console.print(
        f"Bits per dim: {likelihood.bits_per_dim:.5f}{given}; order 0 {likelihood.order_0_bits_per_dim:.5f}, log2 K "
        f"{likelihood.uniform_bits_per_dim:.5f}.{lossy}",
        highlight=False,
        soft_wrap=True,
    )


def _print_tables(evaluation, data: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from latent_codec.files import human_bytes

    console = Console()
    console.print(
        f"{evaluation.codec} on {data}: {len(evaluation.images)} images",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    quality = Table(box=box.SIMPLE, show_header=False)
    for justify in ("left", "right", "left"):
        quality.add_column(justify=justify, overflow="fold")
    for name, figure, form in (
        ("PSNR", evaluation.psnr, ".2f"),
        ("SSIM", evaluation.ssim, ".4f"),
        ("MS-SSIM", evaluation.ms_ssim, ".4f"),
        ("LPIPS", evaluation.lpips, ".4f"),
        ("Frechet distance", evaluation.frechet, ".4g"),
    ):
        quality.add_row(name, "-" if figure.value is None else format(figure.value, form), figure.note)
    where = f"s per megapixel, {evaluation.dtype} on {evaluation.device}"
    quality.add_row("encode", f"{evaluation.encode_seconds_per_megapixel:.3g}", where)
    quality.add_row("decode", f"{evaluation.decode_seconds_per_megapixel:.3g}", where)
    peak = evaluation.peak_memory_bytes
    quality.add_row("peak memory", "-" if peak is None else human_bytes(peak), evaluation.peak_memory_note)
    if evaluation.skipped:
        quality.add_row("skipped", str(len(evaluation.skipped)), "images that could not be read")

    console.print(quality)
    if evaluation.codes:
        _print_codes(console, evaluation.codes)
    _print_latents(console, evaluation)


def _print_codes(console, codes) -> None:
    from rich import box
    from rich.table import Table

    from latent_codec.evaluation.comparison import level_name

    table = Table(box=box.SIMPLE)
    table.add_column("level")
    headings = "size", "used", "dead", "perplexity", "bits per\nindex", "bits per\npixel", "fixed\nlength"
    for heading in headings:
        table.add_column(heading, justify="right")
    for level, usage in enumerate(codes.levels):
        table.add_row(
            level_name(level, len(codes.levels)).removeprefix("level "),
            f"{usage.codebook_size:,}",
            f"{usage.used_codes:,}",
            f"{usage.dead_codes:,}",
            f"{usage.perplexity:,.1f}",
            f"{usage.entropy:.3f}",
            f"{usage.bits_per_pixel:.4f}",
            f"{usage.fixed_length_bits_per_pixel:.4f}",
        )
    if len(codes.levels) > 1:
        totals = f"{codes.bits_per_pixel:.4f}", f"{codes.fixed_length_bits_per_pixel:.4f}"
        table.add_row("all", *[""] * 5, *totals)
    console.print(table)
    grids = " + ".join(by(usage.first_grid) for usage in codes.levels)
    console.print(
        f"Indices: {grids} for the first image, {by(codes.first_size)}.\n"
        "Bits per index: their order-0 entropy. Bits per pixel: the same, per pixel without\n"
        "padding. Fixed length: the bits per pixel at log2(size) bits for every index.",
        highlight=False,
        soft_wrap=True,
    )
    if codes.note:
        console.print(f"Note: {codes.note}.", highlight=False)


def _print_latents(console, evaluation) -> None:
    from rich import box
    from rich.table import Table

    is_discrete, statistics = evaluation.codes is not None, evaluation.latents
    table = Table(box=box.SIMPLE)
    for heading in ("latent channel", "mean", "std", *([] if is_discrete else ["KL"]), "from N(0, 1)"):
        table.add_column(heading, justify="right")
    for channel, (mean, std, distance) in enumerate(
        zip(statistics.mean, statistics.std, statistics.distance_from_normal)
    ):
        kl = "-" if statistics.kl is None else f"{statistics.kl[channel]:.3f}"
        row = str(channel), f"{mean:.3f}", f"{std:.3f}", *([] if is_discrete else [kl]), f"{distance:.3f}"
        table.add_row(*row)
    console.print(table)
    whose = "encoded latents" if is_discrete else "posterior means"
    console.print(
        f"Mean and std: of {whose}, scaled and shifted as a denoiser sees them.\n"
        + ("" if is_discrete else f"KL: {statistics.kl_note}.\n")
        + "From N(0, 1): Kolmogorov-Smirnov distance, 0 (the same) to 1 (nothing shared).",
        highlight=False,
    )
