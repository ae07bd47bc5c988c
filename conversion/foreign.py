"""Foreign checkpoints become diffusers components, and components foreign state dicts, with every key accounted for.

file(s) --open_checkpoint--> tensors --read_foreign--> format, config, report of keys, scale
                                                           |
state dict <----------from_diffusers---------- component <-+
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor

from latent_codec.conversion import diffusers_files, ldm_kl, taef2, taesd, taming_vq, vq_vae_2
from latent_codec.conversion.checkpoints import Checkpoint, open_checkpoint
from latent_codec.conversion.renaming import (
    ConversionError,
    Format,
    KeyReport,
    Network,
    Scale,
    Shapes,
    foreign_keys,
    match_keys,
    some,
)
from latent_codec.conversion.scales import known_scale
from latent_codec.models.own_weights import own_copy
from latent_codec.torch_settings import plain_state_dict

FORMATS: tuple[Format, ...] = (
    ldm_kl.FORMAT,
    taming_vq.FORMAT,
    vq_vae_2.FORMAT,
    taesd.FORMAT,
    taef2.FORMAT,
    diffusers_files.KL,
    diffusers_files.OLD_KL,
    diffusers_files.VQ,
    taesd.DIFFUSERS,
    taef2.DIFFUSERS,
)
PREFIXES = ("", "first_stage_model.", "vae.")
"""Where whole models keep their autoencoder."""


@dataclass(frozen=True)
class Foreign:
    """A recognised checkpoint, its weights not yet read."""

    name: str
    tensors: Mapping[str, Tensor]
    format: Format
    prefix: str
    network: Network
    keys: KeyReport
    scale: Scale | None
    """None where nothing says it: the caller asks or calibrates."""
    wrapper: str | None = None
    """The entry of the file that holds the state dict, in Lightning's files."""

    def tensor(self, foreign_key: str) -> Tensor:
        """One tensor as our component has it."""
        _, change = self.keys.mapped[foreign_key]
        return change.to_ours(self.tensors[foreign_key])

    def component(self, dtype: torch.dtype | None = None) -> ModelMixin:
        """The diffusers component, its scale set where known; `dtype` None keeps the file's.

        Raises:
            ConversionError: if a key is missing, unexpected or of another shape.
        """
        self.keys.check(self.name)
        state = {}
        for foreign_key, (ours, _) in self.keys.mapped.items():
            tensor = self.tensor(foreign_key)
            state[ours] = own_copy(tensor, dtype if tensor.is_floating_point() else None)
        component = self.network.on_meta()
        component.load_state_dict(state, assign=True)
        component.requires_grad_(True)
        component.eval()
        if self.scale is not None:
            scale = {"scaling_factor": self.scale.scaling_factor, "shift_factor": self.scale.shift_factor}
            given = {
                key: value for key, value in scale.items() if value is not None and key in component.config
            }
            component.register_to_config(**given)
        return component


def read_foreign(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Foreign:
    """Recognise a checkpoint by its names and shapes: one file, or the two that hold encoder and decoder.

    Raises:
        ConversionError: if nothing known is in it, or two autoencoders are.
        ValueError: if a file is damaged or would run code.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    opened = [open_checkpoint(path) for path in paths]
    name = " and ".join(Path(path).name for path in paths)
    if len(opened) > 2:
        raise ConversionError(
            f"{len(opened)} files came; an autoencoder is one file, or an encoder and a decoder."
        )
    tensors = opened[0] if len(opened) == 1 else Halves(opened)
    return recognize(tensors, shapes_of(tensors), name, opened[0].metadata, opened[0].wrapper)


def recognize(
    tensors: Mapping[str, Tensor],
    shapes: Shapes,
    name: str = "the state dict",
    metadata: Mapping[str, str] | None = None,
    wrapper: str | None = None,
) -> Foreign:
    """`read_foreign` for tensors that are at hand."""
    format, prefix = detect(shapes, name)
    inner = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    try:
        network = Network(format.network_class, format.infer(inner))
        ours = {key: tensor.shape for key, tensor in network.on_meta().state_dict().items()}
    except (ValueError, IndexError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error) if isinstance(error, ConversionError) else f"its shapes make no network: {error}"
        raise ConversionError(f"{name} is a {format.title}, but {reason}") from error
    report = match_keys(shapes, prefix, format.table(network.config), ours, format.left_out)
    kl_channels = network.config["latent_channels"] if format.network_class is AutoencoderKL else None
    scale = known_scale(shapes, tensors, metadata or {}, kl_channels) or format.scale
    return Foreign(name, tensors, format, prefix, network, report, scale, wrapper)


def detect(shapes: Shapes, name: str = "the state dict") -> tuple[Format, str]:
    """The format of a state dict, and the prefix of the autoencoder's keys in it.

    Raises:
        ConversionError: if it is none of the known ones, or two autoencoders are in it.
    """
    found = []
    for prefix in PREFIXES:
        inner = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        found += [(each, prefix) for each in FORMATS if each.recognizes(inner)]
    if len(found) > 1:
        both = " and ".join(f"a {each.title} under {prefix or 'no prefix'}" for each, prefix in found)
        raise ConversionError(
            f"{name} holds two autoencoders, {both}; save the one you mean to a file of its own."
        )
    if not found:
        side = side_of(shapes)
        if side is not None:
            other = "decoder" if side == "encoder" else "encoder"
            raise ConversionError(f"{name} is the {side} of a tiny autoencoder; give the {other}'s file too.")
        known = ", ".join(dict.fromkeys(each.title for each in FORMATS))
        raise ConversionError(
            f"{name} holds no autoencoder that is known here: its keys are {some(list(shapes))}. Known are: {known}."
        )
    return found[0]


def to_diffusers(state_dict: Mapping[str, Tensor]) -> ModelMixin:
    """The component that a foreign state dict holds; scaling_factor stays the class's default where unknown.

    Raises:
        ConversionError: as `recognize`, and if a key is missing, unexpected or of another shape.
    """
    return recognize(state_dict, shapes_of(state_dict)).component()


def from_diffusers(component: ModelMixin, name: str) -> dict[str, Tensor]:
    """A component's state dict in the format that `--to` calls `name`; tensors share memory where they can.

    Raises:
        ConversionError: if the format cannot hold it, with the reason.
    """
    format = find_format(component, name)
    reason = format.refuses(component)
    if reason is not None:
        raise ConversionError(f"this {type(component).__name__} cannot be written as {name}: {reason}.")
    state = plain_state_dict(component)
    names = foreign_keys(format.table(component.config), state)
    return format.complete({theirs: change.to_foreign(state[key]) for key, (theirs, change) in names.items()})


def find_format(component: ModelMixin, name: str) -> Format:
    """The format that `--to` calls `name`, for a component of this class."""
    possible = [each for each in FORMATS if each.holds(component)]
    fitting = [each for each in possible if name in each.names]
    if not fitting:
        names = sorted({known for each in possible for known in each.names}) or ["nothing"]
        raise ConversionError(
            f"{type(component).__name__} cannot be written as {name}; it can be as {', '.join(names)}."
        )
    return fitting[0]


class Halves(Mapping):
    """The two files of a tiny autoencoder as one, `encoder.` and `decoder.` before the keys.

    Raises:
        ConversionError: if they are not an encoder, whose first layer is a convolution, and a decoder, whose first layer
            has no weights.
    """

    def __init__(self, opened: Sequence[Checkpoint]):
        self.parts = {side_of(each.shapes): each for each in opened}
        if set(self.parts) != {"encoder", "decoder"}:
            names = " and ".join(each.path.name for each in opened)
            raise ConversionError(
                f"{names} are not the encoder and the decoder of a tiny autoencoder; only those come as two files."
            )
        self.shapes = {
            f"{side}.{key}": shape
            for side in ("encoder", "decoder")
            for key, shape in self.parts[side].shapes.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        side, _, inner = key.partition(".")
        return self.parts[side][inner]

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def side_of(shapes: Shapes) -> str | None:
    """Which half of a tiny autoencoder a state dict is: layers are numbered, and the decoder's layer 0 is its clamp."""
    if not all(key.partition(".")[0].isdigit() for key in shapes):
        return None
    return "encoder" if "0.weight" in shapes else "decoder" if "1.weight" in shapes else None


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Shapes by key, without reading weights where they come from files."""
    if isinstance(tensors, (Checkpoint, Halves)):
        return tensors.shapes
    return {key: tensor.shape for key, tensor in tensors.items()}
