"""Checkpoints of a run: complete or absent, and enough to go on to the same bits.

    RUN/checkpoints/STEP/
        model.safetensors          what is optimized (float32)
        ema.safetensors            its moving average
        discriminator.safetensors  with a GAN term
        optimizer.pt               optimizer's and gradient scaler's state, opened with weights_only
        state.json                 step, format version, and what else the loop remembers

Data order and noise are pure functions of seed and step, so no generator's state is kept.
"""

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from latent_codec import deprecated
from latent_codec.files import replacing

FORMAT_VERSION = 1


def save_checkpoint(
    run: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, object],
    *,
    keep: int,
    state: dict | None = None,
) -> Path:
    """Write `run`/checkpoints/`step` and remove all but the `keep` newest.

    Args:
        run: the run folder.
        step: steps done.
        modules: file stem -> module whose state is kept.
        optimizers: name -> anything with a `state_dict`.
        keep: at least 1.
        state: further entries of state.json.

    Raises:
        OSError: if it cannot be written, as on a full disk; there is no half of it then.
    """
    folder = run / "checkpoints" / str(step)
    entries = {"step": step, "format_version": FORMAT_VERSION, **(state or {})}
    try:
        with replacing(folder, superseded=("*",)) as written:
            written.mkdir()
            for name, module in modules.items():
                tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
                save_file(tensors, written / f"{name}.safetensors")
            with (written / "optimizer.pt").open("wb") as file:
                torch.save({name: each.state_dict() for name, each in optimizers.items()}, file)
            (written / "state.json").write_text(json.dumps(entries))
    except (SafetensorError, RuntimeError, OSError) as error:
        # torch hides the system's error behind one of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"checkpoint {folder} cannot be written: {reason}") from error
    for old in _checkpoint_steps(run)[:-keep]:
        shutil.rmtree(run / "checkpoints" / str(old))
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    steps = _checkpoint_steps(run)
    return run / "checkpoints" / str(steps[-1]) if steps else None


def load_checkpoint(folder: Path, modules: dict[str, nn.Module], optimizers: dict[str, object]) -> dict:
    """Restore what `save_checkpoint` wrote, in place, and return the entries of state.json, `step` among them.

    Raises:
        ValueError: if the checkpoint is damaged, does not fit the modules, or has another format version.
    """
    try:
        state = deprecated.rename_record(json.loads((folder / "state.json").read_text()))
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {state['format_version']}, this version reads {FORMAT_VERSION}")
        for name, module in modules.items():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        for name, each in optimizers.items():
            each.load_state_dict(saved[name])
    except (RuntimeError, KeyError, ValueError, OSError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be resumed from: {error}. Remove it to go on from the one before."
        ) from error
    return state


def _checkpoint_steps(run: Path) -> list[int]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
