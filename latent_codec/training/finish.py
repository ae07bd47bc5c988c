"""What a run leaves: the averaged weights with each checkpoint, and at its end, a codec calibrated, with the curves."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin

import latent_codec
from latent_codec.codec import LatentCodec
from latent_codec.components.codec_folders import SIDECARS
from latent_codec.components.weight_files import FORMER_WEIGHTS, save_component
from latent_codec.evaluation import calibration
from latent_codec.families import family_of
from latent_codec.files import replacing
from latent_codec.images.sources import ImageSource
from latent_codec.training.build import Autoencoder
from latent_codec.training.config import TrainingConfig, dump_toml
from latent_codec.training.report import plot_curves, read_metrics

LEAST_CALIBRATION_IMAGES = 8
LEAST_LOG_VARIANCE = -30.0  # where diffusers clamps a posterior's: a standard deviation of 3e-7


def finish_run(
    config: TrainingConfig,
    autoencoder: Autoencoder,
    source: ImageSource,
    run: Path,
    *,
    data_name: str,
    on_progress: Callable[..., None] | None = None,
) -> Path:
    """Write RUN/codec and RUN/curves.png, and return the codec's folder.

    Args:
        config: of the run.
        autoencoder: the averaged weights, float32; calibrated in place.
        source: what scale, shift and half-precision safety are measured on.
        run: the run folder.
        data_name: what the model card calls the data.
        on_progress: called by `calibration.measure`.

    Raises:
        OSError: if the codec cannot be written; there is no half of it then.
    """
    if has_untrained_variance(config, autoencoder):
        silence_posterior(autoencoder)
    codec = LatentCodec(autoencoder, name=run.resolve().name)
    measured = None
    if config.run.calibration_images:
        measured = calibration.measure(
            codec, source, num_images=num_calibration_images(config), on_progress=on_progress
        )
        keep = config.model.train == "decoder"  # the space that its encoder came with
        fold = calibration.can_normalize(autoencoder)
        calibration.calibrate(codec, measured, "keep" if keep else "normalize" if fold else "scale")
    folder = _write(config, autoencoder, run, data_name, read_metrics(run), measured)
    plot_curves(run)
    print(f"wrote {folder}", file=sys.stderr)
    return folder


def num_calibration_images(config: TrainingConfig) -> int:
    """`run.calibration_images`, or fewer after a short run, so that measuring takes at most about a tenth of it.

    A training step costs about six times the encoding of as many pixels: forward and backward, encoder and decoder.
    """
    height, width = config.data.size
    trained = config.run.steps * config.optimizer.batch_size * config.optimizer.accumulation * height * width
    affordable = int(0.6 * trained / calibration.MAX_SIDE**2)
    return min(config.run.calibration_images, max(affordable, LEAST_CALIBRATION_IMAGES))


def finish_network(config: TrainingConfig, network: ModelMixin, run: Path, *, data_name: str) -> Path:
    """Write a prior, classifier or preview into RUN/prior and so on, with its model card, and RUN/curves.png.

    Args:
        config: of the run.
        network: the averaged weights, float32.
        run: the run folder.
        data_name: what the model card calls the data.

    Raises:
        OSError: if it cannot be written; there is no half of it then.
    """
    folder = _write(config, network, run, data_name, read_metrics(run))
    plot_curves(run)
    print(f"wrote {folder}", file=sys.stderr)
    return folder


def write_so_far(
    config: TrainingConfig, network: ModelMixin, run: Path, step: int, *, data_name: str
) -> Path:
    """Write the averaged weights after `step` into RUN/codec, RUN/prior and so on, marked as unfinished.

    A codec's latents are not measured: its scale and shift are what it began with.

    Args:
        config: of the run.
        network: the averaged weights, float32; left as it is.
        run: the run folder.
        step: steps done.
        data_name: what the model card calls the data.

    Raises:
        OSError: if it cannot be written; there is no half of it then.
    """
    if has_untrained_variance(config, network):
        network = copy.deepcopy(network)
        silence_posterior(network)
    return _write(config, network, run, data_name, read_metrics(run), unfinished_at=step)


def _write(
    config: TrainingConfig,
    network: ModelMixin,
    run: Path,
    data_name: str,
    lines: list[dict[str, float]],
    measured: calibration.Calibration | None = None,
    unfinished_at: int | None = None,
) -> Path:
    """The network's folder, RUN/codec and so on, with its model card."""
    folder = run / config.kind
    network = torch.nn.Module.to(copy.deepcopy(network), dtype=getattr(torch, config.run.codec_dtype))
    if config.kind == "codec":
        codec = LatentCodec(network, name=run.resolve().name)
        card = model_card(config, codec, data_name, lines, measured, unfinished_at)
    else:
        card = network_card(config, run, data_name, unfinished_at)
    superseded = (*FORMER_WEIGHTS, *SIDECARS) if config.kind == "codec" else FORMER_WEIGHTS
    with replacing(folder, superseded=superseded) as written:
        save_component(network, written)
        (written / "README.md").write_text(card, encoding="utf-8")
    return folder


def is_finished(config: TrainingConfig, run: Path, step: int) -> bool:
    """Whether the run's finished network is that of `step`."""
    card = run / config.kind / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return f"training_steps: {step}" in lines and "unfinished: true" not in lines


def has_untrained_variance(config: TrainingConfig, autoencoder: Autoencoder) -> bool:
    """A plain autoencoder's decoder saw the posterior's mean alone, so that nothing trained its variance."""
    if config.kind != "codec" or family_of(autoencoder).levels:
        return False
    return config.objective.posterior == "mean" and config.model.train == "all"


@torch.no_grad()
def silence_posterior(autoencoder: AutoencoderKL) -> None:
    """Set the posterior's variance to its minimum: a sample is the mean, which is all that the decoder knows."""
    head = autoencoder.encoder.conv_out if autoencoder.quant_conv is None else autoencoder.quant_conv
    head.weight[autoencoder.config.latent_channels :] = 0
    head.bias[autoencoder.config.latent_channels :] = LEAST_LOG_VARIANCE


def model_card(
    config: TrainingConfig,
    codec: LatentCodec,
    data_name: str,
    lines: list[dict[str, float]],
    measured: calibration.Calibration | None,
    unfinished_at: int | None = None,
) -> str:
    """The codec folder's README.md: front matter that tools read, data, recipe and measured figures.

    Args:
        codec: as stored.
        lines: of metrics.jsonl.
        measured: None if calibration was switched off.
        unfinished_at: steps done so far; None at the end.
    """
    table = config.to_dict()
    last = lines[-1] if lines else {}
    facts = [
        *_unfinished(config, unfinished_at, ", scale and shift are not measured"),
        f"Last terms of the training loss: {_terms(last)}",
    ]
    if measured:
        facts += [
            f"Reconstruction by precision: {', '.join(map(_parity, measured.parity))} ({measured.parity_note})",
            f"Largest activation: {measured.largest_activation:.0f} (float16 ends at 65504)",
        ]
    if has_untrained_variance(config, codec.autoencoder):
        facts.append(
            "The posterior's variance is untrained, as the decoder saw its mean alone. It is set to its minimum, so "
            "that a sample is the mean; random latents decode to nothing in particular."
        )
    pretrained = config.model.pretrained
    if pretrained and Path(pretrained).exists():
        pretrained = table["model"]["pretrained"] = Path(pretrained).resolve().name
    if config.model.train == "decoder":
        origin = pretrained or "the linear start"
        facts.append(
            f"Only the decoder was trained. Encoder, quant_conv and any codebook are those of {origin}, to the bit in float32, "
            f"and its latents decode here: space fingerprint {codec.space_fingerprint}."
        )
    return f"""---
library_name: diffusers
tags: [autoencoder, latent-codec]
lpips_trained: {str(config.objective.lpips_weight > 0).lower()}
{_progress(last, unfinished_at)}
---

# {codec.name}

Trained by latent-codec {latent_codec.__version__} for {_steps(last, unfinished_at)} steps on {data_name}.

{chr(10).join(f"- {fact}" for fact in facts)}

## Configuration

```toml
{dump_toml(table).strip()}
```
"""


def network_card(config: TrainingConfig, run: Path, data_name: str, unfinished_at: int | None = None) -> str:
    """The README.md of the folder of what is no codec."""
    table, lines = config.to_dict(), read_metrics(run)
    last = lines[-1] if lines else {}
    for section, key in (("model", "pretrained"), ("model", "teacher"), ("prior", "codec")):
        path = table[section].get(key)
        if path and Path(path).exists():
            table[section][key] = Path(path).resolve().name
    for section in ("objective", "codebook", *(() if config.kind == "prior" else ("prior",))):
        del table[section]
    name = run.resolve().name
    facts = [*_unfinished(config, unfinished_at), f"Last terms: {_terms(last)}"]
    return f"""---
library_name: diffusers
tags: [{config.kind}, latent-codec]
{_progress(last, unfinished_at)}
---

# {name}

A {config.model.class_name}, trained by latent-codec {latent_codec.__version__} for {_steps(last, unfinished_at)} steps on {data_name}.

{chr(10).join(f"- {fact}" for fact in facts)}

## Configuration

```toml
{dump_toml(table).strip()}
```
"""


def _steps(last: dict[str, float], unfinished_at: int | None) -> int:
    return last.get("step", 0) if unfinished_at is None else unfinished_at


def _progress(last: dict[str, float], unfinished_at: int | None) -> str:
    """What `is_finished` reads in a card."""
    steps = f"training_steps: {_steps(last, unfinished_at)}"
    return steps if unfinished_at is None else f"{steps}\nunfinished: true"


def _unfinished(config: TrainingConfig, unfinished_at: int | None, also: str = "") -> list[str]:
    if unfinished_at is None:
        return []
    return [
        f"Unfinished: the averaged weights after {unfinished_at} of {config.run.steps} steps{also}. The same command goes on."
    ]


def _terms(line: dict[str, float]) -> str:
    terms = [
        f"{name} {value:.5g}"
        for name, value in line.items()
        if name not in ("step", "learning_rate", "images_per_second")
    ]
    return ", ".join(terms) or "none recorded"


def _parity(each: calibration.PrecisionParity) -> str:
    if each.psnr is None:
        return f"{each.dtype} not finite"
    return f"{each.dtype} {each.psnr:.2f} dB" + (
        f" (-{each.psnr_lost:.3f})" if each.psnr_lost and each.psnr_lost >= 5e-4 else ""
    )
