"""The state dict in a file of `torch.save`, zip or legacy, read without running what its pickle names (pickles.py)."""

import mmap
import os
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from latent_codec.conversion.checkpoints import IF_LATENTS, ZIP_MAGIC, Checkpoint, gist
from latent_codec.conversion.pickles import PickleReader, unreadable

# Views that repeat their elements may be larger than the file, but not without bound.
_LARGEST_REPETITION = 2**26

# Of what a checkpoint holds in dicts and lists: real ones have ten levels, and a few values for each tensor.
_DEEPEST = 64
_MOST_VALUES = 2**21

_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")

_GLOBALS_LOCK = threading.Lock()


def load_object(path: Path, head: bytes) -> object:
    """Read the object in a file that begins with `head`, running nothing that the file names."""
    size = path.stat().st_size
    if head.startswith(ZIP_MAGIC):
        return _load_zip(path, size)
    return _load_legacy(path, size, head)


def _load_zip(path: Path, size: int) -> object:
    """The object in a zip file of `torch.save`, its tensors mapped, once directory and pickle are checked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            folder = entries[0].filename.partition("/")[0] + "/" if entries else ""  # as torch finds it
            sizes = {entry.filename.removeprefix(folder): entry.file_size for entry in entries}
            if entries and all(entry.filename.endswith(".npy") for entry in entries):
                problem = f"is a NumPy archive (.npz), no checkpoint; {IF_LATENTS}"
            elif "data.pkl" not in sizes:
                problem = "is a zip archive, but not one of torch.save; unpack it, and give what is inside"
            elif "constants.pkl" in sizes:
                problem = "is a TorchScript program; save the state dict of its model instead"
            elif len({name.lower() for name in sizes}) < len(entries):
                problem = "is a zip archive with two entries of one name; save it again with torch.save"
            elif any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries):
                problem = "has compressed entries, which torch.save never has; save it again with torch.save"
            elif sum(sizes.values()) > size:
                problem = f"declares {sum(sizes.values())} bytes, and has {size}; fetch it again"
            else:
                problem = None
                with path.open("rb") as file:  # zipfile wants checksums, which torch.save can leave out
                    file.seek(archive.getinfo(folder + "data.pkl").header_offset + 26)
                    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
                    opcodes = file.read(sizes["data.pkl"])
    except Exception as error:  # of zipfile, or of what it calls, as the damage is
        raise ValueError(
            f"{path} is a damaged or truncated zip file ({gist(error)}); fetch it again"
        ) from error
    if problem:
        raise ValueError(f"{path} {problem}")

    pickle = PickleReader()
    with pickle.checked(path):
        pickle.follow(BytesIO(opcodes))
        for key, need in pickle.storages.items():
            if (have := sizes.get(f"data/{key}", 0)) != need:
                raise ValueError(f"storage {key} has {have} bytes, and its tensors need {need}")
    return _load(path, size, pickle, mapped=True)


def _load_legacy(path: Path, size: int, head: bytes) -> object:
    """The object in a file of `torch.save` before 1.6: five pickles, then the bytes of all storages."""
    pickle = PickleReader()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if _LEGACY_MAGIC not in head[:32]:
            with suppress(Exception):  # it may be anything: only what a pickle would run matters
                pickle.follow(stream)
            pickle.refuse_code(path)
            raise ValueError(
                f"{path} begins with {head[:16]!r}; give a safetensors file, or one that torch.save wrote"
            )
        with pickle.checked(path):
            for _ in ("magic number", "protocol", "system", "object"):
                pickle.follow(stream)
            if sorted(pickle.follow(stream)) != sorted(pickle.storages):
                raise ValueError("the storages that it lists are not those of its tensors")
            if (need := sum(pickle.storages.values())) > size:
                raise ValueError(f"its tensors need {need} bytes, and it has {size}")
    return _load(path, size, pickle, mapped=False)


def _load(path: Path, size: int, pickle: PickleReader, *, mapped: bool) -> object:
    if path.name.endswith(".safetensors"):  # torch would go by the name
        raise ValueError(f"{path} is a pickle of torch.save, not a safetensors file; rename it to .ckpt")
    if pickle.largest_count > max(size, _LARGEST_REPETITION):
        raise ValueError(
            f"{path} is damaged: it asks for {pickle.largest_count} elements, and has {size} bytes; "
            "fetch it again"
        )
    try:
        with _only(pickle.stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is either read or an error
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # of torch, or of what it calls, as the damage is
        raise unreadable(path, error) from error


@contextmanager
def _only(stand_ins: list[tuple[type, str]]) -> Iterator[None]:
    """Let torch build these classes, and none that someone allowed for files of their own."""
    with _GLOBALS_LOCK:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(stand_ins)
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def state_dict_of(path: Path, value: object) -> Checkpoint:
    """The state dict in the object of a file, as `open_checkpoint` looks for it."""
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a state dict; save only its state dict")
    wrappers = [key for key in value if _holds_tensors(value[key])]
    if "state_dict" in wrappers:
        wrappers = ["state_dict"]
    elif wrappers and _holds_tensors(value):
        raise ValueError(
            f"{path} holds tensors at its top level and under {wrappers[0]!r}; save only one of them"
        )
    elif len(wrappers) > 1:
        names = " and ".join(map(repr, wrappers))
        raise ValueError(f"{path} holds state dicts under {names}; save only one of them")
    elif not wrappers and not _holds_tensors(value):
        raise ValueError(
            f"{path} holds no tensors at its top level or one below; give a checkpoint with weights"
        )
    wrapper = wrappers[0] if wrappers else None
    state_dict = value[wrapper] if wrappers else value

    tensors, left_out = {}, {str(key) for key in value if wrappers and key != wrapper}
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            left_out.add(str(key))
            continue
        for each in (key, *wrappers):
            if not isinstance(each, str):
                raise ValueError(
                    f"{path} has the key {each!r} of type {type(each).__name__}; keys must be strings"
                )
        tensors[key] = _plain(path, key, tensor)
    return _checkpoint(path, tensors, wrapper, left_out)


def entries_of(path: Path, value: object) -> Checkpoint:
    """Every tensor in the object of a file, as `open_entries` names them."""
    tensors, entries, left_out = {}, {}, set()
    visited = 0

    def visit(each: object, parts: tuple[str, ...]) -> bool:
        """Gather the tensors in a value, and give whether there are any."""
        nonlocal visited
        visited += 1
        if len(parts) > _DEEPEST or visited > _MOST_VALUES:
            raise ValueError(f"{path} holds dicts in dicts without end; save only the state dict")
        if isinstance(each, Tensor):
            key = ".".join(parts)
            if key in tensors:
                raise ValueError(f"{path} holds two tensors called {key!r}; save only one of them")
            tensors[key] = _plain(path, key, each)
            entries[key] = ".".join(parts[:-1])
            return True
        items = (
            each.items() if isinstance(each, dict) else enumerate(each) if type(each) in (list, tuple) else ()
        )
        inner = [(str(name), visit(item, (*parts, str(name)))) for name, item in items]
        found = any(holds for _, holds in inner)
        if found or not parts:
            left_out.update(".".join((*parts, name)) for name, holds in inner if not holds)
        return found

    visit(value if isinstance(value, dict) else {}, ())
    if not tensors:
        what = "no tensors" if isinstance(value, dict) else f"a {type(value).__name__}, not a state dict"
        raise ValueError(f"{path} holds {what}; give a checkpoint with weights")
    if len(names := set(entries.values())) > 1:
        return replace(_checkpoint(path, tensors, None, left_out), entries=entries)
    wrapper = names.pop()
    start = wrapper and f"{wrapper}."
    inner = {key.removeprefix(start): tensor for key, tensor in tensors.items()}
    return _checkpoint(path, inner, wrapper or None, {key.removeprefix(start) for key in left_out})


def _plain(path: Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor, if it is a dense one on the CPU with as many elements as the file can hold."""
    if (
        tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.is_quantized
    ):
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"{tensor.layout}"
        raise ValueError(
            f"{path} holds {key!r} as a {kind} tensor on {tensor.device}; save it as a dense tensor on the CPU"
        )
    if tensor.nbytes > max(size := path.stat().st_size, _LARGEST_REPETITION):
        shape = tuple(tensor.shape)
        raise ValueError(
            f"{path} is damaged: {key!r} has shape {shape}, and the file {size} bytes; fetch it again"
        )
    return tensor.detach()


def _checkpoint(
    path: Path, tensors: dict[str, Tensor], wrapper: str | None, left_out: set[str]
) -> Checkpoint:
    return Checkpoint(
        path=path,
        shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
        dtype_names={key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()},
        wrapper=wrapper,
        not_tensors=tuple(sorted(left_out)),
        _read=tensors.__getitem__,
    )


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())
