"""A second reader of compressed files, written from FORMAT.md alone: one integer at a time, nothing but Python.

It trusts the file in so far as it asserts what has to hold. Values are dictionaries by (channel, row, column).
"""

import hashlib
import json
import struct
import zlib
from array import array
from math import prod

DTYPES = {
    "BOOL": ("bool", "B"),
    "F32": ("float32", "f"),
    "I8": ("int8", "b"),
    "I32": ("int32", "i"),
    "U16": ("uint16", "H"),
}
"""Of safetensors: the name in a fingerprint, and the code of Python's arrays."""


class Reader:
    """Bytes from their beginning to their end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value


class Sidecar:
    """An entropy model's file: its arrays as flat lists and their shapes."""

    def __init__(self, data: bytes):
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        assert (metadata["format"], metadata["version"]) == ("latent-codec-entropy", "1")
        self.kind, self.space = metadata["kind"], metadata["space_fingerprint"]
        self.lists, self.shapes = {}, {}
        digest = hashlib.sha256(f"{self.kind} {self.space}\n".encode())
        for name, entry in sorted(entries.items()):
            first, end = entry["data_offsets"]
            raw = data[8 + length :][first:end]
            dtype, code = DTYPES[entry["dtype"]]
            self.shapes[name] = tuple(entry["shape"])
            self.lists[name] = list(struct.unpack(f"<{prod(entry['shape'])}{code}", raw))
            digest.update(f"{name} {dtype} {self.shapes[name]}\n".encode() + raw)
        self.fingerprint = digest.digest()[:8]
        self.tables, at = [], 0
        for size in self.lists["sizes"]:
            self.tables.append([*self.lists["starts"][at : at + size], 2**16])
            at += size

    def row(self, name: str, index: int) -> list:
        columns = self.shapes[name][1]
        return self.lists[name][index * columns : (index + 1) * columns]

    def output(self, name: str, row: int, x: list[int]) -> int:
        """Of a row of a layer of a network."""
        weights = self.row(f"{name}.weights", row)
        bias, shift = self.lists[f"{name}.biases"][row], self.lists[f"{name}.shifts"][row]
        assert 127 * sum(map(abs, weights)) + abs(bias) < 2**24 and 0 <= shift <= 30
        return bias + sum(w * each for w, each in zip(weights, x, strict=True)) >> shift

    def outputs(self, name: str, x: list[int]) -> list[int]:
        return [self.output(name, row, x) for row in range(self.shapes[f"{name}.biases"][0])]

    def network(self, number: int, x: list[int]) -> list[int]:
        hidden = x
        for layer in range(2):
            found = self.outputs(f"networks.{number}.{layer}", hidden)
            hidden = [clamp(y, 0, 127) for y in found]
        if f"networks.{number}.2.weights" not in self.shapes:
            return hidden
        return self.outputs(f"networks.{number}.2", hidden + x)


def clamp(a: int, low: int, high: int) -> int:
    return min(max(a, low), high)


def f32(x: float) -> float:
    """Rounded to float32, which for one sum or product of float32 numbers in Python's floats is the same as at once."""
    return array("f", [x])[0]


def phase_of(i: int, j: int) -> int:
    if i % 4 == 0 and j % 4 == 0:
        return 0
    if i % 4 == 2 and j % 4 == 2:
        return 1
    if i % 2 == 0 and j % 2 == 0:
        return 2
    return 3 if i % 2 == 1 and j % 2 == 1 else 4


SIBLINGS = [
    [(-4, 0), (0, -4), (0, 4), (4, 0)],
    [(-4, 0), (0, -4), (0, 4), (4, 0)],
    [(-2, -2), (-2, 2), (2, -2), (2, 2)],
    [(-2, 0), (0, -2), (0, 2), (2, 0)],
    [(-1, -1), (-1, 1), (1, -1), (1, 1)],
]
LAYERS = [0, 1, 1, 2, 3]


def neighbors(i: int, j: int) -> list[tuple[int, int]]:
    offsets = [(y * y + x * x, y, x) for y in range(-7, 8) for x in range(-7, 8)]
    earlier = [
        (i + y, j + x) for _, y, x in sorted(offsets) if phase_of((i + y) % 4, (j + x) % 4) < phase_of(i, j)
    ]
    return earlier[:16]


def inputs(i: int, j: int, is_inside, features, num_features: int, num_before: int) -> list[int]:
    """What a network sees at a position; `features(f, i, j)` is asked for places in the grid alone."""

    def feature(f, place):
        return features(f, *place) if is_inside(*place) else 0

    around = neighbors(i, j)
    own = [(i, j), *((i + y, j + x) for y, x in SIBLINGS[phase_of(i, j)])]
    return [
        *(32 if is_inside(*place) else 0 for place in around),
        *(feature(f, place) for f in range(num_features) for place in around),
        *(feature(f, place) for f in range(num_before) for place in own),
    ]


class Static:
    """Passes as (layer, level, digit or None, places); `predict` gives a place's table and offset."""

    def __init__(self, sidecar: Sidecar, shapes, sides, steps_index: int):
        self.is_indices, self.first = "steps" not in sidecar.lists, steps_index * shapes[0][0]
        self.passes = [(level, level, None, places_of(shape)) for level, shape in enumerate(shapes)]

    def predict(self, number: int, place, values) -> tuple[int, int]:
        return (number if self.is_indices else self.first + place[0]), 0

    def index(self, level: int, value: int) -> int:
        return value


class LatentContext:
    def __init__(self, sidecar: Sidecar, shapes, sides, steps_index: int):
        self.sidecar, self.q = sidecar, steps_index
        ((self.channels, self.height, self.width),) = shapes
        group = sidecar.shapes["networks.1.2.biases"][0] // 2
        self.groups = [(0, 0, self.channels)]
        for phase in range(1, 5):
            for first in range(0, self.channels, group):
                self.groups.append((phase, first, min(group, self.channels - first)))
        self.passes = [
            (LAYERS[p], 0, None, [(first + c, i, j) for c, i, j in places_of((n, *shapes[0][1:]), p)])
            for p, first, n in self.groups
        ]
        self.outputs = {}

    def is_inside(self, i: int, j: int) -> bool:
        return 0 <= i < self.height and 0 <= j < self.width

    def feature(self, values, c: int, i: int, j: int) -> int:
        product = values[0][c, i, j] * self.sidecar.row("feature_multipliers", self.q)[c]
        return clamp(product + 2**15 >> 16, -127, 127)

    def predict(self, number: int, place, values) -> tuple[int, int]:
        c, i, j = place
        phase, first, count = self.groups[number]
        if (number, i, j) not in self.outputs:
            x = []
            if phase:
                x = inputs(i, j, self.is_inside, lambda *at: self.feature(values, *at), self.channels, first)
            self.outputs[number, i, j] = self.sidecar.network(number, x)
        y, of = self.outputs[number, i, j], self.sidecar
        mean = y[c - first] * of.row("mean_multipliers", self.q)[c] + 2**15 >> 16
        offset = mean + 8 >> 4
        fraction = mean + 8 - 16 * offset
        deviation = y[count + c - first] + of.row("deviation_offsets", self.q)[c] >> 1
        deviation = clamp(deviation, 0, len(of.lists["firsts"]) - 1)
        return of.lists["firsts"][deviation] + (fraction >> of.lists["drops"][deviation]), offset

    def index(self, level: int, value: int) -> int:
        return value


class IndexContext:
    def __init__(self, sidecar: Sidecar, shapes, sides, steps_index: int):
        self.sidecar, self.shapes, self.sides = sidecar, shapes, sides
        self.trees, self.firsts, num_codewords = [], [], 0
        leaves = sidecar.lists["leaves"]
        while f"forks.{len(self.trees)}.biases" in sidecar.shapes:
            size = sidecar.shapes[f"forks.{len(self.trees)}.biases"][0] + 1
            self.trees.append(leaves[:size])
            self.firsts.append(num_codewords)
            num_codewords += sum(leaf >= 0 for leaf in leaves[:size])
            leaves = leaves[size:]
        assert not leaves and num_codewords == sidecar.shapes["embeddings"][0]
        self.depths = [len(tree).bit_length() - 1 for tree in self.trees]
        self.passes = [
            (LAYERS[p] if len(self.trees) == 1 else level, level, digit, places_of(shape, p))
            for level, shape in enumerate(shapes)
            for p in range(5)
            for digit in reversed(range(self.depths[level]))
        ]
        self.hidden = {}

    def feature(self, values, level: int, f: int, i: int, j: int) -> int:
        """On later levels the upper level's come first."""
        size = self.sidecar.shapes["embeddings"][1]
        if level and f < size:
            z = self.sides[level - 1] // self.sides[level]
            return self.feature_of_own(values, level - 1, f, i // z, j // z)
        return self.feature_of_own(values, level, f - size * (level > 0), i, j)

    def feature_of_own(self, values, level: int, f: int, i: int, j: int) -> int:
        codeword = self.firsts[level] + self.index(level, values[level][0, i, j])
        return self.sidecar.row("embeddings", codeword)[f]

    def predict(self, number: int, place, values) -> tuple[int, int]:
        _, i, j = place
        _, level, digit, _ = self.passes[number]
        _, height, width = self.shapes[level]
        if (level, i, j) not in self.hidden:

            def is_inside(y, x):
                return 0 <= y < height and 0 <= x < width

            def feature(f, y, x):
                return self.feature(values, level, f, y, x)

            before = self.sidecar.shapes["embeddings"][1] * (level > 0)
            size = self.sidecar.shapes["embeddings"][1] + before
            x = inputs(i, j, is_inside, feature, size, before)
            self.hidden[level, i, j] = self.sidecar.network(5 * level + phase_of(i, j), x)
        above = values[level].get(place, 0) >> digit + 1
        fork = 2 ** (self.depths[level] - 1 - digit) - 1 + above
        logit = self.sidecar.output(f"forks.{level}", fork, self.hidden[level, i, j])
        half = len(self.sidecar.tables) // 2
        return clamp(logit, -half, half) + half, 0

    def index(self, level: int, leaf: int) -> int:
        assert self.trees[level][leaf] >= 0
        return self.trees[level][leaf]


KINDS = {"static": Static, "latent context": LatentContext, "index context": IndexContext}


def places_of(shape, phase: int | None = None) -> list[tuple[int, int, int]]:
    channels, height, width = shape
    grid = [(i, j) for i in range(height) for j in range(width) if phase in (None, phase_of(i, j))]
    return [(c, i, j) for c in range(channels) for i, j in grid]


def read(data: bytes, sidecar: Sidecar | None) -> tuple[list[dict], dict]:
    """The values of each level, and the latents that they stand for, if they are latents."""
    file = Reader(data)
    assert file.take(5) == b"\x8cLCF\1"
    header_length, features = file.varint(), file.varint()
    height, width, num_levels = file.varint(), file.varint(), file.varint()
    levels = [(file.varint(), file.varint()) for _ in range(num_levels)]
    steps_index = 0 if features & 1 else file.varint()
    tile = file.varint() if features & 4 else 10**9
    num_layers = file.varint()
    space = file.take(8)
    if features & 2:
        assert (space.hex(), file.take(8)) == (sidecar.space, sidecar.fingerprint)
    side = levels[0][0]
    rows, columns = -(-height // side), -(-width // side)
    corners = [(i, j) for i in range(0, rows, tile) for j in range(0, columns, tile)]
    listed = [(file.varint(), file.take(4)) for _ in range(num_layers * len(corners))]
    assert zlib.crc32(data[: file.at]).to_bytes(4, "little") == file.take(4)
    assert file.at == header_length
    sections = [file.take(length) for length, _ in listed]
    assert file.at == len(data)
    assert [zlib.crc32(section).to_bytes(4, "little") for section in sections] == [crc for _, crc in listed]

    found, latents = [{} for _ in levels], {}
    for number, (top, left) in enumerate(corners):
        size = min(tile, rows - top), min(tile, columns - left)
        scales = [side // s for s, _ in levels]
        shapes = [
            (1 if features & 1 else count, size[0] * z, size[1] * z) for z, (_, count) in zip(scales, levels)
        ]
        mine = sections[number :: len(corners)]
        if not features & 2:
            parts, its_latents = fixed_length(mine, shapes, levels), {}
        else:
            model = KINDS[sidecar.kind](sidecar, shapes, [s for s, _ in levels], steps_index)
            parts, its_latents = entropy_coded(mine, sidecar, model, steps_index)
        for level, (part, z) in enumerate(zip(parts, scales)):
            found[level] |= {(c, i + top * z, j + left * z): value for (c, i, j), value in part.items()}
        latents |= {(c, i + top, j + left): value for (c, i, j), value in its_latents.items()}
    return found, latents


def fixed_length(sections, shapes, levels) -> list[dict]:
    parts = []
    for section, shape, (_, size) in zip(sections, shapes, levels, strict=True):
        bits = "".join(f"{byte:08b}" for byte in section)
        b, places = (size - 1).bit_length(), places_of(shape)
        parts.append({place: int(bits[k * b : k * b + b], 2) for k, place in enumerate(places)})
        assert not bits[b * len(places) :].strip("0") and max(parts[-1].values()) < size
    return parts


def entropy_coded(sections, sidecar: Sidecar, model, steps_index: int) -> tuple[list[dict], dict]:
    """The values of a tile, and its latents."""
    readers = [Reader(section) for section in sections]
    assert model.passes[-1][0] + 1 == len(sections)
    n, m = readers[0].varint(), readers[0].varint()
    x = [int.from_bytes(readers[0].take(6), "little") for _ in range(n)]
    num_levels = 1 + max(level for _, level, _, _ in model.passes)
    values, latents, returned, done = [{} for _ in range(num_levels)], {}, [], 0
    for number, (layer, level, digit, places) in enumerate(model.passes):
        reader, symbols = readers[layer], []
        for k, place in enumerate(places):
            t, offset = model.predict(number, place, values)
            c = sidecar.tables[t]
            j = k % n if done < m else 0
            slot = x[j] % 65536
            s = next(s for s in range(len(c)) if c[s] <= slot < c[s + 1])
            x[j] = (c[s + 1] - c[s]) * (x[j] // 65536) + slot - c[s]
            if x[j] < 2**32:
                word = returned.pop(0) if returned else int.from_bytes(reader.take(2), "little")
                x[j] = 65536 * x[j] + word
            done += 1
            if done == m:
                assert all(2**32 <= y < 2**33 for y in x[1:])
                returned = [word for y in x[1:] for word in (y // 65536 % 65536, y % 65536)]
            symbols.append((t, offset, s))
        bits, read = "".join(f"{byte:08b}" for byte in reader.data[reader.at :]), 0
        for place, (t, offset, s) in zip(places, symbols):
            minimum, size = sidecar.lists["minimums"][t], sidecar.lists["sizes"][t]
            coded, is_escaped = minimum + s, sidecar.lists["escapes"][t] and s == size - 1
            if is_escaped:
                k = bits.index("1", read + 1) - read - 1
                d = int(bits[read + 1 + k : read + 2 + 2 * k], 2) - 1
                coded = minimum + size - 1 + d if bits[read] == "1" else minimum - 1 - d
                read += 2 + 2 * k
            if digit is None:
                values[level][place] = offset + coded
            else:
                values[level][place] = values[level].get(place, 0) | coded << digit
            if "steps" in sidecar.lists:
                at = sum(sidecar.lists["sizes"][:t]) + s
                shift = 0.0 if is_escaped else sidecar.lists["shifts"][at]
                step = sidecar.row("steps", steps_index)[place[0]]
                latents[place] = f32(f32(f32(offset + coded) + shift) * step)
        assert not bits[read : -(-read // 8) * 8].strip("0")
        reader.take(-(-read // 8))
    assert all(reader.at == len(reader.data) for reader in readers)
    assert x[0] == 2**32 and not returned and done >= m
    indices = [
        {place: model.index(level, v) for place, v in each.items()} for level, each in enumerate(values)
    ]
    return indices, latents
