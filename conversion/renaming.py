"""Rename tables: a conversion is one table of modules, from which both directions come, and a count of every key.

foreign key --left out by a rule-->  named in the report
     |      --in the table-------->  our key, its tensor perhaps reshaped
     |      --neither------------->  unexpected: an error
our key that nothing gave ---------> missing: an error
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from latent_codec.errors import SettingError
from latent_codec.families import component_class

if TYPE_CHECKING:  # names and shapes are read without torch
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


class Scale(NamedTuple):
    """latents = (raw latents - shift_factor) scaling_factor, and how it is known."""

    scaling_factor: float
    shift_factor: float | None
    rule: str

    def check(self, name: str) -> None:
        """Raise ConversionError, naming the file, for what no codec can be opened with."""
        if not (0 < self.scaling_factor < math.inf and math.isfinite(self.shift_factor or 0)):
            shift = "" if self.shift_factor is None else f", shift_factor {self.shift_factor:g}"
            raise ConversionError(
                f"{name}: expected a finite scaling_factor above 0 and a finite shift_factor, got scaling_factor "
                f"{self.scaling_factor:g}{shift} ({self.rule})"
            )


class ConversionError(ValueError):
    """A checkpoint that cannot be converted with nothing lost."""


class ConversionSettingError(SettingError, ConversionError):
    """A checkpoint that can be converted once a setting of `convert` says what is not in it."""


class Change(Enum):
    """The change of a foreign tensor to ours, and back."""

    NONE = "as it is"
    MATRIX = "a 1x1 convolution's weight (C, D, 1, 1) as a matrix (C, D)"
    TRANSPOSED = "(D, K) as (K, D)"
    STILL = "a convolution's weight (C, D, 1, h, w) over one frame as (C, D, h, w)"
    FIRST_THIRD = "the first C rows of a 1x1 convolution's weight (3 C, D, 1, 1) as a matrix (C, D)"
    SECOND_THIRD = "its middle C rows"
    LAST_THIRD = "its last C rows"

    def to_ours(self, tensor: "Tensor") -> "Tensor":
        if self in THIRDS and tensor.ndim == 4 and tensor.shape[0] % 3 == 0 and tensor.shape[2:] == (1, 1):
            return tensor.chunk(3)[THIRDS.index(self)][:, :, 0, 0]
        if self is Change.MATRIX and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            return tensor[:, :, 0, 0]
        if self is Change.STILL and tensor.ndim == 5 and tensor.shape[2] == 1:
            return tensor[:, :, 0]
        return tensor.T if self is Change.TRANSPOSED and tensor.ndim == 2 else tensor

    def to_foreign(self, tensor: "Tensor") -> "Tensor":
        """The foreign tensor; of a third, its rows, which `join` puts together."""
        if self in (Change.MATRIX, *THIRDS) and tensor.ndim == 2:
            return tensor[:, :, None, None]
        if self is Change.STILL and tensor.ndim == 4:
            return tensor[:, :, None]
        return tensor.T.contiguous() if self is Change.TRANSPOSED else tensor


THIRDS = (Change.FIRST_THIRD, Change.SECOND_THIRD, Change.LAST_THIRD)


def join(parts: "Mapping[Change, Tensor]") -> "Tensor":
    """The foreign tensor of our tensors, by their changes: one, or the three thirds of it."""
    import torch

    rows = [change.to_foreign(parts[change]) for change in Change if change in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class Rename(NamedTuple):
    """A foreign module, or a single tensor, and ours."""

    foreign: str
    ours: str
    change: Change = Change.NONE


def modules(theirs: str, ours: str, names: Mapping[str, str], change: Change = Change.NONE) -> list[Rename]:
    """Rows for the parts of a module, by their names in it and ours."""
    return [Rename(f"{theirs}.{a}", f"{ours}.{b}", change) for a, b in names.items()]


def count_keys(shapes: Shapes, pattern: str, first: int = 0) -> int:
    """How many keys in a row there are, with `first` and the numbers after it in place of the `*` of a pattern."""
    return next(number for number in count() if pattern.replace("*", str(first + number)) not in shapes)


class LeftOut(NamedTuple):
    """Foreign keys that are no part of an autoencoder."""

    pattern: str
    """A regular expression for the beginning of a key."""
    rule: str
    """A description of the keys, for the report."""


class Network(NamedTuple):
    """The network that a checkpoint's names and shapes describe."""

    class_name: str
    config: Mapping

    @property
    def network_class(self) -> "type[nn.Module]":
        return component_class(self.class_name)

    def default(self, key: str, default):
        """An entry of the config, or else its default in the class, or else `default`."""
        if key in self.config:
            return self.config[key]
        parameter = inspect.signature(self.network_class.__init__).parameters.get(key)
        return default if parameter is None else parameter.default

    def on_meta(self) -> "nn.Module":
        """The network without memory for its weights; entries that diffusers adds to a config are passed over."""
        from latent_codec.torch_settings import on_meta

        parameters = inspect.signature(self.network_class.__init__).parameters
        with on_meta():
            return self.network_class(**{key: self.config[key] for key in self.config if key in parameters})


@dataclass(frozen=True, kw_only=True)
class Format:
    """A foreign format: how it is recognized, what it becomes, and the table between the two."""

    names: tuple[str, ...]
    """Values of `to` in `convert` that mean this format."""
    title: str
    class_name: str
    """Of the component that it becomes."""
    anchor: str
    """A key that every checkpoint of the format has, by which the prefix of its keys is found."""
    recognizes: Callable[[Shapes], bool]
    """Whether these keys, without their prefix, are of this format."""
    infer: Callable[[Shapes], dict]
    """The config, from only names and shapes; raises ConversionError for what the class cannot hold."""
    defaults: Callable[[Mapping], dict] = lambda inferred: {}
    """Entries of the config that the original code fixes for a network of the inferred one, unless a config says otherwise."""
    required: tuple[str, ...] = ()
    """Entries that neither shapes nor the original code know for every network."""
    fixed: str | None = None
    """Source of the settings that shapes do not show, where the original code fixes them; None: a config is needed."""
    not_shown: str = "norm_num_groups, act_fn and the scale of its latents"
    """Names of these settings."""
    table: Callable[[Mapping], Sequence[Rename]]
    """All modules of a network of this config."""
    own_keys: str | None = None
    """A regular expression for the beginning of the format's keys, where only a built network gives `table`."""
    left_out: tuple[LeftOut, ...] = ()
    refuses: "Callable[[nn.Module], str | None]" = lambda component: None
    """Reason why a component of the class cannot be written in this format; None if it can."""
    complete: "Callable[[dict[str, Tensor]], dict[str, Tensor]]" = lambda state_dict: state_dict
    """Adds what the original code wants to load and our component does not have."""
    scale: Scale | None = None
    """Of the latents of every model of this format, if one rule holds for all."""
    published_scales: Callable[[Mapping], str] = lambda config: ""
    """Names the scales of published models of a config, where no file has them."""
    twins: "tuple[Format, ...]" = ()
    """The same files for other classes, which have to be asked for."""
    written_prefix: str = ""
    """What the original code wants before every key of a file that it loads."""
    halves: bool = False
    """Whether the original has encoder and decoder in two files, each without the prefix that the table has."""

    @property
    def network_class(self) -> "type[nn.Module]":
        return component_class(self.class_name)

    def holds(self, component: "nn.Module") -> bool:
        """Whether `component` is of the class, or the diffusers class that ours derives from."""
        return isinstance(component, self.network_class) or type(component) in self.network_class.__bases__


@dataclass(frozen=True)
class KeyReport:
    """The place of every key of a checkpoint; foreign keys are as the file has them."""

    mapped: dict[str, dict[Change, str]] = field(default_factory=dict)
    """Foreign key -> our key by the change of its tensor: one, or three where thirds of a tensor have their own."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Foreign key -> the rule that leaves it out."""
    missing: tuple[str, ...] = ()
    """Keys that the format has for this network, and the file has not."""
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    """Sentences: a key, its shape, and the expected one."""

    def counts(self) -> dict[str, int]:
        """Keys mapped, left out by each rule, missing and unexpected."""
        return counts_of(
            len(self.mapped), self.left_out, missing=len(self.missing), unexpected=len(self.unexpected)
        )

    def check(self, name: str) -> None:
        """Raise ConversionError unless every key has its place."""
        faults = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshapen}
        problems = [f"{some(keys)} {fault}" for fault, keys in faults.items() if keys]
        if problems:
            raise ConversionError(f"{name} does not fit: {'; '.join(problems)}. Nothing was converted.")


def as_tuple(value):
    """An entry of a config, lists of a file as the tuples of a class, however deep."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def refuse_others(config: Mapping, original: Mapping) -> str | None:
    """Why an original code, which always has these entries, cannot hold a component of this config; None if it can."""
    for key, expected in original.items():
        value = as_tuple(config.get(key, expected))
        if value != expected:
            return f"its {key} is {value}, and the original code's always {expected}"
    return None


def counts_of(mapped: int, left_out: Mapping[str, str], **others: int) -> dict[str, int]:
    """Count keys: mapped, left out by each rule, and the `others`."""
    counted = Counter(left_out.values())
    return {"mapped": mapped, **{f"left out: {rule}": counted[rule] for rule in sorted(counted)}, **others}


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, the long ones cut, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name if len(name) <= 120 else f"{name[:117]}..." for name in names[:limit]) + rest


def foreign_keys(table: Sequence[Rename], ours: Iterable[str]) -> dict[str, tuple[str, Change]]:
    """Our keys -> foreign key and change, by a table of modules or single tensors."""
    rows = {row.ours: row for row in table}
    found = {}
    for key in ours:
        module, _, leaf = key.rpartition(".")
        if key in rows:
            found[key] = rows[key].foreign, rows[key].change
        elif module in rows:
            found[key] = f"{rows[module].foreign}.{leaf}", rows[module].change
        else:
            raise AssertionError(f"the table lacks {key}")
    return found


def match_keys(
    shapes: Shapes,
    prefix: str,
    table: Sequence[Rename],
    ours: Shapes,
    left_out: Sequence[LeftOut],
    rule_outside: Callable[[str], str | None] = lambda key: None,
) -> KeyReport:
    """Find the place of every foreign key, and every key that is missing.

    Args:
        shapes: of the whole checkpoint.
        prefix: of the autoencoder's keys in it; others are the rest of a whole model.
        table, left_out: of the format, without the prefix.
        ours: shapes of the network's tensors.
        rule_outside: the rule that leaves a key out, if it is of something else in the file.
    """
    import torch

    expected: dict[str, dict[Change, str]] = {}
    for key, (theirs, change) in foreign_keys(table, ours).items():
        expected.setdefault(f"{prefix}{theirs}", {})[change] = key
    dropped, unexpected = other_keys(shapes, prefix, expected, left_out, rule_outside)
    mapped, misshapen = {}, []
    for key in (key for key in shapes if key in expected):
        parts = mapped[key] = expected[key]
        found = torch.empty(shapes[key], device="meta")
        if any(change.to_ours(found).shape != ours[our_key] for change, our_key in parts.items()):
            wanted = join(
                {change: torch.empty(ours[our_key], device="meta") for change, our_key in parts.items()}
            )
            misshapen.append(f"{key} {tuple(shapes[key])} instead of {tuple(wanted.shape)}")
    missing = tuple(sorted(set(expected) - set(shapes)))
    return KeyReport(mapped, dropped, missing, unexpected, tuple(misshapen))


def other_keys(
    shapes: Shapes,
    prefix: str,
    taken: Container[str],
    left_out: Sequence[LeftOut],
    rule_outside: Callable[[str], str | None] = lambda key: None,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Of the keys that are not `taken`: those left out, with the rule; and the unexpected ones.

    Args:
        shapes, prefix, left_out, rule_outside: as `match_keys` takes them.
    """
    dropped, unexpected = {}, []
    for key in shapes:
        if key in taken:
            continue
        inner = key.removeprefix(prefix)
        rule = next((each.rule for each in left_out if re.match(each.pattern, inner)), None)
        if rule is not None or (rule := rule_outside(key)) is not None:
            dropped[key] = rule
        elif not key.startswith(prefix):
            dropped[key] = f"outside {prefix}*, the rest of a whole model"
        else:
            unexpected.append(key)
    return dropped, tuple(sorted(unexpected))
