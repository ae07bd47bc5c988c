"""Opening and writing checkpoint files: a state dict and nothing else, whoever made the file.

    file --first bytes--> safetensors ------------------------------------> tensors, memory-mapped
                     \\--> torch.save, zip or legacy --opcodes--> torch.load(weights_only=True) --> the state dict in it

What a pickle would do is read from its opcodes before torch sees it: a name of Python's own library or of torch that
is no plain data ends in an error, and every other name gets a class that does nothing. No module is imported.
"""

import json
import mmap
import os
import pickletools
import re
import struct
import sys
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals  # its public form knows zip files alone

from latent_codec.files import replacing

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")

_NO_CHECKPOINTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights it stands for; run `git lfs pull`",
    b"<": "a web page; fetch the file itself, not the page that shows it",
    b"{": "JSON text; give the file that holds the weights",
    b"\x1f\x8b": "a gzip archive; unpack it, and give the checkpoint inside",
    b"GGUF": "a GGUF file; give a .safetensors file, or one of torch.save",
    b"\x89HDF": "an HDF5 file; give a .safetensors file, or one of torch.save",
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

# Names of Python's library and of torch that only hold data, or look something up (what they give is never called).
_DATA = re.compile(
    r"""builtins\.(bool|bytes|dict|float|frozenset|getattr|int|list|object|range|slice|str|tuple|type)
    |   (argparse\.|types\.Simple)Namespace | copyreg\._reconstructor | functools\.partial | operator\.getitem
    |   collections\.(UserDict|UserList|defaultdict|deque) | (typing|collections\.abc)\.[A-Z]\w*
    |   datetime\.(date|datetime|time|timedelta|timezone) | decimal\.Decimal | fractions\.Fraction | uuid\.UUID
    |   pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path
    |   torch\.(nn\.modules|optim)\.\w+\.[A-Z]\w* | torch\.nn\.parameter\.[A-Z]\w*
    |   torch\.nn\.functional\.\w+ | torch\._C\._nn\.\w+""",
    re.VERBOSE,
)

# Others are slow without bound (idna, punycode).
_BYTES_CODECS = ((), ("latin1",), ("latin-1",))

# Views that repeat their elements may be larger than the file, but not without bound.
_LARGEST_REPETITION = 2**26

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
    """Keys in the state dict that hold no tensor, and all keys beside a wrapped one; sorted."""
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
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path} is a folder or a device; give one checkpoint file ({', '.join(_SUFFIXES)})")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty; fetch it again")
    if head[8:9] == b"{":  # first, because the header's length before it may look like any magic number
        return _open_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        return _state_dict_of(path, size, _load_zip(path, size))
    for magic, what in _NO_CHECKPOINTS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive; unpack it, and give the checkpoint inside")
    return _state_dict_of(path, size, _load_legacy(path, size, head))


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
            raise OSError(f"cannot write {path}: {_gist(error)}") from error


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        # Checks the header: at most 100 MB, offsets without gap or overlap, sizes as shapes and dtypes say.
        stored = safe_open(path, framework="pt")
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
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
            f"{path} is no safetensors file, or a damaged or truncated one ({_gist(error)}); fetch it again"
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
            if "data.pkl" not in sizes:
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
            f"{path} is a damaged or truncated zip file ({_gist(error)}); fetch it again"
        ) from error
    if problem:
        raise ValueError(f"{path} {problem}")

    pickle = _Pickle()
    with pickle.checked(path):
        pickle.follow(BytesIO(opcodes))
        for key, need in pickle.storages.items():
            if (have := sizes.get(f"data/{key}", 0)) != need:
                raise ValueError(f"storage {key} has {have} bytes, and its tensors need {need}")
    return _load(path, size, pickle, mapped=True)


def _load_legacy(path: Path, size: int, head: bytes) -> object:
    """The object in a file of `torch.save` before 1.6: five pickles, then the bytes of all storages."""
    pickle = _Pickle()
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


def _load(path: Path, size: int, pickle: "_Pickle", *, mapped: bool) -> object:
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
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged, truncated or beyond torch.load(weights_only=True) ({_gist(error)}); "
        "fetch it again, or save its state dict alone"
    )


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
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            kind = f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{path} holds {key!r} as {kind}; save it as a dense tensor on the CPU")
        if tensor.nbytes > max(size, _LARGEST_REPETITION):
            shape = tuple(tensor.shape)
            raise ValueError(
                f"{path} is damaged: {key!r} has shape {shape}, and the file {size} bytes; fetch it again"
            )
        tensors[key] = tensor.detach()
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


def _gist(error: Exception) -> str:
    """The line that says what is wrong: torch wraps it in advice to load without safety."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return _printable(text.partition("\n")[0].strip().rstrip("."))


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True, eq=False)
class _Name:
    """A class or function that a pickle names."""

    path: str


@dataclass(frozen=True, eq=False)
class _Result:
    """What calling it gives."""

    path: str
    items: dict = field(default_factory=dict)


class _Tuple(tuple):
    """A tuple that Python can hash: one too deep ends the process, one that repeats itself never ends."""

    def __init__(self, items: Iterable = ()):
        inner = [item for item in self if isinstance(item, _Tuple)]
        self.depth = 1 + max((item.depth for item in inner), default=0)
        self.weight = len(self) + sum(item.weight for item in inner)
        if self.depth > 100 or self.weight > 2**20:
            raise ValueError("it has tuples in tuples without end")


class _Pickle:
    """What pickles would do, read from their opcodes (Python's pickletools) without doing any of it.

    The stack is kept for the opcodes that `torch.load(weights_only=True)` knows; with others a pickle is refused.
    """

    def __init__(self):
        self.storages: dict[str, int] = {}
        """Bytes that tensors need, by the storage's key."""
        self.largest_count = 0
        """The largest number given to a class of tensors, which would make room for it."""
        self._names: dict[str, str] = {}  # as the pickle has it: as Python 3 has it
        self._containers: dict[str, type] = {}  # of names whose objects are given items: dict or list
        self._computed: set[str] = set()  # names whose results are called

    def refuse_code(self, path: Path) -> None:
        """End in an error if the pickle, opened without safety, would run code."""
        names = sorted(name for name in self._names.values() if _runs_code(name))
        names += sorted(f"what {name} gives" for name in self._computed)
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{path} is a pickle that would run {_printable(listed)}; it was not opened")

    @contextmanager
    def checked(self, path: Path) -> Iterator[None]:
        """End the block in an error: of code that would run, or else of the damage that it found."""
        damage = None
        try:
            yield
        except Exception as error:  # a damaged pickle leads to any
            damage = error
        self.refuse_code(path)
        if damage:
            raise _unreadable(path, damage) from damage

    def stand_ins(self) -> list[tuple[type, str]]:
        """For every name a class that does nothing, with the name; torch prefers its own where it has one."""
        bases = {dict: _DictStandIn, list: _ListStandIn}
        stand_ins = []
        for written, name in self._names.items():
            made = type(name, (bases.get(self._containers.get(name), _StandIn),), {})
            # Under both names: torch translates only some of Python 2's, which pickles of protocol 2 have.
            stand_ins += [(made, each) for each in {written, name}]
        return stand_ins

    def follow(self, stream: BinaryIO) -> object:
        """Read one pickle, and give its object with a `_Result` in place of all that is no plain data."""
        start = stream.tell()
        try:
            return self._follow(stream)
        except Exception:  # a pickle that torch would not read either; what it would run is said all the same
            stream.seek(start)
            with suppress(Exception):
                self._find_names(stream)
            raise

    def _follow(self, stream: BinaryIO) -> object:
        stack, marks, memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case (
                    "BINUNICODE" | "SHORT_BINSTRING" | "BINFLOAT" | "BININT" | "BININT1" | "BININT2" | "LONG1"
                ):
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    stack.append({"TUPLE": _Tuple, "LIST": list, "DICT": dict, "SET": set}[opcode.name[6:]]())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [_Tuple(stack[-count:])]
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE":
                    stack, items = marks.pop(), stack
                    stack.append(_Tuple(items))
                case "APPEND":
                    item = stack.pop()
                    self._add_items(stack[-1], [item], list)
                case "APPENDS":
                    stack, items = marks.pop(), stack
                    self._add_items(stack[-1], items, list)
                case "SETITEM":
                    key, _ = stack.pop(-2), stack.pop()
                    self._add_items(stack[-1], [key], dict)
                case "SETITEMS":
                    stack, items = marks.pop(), stack
                    self._add_items(stack[-1], items[::2], dict)
                case "GLOBAL":
                    stack.append(self._add_name(*argument.split(" ", 1)))
                case "REDUCE" | "NEWOBJ":
                    arguments, called = stack.pop(), stack.pop()
                    stack.append(self._add_call(called, arguments))
                case "BUILD":
                    stack.pop()
                case "BINPERSID":
                    stack.append(self._add_storage(stack.pop()))
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case unknown:
                    raise ValueError(f"it has the opcode {unknown}, which torch.save's own protocol has not")

    def _find_names(self, stream: BinaryIO) -> None:
        """Names alone, of every pickle protocol."""
        strings = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                self._add_name(*argument.split(" ", 1))
            elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                self._add_name(*strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)

    def _add_name(self, module: str, name: str) -> _Name:
        written = f"{module}.{name}"
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        else:
            module = IMPORT_MAPPING.get(module, module)
        self._names[written] = f"{module}.{name}"
        return _Name(self._names[written])

    def _add_call(self, called: object, arguments: tuple) -> _Result:
        if not isinstance(called, _Name):
            self._computed.add(called.path if isinstance(called, _Result) else type(called).__name__)
            return _Result("a call")
        counts = [each for each in arguments if type(each) is int]
        if called.path in ("builtins.bytearray", "_codecs.encode"):
            if counts or arguments[1:] not in _BYTES_CODECS:
                raise ValueError(f"{called.path} is called as no pickle of bytes calls it")
        elif called.path.startswith("torch."):
            self.largest_count = max(self.largest_count, *counts, 0)
        return _Result(called.path)

    def _add_items(self, target: object, items: list, kind: type) -> None:
        if isinstance(target, _Result):
            self._containers[target.path] = kind
        if kind is list:
            if isinstance(target, list):
                target.extend(items)
            return
        known = target.items if isinstance(target, _Result) else target
        for key in items:
            if key in known:
                raise ValueError(f"key {key!r} comes twice")
            known[key] = None

    def _add_storage(self, persistent_id: tuple) -> _Result:
        if persistent_id[0] != "storage":
            raise ValueError("it has the source of a class, which would have to be imported")
        _, storage_type, key, _, num_elements = persistent_id[:5]
        made = _get_allowed_globals().get(storage_type.path)
        dtype = made.dtype if isinstance(made, torch.serialization.StorageType) else torch.uint8
        num_bytes = num_elements * dtype.itemsize
        if num_bytes < 0 or self.storages.setdefault(key, num_bytes) != num_bytes:
            raise ValueError(f"storage {key} comes with two sizes, or less than none")
        return _Result(storage_type.path)


def _runs_code(name: str) -> bool:
    """Whether a name is of Python's library or torch, and neither plain data nor what torch itself allows."""
    root = name.partition(".")[0]
    if root != "torch" and root not in sys.stdlib_module_names:
        return False
    return not _DATA.fullmatch(name) and name not in _get_allowed_globals()


class _StandIn:
    """An object of a class that is not imported: takes whatever a pickle gives it, and does nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class _DictStandIn:
    """The same for a class whose objects are given items, which torch sets in its own kinds of dict alone."""

    def __new__(cls, *_):
        return OrderedDict()


class _ListStandIn:
    """The same for a class whose objects are given elements, which torch appends to lists alone."""

    def __new__(cls, *_):
        return []
