"""diffusers' own layouts as single files, without the config.json that belongs beside them."""

from collections.abc import Mapping

from diffusers import AutoencoderKL

from latent_codec.conversion import ldm_kl, taming_vq
from latent_codec.conversion.encoder_decoder import DIFFUSERS, infer_levels
from latent_codec.conversion.renaming import Change, Format, Network, Rename, Shapes
from latent_codec.models.autoencoder_vq import AutoencoderVQ

_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _is_diffusers(shapes: Shapes) -> bool:
    return "encoder.mid_block.resnets.0.norm1.weight" in shapes


def _has_old_attention(shapes: Shapes) -> bool:
    return any(key.endswith("attentions.0.query.weight") for key in shapes)


def _has_codebook(shapes: Shapes) -> bool:
    return "quantize.embedding.weight" in shapes


def infer_kl(shapes: Shapes) -> dict:
    return infer_levels(shapes, DIFFUSERS) | ldm_kl.infer_latents(shapes)


def infer_vq(shapes: Shapes) -> dict:
    return infer_levels(shapes, DIFFUSERS) | taming_vq.infer_codebook(shapes, "quantize.embedding.weight")


def _own_names(network_class: type, config: Mapping) -> list[Rename]:
    """Every tensor by its own name."""
    return [Rename(key, key) for key in Network(network_class, config).on_meta().state_dict()]


def old_name(key: str) -> str:
    """The name that a key of AutoencoderKL's attention had before diffusers 0.12; other keys as they are."""
    for new, old in _OLD_ATTENTION.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def _old_names(config: Mapping) -> list[Rename]:
    """The old names, which today's code still renames."""
    rows = []
    for row in _own_names(AutoencoderKL, config):
        old = old_name(row.ours)
        rows.append(Rename(old, row.ours, Change.MATRIX if old != row.ours else Change.NONE))
    return rows


KL = Format(
    names=("diffusers",),
    title="diffusers AutoencoderKL",
    network_class=AutoencoderKL,
    recognizes=lambda shapes: (
        _is_diffusers(shapes) and not _has_codebook(shapes) and not _has_old_attention(shapes)
    ),
    infer=infer_kl,
    table=lambda config: _own_names(AutoencoderKL, config),
)
OLD_KL = Format(
    names=(),
    title="diffusers AutoencoderKL with its attention's names of 2022",
    network_class=AutoencoderKL,
    recognizes=lambda shapes: _is_diffusers(shapes) and _has_old_attention(shapes),
    infer=infer_kl,
    table=_old_names,
)
VQ = Format(
    names=("diffusers",),
    title="diffusers VQModel",
    network_class=AutoencoderVQ,
    recognizes=lambda shapes: _is_diffusers(shapes) and _has_codebook(shapes),
    infer=infer_vq,
    table=lambda config: _own_names(AutoencoderVQ, config),
)
