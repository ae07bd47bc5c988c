"""What a run leaves: the averaged weights with each checkpoint and at its end, with a model card, and the curves."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin

import latent_codec
from latent_codec.components.weight_files import FORMER_WEIGHTS, save_component
from latent_codec.files import replacing
from latent_codec.images.labels import Images
from latent_codec.training.config import TrainingConfig, dump_toml
from latent_codec.training.kinds import KINDS, kinds_that_read
from latent_codec.training.report import PSNR_OF_TRAINING, plot_curves, read_metrics

logger = logging.getLogger(__name__)


def finish_network(
    config: TrainingConfig,
    network: ModelMixin,
    source: Images,
    run: Path,
    *,
    data_name: str,
    on_progress: Callable[..., None] | None = None,
    unfinished_at: int | None = None,
) -> Path:
    """Write the averaged weights into RUN/prior, RUN/classifier and so on, with a model card.

    Args:
        config: of the run.
        network: the averaged weights, float32; left as it is.
        source: what was trained on.
        run: the run folder.
        data_name: what the model card calls the data.
        on_progress: called with what is done and the total, where it takes long.
        unfinished_at: steps done so far; None at the end, where RUN/curves.png is drawn.

    Raises:
        OSError: if it cannot be written; there is no half of it then.
    """
    return write_network(
        config,
        to_stored_dtype(config, copy.deepcopy(network)),
        run,
        f"A {config.model.class_name}, trained",
        data_name=data_name,
        front_matter=(f"tags: [{config.kind.name}, latent-codec]",),
        unfinished_at=unfinished_at,
    )


def to_stored_dtype(config: TrainingConfig, network: ModelMixin) -> ModelMixin:
    """The network itself, in `run.codec_dtype`."""
    return torch.nn.Module.to(network, dtype=getattr(torch, config.run.codec_dtype))


def is_finished(config: TrainingConfig, run: Path, step: int) -> bool:
    """Whether the run's finished network is that of `step`."""
    card = run / config.kind.folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return f"training_steps: {step}" in lines and "unfinished: true" not in lines


def write_network(
    config: TrainingConfig,
    network: ModelMixin,
    run: Path,
    opening: str,
    *,
    data_name: str,
    front_matter: Sequence[str],
    facts: Sequence[str] = (),
    unfinished_at: int | None = None,
    not_yet: str = "",
    superseded: Sequence[str] = (),
    pipeline: str | None = None,
    others: Mapping[str, str] | None = None,
) -> Path:
    """Write RUN/KIND with a model card, and at the end RUN/curves.png; the card holds data, recipe and measured figures.

    Args:
        opening: how the card's sentence on the training begins.
        front_matter: lines of YAML, which tools read.
        facts: what is known besides the last terms of the loss.
        unfinished_at: steps done so far; None at the end.
        not_yet: what is still missing of an unfinished network.
        superseded: files of the old folder that go.
        pipeline: of a codec, for `save_component`.
        others: further files, by name, with their text.
    """
    last = (read_metrics(run) or [{}])[-1]
    steps = last.get("step", 0) if unfinished_at is None else unfinished_at
    progress = [f"training_steps: {steps}"]  # what `is_finished` reads
    no_terms = "step", "learning_rate", "images_per_second"
    terms = [f"{name} {value:.5g}" for name, value in last.items() if name not in no_terms]
    explained = PSNR_OF_TRAINING * ("psnr" in last and config.kind.folder == "codec")
    facts = [f"Last terms: {', '.join(terms) or 'none recorded'}{explained}", *facts]
    if unfinished_at is not None:
        progress.append("unfinished: true")
        so_far = f"the averaged weights after {steps} of {config.run.steps} steps{not_yet}"
        facts.insert(0, f"Unfinished: {so_far}. The same command goes on.")
    newline = "\n"
    card = f"""---
library_name: diffusers
{newline.join([*front_matter, *progress])}
---

# {run.resolve().name}

{opening} by latent-codec {latent_codec.__version__} for {steps} steps on {data_name}.

{newline.join(f"- {fact}" for fact in facts)}

## Configuration

```toml
{dump_toml(_card_settings(config)).strip()}
```
"""
    folder = run / config.kind.folder
    with replacing(folder, superseded=(*FORMER_WEIGHTS, *superseded)) as written:
        save_component(network, written, pipeline)
        for name, text in {"README.md": card, **(others or {})}.items():
            (written / name).write_text(text, encoding="utf-8")
    if unfinished_at is None:
        plot_curves(run)
        logger.info("wrote %s", folder)
    return folder


def _card_settings(config: TrainingConfig) -> dict[str, dict]:
    """The settings that this kind of training reads, without this machine's folders."""
    table = config.to_dict()
    for setting in {kind.codec for kind in KINDS.values() if kind.codec} | {"model.pretrained"}:
        section, _, key = setting.partition(".")
        path = table[section].get(key)
        if path and Path(path).exists():
            table[section][key] = Path(path).resolve().name
    return {
        name: values
        for name, values in table.items()
        if config.kind in (kinds_that_read(name) or [config.kind])
    }
