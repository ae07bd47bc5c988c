"""Opening and writing checkpoint files: a state dict and nothing else, whoever made the file.

    file --first bytes--> safetensors ------------------------------------> tensors, memory-mapped
                     \\--> torch.save, zip or legacy --opcodes--> torch.load(weights_only=True) --> the state dict in it

What a safetensors file holds is read from its header, without torch, which maps the file when the first tensor is read.
What a pickle would do is read from its opcodes before torch sees it (torch_files.py, pickles.py).
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from latent_codec.files import replacing

if TYPE_CHECKING:  # the header of a safetensors file is read without torch
    import torch
    from torch import Tensor

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")

IF_LATENTS = "if it holds latents, `latent-codec decode` opens it with --codec"
_NO_CHECKPOINTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights that it names; run `git lfs pull`",
    b"<": "a web page; fetch the file itself, not the page that shows it",
    b"{": "JSON text; give the file that holds the weights",
    b"\x1f\x8b": "a gzip archive; unpack it, and give the checkpoint inside",
    b"GGUF": "a GGUF file; give a .safetensors file, or one of torch.save",
    b"\x89HDF": "an HDF5 file; give a .safetensors file, or one of torch.save",
    b"\x93NUMPY": f"a NumPy array (.npy), no checkpoint; {IF_LATENTS}",
}

_DTYPES = {  # as safetensors calls them, and torch
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}

ZIP_MAGIC = b"PK\x03\x04"
"""Of what torch.save writes since 1.6."""
MAX_TENSORS = 2**16
"""In one safetensors file; the largest models have some thousands."""
_MAX_HEADER = 2**25


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint(Mapping):
    """The state dict of a checkpoint file: a mapping from key to CPU tensor, in file order.

    Tensors are views of the memory-mapped file, whose pages are read once they are used; those of a legacy pickle
    (before torch 1.6) are in memory. Writing to a tensor leaves the file as it is.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtype_names: dict[str, str] = field(repr=False)
    """As torch calls them, such as float32."""
    wrapper: str | None = None
    """The key under which the state dict was found; None: it is the file's top level."""
    not_tensors: tuple[str, ...] = ()
    """Keys in the state dict that hold no tensor, and all keys next to a wrapped one; sorted."""
    entries: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of `open_entries`, where a file has several entries: key -> the entry in which its tensor is."""
    shards: Mapping[str, Path] = field(default_factory=dict, repr=False)
    """Where `path` is an index of shards: key -> the file in which its tensor is."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a safetensors header; empty for pickles."""
    _read: "Callable[[str], Tensor]" = field(repr=False)

    @cached_property
    def dtypes(self) -> "dict[str, torch.dtype]":
        import torch

        return {key: getattr(torch, name) for key, name in self.dtype_names.items()}

    @property
    def num_values(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def files(self) -> list[Path]:
        """Those that a copy needs: the file, or the index and its shards."""
        return sorted({self.path, *self.shards.values()})

    def file(self, key: str) -> Path:
        return self.shards.get(key, self.path)

    def __getitem__(self, key: str) -> "Tensor":
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

    The state dict is what is under "state_dict" (Lightning); else the top level, if there are tensors; else what
    is under the only key whose value holds tensors.

    Raises:
        ValueError: for what is no checkpoint, is damaged, would run code, or has more than one state dict.
        OSError: if the file cannot be read.
    """
    found = read_pickled(path)
    if isinstance(found, Checkpoint):
        return found
    from latent_codec.conversion.torch_files import state_dict_of

    return state_dict_of(Path(path), found)


def open_entries(path: str | os.PathLike) -> Checkpoint:
    """`open_checkpoint` with every tensor of the file, however deep in dicts and lists.

    Where all of them are in one dict, keys are that dict's own, and `wrapper` names it. Else a key begins with the names
    of the dicts around it ("ema.encoder.conv_in.weight"), and `entries` says which dict that is ("ema").

    Raises:
        ValueError, OSError: as `open_checkpoint`, but for several state dicts.
    """
    found = read_pickled(path)
    if isinstance(found, Checkpoint):
        return found
    from latent_codec.conversion.torch_files import entries_of

    return entries_of(Path(path), found)


def read_pickled(path: str | os.PathLike) -> object:
    """Read the object in a file of `torch.save`, whatever it is, running nothing that the file names.

    Returns:
        The object; of a safetensors file, a `Checkpoint`.

    Raises:
        ValueError, OSError: as `open_checkpoint`.
    """
    path = Path(path)
    path.stat()  # raises OSError where there is nothing
    if not path.is_file():
        raise ValueError(
            f"{path} is a folder or a device, not a file; give one checkpoint file ({', '.join(SUFFIXES)})"
        )
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty; fetch it again")
    if head[8:9] == b"{":  # first, because the header's length before it may look like any magic number
        return _open_safetensors(path)
    for magic, what in _NO_CHECKPOINTS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if head[257:262] == b"ustar" and not head.startswith(ZIP_MAGIC):
        raise ValueError(f"{path} is a tar archive; unpack it, and give the checkpoint inside")
    from latent_codec.conversion.torch_files import load_object

    return load_object(path, head)


def save_checkpoint(
    state_dict: "Mapping[str, Tensor]", path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a state dict: .safetensors; .ckpt, under "state_dict" as Lightning has it; .pt or .pth, bare.

    Views, and tensors that share memory, are written each on its own.

    Args:
        metadata: strings for a safetensors header; pickles have no place for them.

    Raises:
        ValueError: for another suffix, an empty state dict, a key that is no string, or a value that is no tensor.
        OSError: if the file cannot be written; then `path` is as it was.
    """
    import torch
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; a checkpoint ends in one of {', '.join(SUFFIXES)}")
    if metadata and path.suffix != ".safetensors":
        raise ValueError(f"expected a .safetensors file for metadata, got {path}, which has no place for it")
    if not state_dict:
        raise ValueError(f"{path}: expected a state dict with at least one tensor, got an empty one")
    tensors, storages = {}, set()
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise ValueError(f"{key!r} maps to a {kind}; a state dict maps strings to tensors")
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        is_only = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        if not (is_only and tensor.is_contiguous()):
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
        with safe_open(path, framework="np") as stored:
            metadata = stored.metadata() or {}
        places = json.loads(header, object_pairs_hook=_without_duplicates)
        places.pop("__metadata__", None)
        keys = sorted(places, key=lambda key: places[key]["data_offsets"])
        shapes = {key: tuple(places[key]["shape"]) for key in keys}
        if unknown := {places[key]["dtype"] for key in keys} - _DTYPES.keys():
            raise ValueError(f"it has dtype {min(unknown)}, and torch {', '.join(_DTYPES)}")
        dtype_names = {key: _DTYPES[places[key]["dtype"]] for key in keys}
    except Exception as error:  # of safetensors, json or torch, as the damage is
        raise ValueError(
            f"{path} is no safetensors file, or a damaged or truncated one ({gist(error)}); fetch it again"
        ) from error
    if not shapes:
        raise ValueError(f"{path} holds no tensors; give a checkpoint with weights")

    @cache
    def mapped() -> "Callable[[str], Tensor]":
        return safe_open(path, framework="pt").get_tensor

    return Checkpoint(
        path=path,
        shapes=shapes,
        dtype_names=dtype_names,
        metadata=metadata,
        _read=lambda key: mapped()(key),
    )


def _without_duplicates(pairs: list[tuple]) -> dict:
    unique = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"key {key!r} comes twice")
        unique[key] = value
    return unique


def gist(error: Exception) -> str:
    """The line that says what is wrong: torch wraps it in advice to load without safety."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return printable(text.partition("\n")[0].strip().rstrip("."))


def printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
