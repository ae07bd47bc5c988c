"""Opening and writing checkpoint files: a state dict and nothing else, whoever made the file.

    file --first bytes--> safetensors ------------------------------------> tensors, memory-mapped
                     \\--> torch.save, zip or legacy --opcodes--> torch.load(weights_only=True) --> the state dict in it

What a pickle would do is read from its opcodes before torch sees it (pickles.py).
"""

import json
import mmap
import os
import struct
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_codec.conversion.pickles import PickleReader, gist, unreadable
from latent_codec.files import replacing

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")

_IF_LATENTS = "if it holds latents, `latent-codec decode` opens it with --codec"
_NO_CHECKPOINTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights it stands for; run `git lfs pull`",
    b"<": "a web page; fetch the file itself, not the page that shows it",
    b"{": "JSON text; give the file that holds the weights",
    b"\x1f\x8b": "a gzip archive; unpack it, and give the checkpoint inside",
    b"GGUF": "a GGUF file; give a .safetensors file, or one of torch.save",
    b"\x89HDF": "an HDF5 file; give a .safetensors file, or one of torch.save",
    b"\x93NUMPY": f"a NumPy array (.npy), no checkpoint; {_IF_LATENTS}",
}

_DTYPES = {  # as safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}

MAX_TENSORS = 2**16
"""In one safetensors file; the largest models have some thousands."""
_MAX_HEADER = 2**25

# Views that repeat their elements may be larger than the file, but not without bound.
_LARGEST_REPETITION = 2**26

# Of what a checkpoint holds in dicts and lists: real ones have ten levels, and a few values for each tensor.
_DEEPEST = 64
_MOST_VALUES = 2**21

_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")

_GLOBALS_LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint(Mapping):
    """The state dict of a checkpoint file: a mapping from key to CPU tensor, in file order.

    Tensors are views of the memory-mapped file, whose pages are read once they are used; those of a legacy pickle
    (before torch 1.6) lie in memory. Writing to a tensor leaves the file as it is.
    """

    path: Path
    shapes: dict[str, torch.Size] = field(repr=False)
    dtypes: dict[str, torch.dtype] = field(repr=False)
    wrapper: str | None
    """The key under which the state dict was found; None: it is the file's top level."""
    not_tensors: tuple[str, ...]
    """Keys in the state dict that hold no tensor, and all keys next to a wrapped one; sorted."""
    entries: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of `open_entries`, where a file has several entries: key -> the entry in which its tensor is."""
    metadata: dict[str, str]
    """Of a safetensors header; empty for pickles."""
    _read: Callable[[str], Tensor] = field(repr=False)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a safetensors file or one of `torch.save`, told apart by content, running nothing that it names.

    The state dict is what lies under "state_dict" (Lightning); else the top level, if tensors lie there; else what
    lies under the only key whose value holds tensors.

    Raises:
        ValueError: for what is no checkpoint, is damaged, would run code, or has more than one state dict.
        OSError: if the file cannot be read.
    """
    return _open(path, _state_dict_of)


def open_entries(path: str | os.PathLike) -> Checkpoint:
    """`open_checkpoint` with every tensor of the file, however deep in dicts and lists.

    Where all of them are in one dict, keys are that dict's own, and `wrapper` names it. Else a key begins with the names
    of the dicts around it ("ema.encoder.conv_in.weight"), and `entries` says which dict that is ("ema").

    Raises:
        ValueError, OSError: as `open_checkpoint`, but for several state dicts.
    """
    return _open(path, _entries_of)


def read_pickled(path: str | os.PathLike) -> object:
    """Read the object in a file of `torch.save`, whatever it is, running nothing that the file names.

    Raises:
        ValueError, OSError: as `open_checkpoint`.
    """
    return _open(path, lambda path, size, found: found)


def _open(path: str | os.PathLike, gather: Callable[[Path, int, object], object]):
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(
            f"{path} is a folder or a device, not a file; give one checkpoint file ({', '.join(_SUFFIXES)})"
        )
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty; fetch it again")
    if head[8:9] == b"{":  # first, because the header's length before it may look like any magic number
        return _open_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        return gather(path, size, _load_zip(path, size))
    for magic, what in _NO_CHECKPOINTS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive; unpack it, and give the checkpoint inside")
    return gather(path, size, _load_legacy(path, size, head))


def save_checkpoint(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a state dict: .safetensors; .ckpt, under "state_dict" as Lightning has it; .pt or .pth, bare.

    Views, and tensors that share memory, are written each on its own.

    Args:
        metadata: strings for a safetensors header; pickles have no place for them.

    Raises:
        ValueError: for another suffix, an empty state dict, a key that is no string, or a value that is no tensor.
        OSError: if the file cannot be written; then `path` is as it was.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; a checkpoint ends in one of {', '.join(_SUFFIXES)}"
        )
    if metadata and path.suffix != ".safetensors":
        raise ValueError(
            f"metadata came for {path}, which has no place for it; only a .safetensors file takes it"
        )
    if not state_dict:
        raise ValueError(f"an empty state dict came for {path}; give at least one tensor")
    tensors, storages = {}, set()
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{key!r} maps to a {kind}; a state dict maps strings to tensors")
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        if not (alone and tensor.is_contiguous()):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensors[key] = tensor
    with replacing(path) as written:
        try:
            if path.suffix == ".safetensors":
                save_file(tensors, written, metadata)
            else:
                torch.save({"state_dict": tensors} if path.suffix == ".ckpt" else tensors, written)
        except (SafetensorError, RuntimeError) as error:  # of a full disk
            raise OSError(f"cannot write {path}: {gist(error)}") from error


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"expected a header of at most {_MAX_HEADER} bytes, got {length}")
            header = file.read(length)
        if (number := header.count(b'"data_offsets"')) > MAX_TENSORS:
            raise ValueError(f"expected at most {MAX_TENSORS} tensors, got {number}")
        # Checks the header: offsets without gap or overlap, sizes as shapes and dtypes say.
        stored = safe_open(path, framework="pt")
        places = json.loads(header, object_pairs_hook=_without_duplicates)
        places.pop("__metadata__", None)
        keys = sorted(places, key=lambda key: places[key]["data_offsets"])
        shapes = {key: torch.Size(places[key]["shape"]) for key in keys}
        if unknown := {places[key]["dtype"] for key in keys} - _DTYPES.keys():
            raise ValueError(f"it has dtype {min(unknown)}, and torch {', '.join(_DTYPES)}")
        dtypes = {key: _DTYPES[places[key]["dtype"]] for key in keys}
        metadata = stored.metadata() or {}
    except Exception as error:  # of safetensors, json or torch, as the damage is
        raise ValueError(
            f"{path} is no safetensors file, or a damaged or truncated one ({gist(error)}); fetch it again"
        ) from error
    if not shapes:
        raise ValueError(f"{path} holds no tensors; give a checkpoint with weights")
    return Checkpoint(
        path=path,
        shapes=shapes,
        dtypes=dtypes,
        wrapper=None,
        not_tensors=(),
        metadata=metadata,
        _read=stored.get_tensor,  # only now: it reads a page of each tensor
    )


def _without_duplicates(pairs: list[tuple]) -> dict:
    unique = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"key {key!r} comes twice")
        unique[key] = value
    return unique


def _load_zip(path: Path, size: int) -> object:
    """The object in a zip file of `torch.save`, its tensors mapped, once directory and pickle are checked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            folder = entries[0].filename.partition("/")[0] + "/" if entries else ""  # as torch finds it
            sizes = {entry.filename.removeprefix(folder): entry.file_size for entry in entries}
            if entries and all(entry.filename.endswith(".npy") for entry in entries):
                problem = f"is a NumPy archive (.npz), no checkpoint; {_IF_LATENTS}"
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


def _state_dict_of(path: Path, size: int, value: object) -> Checkpoint:
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, not a state dict; save its state dict alone"
        )
    wrappers = [key for key in value if _holds_tensors(value[key])]
    if "state_dict" in wrappers:
        wrappers = ["state_dict"]
    elif wrappers and _holds_tensors(value):
        raise ValueError(
            f"{path} holds tensors at its top level and under {wrappers[0]!r}; save one of them alone"
        )
    elif len(wrappers) > 1:
        names = " and ".join(map(repr, wrappers))
        raise ValueError(f"{path} holds state dicts under {names}; save one of them alone")
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
        tensors[key] = _plain(path, size, key, tensor)
    return _checkpoint(path, tensors, wrapper, left_out)


def _entries_of(path: Path, size: int, value: object) -> Checkpoint:
    tensors, entries, left_out = {}, {}, set()
    visited = 0

    def visit(each: object, parts: tuple[str, ...]) -> bool:
        """Gather the tensors in a value, and give whether there are any."""
        nonlocal visited
        visited += 1
        if len(parts) > _DEEPEST or visited > _MOST_VALUES:
            raise ValueError(f"{path} holds dicts in dicts without end; save the state dict alone")
        if isinstance(each, Tensor):
            key = ".".join(parts)
            if key in tensors:
                raise ValueError(f"{path} holds two tensors called {key!r}; save one of them alone")
            tensors[key] = _plain(path, size, key, each)
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


def _plain(path: Path, size: int, key: str, tensor: Tensor) -> Tensor:
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
    if tensor.nbytes > max(size, _LARGEST_REPETITION):
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
        shapes={key: tensor.shape for key, tensor in tensors.items()},
        dtypes={key: tensor.dtype for key, tensor in tensors.items()},
        wrapper=wrapper,
        not_tensors=tuple(sorted(left_out)),
        metadata={},
        _read=tensors.__getitem__,
    )


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())
