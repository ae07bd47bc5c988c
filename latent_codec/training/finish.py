"""The end of a run: calibrate a codec, and write the averaged weights, their model card and the curves."""

import copy
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin

import latent_codec
from latent_codec.codec import LatentCodec
from latent_codec.codec_folders import SIDECARS
from latent_codec.evaluation import calibration
from latent_codec.files import replacing
from latent_codec.picture_sources import PictureSource
from latent_codec.training.build import Autoencoder
from latent_codec.training.config import TrainingConfig, dump_toml
from latent_codec.training.report import plot_curves, read_metrics
from latent_codec.weight_files import FORMER_WEIGHTS, save_component

LEAST_LOG_VARIANCE = -30.0  # where diffusers clamps a posterior's: a standard deviation of 3e-7


def finish_run(
    config: TrainingConfig,
    autoencoder: Autoencoder,
    source: PictureSource,
    run: Path,
    *,
    data_name: str,
) -> Path:
    """Write RUN/codec and RUN/curves.png, and return the codec's folder.

    Args:
        config: of the run.
        autoencoder: the averaged weights, float32; calibrated in place.
        source: what scale, shift and half-precision safety are measured on.
        run: the run folder.
        data_name: what the model card calls the data.

    Raises:
        OSError: if the codec cannot be written; there is no half of it then.
    """
    if has_untrained_variance(config, autoencoder):
        silence_posterior(autoencoder)
    codec = LatentCodec(autoencoder, name=run.resolve().name)
    measured = None
    if config.run.calibration_pictures:
        measured = calibration.measure(codec, source, num_pictures=config.run.calibration_pictures)
        keep = config.model.train == "decoder"  # the space that its encoder came with
        fold = calibration.can_normalize(autoencoder)
        calibration.calibrate(codec, measured, "keep" if keep else "normalize" if fold else "scale")
    dtype = getattr(torch, config.run.codec_dtype)
    stored = LatentCodec(torch.nn.Module.to(copy.deepcopy(autoencoder), dtype=dtype), name=codec.name)
    folder = run / "codec"
    with replacing(folder, superseded=(*FORMER_WEIGHTS, *SIDECARS)) as written:
        stored.save_pretrained(written)
        card = model_card(config, stored, data_name, read_metrics(run), measured)
        (written / "README.md").write_text(card, encoding="utf-8")
    plot_curves(run)
    print(f"wrote {folder}", file=sys.stderr)
    return folder


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
    folder = run / config.kind
    dtype = getattr(torch, config.run.codec_dtype)
    with replacing(folder, superseded=FORMER_WEIGHTS) as written:
        save_component(torch.nn.Module.to(copy.deepcopy(network), dtype=dtype), written)
        card = network_card(config, run, data_name)
        (written / "README.md").write_text(card, encoding="utf-8")
    plot_curves(run)
    print(f"wrote {folder}", file=sys.stderr)
    return folder


def is_finished(config: TrainingConfig, run: Path, step: int) -> bool:
    """Whether the run's finished network is that of `step`."""
    card = run / config.kind / "README.md"
    return card.is_file() and f"training_steps: {step}" in card.read_text(encoding="utf-8").splitlines()


def has_untrained_variance(config: TrainingConfig, autoencoder: Autoencoder) -> bool:
    """A plain autoencoder's decoder saw the posterior's mean alone, so that nothing trained its variance."""
    has_posterior = isinstance(autoencoder, AutoencoderKL)
    return has_posterior and config.objective.posterior == "mean" and config.model.train == "all"


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
) -> str:
    """The codec folder's README.md: front matter that tools read, data, recipe and measured figures.

    Args:
        codec: as stored.
        lines: of metrics.jsonl.
        measured: None if calibration was switched off.
    """
    table = config.to_dict()
    last = lines[-1] if lines else {}
    facts = [f"Last terms of the training loss: {_terms(last)}"]
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
training_steps: {last.get("step", 0)}
---

# {codec.name}

Trained by latent-codec {latent_codec.__version__} for {last.get("step", 0)} steps on {data_name}.

{chr(10).join(f"- {fact}" for fact in facts)}

## Configuration

```toml
{dump_toml(table).strip()}
```
"""


def network_card(config: TrainingConfig, run: Path, data_name: str) -> str:
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
    return f"""---
library_name: diffusers
tags: [{config.kind}, latent-codec]
training_steps: {last.get("step", 0)}
---

# {name}

A {config.model.class_name}, trained by latent-codec {latent_codec.__version__} for {last.get("step", 0)} steps on {data_name}.

- Last terms: {_terms(last)}

## Configuration

```toml
{dump_toml(table).strip()}
```
"""


def _terms(line: dict[str, float]) -> str:
    terms = [
        f"{name} {value:.5g}"
        for name, value in line.items()
        if name not in ("step", "learning_rate", "pictures_per_second")
    ]
    return ", ".join(terms) or "none recorded"


def _parity(each: calibration.PrecisionParity) -> str:
    if each.psnr is None:
        return f"{each.dtype} not finite"
    return f"{each.dtype} {each.psnr:.2f} dB" + (
        f" (-{each.psnr_lost:.3f})" if each.psnr_lost and each.psnr_lost >= 5e-4 else ""
    )
