"""Foreign checkpoints become diffusers components, and components foreign state dicts, with every key accounted for.

file(s) --open_entries--> tensors --find_places--> autoencoders by prefix --choose--> one --recognize--> format, config,
                                                                                                            report, scale
state dict <----------from_diffusers---------- component <----------------------------------------------------+
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from latent_codec.conversion import (
    dc_ae,
    diffusers_files,
    flux2,
    hunyuan_image,
    ldm_kl,
    taef2,
    taehv,
    taesd,
    taming_vq,
    vq_vae_2,
    wan,
)
from latent_codec.conversion.checkpoints import Checkpoint, open_entries
from latent_codec.conversion.other_families import OTHER_FAMILIES
from latent_codec.conversion.renaming import (
    ConversionError,
    ConversionSettingError,
    Format,
    KeyReport,
    Network,
    Scale,
    Shapes,
    counts_of,
    foreign_keys,
    join,
    match_keys,
    other_keys,
    some,
)
from latent_codec.conversion.scales import known_scale
from latent_codec.conversion.settings import Settings, combine, scale_of_config, settings_of_files, settle

if TYPE_CHECKING:  # what a file holds is recognized without torch, and without building a network
    import torch
    from torch import Tensor, nn

FORMATS: tuple[Format, ...] = (  # the first that recognizes a file has it: some borrow the names of others
    flux2.FORMAT,
    flux2.COMFY,
    flux2.DIFFUSERS,
    hunyuan_image.FORMAT,
    hunyuan_image.COMFY,
    hunyuan_image.DIFFUSERS,
    wan.WAN_2_1,
    wan.WAN_2_2,
    wan.QWEN_IMAGE,
    wan.DIFFUSERS,
    wan.QWEN_IMAGE_DIFFUSERS,
    dc_ae.FORMAT,
    dc_ae.DIFFUSERS,
    taehv.FORMAT,
    ldm_kl.FORMAT,
    taming_vq.FORMAT,
    vq_vae_2.FORMAT,
    taesd.FORMAT,
    taef2.FORMAT,
    diffusers_files.KL,
    diffusers_files.OLD_KL,
    diffusers_files.VQ,
    diffusers_files.HIERARCHICAL,
    taesd.DIFFUSERS,
    taef2.DIFFUSERS,
)
_MOST_PLACES = 16
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow)(?![a-z])", re.IGNORECASE)
"""In the names of what holds moving averages of weights."""


class Place(NamedTuple):
    """The position of an autoencoder in a state dict: a prefix, and the format of its keys."""

    prefix: str
    """Of the keys, with its last point; empty at the top level."""
    format: Format

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(self.prefix) is not None


@dataclass(frozen=True)
class Foreign:
    """A recognized checkpoint, its weights not yet read."""

    name: str
    tensors: "Mapping[str, Tensor]"
    shapes: Shapes
    place: Place
    network: Network
    scale: Scale | None
    """None where nothing says it: the caller asks or calibrates."""
    wrapper: str | None = None
    """The entry of the file that holds all its tensors, such as Lightning's state_dict."""
    settings: str = ""
    """Source of the settings that shapes do not show (groups of norms, activation)."""
    others: tuple[Place, ...] = ()
    """Autoencoders in the file that were not taken."""

    @property
    def format(self) -> Format:
        return self.place.format

    @property
    def prefix(self) -> str:
        return self.place.prefix

    @property
    def averages(self) -> tuple[str, ...]:
        """Prefixes of averaged weights of the same autoencoder, which were not taken."""
        return tuple(each.prefix for each in self.others if each.is_averaged and not self.place.is_averaged)

    @cached_property
    def keys(self) -> KeyReport:
        """The place of every key, found by building the network without memory for its weights.

        Raises:
            ConversionError: if its config makes no network.
        """
        try:
            ours = {key: tensor.shape for key, tensor in self.network.on_meta().state_dict().items()}
            table = self.format.table(self.network.config)
        except Exception as error:  # of diffusers, which checks no entry of a config
            raise ConversionError(
                f"{self.name} is a {self.format.title}, but its config makes no network: {error}"
            ) from error
        expected = [self.prefix + theirs for theirs, _ in foreign_keys(table, ours).values()]
        rule = self._rule_outside(expected)
        return match_keys(self.shapes, self.prefix, table, ours, self.format.left_out, rule)

    def count_keys_by_name(self) -> dict[str, int]:
        """`keys.counts()` without a network: keys of the format's modules count as mapped, and none as missing."""
        own_keys, left_out = self.format.own_keys, self.format.left_out
        modules = set() if own_keys else {row.foreign for row in self.format.table(self.network.config)}
        named = set()
        for inner in under(self.shapes, self.prefix):
            if any(re.match(each.pattern, inner) for each in left_out):
                continue
            if re.match(own_keys, inner) if own_keys else modules & {inner, inner.rpartition(".")[0]}:
                named.add(self.prefix + inner)
        dropped, unexpected = other_keys(self.shapes, self.prefix, named, left_out, self._rule_outside(named))
        return counts_of(len(named), dropped, unexpected=len(unexpected))

    def _rule_outside(self, own: Iterable[str]) -> Callable[[str], str | None]:
        """The rule that leaves a key out which is of something else in the file; None for other keys.

        Args:
            own: keys of the autoencoder.
        """
        entries = getattr(self.tensors, "entries", {})
        homes = {entries[key] for key in own if key in entries}
        regions = [(each.prefix, _rule(each, self.place, self.tensors, self.shapes)) for each in self.others]

        def rule_outside(key: str) -> str | None:
            for prefix, region_rule in regions:
                if key.startswith(prefix) and not self.prefix.startswith(prefix):
                    return region_rule
            return None if entries.get(key, "") in homes or not homes else _other_entry(entries[key], homes)

        return rule_outside

    def tensors_of(self, foreign_key: str) -> "dict[str, Tensor]":
        """A tensor of the file as our component has it: by our key, or by three of them."""
        tensor = self.tensors[foreign_key]
        return {ours: change.to_ours(tensor) for change, ours in self.keys.mapped[foreign_key].items()}

    def component(self, dtype: "torch.dtype | None" = None) -> "nn.Module":
        """The diffusers component, its scale set where known; `dtype` None keeps the file's.

        Raises:
            ConversionError: if a key is missing, unexpected or of another shape, or if a weight is an integer, NaN or
                infinite, or too large for `dtype`; or for a scale that no codec can have.
        """
        from latent_codec.models.own_weights import own_copy

        self.keys.check(self.name)
        component = self.network.on_meta()
        expected = component.state_dict()
        state = {}
        for foreign_key in self.keys.mapped:
            for ours, tensor in self.tensors_of(foreign_key).items():
                if expected[ours].is_floating_point():
                    tensor = cast_weight(tensor, dtype, foreign_key, self.name)
                state[ours] = own_copy(tensor)
        component.load_state_dict(state, assign=True)
        component.requires_grad_(True)
        component.eval()
        if self.scale is not None:
            self.scale.check(self.name)
            scale = {"scaling_factor": self.scale.scaling_factor, "shift_factor": self.scale.shift_factor}
            given = {
                key: value for key, value in scale.items() if value is not None and key in component.config
            }
            component.register_to_config(**given)
        return component


def cast_weight(tensor: "Tensor", dtype: "torch.dtype | None", key: str, name: str) -> "Tensor":
    """A weight in another dtype; None keeps its own.

    Raises:
        ValueError: if it is not of a floating-point dtype, is NaN or infinite, or overflows `dtype`.
    """
    from latent_codec.models.own_weights import check_finite

    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ConversionError(f"{name}: {key} is of dtype {kind}, expected floating-point weights")
    check_finite(tensor, key, name)
    if dtype is None:
        return tensor
    cast = tensor.to(dtype)
    check_finite(cast, key, name, stored=tensor.dtype)
    return cast


def read_foreign(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    entry: str | None = None,
    settings: Settings | None = None,
    class_name: str | None = None,
) -> Foreign:
    """Recognize a checkpoint by its names and shapes: one file, or the two that hold encoder and decoder.

    Of one file that holds half of a tiny autoencoder (`taesd_encoder.pth`), the other half is read from the file next to it whose name
    has "decoder" for "encoder", or the other way round.

    Args:
        entry: the prefix of the autoencoder's keys, names of dicts in the file included, such as "ema" or
            "state_dict.first_stage_model"; None: the only one, or the one that is no moving average.
        settings: a diffusers config, or a part of one; None: the one in the file's metadata or next to it.
        class_name: of the component, where one file fits several classes; None: the one of `settings`, or the usual one.

    Raises:
        ConversionError: if nothing known is in it, or several autoencoders are, or if nothing says the settings that
            its weights do not show, or if it is not of `class_name`.
        ValueError: if a file is damaged or would run code.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if len(paths) > 2:
        raise ConversionError(f"expected one file, or an encoder's and a decoder's, got {len(paths)} files")
    opened = [open_entries(path) for path in paths]
    if len(paths) == 1 and (other := _other_half(Path(paths[0]), opened[0])):
        paths, opened = [paths[0], other], [opened[0], open_entries(other)]
    name = " and ".join(Path(path).name for path in paths)
    if settings is None or "_class_name" not in settings.config:
        settings = combine(settings, settings_of_files(opened))
    checkpoint = opened[0] if len(opened) == 1 else _joined(opened)
    return recognize(checkpoint, name, entry, settings, class_name)


def _other_half(path: Path, checkpoint: Checkpoint) -> Path | None:
    """The file of the other half of a tiny autoencoder, next to the one at `path`; None if it is none or alone."""
    side = side_of(checkpoint.shapes)
    if side is None:
        return None
    other = path.with_name(path.name.replace(side, "decoder" if side == "encoder" else "encoder"))
    return other if other != path and other.is_file() else None


def recognize(
    tensors: "Mapping[str, Tensor]",
    name: str = "the state dict",
    entry: str | None = None,
    settings: Settings | None = None,
    class_name: str | None = None,
) -> Foreign:
    """`read_foreign` for tensors that are at hand."""
    shapes = shapes_of(tensors)
    wrapper, metadata = getattr(tensors, "wrapper", None), getattr(tensors, "metadata", {})
    chosen, others = choose(find_places(shapes, name), tensors, shapes, name, entry, wrapper)
    chosen = _of_class(chosen, name, class_name, settings)
    class_name, config, rule = settle(name, chosen.format, _inferred(chosen, shapes, name), settings)
    network = Network(class_name, config)
    kl_channels = config["latent_channels"] if class_name == "AutoencoderKL" else None
    scale = (
        scale_of_config(network, settings)
        or known_scale(shapes, tensors, metadata, kl_channels, name)
        or chosen.format.scale
    )
    return Foreign(name, tensors, shapes, chosen, network, scale, wrapper, rule, tuple(others))


def find_places(shapes: Shapes, name: str = "the state dict") -> list[Place]:
    """Every autoencoder of a known format in a state dict, under whatever prefix.

    Raises:
        ConversionError: if there is none, with the name of what is there instead where it is known.
    """
    anchors = tuple({*(each.anchor for each in FORMATS), *OTHER_FAMILIES})
    prefixes = {}
    for key in shapes:
        if key.endswith(anchors):
            found = (key.removesuffix(anchor) for anchor in anchors if key.endswith(anchor))
            prefixes |= {prefix: None for prefix in found if not prefix or prefix.endswith(".")}
    if len(prefixes) > _MOST_PLACES:
        raise ConversionError(
            f"{name} has {len(prefixes)} parts that look like autoencoders; save only one of them"
        )
    places, others = [], []
    for prefix in prefixes:
        inner = under(shapes, prefix)
        other = [title for anchor, title in OTHER_FAMILIES.items() if anchor in inner]
        others += other[:1]
        if not other:
            places += [Place(prefix, each) for each in FORMATS if each.recognizes(inner)][:1]
    if places:
        return places
    if others:
        raise ConversionError(f"{name} holds {others[0]}, which is not supported yet; nothing was converted")
    side = side_of(shapes)
    if side is not None:
        other = "decoder" if side == "encoder" else "encoder"
        raise ConversionError(f"{name} is the {side} of a tiny autoencoder; give the {other}'s file too")
    known = ", ".join(dict.fromkeys(each.title for each in FORMATS))
    raise ConversionError(
        f"{name} holds no autoencoder that is known here: its keys are {some(list(shapes))}. Known are: {known}"
    )


def choose(
    places: Sequence[Place],
    tensors: "Mapping[str, Tensor]",
    shapes: Shapes,
    name: str = "the state dict",
    entry: str | None = None,
    wrapper: str | None = None,
) -> tuple[Place, list[Place]]:
    """The autoencoder that `entry` names, or the only one but for moving averages and copies; and the others.

    Raises:
        ConversionError: if `entry` names none, or several that differ are left.
    """
    if len(places) > 1:  # of which some may look like an autoencoder by only a few keys
        places = [each for each in places if _is_whole(each, shapes)] or places
    candidates = places
    if entry is not None:
        candidates = [each for each in places if _is_in(entry.strip("."), each.prefix, wrapper)]
        if not candidates:
            raise ConversionError(f"{name} has no autoencoder in {entry!r}; it has {_listed(places)}")
    candidates = [each for each in candidates if not each.is_averaged] or candidates
    first, *rest = candidates
    if not all(_are_twins(first, each, tensors, shapes) for each in rest):
        count = {2: "two"}.get(len(candidates), str(len(candidates)))
        raise ConversionSettingError(
            "entry",
            f"the name of one autoencoder, as {name} holds {count} autoencoders, {_listed(candidates)}",
            advice="convert one of them with `entry=NAME`",
        )
    return first, [each for each in places if each is not first]


def _listed(places: Sequence[Place]) -> str:
    return " and ".join(
        f"a {each.format.title} under {each.prefix.rstrip('.') or 'no prefix'}" for each in places
    )


def _is_in(entry: str, prefix: str, wrapper: str | None) -> bool:
    """Whether a prefix is what `entry` names, or in it."""
    names = (prefix, f"{wrapper}.{prefix}") if wrapper else (prefix,)
    return any(each == entry or (entry and each.startswith(f"{entry}.")) for each in names)


def _of_class(place: Place, name: str, asked: str | None, settings: Settings | None) -> Place:
    """The place in the format of the class that is asked for, or else that a config names."""
    formats = {each.class_name: each for each in (place.format, *place.format.twins)}
    if asked is not None and asked not in formats:
        expected = f"{' or '.join(formats)}, as {name} is a {place.format.title}"
        raise ConversionSettingError("class_name", expected, asked)
    class_name = asked or (settings.config.get("_class_name") if settings else None)
    return Place(place.prefix, formats.get(class_name, place.format))


def _inferred(place: Place, shapes: Shapes, name: str) -> dict:
    """The config that names and shapes show."""
    try:
        return place.format.infer(under(shapes, place.prefix))
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError) as error:
        reason = str(error) if isinstance(error, ConversionError) else f"its shapes make no network: {error}"
        raise ConversionError(f"{name} is a {place.format.title}, but {reason}") from error


def _keys_of(place: Place, shapes: Shapes) -> list[str]:
    """The keys, without prefix, of an autoencoder of the shapes that are there."""
    config = _inferred(place, shapes, "it")
    config.setdefault("norm_num_groups", 1)  # which names no key
    ours = Network(place.format.class_name, config).on_meta().state_dict()
    return [theirs for theirs, _ in foreign_keys(place.format.table(config), ours).values()]


def _is_whole(place: Place, shapes: Shapes) -> bool:
    try:
        return all(place.prefix + key in shapes for key in _keys_of(place, shapes))
    except Exception:  # of what shapes make no network
        return False


def _are_twins(one: Place, other: Place, tensors: "Mapping[str, Tensor]", shapes: Shapes) -> bool:
    """Whether two places hold the same weights to the bit."""
    if one.format is not other.format or not (_is_whole(one, shapes) and _is_whole(other, shapes)):
        return False
    keys = _keys_of(one, shapes)
    return keys == _keys_of(other, shapes) and all(
        same_bits(tensors[one.prefix + key], tensors[other.prefix + key]) for key in keys
    )


def same_bits(one: "Tensor", other: "Tensor") -> bool:
    """Whether two tensors are of one dtype and shape, and equal to the bit, NaN included."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(one, other)


def _rule(place: Place, chosen: Place, tensors: "Mapping[str, Tensor]", shapes: Shapes) -> str:
    """Rule that leaves out an autoencoder which is not the chosen one."""
    if _are_twins(chosen, place, tensors, shapes):
        return f"{place.prefix}*, the same weights once more"
    kind = "averaged weights of the autoencoder" if place.is_averaged else "another autoencoder"
    return f"{place.prefix}*, {kind}"


def _other_entry(entry: str, homes: set[str]) -> str:
    """The rule for keys of an entry: the outermost one that holds nothing of the autoencoder."""
    parts = entry.split(".") if entry else []
    for count in range(1, len(parts) + 1):
        outer = ".".join(parts[:count])
        if not any(f"{home}.".startswith(f"{outer}.") for home in homes):
            return f"{outer}.*, another entry of the file"
    return "tensors next to the autoencoder's entry"


def under(shapes: Shapes, prefix: str) -> Shapes:
    """The shapes of keys that begin with a prefix, without it."""
    if not prefix:
        return shapes
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def detect(shapes: Shapes, name: str = "the state dict") -> tuple[Format, str]:
    """The format of the only autoencoder in a state dict, and the prefix of its keys.

    Raises:
        ConversionError: if it is none of the known ones, or several autoencoders are in it.
    """
    places = find_places(shapes, name)
    if len(places) > 1:
        raise ConversionError(f"{name} holds {len(places)} autoencoders, {_listed(places)}")
    return places[0].format, places[0].prefix


def to_diffusers(state_dict: "Mapping[str, Tensor]", config: Mapping | None = None) -> "nn.Module":
    """The component that a foreign state dict holds; scaling_factor stays the class's default where unknown.

    Args:
        config: of a diffusers model, for what weights in its own key layout do not show.

    Raises:
        ConversionError: as `recognize`, and if a key is missing, unexpected or of another shape.
    """
    settings = None if config is None else Settings(config, "the given config")
    return recognize(state_dict, settings=settings).component()


def from_diffusers(component: "nn.Module", name: str) -> "dict[str, Tensor]":
    """A component's state dict in the format called `name` (`Format.names`); tensors share memory where they can.

    Raises:
        ConversionError: if the format cannot hold it, with the reason.
    """
    format = find_format(component, name)
    reason = format.refuses(component)
    if reason is not None:
        raise ConversionError(f"this {type(component).__name__} cannot be written as {name}: {reason}.")
    from latent_codec.torch_settings import plain_state_dict

    state = plain_state_dict(component)
    names = foreign_keys(format.table(component.config), state)
    parts: dict[str, dict] = {}
    for key, (theirs, change) in names.items():
        parts.setdefault(format.written_prefix + theirs, {})[change] = state[key]
    return format.complete({theirs: join(tensors) for theirs, tensors in parts.items()})


def find_format(component: "nn.Module", name: str) -> Format:
    """The format called `name` that holds components of this class."""
    possible = [each for each in FORMATS if each.holds(component)]
    fitting = [each for each in possible if name in each.names]
    if not fitting:
        names = sorted({known for each in possible for known in each.names}) or ["nothing"]
        raise ConversionError(
            f"{type(component).__name__} cannot be written as {name}; it can be as {', '.join(names)}."
        )
    return next((each for each in fitting if each.refuses(component) is None), fitting[0])


def _joined(opened: Sequence[Checkpoint]) -> Checkpoint:
    """The two files of a tiny autoencoder as one, `encoder.` and `decoder.` before the keys.

    Raises:
        ConversionError: if they are not an encoder, whose first layer is a convolution, and a decoder, whose first layer
            has no weights.
    """
    parts = {side_of(each.shapes): each for each in opened}
    if set(parts) != {"encoder", "decoder"}:
        names = " and ".join(each.path.name for each in opened)
        raise ConversionError(
            f"{names} are not the encoder and the decoder of a tiny autoencoder; only those come as two files."
        )
    places = {}
    for side in ("encoder", "decoder"):
        part, prefix = parts[side], common_prefix(parts[side])
        places |= {f"{side}.{key.removeprefix(prefix)}": (part, key) for key in part}
    return replace(
        opened[0],
        shapes={key: part.shapes[inner] for key, (part, inner) in places.items()},
        dtype_names={key: part.dtype_names[inner] for key, (part, inner) in places.items()},
        entries={},
        _read=lambda key: places[key][0][places[key][1]],
    )


def side_of(shapes: Shapes) -> str | None:
    """Name the half of a tiny autoencoder that a state dict holds: layers are numbered, and the decoder's layer 0 is its clamp."""
    prefix = common_prefix(shapes)
    if not all(key.removeprefix(prefix).partition(".")[0].isdigit() for key in shapes):
        return None
    return (
        "encoder" if f"{prefix}0.weight" in shapes else "decoder" if f"{prefix}1.weight" in shapes else None
    )


def common_prefix(keys: Iterable[str]) -> str:
    """The names that all keys begin with before the number of a layer, such as "module."."""
    keys = list(keys)
    first, last = (min(keys).split("."), max(keys).split(".")) if keys else ([], [])
    shared = takewhile(lambda pair: pair[0] == pair[1] and not pair[0].isdigit(), zip(first[:-1], last[:-1]))
    return "".join(f"{name}." for name, _ in shared)


def shapes_of(tensors: "Mapping[str, Tensor]") -> Shapes:
    """Shapes by key, without reading weights where they come from files."""
    if isinstance(tensors, Checkpoint):
        return tensors.shapes
    return {key: tensor.shape for key, tensor in tensors.items()}
