"""`latent-codec diffusability`."""

import argparse
import sys
from statistics import mean, stdev

from latent_codec.cli.progress import showing
from latent_codec.cli.work.opening import load_codecs, open_data, settings_of
from latent_codec.cli.work.printing import write_json
from latent_codec.cli.work.summaries import Table, finish_tables
from latent_codec.evaluation.diffusability import measure_diffusability, patches_of
from latent_codec.evaluation.diffusability_result import Diffusability, plot_diffusability, samples_sheet
from latent_codec.evaluation.frechet import MIN_CROPS
from latent_codec.images.tensors import write_image

FAR_FROM_1 = 0.5, 2.0
"""Standard deviations of latents that a denoiser made for unit variance is hindered by."""


def run(args: argparse.Namespace) -> None:
    source, codecs = open_data(args), load_codecs(args)
    patches_of(codecs, args.size)
    args.out.mkdir(parents=True, exist_ok=True)
    with showing("measuring") as report:
        found = measure_diffusability(
            source,
            codecs,
            num_samples=args.samples,
            folder=args.out / "runs",
            on_progress=report,
            on_estimate=_tell,
            **settings_of(args, "seeds", "steps", "size", "limit"),
        )
    files = []
    if found.steps:
        files = [args.out / "curves.png", args.out / "samples.png"]
        with showing(f"writing {args.out}"):
            plot_diffusability(found, files[0])
            write_image(samples_sheet(found), files[1])
    files.append(args.out / "diffusability.json")
    as_json = {"data": args.data} | found.to_dict()
    write_json(as_json, files[-1])
    for note in _notes(found):
        print(f"Note: {note}", file=sys.stderr)
    finish_tables(args, as_json, files, found.skipped, _tables(found, " ".join(args.data)))


def _tell(seconds: float, count: int) -> None:
    print(
        f"{count} denoisers to train, about {seconds / 60:.1f} min each: {seconds * count / 60:.0f} min. Stop at any time: the "
        "same command goes on.",
        file=sys.stderr,
    )


def _notes(found: Diffusability) -> list[str]:
    notes = []
    if found.num_enlarged:
        notes.append(f"{found.num_enlarged} images are smaller than {found.side} px and were enlarged")
    if found.num_images < MIN_CROPS:
        notes.append(
            f"give {MIN_CROPS:,} images or more: of {found.num_images:,}, distances are too large and denoisers learn them by heart"
        )
    for each in found.codecs:
        if not all(FAR_FROM_1[0] <= std <= FAR_FROM_1[1] for std in each.std):
            notes.append(
                f"{each.name}'s latents have standard deviations of {min(each.std):.2f} to {max(each.std):.2f}, where denoisers "
                f"expect 1: `latent-codec calibrate` measures its scale"
            )
    return notes


def _tables(found: Diffusability, data: str) -> list[Table]:
    rows = [
        ("latents", *(f"{each.channels}x{each.grid}x{each.grid}" for each in found.codecs)),
        ("reconstructions", *(f"{each.reconstructions:,.4g}" for each in found.codecs)),
        ("iFID", *(f"{each.interpolated:,.4g}" for each in found.codecs)),
    ]
    if found.steps:
        rows.append(())
    for mark, steps in enumerate(found.steps):
        rows.append(
            (f"{steps:,} steps", *(_spread(each.mean(mark), each.spread(mark)) for each in found.codecs))
        )
    notes = [
        f"{found.network} of {found.num_samples} samples. Half of the images from the other: {found.half:,.4g}."
    ]
    for figure, title in (("interpolated", "iFID"), ("reconstructions", "reconstructions'")):
        correlation = found.correlation(figure)
        if correlation is not None:
            notes.append(f"Rank correlation of {title} with the last distance: {correlation:+.2f}.")
    num_seeds = len(found.codecs[0].curves)
    of_seeds = f"; mean and standard deviation of {num_seeds} seeds" if num_seeds > 1 else ""
    tables = [
        Table(
            title=f"Frechet distance from {found.num_images} images of {data}, {found.side} px{of_seeds}",
            headings=("", *(each.name for each in found.codecs)),
            rows=rows,
            note="\n".join(notes),
        )
    ]
    if found.steps and len(found.codecs) > 1:
        first, *others = found.codecs
        tables.append(
            Table(
                title=f"Steps until as near as {first.name} after {found.steps[-1]:,}",
                headings=("", "steps", "share", "of each seed"),
                rows=[(each.name, *_steps(found, each.name)) for each in others],
                note="Interpolated between the steps above. > means: not within the training.",
            )
        )
    return tables


def _spread(value: float, spread: float | None) -> str:
    return f"{value:,.4g}" + ("" if spread is None else f" ± {spread:,.2g}")


def _steps(found: Diffusability, name: str) -> tuple[str, str, str]:
    last, reached = found.steps[-1], found.steps_to_first(name)
    shares = [None if each is None else each / last for each in reached]
    of_each = ", ".join(f"> {1:.2f}" if each is None else f"{each:.2f}" for each in shares)
    known = [each for each in shares if each is not None]
    if len(known) < len(shares):
        return f"> {last:,}", f"reached by {len(known)} of {len(shares)}", of_each
    spread = stdev(known) if len(known) > 1 else None
    return (
        f"{mean(known) * last:,.0f}",
        f"{mean(known):.2f}" + ("" if spread is None else f" ± {spread:.2f}"),
        of_each,
    )
