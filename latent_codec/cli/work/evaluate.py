"""`latent-codec evaluate`."""

import argparse
import sys
from pathlib import Path

from latent_codec import LatentCodec
from latent_codec.cli.progress import showing
from latent_codec.cli.work.codec_comparison import compare
from latent_codec.cli.work.opening import device_of, load_codec, open_data
from latent_codec.cli.work.printing import by, write_json
from latent_codec.cli.work.summaries import Table, finish_tables
from latent_codec.components.prior_folders import load_prior
from latent_codec.evaluation.codes import CodeStatistics, codeword_tiles
from latent_codec.evaluation.comparison import codebook_sheet, comparison_image, index_sheet, level_name
from latent_codec.evaluation.latents import plot_latent_histograms
from latent_codec.evaluation.likelihood import Likelihood, measure_likelihood
from latent_codec.evaluation.reconstruction import Evaluation, evaluate
from latent_codec.files import human_bytes
from latent_codec.images.tensors import write_image
from latent_codec.latents.encoded_images import are_latent_files, open_encoded
from latent_codec.pipelines.folders import PRIORS, SHIPPED, find_pipeline


def run(args: argparse.Namespace) -> None:
    given = args.codec or []
    if len(given) > 1:
        compare(args)
        return
    args.codec = given[0] if given else None
    (_evaluate_codec if args.prior is None else _measure_prior)(args)


def _evaluate_codec(args: argparse.Namespace) -> None:
    args.codec = args.codec or "default"
    source = open_data(args)
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

    files = [args.out / name for name in ("images.png", "latents.png")]
    with showing(f"writing {args.out}"):
        write_image(comparison_image(codec, source, evaluation), files[0])
        plot_latent_histograms(evaluation.latents, files[1], title=f"Latents of {codec.name}")
        if tiles:
            files += [args.out / name for name in ("codebook.png", "indices.png")]
            write_image(codebook_sheet(codec, evaluation, tiles), files[2])
            write_image(index_sheet(codec, source, evaluation, tiles), files[3])
    found = {"data": args.data} | evaluation.to_dict()
    files.append(args.out / "evaluation.json")
    write_json(found, files[-1])
    finish_tables(args, found, files, evaluation.skipped, _evaluation_tables(evaluation, " ".join(args.data)))


def _measure_prior(args: argparse.Namespace) -> None:
    priors, codec = _open_priors(args)
    images = open_encoded(args.data, codec=codec) if are_latent_files(args.data) else open_data(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with showing("measuring") as report:
        likelihood = measure_likelihood(
            priors, images, codec, label=args.label or "class", limit=args.limit, on_progress=report
        )
    found = {"data": args.data, "prior": args.prior} | likelihood.to_dict()
    for note in likelihood.notes:
        print(f"Note: {note}", file=sys.stderr)
    files = [args.out / "likelihood.json"]
    write_json(found, files[0])
    tables = [_likelihood_table(likelihood, args.prior, " ".join(args.data))]
    finish_tables(args, found, files, likelihood.skipped, tables)


def _open_priors(args: argparse.Namespace) -> tuple[list, LatentCodec | None]:
    """The priors that `--prior` names, top level first, and their codec, None of pixels."""
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


def _likelihood_table(likelihood: Likelihood, prior: str, data: str) -> Table:
    whose = "" if likelihood.codec is None else f" of {likelihood.codec}"
    headings = "level", "indices", "bits per\nindex", "order 0", "log2 K", "perplexity", "K", "bits per\ndim"
    rows = [
        (
            str(level.level),
            f"{level.num_indices:,}",
            f"{level.bits_per_index:.4f}",
            f"{level.order_0_bits_per_index:.4f}",
            f"{level.uniform_bits_per_index:.4f}",
            "-" if level.perplexity is None else f"{level.perplexity:,.1f}",
            f"{level.num_values:,}",
            f"{level.bits_per_dim:.5f}",
        )
        for level in likelihood.levels
    ]
    if len(rows) > 1:
        rows.append(("all", *[""] * 6, f"{likelihood.bits_per_dim:.5f}"))
    given = "" if likelihood.label is None else f", given {likelihood.label!r} of the label"
    lossy = "" if likelihood.kind == "pixels" else " Of a lossy code: not the images' own likelihood."
    return Table(
        title=f"{prior}, {likelihood.kind}{whose}, on {data}: {likelihood.num_images} images",
        headings=headings,
        rows=rows,
        note=(
            f"Bits per dim: {likelihood.bits_per_dim:.5f}{given}; order 0 {likelihood.order_0_bits_per_dim:.5f}, log2 K "
            f"{likelihood.uniform_bits_per_dim:.5f}.{lossy}"
        ),
    )


def _evaluation_tables(evaluation: Evaluation, data: str) -> list[Table]:
    rows = [
        (name, "-" if figure.value is None else format(figure.value, form), figure.note)
        for name, figure, form in (
            ("PSNR", evaluation.psnr, ".2f"),
            ("RMSE", evaluation.rmse, ".4g"),
            ("SSIM", evaluation.ssim, ".4f"),
            ("MS-SSIM", evaluation.ms_ssim, ".4f"),
            ("LPIPS", evaluation.lpips, ".4f"),
            ("Frechet distance", evaluation.frechet, ".4g"),
        )
        if name != "RMSE" or figure.value is not None
    ]
    rows += [
        (name, "-" if figure.value is None else f"{figure.value:.2f}", figure.note)
        for name, figure in (
            ("quarter turn", evaluation.equivariance.quarter_turn),
            ("half size", evaluation.equivariance.half_size),
        )
    ]
    high, of_images = evaluation.equivariance.high_frequencies, evaluation.equivariance.image_high_frequencies
    if high.value is not None:
        rows.append(("high frequencies", f"{high.value:.1%}", f"{high.note}; images' {of_images.value:.1%}"))
    where = f"s per megapixel, {evaluation.dtype} on {evaluation.device}"
    peak = evaluation.peak_memory_bytes
    rows += [
        ("encode", f"{evaluation.encode_seconds_per_megapixel:.3g}", where),
        ("decode", f"{evaluation.decode_seconds_per_megapixel:.3g}", where),
        ("peak memory", "-" if peak is None else human_bytes(peak), evaluation.peak_memory_note),
    ]
    if evaluation.skipped:
        rows.append(("skipped", str(len(evaluation.skipped)), "images that could not be read"))
    title = f"{evaluation.codec} on {data}: {len(evaluation.images)} images"
    samples = "" if evaluation.codes else ", from a posterior's samples"
    note = (
        f"A training prints another PSNR: of its crops, by the weights of each step{samples},\n"
        "and not rounded to 8 bits."
    )
    found = [Table(title=title, headings=("", "", ""), rows=rows, justify="lrl", note=note)]
    if evaluation.codes:
        found.append(_code_table(evaluation.codes))
    return [*found, _latent_table(evaluation)]


def _code_table(codes: CodeStatistics) -> Table:
    bits = "bits per\nindex", "bits per\npixel", "fixed\nlength"
    rows = [
        (
            level_name(level, len(codes.levels)).removeprefix("level "),
            f"{usage.codebook_size:,}",
            f"{usage.used_codes:,}",
            f"{usage.dead_codes:,}",
            f"{usage.perplexity:,.1f}",
            f"{usage.entropy:.3f}",
            f"{usage.bits_per_pixel:.4f}",
            f"{usage.fixed_length_bits_per_pixel:.4f}",
        )
        for level, usage in enumerate(codes.levels)
    ]
    if len(rows) > 1:
        totals = f"{codes.bits_per_pixel:.4f}", f"{codes.fixed_length_bits_per_pixel:.4f}"
        rows.append(("all", *[""] * 5, *totals))
    grids = " + ".join(by(usage.first_grid) for usage in codes.levels)
    note = (
        f"Indices: {grids} for the first image, {by(codes.first_size)}.\n"
        "Bits per index: their order-0 entropy. Bits per pixel: the same, per pixel without\n"
        "padding. Fixed length: the bits per pixel at log2(size) bits for every index."
    ) + (f"\nNote: {codes.note}." if codes.note else "")
    headings = ("level", "size", "used", "dead", "perplexity", *bits)
    return Table(title="", headings=headings, rows=rows, note=note)


def _latent_table(evaluation: Evaluation) -> Table:
    is_discrete, statistics = evaluation.codes is not None, evaluation.latents
    kls = [] if is_discrete else ["KL"]
    rows = []
    for channel, (mean, std, distance) in enumerate(
        zip(statistics.mean, statistics.std, statistics.distance_from_normal)
    ):
        kl = "-" if statistics.kl is None else f"{statistics.kl[channel]:.3f}"
        rows.append((str(channel), f"{mean:.3f}", f"{std:.3f}", *([kl] if kls else []), f"{distance:.3f}"))
    whose = "encoded latents" if is_discrete else "posterior means"
    note = (
        f"Mean and std: of {whose}, scaled and shifted as a denoiser sees them.\n"
        + ("" if is_discrete else f"KL: {statistics.kl_note}.\n")
        + "From N(0, 1): Kolmogorov-Smirnov distance, 0 (the same) to 1 (nothing shared)."
    )
    headings = ("latent channel", "mean", "std", *kls, "from N(0, 1)")
    return Table(title="", headings=headings, rows=rows, justify="r", note=note)
