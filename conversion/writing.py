"""Converted checkpoints on disk: written, read again and compared before they take their name."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from latent_codec.components.weight_files import FORMER_WEIGHTS, WEIGHTS, config_metadata, save_component
from latent_codec.conversion.checkpoints import open_checkpoint, save_checkpoint
from latent_codec.conversion.foreign import (
    Foreign,
    cast_weight,
    find_format,
    from_diffusers,
    read_foreign,
    same_bits,
)
from latent_codec.conversion.renaming import ConversionError, Network
from latent_codec.files import replacing
from latent_codec.torch_settings import plain_state_dict

Dtypes = Mapping[str, torch.dtype] | torch.dtype | None


def write_diffusers(
    foreign: Foreign, folder: str | os.PathLike, *, dtype: torch.dtype | None = None, card: str | None = None
) -> None:
    """Write a diffusers folder, complete and equal to the checkpoint, or none.

    Args:
        dtype: of the weights; None keeps the checkpoint's.
        card: text of the folder's README.md.

    Raises:
        ConversionError: if a key has no place, or what was written differs from what was read.
        OSError: if it cannot be written.
    """
    component = foreign.component(dtype)
    with replacing(folder, superseded=FORMER_WEIGHTS) as new:
        save_component(component, new)
        if card is not None:
            (new / "README.md").write_text(card)
        written = open_checkpoint(new / WEIGHTS)
        for key in foreign.keys.mapped:
            for ours, tensor in foreign.tensors_of(key).items():
                _check_equal(_cast(tensor, dtype, key, foreign.name), written[ours], key)


def write_component(
    component: nn.Module,
    folder: str | os.PathLike,
    *,
    dtypes: Dtypes = None,
    pipeline: str | None = None,
    finish: Callable[[Path], None] = lambda new: None,
) -> None:
    """Write a component's diffusers folder in the given precision, compared with it once written.

    Args:
        dtypes: of the weights, one or by key; None keeps the component's.
        pipeline: of a codec, for `save_component`.
        finish: is given the folder once the component is in it, and may write what belongs next to it.

    Raises:
        ConversionError: if what was written differs.
        OSError: if it cannot be written.
    """
    component = _with_dtypes(component, dtypes)
    with replacing(folder, superseded=FORMER_WEIGHTS) as new:
        save_component(component, new, pipeline)
        written = open_checkpoint(new / WEIGHTS)
        for key, tensor in component.state_dict().items():
            _check_equal(tensor, written[key], key)
        finish(new)


def write_foreign(
    component: nn.Module,
    name: str,
    path: str | os.PathLike | Sequence[Path],
    *,
    dtypes: Dtypes = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a component in the format called `name` (`Format.names`); return the files.

    A safetensors file says scaling_factor and shift_factor in its metadata, where `read_foreign` finds them; the other
    kinds have no place for them.

    Args:
        path: a file; of a format of two files, a folder, or the encoder's and the decoder's file.
        dtypes: of the weights, one or by our key; None keeps the component's.
        metadata: further entries for safetensors files.

    Raises:
        ConversionError: if the format cannot hold the component, or what was written differs from it.
        OSError: if it cannot be written.
    """
    state = from_diffusers(_with_dtypes(component, dtypes), name)
    sides = ("encoder", "decoder") if find_format(component, name).halves else ("",)
    if not isinstance(path, (str, os.PathLike)):
        files = list(path)
    elif len(sides) == 2:
        files = [Path(path) / f"{name}_{side}.safetensors" for side in sides]
    else:
        files = [Path(path)]
    with ExitStack() as stack:
        written = [stack.enter_context(replacing(file)) for file in files]
        for file, side in zip(written, sides):
            start = side and f"{side}."
            part = {key.removeprefix(start): each for key, each in state.items() if key.startswith(start)}
            entries = {**_metadata(component), **(metadata or {})} if file.suffix == ".safetensors" else None
            save_checkpoint(part, file, entries)
        again = read_foreign(written)
        again.keys.check("what was written")
        for key in again.keys.mapped:
            _check_equal(state[key], again.tensors[key], key)
    return files


def _with_dtypes(component: nn.Module, dtypes: Dtypes) -> nn.Module:
    """The component on the CPU, its floating-point tensors in these dtypes."""
    state = {}
    for key, tensor in plain_state_dict(component).items():
        dtype = dtypes.get(key) if isinstance(dtypes, Mapping) else dtypes
        state[key] = _cast(tensor, dtype, key, "the codec").cpu()
    copy = Network(type(component).__name__, component.config).on_meta()
    copy.load_state_dict(state, assign=True)
    return copy


def _cast(tensor: Tensor, dtype: torch.dtype | None, key: str, name: str) -> Tensor:
    return cast_weight(tensor, dtype, key, name) if tensor.is_floating_point() else tensor


def _metadata(component: nn.Module) -> dict[str, str]:
    """Scale and shift, which other programs look for, and the whole config."""
    entries = {name: component.config.get(name) for name in ("scaling_factor", "shift_factor")}
    scale = {name: repr(float(value)) for name, value in entries.items() if value is not None}
    return scale | config_metadata(component)


def _check_equal(expected: Tensor, written: Tensor, key: str) -> None:
    if not same_bits(expected, written):
        raise ConversionError(f"{key} is not on the disk as it was written; nothing was kept")
