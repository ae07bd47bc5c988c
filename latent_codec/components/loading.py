"""Component folders: finding, checking and loading any diffusers model, strictly, in one place.

    config.json --read_config_file--> class and entries -+
    weights --open_weights-------> shapes and dtypes --+--> network on meta, no larger than its weights
                                                              |
                       every key, shape and kind fits, every value is finite, in memory of its own
                                                              v
                                                        component in float32

Nothing is allocated before the weight file's header bounds it, whatever a config asks for.
"""

import inspect
import os
import re
import reprlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from latent_codec.components.weight_files import BASES, CONFIG, find_weights_in, read_config_file, read_json
from latent_codec.conversion.checkpoints import MAX_TENSORS, Checkpoint, open_checkpoint
from latent_codec.files import read_folder
from latent_codec.models.own_weights import check_finite, own_copy
from latent_codec.torch_settings import ignoring_caller_settings, on_meta

_SHARD = re.compile(rf"({'|'.join(BASES)})[\w.-]*\.(safetensors|bin)")
_MAX_INDEX = 2**24
_MAX_SHARDS = 1000
_SMALL = 10**6


def find_component(path: str | os.PathLike, name: str, classes: Collection[type]) -> Path:
    """The folder of a component of one of `classes`: the path itself, or `name`/ in a run's or a pipeline's folder.

    Raises:
        ValueError: if there is none.
    """
    given, names = Path(path), [each.__name__ for each in classes]
    for folder in (given, given / name):
        if (folder / CONFIG).exists():
            class_name = read_config_file(folder / CONFIG)["_class_name"]
            if class_name not in names:
                raise ValueError(f"{folder}: expected {' or '.join(names)} as {name}, got {class_name}")
            return folder
    raise ValueError(
        f"{given} is no {name}: it has neither {CONFIG} nor {name}/ (as run folders and pipelines have)"
        if given.exists()
        else f"{given} does not exist; give a {name}'s folder, a run folder or a pipeline's"
    )


def open_component(path: str | os.PathLike, name: str, classes: Collection[type]) -> torch.nn.Module:
    """Load what `find_component` finds, as `load_component` does.

    Raises:
        ValueError: as both.
        OSError: if it cannot be read.
    """
    by_name = {each.__name__: each for each in classes}
    return load_component(find_weights_in(find_component(path, name, classes)), by_name.__getitem__)


def download(repository: str, patterns: Sequence[str], **where) -> Path:
    """Fetch the files of a hub repository that match `patterns`, or find them in its cache.

    Args:
        where: revision, token, cache_dir, local_files_only, as huggingface_hub has them.

    Raises:
        ValueError: if they could not be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **where))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repository} is neither a folder here nor could it be had from the hub ({type(error).__name__})"
        ) from error


def open_weights(path: Path) -> Checkpoint:
    """Read the header of a weight file, or those of the shards that an index names.

    Raises:
        ValueError: if a file is missing, damaged, would run code or holds other things than tensors.
    """
    return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder needs it next to {CONFIG}")
    file = open_checkpoint(path)
    if file.wrapper is not None or file.not_tensors:
        raise ValueError(
            f"{path} holds other things than a component's tensors ({file.wrapper or file.not_tensors[0]!r}); "
            "`latent-codec convert` reads training checkpoints"
        )
    return file


def _open_shards(index: Path) -> Checkpoint:
    try:
        content = read_json(index, _MAX_INDEX)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places:
            raise ValueError("it has no weight_map")
        if len(places) > MAX_TENSORS:
            raise ValueError(f"expected at most {MAX_TENSORS} tensors, got {len(places)}")
        for name in places.values():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise ValueError(f"{reprlib.repr(name)} is not the name of a shard next to it")
        names = sorted(set(places.values()))
        if len(names) > _MAX_SHARDS:
            raise ValueError(f"expected at most {_MAX_SHARDS} shards, got {len(names)}")
    except ValueError as error:
        raise ValueError(f"{index} is not an index of shards: {error}") from error
    parts: dict[str, Checkpoint] = {}
    for name in names:
        file = _open_file(index.with_name(name))
        for key in file:
            if places.get(key) != name:
                raise ValueError(
                    f"{file.path} holds {key!r}, which {index.name} has in {places.get(key, 'no file')}"
                )
            parts[key] = file
    if missing := sorted(places.keys() - parts.keys()):
        raise ValueError(f"{index} has {_some(missing)} in shards that do not hold them")
    return Checkpoint(
        path=index,
        shapes={key: part.shapes[key] for key, part in parts.items()},
        dtype_names={key: part.dtype_names[key] for key, part in parts.items()},
        shards={key: part.path for key, part in parts.items()},
        _read=lambda key: parts[key][key],
    )


@ignoring_caller_settings()
def load_component(weights: Path, find_class: Callable[[str], type]) -> torch.nn.Module:
    """Build the network that a config describes and give it its weights, every key accounted for.

    Torch's default dtype and default device change nothing.

    Args:
        weights: as `find_weights_in` gives it, next to their config.json.
        find_class: the class for a config's _class_name; raises ValueError for those that are not wanted.

    Returns:
        The component in eval mode on the CPU, floating weights in float32, in memory of their own.

    Raises:
        ValueError: if config or weights are missing, damaged or do not fit each other, or hold NaN or infinity.
        OSError: if they cannot be read.
    """
    return read_folder(weights.parent, lambda: _load(weights, find_class))


def _load(weights: Path, find_class: Callable[[str], type]) -> torch.nn.Module:
    path = weights.parent / CONFIG
    config = read_config_file(path)
    try:
        component_class = find_class(config["_class_name"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    stored = open_weights(weights)
    _check_entries(config, component_class, stored, path)
    component = _build(component_class, config, stored, path)
    expected = component.state_dict()
    names = _stored_names(expected, stored)
    _check_fit(expected, names, stored, component_class)
    state = {}
    for key, like in expected.items():
        name = names[key]
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        state[key] = own_copy(stored[name], dtype)
        check_finite(state[key], name, stored.file(name), stored.dtypes[name])
    component.load_state_dict(state, assign=True)
    if unset := [key for key, tensor in component.named_buffers() if tensor.is_meta]:
        computed = dict(_build(component_class, config, stored, path, "cpu").named_buffers())
        for key in unset:  # what a class computes of its config, and stores nowhere
            owner, _, name = key.rpartition(".")
            component.get_submodule(owner).register_buffer(name, computed[key], persistent=False)
    component.register_to_config(_name_or_path=str(weights.parent))
    return component.eval()


def _build(
    component_class: type, config: dict[str, Any], stored: Checkpoint, path: Path, device: str = "meta"
) -> torch.nn.Module:
    """The network, on "meta" without memory for its weights, which stops growing once it is larger than what is stored."""
    from diffusers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of entries that it does not know
    try:
        with _no_larger_than(stored), on_meta() if device == "meta" else torch.device(device):
            return component_class.from_config(config)
    except Exception as error:  # diffusers checks no config: a wrong entry can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} makes no {component_class.__name__} for {stored.path.name}: {reason}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _no_larger_than(stored: Checkpoint) -> Iterator[None]:
    """End the block in an error once modules, made in this thread, hold far more tensors or values than `stored`.

    A class may replace layers that its base made, and have layers without weights.
    """
    thread = threading.get_ident()
    left = {
        "tensors": 2 * len(stored) + 100,
        "values": 2 * stored.num_values + 10_000,
        "layers": 8 * len(stored) + 1000,
    }

    def spend(what: str, number: int) -> None:
        if threading.get_ident() == thread:
            left[what] -= number
            if left[what] < 0:
                raise ValueError(f"it asks for more {what} than there are weights")

    def count_tensor(module, name, tensor) -> None:
        if tensor is not None:
            spend("tensors", 1)
            spend("values", tensor.numel())

    hooks = torch.nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(count_tensor),
        hooks.register_module_buffer_registration_hook(count_tensor),
        hooks.register_module_module_registration_hook(lambda module, name, inner: spend("layers", 1)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stored_names(expected: Mapping[str, Tensor], stored: Checkpoint) -> dict[str, str]:
    """Keys of the component -> keys of the file, which differ where AutoencoderKL's attention has its old names."""
    if expected.keys() <= stored.keys():
        return {key: key for key in expected}
    from latent_codec.conversion.diffusers_files import old_name

    return {key: old_name(key) if key not in stored and old_name(key) in stored else key for key in expected}


def _check_fit(
    expected: Mapping[str, Tensor], names: Mapping[str, str], stored: Checkpoint, component_class: type
) -> None:
    missing = sorted(key for key, name in names.items() if name not in stored)
    unexpected = sorted(stored.keys() - names.values())
    if missing or unexpected:
        raise ValueError(
            f"{stored.path} does not fit {component_class.__name__} in diffusers' key layout: "
            f"{_some(missing)} missing, {_some(unexpected)} unexpected"
        )
    for key, like in expected.items():
        name = names[key]
        shape, dtype = stored.shapes[name], stored.dtypes[name]
        if shape != like.shape:
            raise ValueError(
                f"{stored.file(name)} does not fit its {CONFIG}: expected {name} of shape {tuple(like.shape)}, got "
                f"{tuple(shape)}"
            )
        if dtype.is_complex or dtype.is_floating_point != like.is_floating_point():
            wanted = "floating weights" if like.is_floating_point() else "integers"
            raise ValueError(
                f"{stored.file(name)}: expected {wanted} in {name}, got {str(dtype).removeprefix('torch.')}"
            )


def _check_entries(config: dict[str, Any], component_class: type, stored: Checkpoint, path: Path) -> None:
    """Refuse entries of other types than the class declares, and numbers that no network of these weights can have."""
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path} describes quantized weights; give the component as it was before")
    signature = inspect.signature(component_class.__init__).parameters
    try:
        types = get_type_hints(component_class.__init__)
    except NameError:  # of a name that only type checkers see
        types = {}
    limit = max(_SMALL, stored.num_values)
    for key, value in config.items():
        if key not in signature or value is None or value == signature[key].default:
            continue
        if key in types and not _is_a(value, types[key]):
            wanted = inspect.formatannotation(types[key])
            raise ValueError(f"{path}: expected {key} of type {wanted}, got {reprlib.repr(value)}")
        if (largest := _largest(value)) > limit:
            raise ValueError(
                f"{path}: {key} is {reprlib.repr(largest)}, and {stored.path.name} has {stored.num_values} values in all"
            )


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a value of a JSON file is of a type; numbers of any type are alike, as are lists and tuples."""
    origin, parts = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is Literal:
        return any(_is_a(value, type(part)) for part in parts)
    if origin in (bool, int, float):
        return isinstance(value, (int, float))
    if origin in (list, tuple):
        parts = [part for part in parts if part is not ...]
        return isinstance(value, (list, tuple)) and all(
            not parts or any(_is_a(each, part) for part in parts) for each in value
        )
    return isinstance(value, origin) if origin in (str, dict, NoneType) else True


def _largest(value: Any) -> int:
    """The largest magnitude of an integer in a value of a JSON file; 0 if there is none."""
    if isinstance(value, int):
        return abs(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return max(map(_largest, inner), default=0)


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys" + (f" ({keys[0]}{', ...' if len(keys) > 1 else ''})" if keys else "")
