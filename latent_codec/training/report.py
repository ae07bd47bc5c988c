"""What a run shows: progress bar, metrics.jsonl, trackers, sample images and the plot of the curves."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latent_codec import deprecated
from latent_codec.families import family_of
from latent_codec.files import replacing
from latent_codec.images.batches import iter_images
from latent_codec.images.decoding import printable
from latent_codec.images.figures import new_figure
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import central_window, shrunk_by, write_image
from latent_codec.metrics import psnr
from latent_codec.training.checkpoints import latest_checkpoint
from latent_codec.training.config import TrainingConfig

NUM_SAMPLES = 8
PSNR_OF_TRAINING = (
    ". This psnr is of training crops, by each step's weights and a posterior's samples; `latent-codec evaluate` measures "
    "whole images, by the averaged weights and posterior means, rounded to 8 bits, so the two differ"
)
SAMPLE_SIDE = 128
"""Smaller images of samples are shown enlarged to about so many pixels."""
UNITS = {
    "psnr": "dB",
    "kl": "nats per pixel value",
    "loss": "",
    "images_per_second": "images/s",
    "bits_per_dim": "bits",
    "bits_per_index": "bits",
    "bits_per_position": "bits",
    "held_out_bits_per_index": "bits",
    "held_out_bits_per_position": "bits",
    "perplexity": "codewords",
    "used_codes": "codewords",
    "dead_codes": "codewords",
    "restarted_codes": "codewords",
}
"""Of the terms of curves.png; others have none."""
logger = logging.getLogger(__name__)


class NonFiniteLossError(ValueError, ArithmeticError):
    """A loss term became NaN or infinite."""


class Journal:
    """Progress on stderr, and one line of metrics.jsonl every `run.log_every` steps.

    A line holds the step, each term's mean since the line before, the learning rate
    and images per second. A resumed run drops the lines beyond its checkpoint, whose
    steps are made again, and gives the same ones, images per second aside.

    Terms stay on the device until `settle`, which a CPU, having nothing to wait for, does at every step, and another
    device for a line of metrics.jsonl, for samples and for a checkpoint.

    Args:
        out: the run folder.
        start: steps done.
        images_per_step: of all processes.
        headline: a step's terms in a few words.
        state: a checkpoint's `state_dict` of the journal.
        waits: whether terms wait on the device; None: as the device is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        out: Path,
        config: TrainingConfig,
        *,
        start: int,
        images_per_step: int,
        headline: Callable[[dict[str, float]], str],
        state: dict | None,
        waits: bool | None = None,
    ):
        self._accelerator, self._config, self._out, self._start = accelerator, config, out, start
        self._path = out / "metrics.jsonl"
        self._images_per_step, self._headline = images_per_step, headline
        self._waits = accelerator.device.type != "cpu" if waits is None else waits
        # Since the last line: name -> sum and number of values.
        self._sums = {name: tuple(entry) for name, entry in (state or {}).items()}
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
        self._since, self._steps_since = time.monotonic(), 0
        self._progress = None
        if accelerator.is_main_process:
            logger.info(
                f"{out}: steps {start} to {config.run.steps}, {images_per_step} images a step, "
                f"{accelerator.num_processes} process(es) on {accelerator.device}, {config.run.precision}"
            )
            if self._path.is_file():
                kept = [line for line in read_metrics(out) if line["step"] <= start]
                with replacing(self._path) as written:
                    written.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __enter__(self) -> "Journal":
        if self._accelerator.is_main_process:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=self._config.run.steps, completed=self._start)
        return self

    def __exit__(self, *exception) -> None:
        if self._progress is not None:
            self._progress.stop()

    def state_dict(self) -> dict:
        return dict(self._sums)

    def record(self, step: int, terms: dict[str, Tensor | float], rate: float) -> None:
        """Take the terms of a step, `step` being done, and its learning rate; write a line if one is due."""
        self._pending.append((step, terms))
        self._steps_since += 1
        is_due = step % self._config.run.log_every == 0 or step == self._config.run.steps
        if is_due or not self._waits:
            self.settle()
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        if is_due:
            self._write_line(step, rate)

    def settle(self) -> None:
        """Read what waits on the device.

        Raises:
            NonFiniteLossError: for the first step with a term that is not finite.
        """
        tensors = [term for _, terms in self._pending for term in terms.values() if isinstance(term, Tensor)]
        values = iter(torch.stack(tensors).tolist() if tensors else ())
        for step, terms in self._pending:
            found = {name: next(values) if isinstance(term, Tensor) else term for name, term in terms.items()}
            if self._accelerator.scaler is not None and not math.isfinite(found["gradient_norm"]):
                del found["gradient_norm"]  # the scaler leaves out a step that overflowed, and scales less
            self._check_finite(found, step - 1)
            for name, value in found.items():
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
            if self._progress is not None:
                self._progress.update(self._task, description=self._headline(found))
        self._pending.clear()

    def _write_line(self, step: int, rate: float) -> None:
        seconds = time.monotonic() - self._since
        line = {
            "step": step,
            **{name: total / count for name, (total, count) in self._sums.items()},
            "learning_rate": rate,
            "images_per_second": self._steps_since * self._images_per_step / seconds,
        }
        self._sums.clear()
        self._steps_since, self._since = 0, time.monotonic()
        self._accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if not sys.stderr.isatty():
                logger.info(
                    f"step {step}/{self._config.run.steps}  {self._headline(line)}  "
                    f"{line['images_per_second']:.1f} images/s"
                )

    def _check_finite(self, terms: dict[str, float], step: int) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if bad:
            last = latest_checkpoint(self._out)
            kept = f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"
            raise NonFiniteLossError(
                f"step {step}: {', '.join(bad)} is not finite. {kept}. A run in another folder with a lower "
                'optimizer.learning_rate, or run.precision = "fp32", may go further.'
            )


class SampleImages:
    """A fixed set of images, each original over its reconstruction, with their names and PSNR."""

    def __init__(self, source: ImageSource, channels: int, config: TrainingConfig):
        readable = list(
            islice(iter_images(source, channels=channels, on_skip=lambda line: None), NUM_SAMPLES)
        )
        self._images = [central_window(image, config.data.size) for _, image in readable]
        self._names = [_short(printable(Path(source.name(index)).name)) for index, _ in readable]
        if not self._images:
            raise ValueError(f"none of the {len(source)} images can be read, the first is {source.name(0)}")
        if config.data.binarize:
            self._images = [torch.where(image > 0, 1.0, -1.0) for image in self._images]

    @torch.no_grad()
    def write(self, autoencoder: nn.Module, path: Path, accelerator: Accelerator) -> None:
        """Reconstruct, where there is a posterior by its mean, and write one PNG."""
        autoencoder.eval()
        family, images = family_of(autoencoder), torch.stack(self._images).to(accelerator.device)
        with accelerator.autocast():
            posterior, raw_latents = family.encode_raw(shrunk_by(images, family.upscale))
            decoded = family.decode_raw(raw_latents if posterior is None else posterior.mode())
        reconstructions = decoded.float().clamp(-1, 1).cpu()
        figures = psnr(reconstructions, images.cpu()).tolist()
        titles = [f"{name}\n{figure:.2f} dB" for name, figure in zip(self._names, figures)]
        rows = ["original", "reconstruction"]
        found = sheet(
            [images.cpu(), reconstructions], row_titles=rows, column_titles=titles, side=SAMPLE_SIDE
        )
        write_image(found, path)


def _short(name: str, length: int = 18) -> str:
    """A name cut in its middle to fit over an image."""
    return name if len(name) <= length else f"{name[: length - 9]}…{name[-8:]}"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, oldest first, without one that is cut short."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [deprecated.rename_record(json.loads(line)) for line in lines if line.endswith("\n")]


def plot_curves(run: Path) -> Path | None:
    """Draw every term of metrics.jsonl over the steps into curves.png; None without two lines to draw.

    A point is the mean over the steps since the point before.
    """
    lines = read_metrics(run)
    if len(lines) < 2:
        return None
    names = sorted({name for line in lines for name in line} - {"step"})
    columns = 3
    rows = -(-len(names) // columns)
    width, height = 4.2 * columns, 2.6 * rows
    path = run / "curves.png"
    with new_figure(path, (width, height), dpi=110, layout=None) as figure:
        figure.subplots_adjust(  # inches; to compute them, matplotlib would draw twice more
            left=0.6 / width,
            right=1 - 0.1 / width,
            bottom=0.45 / height,
            top=1 - 0.3 / height,
            wspace=0.25,
            hspace=0.4,
        )
        for place, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, place + 1)
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points), linewidth=1, marker="." if len(points) <= 40 else None, markersize=4)
            unit = UNITS.get(name, "")
            axes.set_title(name.replace("_", " ") + (f" ({unit})" if unit else ""), fontsize=9)
            if place + columns >= len(names):
                axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.locator_params(nbins=4)
            axes.grid(alpha=0.3)
    return path
