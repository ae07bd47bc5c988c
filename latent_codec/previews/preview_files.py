"""preview.safetensors: what a codec's folder keeps for previews, and whose it is.

linear.weight (3, C) or, in format 2, (3, C, 3, 3), linear.bias (3,)
palette.mean (3,), palette.LEVEL (codebook_size, 3)     of discrete codecs
tiny.KEY, in half precision                             where one was trained

The metadata's one entry is JSON: format, the codec's name and fingerprint, the pipeline whose latents it shows (null: the
usual ones of the autoencoder's class), and the tiny decoder's config.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.components.codec_folders import find_weights
from latent_codec.conversion.checkpoints import open_checkpoint
from latent_codec.files import replacing
from latent_codec.models.own_weights import check_finite, own_copy
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.previews.palette import Palette
from latent_codec.torch_settings import ignoring_caller_settings, on_meta, plain_state_dict

NAME = "preview.safetensors"
ENTRY = "latent_codec_preview"
FORMAT_VERSIONS = (1, 2)
"""Of 1x1 and of 3x3 maps."""


@dataclass(frozen=True)
class StoredPreview:
    """What preview.safetensors holds."""

    weight: Tensor
    """Of the linear map, (3, C) or (3, C, 3, 3)."""
    bias: Tensor
    palette: Palette | None
    """Of discrete codecs."""
    tiny: TinyDecoder | None


def preview_path(name_or_path: str | os.PathLike) -> Path:
    """The path of a codec's preview, if there is one.

    Raises:
        ValueError: if there is no such codec, or it is a single file of another layout, which has no folder of its own.
    """
    return find_weights(name_or_path, None).parent / NAME


def write_preview(path: Path, codec: LatentCodec, preview: StoredPreview) -> None:
    """Write a codec's preview, complete or not at all."""
    tensors = {"linear.weight": preview.weight, "linear.bias": preview.bias}
    facts = {
        "format": FORMAT_VERSIONS[preview.weight.ndim == 4],
        "codec": codec.name,
        "fingerprint": codec.fingerprint,
        "pipeline": codec.pipeline,
        "tiny": None,
    }
    if preview.palette is not None:
        tensors["palette.mean"] = preview.palette.mean
        tensors |= {f"palette.{level}": table for level, table in enumerate(preview.palette.tables)}
    if preview.tiny is not None:
        tensors |= {f"tiny.{key}": tensor.half() for key, tensor in plain_state_dict(preview.tiny).items()}
        config = preview.tiny.config
        facts["tiny"] = {key: config[key] for key in config if not key.startswith("_")}
    metadata = {ENTRY: json.dumps(facts)}  # one entry, since safetensors writes several in any order
    with replacing(path) as written:
        # not save_file, whose files nobody but their owner can read
        written.write_bytes(save({key: each.cpu().contiguous() for key, each in tensors.items()}, metadata))


@ignoring_caller_settings()
def copy_preview(codec: LatentCodec, to: LatentCodec) -> bool:
    """Write the preview of a codec next to one with the same weights and scale, such as that codec as a pipeline takes it.

    Fingerprints may tell these two apart: a pipeline does not ask for a shift or for statistics per channel, which may be 0 and 1.

    Returns:
        False where `codec` has no preview.

    Raises:
        ValueError: if their weights or latents differ, or the preview is damaged.
    """
    if codec.folder is None or not (codec.folder / NAME).is_file():
        return False
    probe = torch.stack(
        [
            torch.zeros(codec.latent_space.raw_channels, 2, 2),
            torch.ones(codec.latent_space.raw_channels, 2, 2),
        ]
    )
    ours, theirs = (plain_state_dict(each.autoencoder) for each in (codec, to))
    is_alike = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if not is_alike or not torch.equal(codec.latent_space.normalize(probe), to.latent_space.normalize(probe)):
        raise ValueError(
            f"the preview of {codec.name} shows other latents than those of {to.name}: fit one to them"
        )
    write_preview(to.folder / NAME, to, read_preview(codec.folder / NAME, codec))
    return True


@ignoring_caller_settings()
def read_preview(path: Path, codec: LatentCodec) -> StoredPreview:
    """Read the preview of `codec`.

    Raises:
        ValueError: if it was fitted to another or to another pipeline's latents, or is damaged.
    """
    try:
        file = open_checkpoint(path)
        facts = json.loads(file.metadata[ENTRY])
        version, fingerprint = facts["format"], facts["fingerprint"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no preview, or damaged ({error}); `latent-codec fit-preview` writes another"
        ) from error
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise ValueError(f"{path} has format {version}; this version reads {known}: fit it again")
    if fingerprint != codec.fingerprint:
        fitted_to = _latents_of(facts.get("codec"), facts.get("pipeline"))
        raise ValueError(
            f"{path} shows {fitted_to} ({fingerprint}), not {_latents_of(codec.name, codec.pipeline)} "
            f"({codec.fingerprint}); `latent-codec fit-preview` fits one to them"
        )
    try:
        tensors = {}
        for key in file:
            tensors[key] = own_copy(file[key])
            check_finite(tensors[key], key, path)
        shape = 3, codec.latent_space.raw_channels, *[3, 3] * (version == 2)
        return StoredPreview(
            weight=tensors["linear.weight"].view(shape),
            bias=tensors["linear.bias"].view(3),
            palette=_palette(tensors, codec),
            tiny=_tiny(tensors, facts.get("tiny")),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}); `latent-codec fit-preview` writes another") from error


def _latents_of(name: str | None, pipeline: str | None) -> str:
    return f"the latents of {name} in {pipeline or 'its usual latent space'}"


def _palette(tensors: dict[str, Tensor], codec: LatentCodec) -> Palette | None:
    if not codec.is_discrete:
        return None
    tables = [tensors[f"palette.{level}"].view(size, 3) for level, size in enumerate(codec.codebook_sizes)]
    return Palette(tensors["palette.mean"].view(3), tables)


def _tiny(tensors: dict[str, Tensor], config: dict | None) -> TinyDecoder | None:
    if config is None:
        return None
    with on_meta():
        decoder = TinyDecoder(**config)
    weights = {
        key.removeprefix("tiny."): tensor.float()
        for key, tensor in tensors.items()
        if key.startswith("tiny.")
    }
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval()
