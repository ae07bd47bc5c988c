"""The yaml beside a latent-diffusion or taming-transformers checkpoint, held against what the weights say."""

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from latent_codec.conversion.renaming import ConversionError, Scale

MAX_BYTES = 1 << 20


def read_config(path: str | os.PathLike) -> dict:
    """The part of a yaml file that describes an autoencoder: ddconfig, embed_dim, n_embed, and the model's scale_factor.

    Raises:
        ConversionError: if it is no yaml of this kind.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ConversionError(f"{path} has {path.stat().st_size:,} bytes; a config has a few thousand.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConversionError(f"{path} is no yaml: {' '.join(str(error).split())}") from error
    found = [each for each in _mappings(content) if isinstance(each.get("ddconfig"), Mapping)]
    if len(found) != 1:
        raise ConversionError(
            f"{path} describes {len(found)} autoencoders (a mapping with ddconfig each); give one."
        )
    scales = [each["scale_factor"] for each in _mappings(content) if "scale_factor" in each]
    return {**found[0], **({"scale_factor": scales[0]} if scales else {})}


def _mappings(node):
    """Every mapping in a yaml's tree."""
    if isinstance(node, Mapping):
        yield node
    for each in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _mappings(each)


def check_config(given: Mapping, inferred: Mapping) -> None:
    """Raise ConversionError where a yaml says something else than names and shapes do.

    Args:
        given: of `read_config`.
        inferred: of AutoencoderKL or AutoencoderVQ.
    """
    dd = given["ddconfig"]
    channels = (
        tuple(dd["ch"] * multiple for multiple in dd["ch_mult"]) if {"ch", "ch_mult"} <= set(dd) else None
    )
    embed_dim = inferred.get("vq_embed_dim", inferred["latent_channels"])
    pairs = [
        ("ch times ch_mult", channels, tuple(inferred["block_out_channels"])),
        ("num_res_blocks", dd.get("num_res_blocks"), inferred["layers_per_block"]),
        ("z_channels", dd.get("z_channels"), inferred["latent_channels"]),
        ("in_channels", dd.get("in_channels"), inferred["in_channels"]),
        ("out_ch", dd.get("out_ch"), inferred["out_channels"]),
        ("embed_dim", given.get("embed_dim"), embed_dim),
        ("n_embed", given.get("n_embed"), inferred.get("num_vq_embeddings")),
        ("attention levels", _attention_levels(dd), _levels_with_attention(inferred)),
    ]
    differing = [
        f"{name} is {said} there and {found} here" for name, said, found in pairs if said not in (None, found)
    ]
    if differing:
        raise ConversionError(f"the config does not describe these weights: {'; '.join(differing)}.")


def _attention_levels(dd: Mapping) -> list[int] | None:
    """Levels, from the picture inwards, whose side is among attn_resolutions."""
    if not {"resolution", "attn_resolutions", "ch_mult"} <= set(dd):
        return None
    return [
        level for level in range(len(dd["ch_mult"])) if dd["resolution"] >> level in dd["attn_resolutions"]
    ]


def _levels_with_attention(inferred: Mapping) -> list[int]:
    return [level for level, name in enumerate(inferred["down_block_types"]) if name.startswith("Attn")]


def scale_of(given: Mapping) -> Scale | None:
    if "scale_factor" not in given:
        return None
    return Scale(float(given["scale_factor"]), None, "scale_factor of the given config")
