"""The yaml next to a latent-diffusion or taming-transformers checkpoint, compared with what the weights say."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from latent_codec.conversion.encoder_decoder import FIXED, NORM_GROUPS
from latent_codec.conversion.renaming import ConversionError, Scale
from latent_codec.conversion.settings import Settings, read_config_file

MAX_BYTES = 1 << 17
SETTINGS = Settings({"norm_num_groups": NORM_GROUPS}, FIXED)
"""Of whatever such a yaml describes."""


def read_config(path: str | os.PathLike) -> dict:
    """The part of a yaml file that describes an autoencoder: ddconfig, embed_dim, n_embed, and the model's scale_factor.

    Raises:
        ConversionError: if it is no yaml of this kind.
        OSError: if it cannot be read.
    """
    path = Path(path)
    text = read_config_file(path, MAX_BYTES)
    try:
        content = yaml.safe_load(text.decode())
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:  # by the damage
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(f"{path} is no yaml: {reason}") from error
    mappings = list(_mappings(content))
    found = [each for each in mappings if isinstance(each.get("ddconfig"), Mapping)]
    if len(found) != 1:
        raise ConversionError(
            f"{path} describes {len(found)} autoencoders (a mapping with ddconfig, or a config.json of diffusers); give one"
        )
    scales = [each["scale_factor"] for each in mappings if "scale_factor" in each]
    if scales and (type(scales[0]) not in (int, float) or not math.isfinite(scales[0])):
        raise ConversionError(
            f"{path} has the scale_factor {str(scales[0])[:40]!r}, expected a finite number"
        )
    return {**found[0], **({"scale_factor": scales[0]} if scales else {})}


def _mappings(content: object) -> Iterator[Mapping]:
    """Every mapping in a yaml's tree, once: by its aliases a short yaml can repeat them without end."""
    seen, waiting = set(), [content]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (Mapping, list)) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Mapping):
            yield node
        waiting += reversed(list(node.values()) if isinstance(node, Mapping) else node)


def check_config(given: Mapping, inferred: Mapping, name: str = "the config") -> None:
    """Raise ConversionError where a yaml says something else than names and shapes do.

    Args:
        given: of `read_config`.
        inferred: of AutoencoderKL or AutoencoderVQ.
        name: of the yaml, for messages.
    """
    try:
        differing = _differing(given, inferred)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConversionError(f"{name} has an entry of another kind than expected: {error}") from error
    if differing:
        raise ConversionError(f"{name} does not describe these weights: {'; '.join(differing)}")


def _differing(given: Mapping, inferred: Mapping) -> list[str]:
    dd = given["ddconfig"]
    channels = (
        tuple(dd["ch"] * multiple for multiple in dd["ch_mult"]) if {"ch", "ch_mult"} <= set(dd) else None
    )
    embed_dim = inferred.get("vq_embed_dim", inferred["latent_channels"])
    down_blocks = inferred["down_block_types"]
    attention_levels = [level for level, name in enumerate(down_blocks) if name.startswith("Attn")]
    pairs = [
        ("ch times ch_mult", channels, tuple(inferred["block_out_channels"])),
        ("num_res_blocks", dd.get("num_res_blocks"), inferred["layers_per_block"]),
        ("z_channels", dd.get("z_channels"), inferred["latent_channels"]),
        ("in_channels", dd.get("in_channels"), inferred["in_channels"]),
        ("out_ch", dd.get("out_ch"), inferred["out_channels"]),
        ("embed_dim", given.get("embed_dim"), embed_dim),
        ("n_embed", given.get("n_embed"), inferred.get("num_vq_embeddings")),
        ("attention levels", _attention_levels(dd), attention_levels),
    ]
    return [
        f"{entry} is {str(said)[:80]} there and {found} here"
        for entry, said, found in pairs
        if said not in (None, found)
    ]


def _attention_levels(dd: Mapping) -> list[int] | None:
    """Levels, from the image inwards, whose side is among attn_resolutions."""
    if not {"resolution", "attn_resolutions", "ch_mult"} <= set(dd):
        return None
    return [
        level for level in range(len(dd["ch_mult"])) if dd["resolution"] >> level in dd["attn_resolutions"]
    ]


def scale_of(given: Mapping) -> Scale | None:
    if "scale_factor" not in given:
        return None
    return Scale(float(given["scale_factor"]), None, "scale_factor of the given config")
