"""The effects of a pickle, read from its opcodes before torch sees it, and without running any of it.

A name of Python's own library or of torch that is no plain data ends in an error, and every other name gets a class that
does nothing. No module is imported.
"""

import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch._weights_only_unpickler import _get_allowed_globals  # its public form knows only zip files

from latent_codec.conversion.checkpoints import gist, printable

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

# Of opcodes in one file, a few dozen for each tensor; and of marks that are open at once, one for each container around.
_MOST_OPCODES = 2**22
_MOST_MARKS = 1000
_MOST_OPCODES_FOR_NAMES = 2**20  # of a pickle that is refused anyway, for its message

# Others are slow without bound (idna, punycode).
_BYTES_CODECS = ((), ("latin1",), ("latin-1",))


def unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged, truncated or beyond torch.load(weights_only=True) ({gist(error)}); "
        "fetch it again, or save only its state dict"
    )


@dataclass(frozen=True, eq=False)
class _Name:
    """A class or function that a pickle names."""

    path: str


@dataclass(frozen=True, eq=False)
class _Result:
    """The result of a call to a name."""

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


class PickleReader:
    """Read the effects of pickles from their opcodes (Python's pickletools), without running any of it.

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
        self._num_opcodes = 0

    def refuse_code(self, path: Path) -> None:
        """End in an error if the pickle, opened without safety, would run code."""
        names = sorted(name for name in self._names.values() if _runs_code(name))
        names += sorted(f"what {name} gives" for name in self._computed)
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{path} is a pickle that would run {printable(listed)}; it was not opened")

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
            raise unreadable(path, damage) from damage

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
            self._num_opcodes += 1
            if self._num_opcodes > _MOST_OPCODES or len(marks) > _MOST_MARKS:
                raise ValueError("it has more opcodes, or deeper containers, than any checkpoint")
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
        """Only names, of every pickle protocol."""
        strings = []
        for opcode, argument, _ in islice(pickletools.genops(stream), _MOST_OPCODES_FOR_NAMES):
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
    """The same for a class whose objects are given items, which torch sets only in its own kinds of dict."""

    def __new__(cls, *_):
        return OrderedDict()


class _ListStandIn:
    """The same for a class whose objects are given elements, which torch appends only to lists."""

    def __new__(cls, *_):
        return []
