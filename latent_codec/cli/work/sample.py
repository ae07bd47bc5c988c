"""`latent-codec sample`."""

import argparse
import math
import time
from pathlib import Path

import torch
from PIL import Image

from latent_codec.cli.progress import progress, showing
from latent_codec.cli.sample import DEFAULT_PIPELINE
from latent_codec.cli.work.decoded_files import check_vocoder, load_vocoder, write_sounds
from latent_codec.cli.work.opening import check_writable, device_of, load_codec, note_emulated, settings_of
from latent_codec.cli.work.printing import by, print_json
from latent_codec.components.codec_folders import read_origin
from latent_codec.images.origins import Origin
from latent_codec.images.tensors import sample_grid, write_image
from latent_codec.pipelines.folders import find_pipeline, load_pipeline
from latent_codec.pipelines.sampling import Pace, labelled_generators, labels_by_number

BATCH_PIXELS = 512 * 512
DEFAULT_SIDE = 256  # for codecs whose config names no size
BATCH_SIZE = 64  # images that a prior samples together


def run(args: argparse.Namespace) -> None:
    vocoder = load_vocoder(args)
    (_sample_pipeline if args.codec is None else _sample_latents)(args, vocoder)


def _sample_pipeline(args: argparse.Namespace, vocoder) -> None:
    height, width = args.size or (None, None)
    for path in filter(None, (args.out, args.preview)):
        check_writable(path, is_image=True)
    folder = find_pipeline(args.pipeline or DEFAULT_PIPELINE)
    device = device_of(args)
    note_emulated(args.dtype, device)
    with showing(f"opening {folder.name}"):
        pipe = load_pipeline(folder, dtype=getattr(torch, args.dtype), device=device)
    pipe.set_progress_bar_config(disable=True)
    labels = labels_by_number(pipe, args.label)
    num_rows = len(labels or [None])
    preview = None
    if args.preview:
        preview = Preview(pipe, args.preview, args.num * num_rows, _columns(args.num, num_rows))
    began = time.monotonic()
    with showing("sampling") as report:

        def follow(step, num_steps, grids, done) -> None:
            report(step, num_steps)
            if preview is not None:
                preview(step, num_steps, grids, done)

        drawn = pipe(
            labels,
            args.num,
            height=height,
            width=width,
            batch_size=BATCH_SIZE,
            generator=labelled_generators(args.seed, labels, args.num),
            callback=follow,
            **settings_of(args, "temperature", "top_k", "top_p", "keep"),
        )
    seconds = time.monotonic() - began
    kept = len(drawn.images) // num_rows
    sounds = _write_sounds(drawn.images, read_origin(folder / "vae"), args.out, vocoder)
    sheet = sample_grid(drawn.images, _columns(kept, num_rows))
    for path in filter(None, (args.out, args.preview)):
        write_image(sheet, path)

    names = pipe.config.class_names
    classes = None if labels is None else drawn.class_labels[::kept]
    rows = None if classes is None else [names[each] if names else str(each) for each in classes]
    size = [drawn.images[0].height, drawn.images[0].width]
    probabilities = None if drawn.probabilities is None else drawn.probabilities.view(num_rows, kept)
    if args.json:
        facts = {
            "pipeline": str(args.pipeline or DEFAULT_PIPELINE),
            "class": type(pipe).__name__,
            "labels": classes,
            "class_names": rows if names else None,
            **settings_of(args, "num", "seed", "temperature", "top_k", "top_p"),
            "kept": kept,
            "probabilities": None if probabilities is None else probabilities.tolist(),
            "size": size,
            "grids": [list(grid.shape[-2:]) for grid in drawn.indices],
            "seconds": round(seconds, 3),
            "path": str(args.out),
            "preview": None if args.preview is None else str(args.preview),
            **sounds,
        }
        print_json(facts)
        return
    grids = " + ".join(by(grid.shape[-2:]) for grid in drawn.indices)
    print(
        f"{len(drawn.images)} samples of {by(size)} from {grids} indices, seed {args.seed}, "
        f"{seconds:.1f} s, see {args.out}{_and(sounds)}"
    )
    if rows is not None:
        print(f"{'rows' if num_rows > 1 else 'label'}: {', '.join(rows)}")
    if probabilities is not None:
        print(
            f"kept {kept} of {args.num} for each label; the classifier's probability of the label is "
            f"{probabilities.min():.3f} to {probabilities.max():.3f}, mean {probabilities.mean():.3f}"
        )


class Preview:
    """A pipeline's callback that rewrites `path` with the grid so far."""

    def __init__(self, pipe, path: Path, num_drawn: int, columns: int):
        self.pipe, self.path, self.num_drawn, self.columns = pipe, path, num_drawn, columns
        self.finished = []  # of the batches before this one
        self.pace = Pace()

    def __call__(self, step: int, num_steps: int, grids: list, done) -> None:
        steps_per_batch = num_steps // -(-self.num_drawn // BATCH_SIZE)
        is_finished = step % steps_per_batch == 0
        is_due = self.pace.is_due
        if not (is_due or is_finished):
            return
        with self.pace:
            images = [*self.finished, *self.pipe.partial_images(grids, done)]
            if is_due:
                blank = Image.new("RGB", images[0].size, "lightgrey")
                missing = [blank] * (self.num_drawn - len(images))
                write_image(sample_grid(images + missing, self.columns), self.path)
        if is_finished:
            self.finished = images


def _columns(num: int, num_rows: int) -> int:
    """Of a sheet with a row for every label, or of a square."""
    return num if num_rows > 1 else math.ceil(math.sqrt(num))


def _sample_latents(args: argparse.Namespace, vocoder) -> None:
    codec = load_codec(args)
    if codec.is_discrete:
        raise ValueError(
            f"{codec.name} has a codebook: its codewords do not follow a normal distribution, "
            "and sampling them needs a prior fitted to them; join the two by `latent-codec pipeline`, and give the "
            "PIPELINE"
        )
    side = codec.autoencoder.config.get("sample_size") or DEFAULT_SIDE
    origin = read_origin(codec.folder)
    height, width = args.size or getattr(origin, "size", (side, side))
    factor = codec.latent_space.downsampling_factor
    multiple = math.lcm(factor, codec.family.side_multiple)
    grid = [-(-each // multiple) * multiple // factor for each in (height, width)]
    shape = codec.latent_space.channels, *grid

    # Drawn on the CPU, one sample after another: the same on every device and for every number of samples.
    generator = torch.Generator().manual_seed(args.seed)
    latents = args.temperature * torch.stack(
        [torch.randn(shape, generator=generator) for _ in range(args.num)]
    )
    batches = latents.split(max(BATCH_PIXELS // (height * width), 1))
    samples = [
        image
        for batch in progress(batches, "sampling")
        for image in codec.decode(batch.to(codec.device), size=(height, width))
    ]
    write_image(sample_grid(samples, _columns(args.num, 1)), args.out)
    sounds = _write_sounds(samples, origin, args.out, vocoder)

    drawn = _what_was_drawn(codec.latent_space, args.temperature)
    if args.json:
        facts = {
            "codec": codec.name,
            "fingerprint": codec.fingerprint,
            **settings_of(args, "num", "seed", "temperature"),
            "size": [height, width],
            "latent_shape": list(shape),
            "drawn": drawn,
            "path": str(args.out),
            **sounds,
        }
        print_json(facts)
        return
    grid, seen = by(shape), f"{args.out}{_and(sounds)}"
    print(f"{args.num} samples of {height}x{width} from {grid} latents, seed {args.seed}, see {seen}")
    print(f"drawn: {drawn}")


def _write_sounds(samples: list[Image.Image], origin: Origin | None, out: Path, vocoder) -> dict:
    """Of samples that are spectrograms a .wav file each, samples-00.wav and so on; gives their paths as a fact."""
    origin = origin and origin.for_size(samples[0].height, samples[0].width)
    check_vocoder(origin, vocoder)
    if origin is None or origin.kind != "sound":
        return {}
    return {"sounds": [str(path) for path in write_sounds(samples, origin, out, vocoder)]}


def _and(sounds: dict) -> str:
    return f" and {sounds['sounds'][0]} to {Path(sounds['sounds'][-1]).name}" if sounds else ""


def _what_was_drawn(space, temperature: float) -> str:
    """The distribution of the raw latents, in words."""
    times = "" if temperature == 1 else f" times {temperature:g}"
    if space.mean is not None and (set(space.mean), set(space.std)) != ({0.0}, {1.0}):
        return (
            f"raw latents with per-channel mean {_listed(space.mean)} and "
            f"std {_listed(value / space.scaling_factor for value in space.std)}{times}"
        )
    if space.shift_factor == 0 and space.scaling_factor == 1:
        return f"raw latents from N(0, I), as they are{times}"
    return (
        f"raw latents with mean {space.shift_factor:.4g} and std {1 / space.scaling_factor:.4g}{times}, "
        "the same for every channel"
    )


def _listed(values) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"
