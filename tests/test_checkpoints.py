import builtins
import collections
import functools
import importlib
import io
import json
import math
import os
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latent_codec.conversion.checkpoints import open_checkpoint, save_checkpoint

WEIGHTS = {"conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "conv.bias": torch.tensor([1.0, -2.0])}
DTYPES = [
    "float64",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]
FORMS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


class Call:
    """Pickles as a call of `function`, which an unsafe loader would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save(path, value, legacy=False, **options):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def assert_same(checkpoint, expected):
    if checkpoint.wrapper or checkpoint.path.suffix == ".pt":  # a pickle; safetensors orders keys by dtype
        assert list(checkpoint) == list(expected)
    assert set(checkpoint) == set(expected)
    for key, tensor in expected.items():
        assert checkpoint[key].dtype == checkpoint.dtypes[key] == tensor.dtype
        assert checkpoint[key].shape == checkpoint.shapes[key] == tensor.shape
        assert torch.equal(checkpoint[key], tensor)


def refusal(path):
    with pytest.raises(ValueError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and message.isprintable()
    return message


@pytest.fixture
def foreign():
    """A module `gone` with classes, as long as something is pickled; a loader cannot import it."""
    module = types.ModuleType("gone")

    class Plain:
        def __init__(self):
            self.history = [WEIGHTS["conv.bias"], self]

    class Slotted:
        __slots__ = ("best",)

        def __init__(self):
            self.best = 3

    class Stateful:
        def __getstate__(self):
            return ("a", 1, None)

        def __setstate__(self, state):
            raise AssertionError("was run")

    class Settings(dict):
        pass

    class Names(list):
        pass

    class Level(int):
        pass

    def rebuild(*arguments):
        raise AssertionError("was run")

    for each in (Plain, Slotted, Stateful, Settings, Names, Level, rebuild):
        each.__module__, each.__qualname__ = "gone", each.__name__
        setattr(module, each.__name__, each)
    sys.modules["gone"] = module
    yield module
    sys.modules.pop("gone", None)


# What opens


def test_golden_files_hold_what_torch_and_safetensors_read(shared):
    paths = [*(shared / "golden/conversion").iterdir(), *(shared / "checkpoints").iterdir()]
    assert len(paths) >= 18
    for path in paths:
        checkpoint = open_checkpoint(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            stored, wrapper = load_file(path), None
            expected = {key: stored[key] for key in checkpoint}
        else:
            stored = torch.load(path, weights_only=True)
            wrapper = "state_dict" if path.suffix == ".ckpt" else None
            expected = stored[wrapper] if wrapper else stored
        assert checkpoint.wrapper == wrapper
        assert checkpoint.path == path
        assert_same(checkpoint, dict(expected))
        assert checkpoint.not_tensors == tuple(sorted(stored.keys() - {wrapper}) if wrapper else ())


def test_safetensors_come_in_file_order_with_metadata_whatever_their_name(tmp_path):
    tensors = {
        "z": torch.ones(2, 3, dtype=torch.bfloat16),
        "a": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "codes": torch.arange(5),
        **{name: torch.zeros(4).to(getattr(torch, name)) for name in DTYPES},
    }
    for name in ("a.safetensors", "a.ckpt", "a.bin", "a"):
        save_file(tensors, tmp_path / name, {"format": "pt", "note": "hello"})
        checkpoint = open_checkpoint(str(tmp_path / name))
        assert checkpoint.metadata == {"format": "pt", "note": "hello"}
        assert checkpoint.wrapper is None and checkpoint.not_tensors == ()
        places = json.loads(header_of((tmp_path / name).read_bytes()))
        places.pop("__metadata__")
        assert list(checkpoint) == sorted(places, key=lambda key: places[key]["data_offsets"])
        assert_same(checkpoint, tensors)
        assert "z" in checkpoint and "y" not in checkpoint and checkpoint.get("y") is None


@FORMS
def test_views_parameters_and_shared_storages_come_out_right(tmp_path, legacy):
    base = torch.arange(24.0).reshape(4, 6)
    expected = {
        "whole": base,
        "row": base[2],
        "columns": base[:, ::2],
        "turned": base.T,
        "repeated": torch.ones(1).expand(5, 3),
        "tied": base,
        "scalar": torch.tensor(3, dtype=torch.int16),
        "empty": torch.empty(0, 2),
        "half": base.half(),
        "brain": base.bfloat16(),
        "last": base.contiguous(memory_format=torch.contiguous_format)[-1:],
    }
    value = {**expected, "parameter": torch.nn.Parameter(base)}
    checkpoint = open_checkpoint(save(tmp_path / "a.pt", value, legacy))
    assert_same(checkpoint, {**expected, "parameter": base})
    assert type(checkpoint["parameter"]) is torch.Tensor and not checkpoint["parameter"].requires_grad
    assert checkpoint["whole"].data_ptr() == checkpoint["tied"].data_ptr()


@FORMS
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "params", None])
def test_the_state_dict_is_found_and_all_else_is_named(tmp_path, wrapper, legacy):
    others = {
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "opt": {"lr": 0.1},
    }
    value = {**others, wrapper: {**WEIGHTS, "version": "1"}} if wrapper else {**WEIGHTS, **others}
    checkpoint = open_checkpoint(save(tmp_path / "a.ckpt", value, legacy))
    assert checkpoint.wrapper == wrapper
    assert checkpoint.not_tensors == tuple(sorted([*others, *(["version"] if wrapper else [])]))
    assert checkpoint.metadata == {}
    assert_same(checkpoint, WEIGHTS)


def test_lightning_wrapper_wins_over_what_is_next_to_it(tmp_path):
    value = {"state_dict": WEIGHTS, "best_accuracy": torch.tensor(0.5), "ema": {"conv.bias": torch.zeros(2)}}
    checkpoint = open_checkpoint(save(tmp_path / "a.ckpt", value))
    assert checkpoint.not_tensors == ("best_accuracy", "ema")
    assert_same(checkpoint, WEIGHTS)


@FORMS
def test_objects_of_classes_that_are_absent_are_left_out_and_nothing_of_theirs_runs(
    tmp_path, foreign, legacy
):
    settings, names = foreign.Settings(rate=1, deep=foreign.Settings(x=[2])), foreign.Names(["a", "b"])
    settings.frozen = True
    value = {
        "state_dict": collections.OrderedDict(WEIGHTS),
        "callbacks": {foreign.Plain: foreign.Plain(), "early": foreign.Slotted()},
        "hyper_parameters": settings,
        "names": names,
        "stateful": foreign.Stateful(),
        "level": foreign.Level(3),
        "function": foreign.rebuild,
        "rebuilt": Call(foreign.rebuild, 1, "two", [3]),
    }
    path = save(tmp_path / "a.ckpt", value, legacy)
    del sys.modules["gone"]
    checkpoint = open_checkpoint(path)
    assert "gone" not in sys.modules
    assert checkpoint.not_tensors == tuple(sorted(value.keys() - {"state_dict"}))
    assert_same(checkpoint, WEIGHTS)


def test_a_state_dict_of_a_foreign_dict_class_opens(tmp_path, foreign):
    path = save(tmp_path / "a.ckpt", {"state_dict": foreign.Settings(WEIGHTS)})
    del sys.modules["gone"]
    assert_same(open_checkpoint(path), WEIGHTS)


def test_plain_data_of_python_numpy_and_torch_is_left_out(tmp_path):
    import datetime
    import decimal
    import fractions
    import typing
    import uuid

    import numpy

    value = {
        "args": Namespace(root=Path("x"), pure=[Path("y")]),
        "collections": [
            collections.defaultdict(list, a=[1]),
            collections.deque([1]),
            collections.Counter("aa"),
        ],
        "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 3j, 2**70, float("nan"), None, True],
        "dates": [datetime.datetime(2020, 1, 2), datetime.timedelta(3), datetime.UTC],
        "sets": [{1}, frozenset([2]), range(3), slice(1, 2), b"bytes", bytearray(b"more"), uuid.UUID(int=3)],
        "types": [
            int,
            dict,
            typing.Any,
            type(None),
            types.SimpleNamespace(a=1),
            torch.float16,
            torch.Size([1]),
        ],
        "functions": [functools.partial(torch.nn.functional.silu, inplace=True), torch.nn.ReLU],
        "numpy": [numpy.float64(2), numpy.ones(3), numpy.dtype("f4")],
        "module": torch.nn.Linear(2, 2),
        "optimizer": [torch.optim.Adam, Call(torch.optim.lr_scheduler.ConstantLR, 1.0)],
        "method": "abc".upper,
    }
    checkpoint = open_checkpoint(save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS, **value}))
    assert checkpoint.not_tensors == tuple(sorted(value))
    assert_same(checkpoint, WEIGHTS)


def test_classes_that_someone_allowed_stay_allowed_and_are_not_built(tmp_path, foreign):
    path = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS, "x": foreign.Stateful()})
    with torch.serialization.safe_globals([foreign.Stateful]):
        before = set(torch.serialization.get_safe_globals())
        assert_same(open_checkpoint(path), WEIGHTS)
        assert set(torch.serialization.get_safe_globals()) == before


def test_writing_to_an_opened_tensor_leaves_the_file_alone(tmp_path):
    for name in ("a.safetensors", "a.ckpt"):
        save_checkpoint(WEIGHTS, tmp_path / name)
        open_checkpoint(tmp_path / name)["conv.bias"].zero_()
        assert_same(open_checkpoint(tmp_path / name), WEIGHTS)


def test_pickles_without_checksums_open(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "a.ckpt", WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(open_checkpoint(tmp_path / "a.ckpt"), WEIGHTS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
def test_shapes_of_200_megabytes_cost_no_memory(tmp_path):
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))  # KiB

    places = {
        str(index): {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [index << 22, (index + 1) << 22]}
        for index in range(50)
    }
    write_header(tmp_path / "large.safetensors", json.dumps(places))
    os.truncate(tmp_path / "large.safetensors", 8 + len(json.dumps(places)) + 200 * 2**20)
    with torch.serialization.skip_data():  # both files have their length, and no disk behind it
        torch.save({key: torch.empty(1024, 1024) for key in places}, tmp_path / "large.ckpt")
    for suffix in (".safetensors", ".ckpt"):
        save_checkpoint(WEIGHTS, tmp_path / f"small{suffix}")
        open_checkpoint(tmp_path / f"small{suffix}")  # what is imported or filled at first
        before = resident()
        checkpoint = open_checkpoint(tmp_path / f"large{suffix}")
        assert sum(map(math.prod, checkpoint.shapes.values())) == 50 * 2**20
        assert resident() - before < 8 * 1024
        assert torch.equal(checkpoint["49"], torch.zeros(1024, 1024))


# Code in pickles


def bombs(marker):
    command = f"touch {marker}"
    return {
        "posix.system": Call(os.system, command),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "subprocess.getoutput": Call(subprocess.getoutput, command),
        "importlib.import_module": Call(importlib.import_module, "antigravity"),
        "builtins.__import__": Call(getattr, Call(builtins.__import__, "os"), "system"),
        "torch.hub.load": Call(torch.hub.load, "nobody/nothing", "model"),
        "torch.serialization.load": Call(torch.load, str(marker)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        "io.open": Call(open, str(marker), "w"),
        "what functools.partial gives": Call(functools.partial(Namespace, marker=str(marker))),
    }


NAMES = list(bombs("x"))
NESTED = {
    "alone": lambda bomb: bomb,
    "next to": lambda bomb: {"state_dict": WEIGHTS, "callbacks": {"x": [bomb]}},
    "within": lambda bomb: {"state_dict": {**WEIGHTS, "conv.extra": bomb}},
    "as a key": lambda bomb: {"state_dict": WEIGHTS, "x": {bomb: 1}},
    "as state": lambda bomb: {"state_dict": WEIGHTS, "x": Namespace(bomb=bomb)},
}


@FORMS
@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("name", NAMES)
def test_pickles_that_would_run_code_are_refused_by_name(tmp_path, name, nested, legacy):
    marker = tmp_path / "marker"
    path = save(tmp_path / "a.ckpt", NESTED[nested](bombs(marker)[name]), legacy)
    modules = set(sys.modules)
    message = refusal(path)
    assert name in message and "would run" in message and "not opened" in message
    assert not marker.exists()
    assert "antigravity" not in sys.modules and set(sys.modules) == modules


@FORMS
def test_a_bomb_in_the_state_of_a_class_is_refused(tmp_path, foreign, legacy):
    holder = foreign.Plain()
    holder.history = Call(os.system, f"touch {tmp_path / 'marker'}")
    path = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS, "x": holder}, legacy)
    del sys.modules["gone"]
    assert "posix.system" in refusal(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_bombs_of_plain_pickle_are_refused_in_every_protocol(tmp_path, protocol, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"a": Call(os.system, f"touch {tmp_path / 'marker'}")}, protocol))
    assert "posix.system" in refusal(path)
    path.write_bytes(f"(S'touch {tmp_path / 'marker'}'\nios\nsystem\n.".encode())
    assert "os.system" in refusal(path)
    if protocol >= 2:
        save(path, {"state_dict": WEIGHTS, "x": Call(eval, "1")}, pickle_protocol=protocol)
        assert "builtins.eval" in refusal(path)
    assert not (tmp_path / "marker").exists()


@FORMS
def test_python_2_names_of_what_runs_are_known(tmp_path, legacy):
    for module, name, known in (
        ("__builtin__", "eval", "builtins.eval"),
        ("commands", "getoutput", "subprocess.getoutput"),
        ("urllib2", "urlopen", "urllib.request.urlopen"),
        ("nt", "system", "nt.system"),
    ):
        opcodes = f"c{module}\n{name}\n".encode() + b"X\x01\x00\x00\x001\x85R."
        path = tmp_path / "a.ckpt"
        if legacy:
            head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
            path.write_bytes(b"".join(pickle.dumps(each, 2) for each in head) + opcodes)
        else:
            write_zip(path, opcodes)
        assert known in refusal(path)


# Damage


def write_zip(path, opcodes, entries=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [("data.pkl", opcodes), ("version", b"3\n"), ("byteorder", b"little"), *entries]:
            archive.writestr(f"archive/{name}", data)
    return path


def tensor_opcodes(num_elements=4, offset=0, size=4, stride=1, key=b"0"):
    def number(value):
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu")
    storage += number(num_elements) + b"tQ"
    view = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + text(b"w") + rebuilt + b"s."


def test_a_pickle_written_by_hand_opens(tmp_path):  # so that the next tests fail for their own reason
    path = write_zip(tmp_path / "a.ckpt", tensor_opcodes(), [("data/0", struct.pack("<4f", 1, 2, 3, 4))])
    assert_same(open_checkpoint(path), {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])})


@pytest.mark.parametrize(
    "hostile",
    [
        {"num_elements": 8, "size": 8},
        {"num_elements": 2, "size": 2},
        {"num_elements": 10**12, "size": 10**12},
        {"num_elements": -4},
        {"size": 10**12},
        {"size": 10**12, "stride": 0},
        {"offset": 3},
        {"offset": -4},
        {"stride": -1},
        {"key": b"7"},
        {"key": b"../../secret"},
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, hostile):
    entries = [("data/0", struct.pack("<4f", 1, 2, 3, 4)), ("data/1", bytes(64))]
    path = write_zip(tmp_path / "a.ckpt", tensor_opcodes(**hostile), entries)
    assert "damaged" in refusal(path)


def test_zip_bombs_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    entries = [("data/0", bytes(2**22))]
    write_zip(path, tensor_opcodes(2**20, size=2**20), entries, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert "compressed" in refusal(path)

    write_zip(path, tensor_opcodes(), [("data/0", bytes(16))])
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")  # of the last entry, data/0
    content[directory + 20 : directory + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    assert "declares" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path):
    for name in ("data/0", "data.pkl", "DATA.pkl"):
        path = write_zip(tmp_path / "a.ckpt", tensor_opcodes(), [("data/0", bytes(16)), (name, bytes(16))])
        assert "two entries" in refusal(path)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x02" + b")" + b"\x85" * 200_000 + b"0}.",
        b"\x80\x02" + b"}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
        b"\x80\x02" + b"})q\x00" + b"h\x00h\x00\x86q\x00" * 90 + b"K\x01s.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R.",
        b"\x80\x02ctorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02}K\x01K\x02sK\x03",
        b"\x80\x02h\x07.",
        b"\x80\x02s.",
        b"\x80\x02t.",
        b"\x80\x02Q.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02(lp0\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02X\xff\xff\xff\xffab.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02R.",
        b"\x80\x02K\x01K\x01R.",
        b"\x80\x02.",
        b"",
        b"garbage",
    ],
)
def test_hostile_opcodes_end_in_an_error_and_not_in_a_crash(tmp_path, opcodes):
    refusal(write_zip(tmp_path / "a.ckpt", opcodes))
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    (tmp_path / "b.ckpt").write_bytes(b"".join(pickle.dumps(each, 2) for each in head) + opcodes)
    refusal(tmp_path / "b.ckpt")


@FORMS
def test_keys_that_come_twice_are_named(tmp_path, legacy):
    for first, second in (("conv.weight", "conv.weighs"), ("state_dict", "state_dics")):
        value = {first: WEIGHTS["conv.bias"], second: 1}
        path = save(tmp_path / "a.ckpt", collections.OrderedDict(value) if legacy else value, legacy)
        content = path.read_bytes()
        assert content.count(second.encode()) == 1
        path.write_bytes(content.replace(second.encode(), first.encode()))
        assert f"{first!r} comes twice" in refusal(path)


def test_legacy_storages_without_bytes_are_refused(tmp_path):
    """Torch leaves a storage that the list after the object lacks as it found the memory."""
    path = save(tmp_path / "a.ckpt", WEIGHTS, legacy=True)
    content = path.read_bytes()
    stream, ends = io.BytesIO(content), []
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    path.write_bytes(content[: ends[3]] + pickle.dumps([], 2))
    assert "storages" in refusal(path)


def header_of(content):
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def write_header(path, header, data=bytes(16)):
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
        '{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F64", "shape": [4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        '{"a": {"dtype": "F32", "shape": [4]}}',
        '{"a": [1, 2]}',
        '{"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        '{"__metadata__": {"format": "pt"}}',
        "{}",
        "{",
        '{"a": ' + "[" * 100_000,
        b'{"\xff\xfe": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    ],
)
def test_malformed_safetensors_headers_are_refused(tmp_path, header):
    refusal(write_header(tmp_path / "a.safetensors", header))


def test_a_well_formed_header_opens(tmp_path):
    header = '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    assert_same(open_checkpoint(write_header(tmp_path / "a.safetensors", header)), {"a": torch.zeros(4)})


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**27, 2**40, 2**63, 2**64 - 1])
def test_header_lengths_beyond_the_file_or_the_limit_are_refused(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a": {}}')
    refusal(path)
    if length == 2**27:  # in a file that is as long, and beyond safetensors' limit
        os.truncate(path, 2**27 + 8)
        refusal(path)


def test_flipped_bytes_in_headers_open_consistently_or_are_refused(tmp_path):
    save_file(WEIGHTS, tmp_path / "good.safetensors", {"format": "pt"})
    good = (tmp_path / "good.safetensors").read_bytes()
    generator, opened = random.Random(0), 0
    path = tmp_path / "a.safetensors"
    for _ in range(400):
        content = bytearray(good)
        for _ in range(generator.choice([1, 1, 1, 2, 5])):
            content[generator.randrange(8 + len(header_of(good)))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        opened += 1
        for key, tensor in checkpoint.items():
            assert tensor.shape == checkpoint.shapes[key] and tensor.dtype == checkpoint.dtypes[key]
            tensor.clone()
        assert sum(tensor.nbytes for tensor in checkpoint.values()) == len(good) - 8 - len(header_of(good))
    assert 0 < opened < 400


@FORMS
def test_flipped_bytes_in_pickles_open_or_are_refused(tmp_path, legacy):
    path = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS, "hp": Namespace(a=1)}, legacy)
    good, generator = path.read_bytes(), random.Random(1)
    for _ in range(150):
        content = bytearray(good)
        content[generator.randrange(len(good))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        for tensor in checkpoint.values():
            tensor.clone()


@pytest.mark.parametrize("cut", [0.0, 1e-9, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_files_are_refused(tmp_path, form, cut):
    """`cut` of the file's length; 1e-9 stands for one byte, and 1.0 for all but one."""
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.ckpt")
    if form == "safetensors":
        save_file(WEIGHTS, path)
    else:
        save(path, {"state_dict": WEIGHTS}, legacy=form == "legacy")
    size = path.stat().st_size
    os.truncate(path, min(max(int(size * cut), int(cut > 0)), size - 1))
    assert ("empty" in refusal(path)) == (cut == 0)


def test_every_truncation_of_a_header_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refusal(path)


# What is no checkpoint, or not one


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"Access denied, and more text than eight bytes", "Access denied"),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', "JSON"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"GGUF\x03" + bytes(100), "GGUF"),
        (bytes(1000), "begins with"),
        (b"", "empty"),
        (pickle.dumps({"a": 1}, 4), "begins with"),
        (pickle.dumps({"a": 1}, 2), "begins with"),
        (b"x" * 257 + b"ustar" + bytes(300), "tar"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
def test_other_files_are_named(tmp_path, content, said, name):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_folders_missing_files_and_other_archives_are_named(tmp_path):
    assert "folder" in refusal(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one of torch.save" in refusal(tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "none.ckpt", "w"):
        pass
    refusal(tmp_path / "none.ckpt")
    write_zip(tmp_path / "a.pt", b"\x80\x02}.", [("constants.pkl", b"\x80\x02)."), ("code/x.py", b"")])
    assert "TorchScript" in refusal(tmp_path / "a.pt")


def test_a_pickle_named_safetensors_is_named(tmp_path):
    for legacy in (False, True):
        assert "rename it" in refusal(save(tmp_path / "a.safetensors", WEIGHTS, legacy))


@FORMS
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"model": WEIGHTS, "module": WEIGHTS}, "'model' and 'module'"),
        ({"params": WEIGHTS, "x": torch.ones(1)}, "top level and under 'params'"),
        ({"a": {"b": WEIGHTS}}, "no tensors"),
        ({"epoch": 3}, "no tensors"),
        ({}, "no tensors"),
        ({0: torch.ones(1)}, "0 of type int"),
        ({"state_dict": {("a", 1): torch.ones(1)}}, "('a', 1) of type tuple"),
        ({3: WEIGHTS}, "3 of type int"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(1).expand(2**20, 2**20)}, "damaged"),
    ],
)
def test_what_holds_no_single_state_dict_is_named(tmp_path, value, said, legacy):
    assert said in refusal(save(tmp_path / "a.ckpt", value, legacy))


def test_a_bomb_in_a_legacy_module_is_named_before_what_cannot_be_read(tmp_path):
    module = torch.nn.Identity()
    path = save(tmp_path / "a.pt", {"state_dict": WEIGHTS, "module": module}, legacy=True)
    assert "source of a class" in refusal(path)
    module.bomb = Call(eval, "1")
    save(path, {"state_dict": WEIGHTS, "module": module}, legacy=True)
    assert "builtins.eval" in refusal(path)


def test_a_whole_module_is_named_by_its_class(tmp_path, foreign):
    assert "torch.nn.modules.linear.Linear" in refusal(save(tmp_path / "a.pt", torch.nn.Linear(2, 2)))
    path = save(tmp_path / "b.pt", foreign.Plain())
    del sys.modules["gone"]
    assert "gone.Plain" in refusal(path)


def test_other_pickle_protocols_of_torch_save_are_named(tmp_path):
    assert_same(open_checkpoint(save(tmp_path / "a.pt", WEIGHTS, pickle_protocol=3)), WEIGHTS)
    assert "protocol" in refusal(save(tmp_path / "b.pt", WEIGHTS, pickle_protocol=4))


# The way back


@pytest.mark.parametrize(
    ("name", "wrapper"), [("a.safetensors", None), ("a.ckpt", "state_dict"), ("a.pt", None), ("a.pth", None)]
)
def test_what_is_saved_opens_to_the_bit(tmp_path, name, wrapper):
    base = torch.randn(6, 4)
    tensors = {
        "row": base[1],
        "base": base,
        "tied": base,
        "turned": base.T,
        "channels": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "part": torch.randn(1000, 1000)[:1],
        "half": base.half(),
        "step": torch.tensor(3),
        "parameter": torch.nn.Parameter(base + 1),
    }
    save_checkpoint(tensors, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.wrapper == wrapper and checkpoint.not_tensors == ()
    assert_same(checkpoint, {key: tensors[key].detach() for key in checkpoint})
    assert set(checkpoint) == set(tensors)
    assert (tmp_path / name).stat().st_size < 20_000  # a view brings no more than itself
    assert os.listdir(tmp_path) == [name]
    save_checkpoint(checkpoint, tmp_path / name)  # over the file that is mapped
    assert_same(open_checkpoint(tmp_path / name), {key: tensors[key].detach() for key in checkpoint})


def test_a_dtype_that_torch_has_not_is_named(tmp_path):
    header = '{"a": {"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 12]}}'
    assert "F6_E2M3" in refusal(write_header(tmp_path / "a.safetensors", header, bytes(12)))


def test_saved_metadata_comes_back(tmp_path):
    save_checkpoint(WEIGHTS, tmp_path / "a.safetensors", {"origin": "here"})
    assert open_checkpoint(tmp_path / "a.safetensors").metadata == {"origin": "here"}


@pytest.mark.parametrize(
    ("state_dict", "name", "metadata", "said"),
    [
        (WEIGHTS, "a.bin", None, ".safetensors, .ckpt, .pt, .pth"),
        (WEIGHTS, "a", None, ".safetensors, .ckpt, .pt, .pth"),
        (WEIGHTS, "a.ckpt", {"a": "b"}, "metadata"),
        ({}, "a.ckpt", None, "empty"),
        ({"a": 1}, "a.safetensors", None, "'a' maps to a int"),
        ({1: torch.ones(1)}, "a.pt", None, "strings"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path, state_dict, name, metadata, said):
    with pytest.raises(ValueError, match=said):
        save_checkpoint(state_dict, tmp_path / name, metadata)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
def test_a_full_disk_leaves_the_former_file(tmp_path, name):
    save_checkpoint(WEIGHTS, tmp_path / name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save_checkpoint({"a": torch.zeros(100_000)}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [name]
    assert_same(open_checkpoint(tmp_path / name), WEIGHTS)


# What would take minutes or gigabytes


LEGACY_HEAD = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]


@pytest.mark.parametrize("form", ["legacy", "plain pickle", "zip"])
def test_marks_without_end_are_refused_after_a_few(tmp_path, form):
    opcodes, path = b"\x80\x02" + b"(" * 5_000_000, tmp_path / "a.pt"
    if form == "zip":
        write_zip(path, opcodes)
    else:
        head = b"".join(pickle.dumps(each, 2) for each in LEGACY_HEAD)
        path.write_bytes((head if form == "legacy" else b"") + opcodes)
    said = "begins with" if form == "plain pickle" else "deeper containers, than any checkpoint"
    assert said in refusal(path)


def test_opcodes_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_codec.conversion.pickles._MOST_OPCODES", 1000)
    save(tmp_path / "a.pt", {"a": torch.zeros(1), "history": list(range(400))})
    assert list(open_checkpoint(tmp_path / "a.pt")) == ["a"]
    save(tmp_path / "a.pt", {"a": torch.zeros(1), "history": list(range(1000))})
    assert "more opcodes" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["quantized", "nested"])
def test_tensors_of_other_kinds_are_named(tmp_path, kind):
    if kind == "quantized":
        tensor = torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)
    else:
        tensor = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])
    message = refusal(save(tmp_path / "a.pt", {"conv.weight": tensor}))
    assert f"'conv.weight' as a {kind} tensor" in message
