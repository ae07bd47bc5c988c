"""Own key layouts of diffusers' and our classes as single files, without the config.json that belongs next to them."""

from collections.abc import Mapping
from dataclasses import replace

from latent_codec.conversion import ldm_kl, taming_vq
from latent_codec.conversion.encoder_decoder import DIFFUSERS, infer_levels
from latent_codec.conversion.renaming import Change, Format, Network, Rename, Shapes, count_keys

_ANCHOR = "encoder.mid_block.resnets.0.norm1.weight"
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _has_old_attention(shapes: Shapes) -> bool:
    return any(key.endswith("attentions.0.query.weight") for key in shapes)


def _has_codebook(shapes: Shapes) -> bool:
    return "quantize.embedding.weight" in shapes


def infer_kl(shapes: Shapes) -> dict:
    return infer_levels(shapes, DIFFUSERS) | ldm_kl.infer_latents(shapes)


def infer_vq(shapes: Shapes) -> dict:
    return infer_levels(shapes, DIFFUSERS) | taming_vq.infer_codebook(shapes, "quantize.embedding.weight")


def infer_hierarchical(shapes: Shapes) -> dict:
    """The config of a HierarchicalVQ but for what its layers compute."""
    levels = range(count_keys(shapes, "encoders.*.downsampling.0.weight"))
    starts = [f"encoders.{level}.downsampling." for level in levels]
    convs = [sum(key.startswith(start) and key.endswith(".weight") for key in shapes) for start in starts]
    blocks = count_keys(shapes, "encoders.0.residual.*.conv1.weight")
    return {
        "in_channels": shapes[f"{starts[-1]}0.weight"][1],
        "strides": tuple(2 ** (number - 1) for number in reversed(convs)),
        "hidden_channels": shapes["quantize_convs.0.weight"][1],
        "num_residual_blocks": blocks,
        "embed_dim": shapes["codebooks.0.embedding.weight"][1],
        "codebook_sizes": tuple(shapes[f"codebooks.{level}.embedding.weight"][0] for level in levels),
    } | ({"residual_channels": shapes["encoders.0.residual.0.conv1.weight"][0]} if blocks else {})


def own_names(class_name: str, config: Mapping) -> list[Rename]:
    """Every tensor by its own name."""
    return [Rename(key, key) for key in Network(class_name, config).on_meta().state_dict()]


def old_name(key: str) -> str:
    """The name that a key of AutoencoderKL's attention had before diffusers 0.12; other keys as they are."""
    for new, old in _OLD_ATTENTION.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def _old_names(config: Mapping) -> list[Rename]:
    """The old names, which today's code still renames."""
    rows = []
    for row in own_names("AutoencoderKL", config):
        old = old_name(row.ours)
        rows.append(Rename(old, row.ours, Change.MATRIX if old != row.ours else Change.NONE))
    return rows


def own_layout(class_name: str, anchor: str, **parts) -> Format:
    """The format of a class's own key layout; where nothing else says its settings, its config has to."""
    shared = {
        "names": ("diffusers",),
        "title": f"diffusers {class_name}",
        "table": lambda config: own_names(class_name, config),
        "own_keys": r"(encoder|decoder|quant_conv|post_quant_conv)\.",
    }
    return Format(class_name=class_name, anchor=anchor, **(shared | parts))


def configured(class_name: str, anchor: str, **parts) -> Format:
    """A format of whose networks only a config tells, which names and shapes are then held against."""
    return own_layout(class_name, anchor, not_shown="what its layers are", infer=lambda shapes: {}, **parts)


KL = own_layout(
    "AutoencoderKL",
    _ANCHOR,
    recognizes=lambda shapes: (
        _ANCHOR in shapes and not _has_codebook(shapes) and not _has_old_attention(shapes)
    ),
    infer=infer_kl,
)
OLD_KL = replace(
    KL,
    names=(),
    title="diffusers AutoencoderKL with its attention's names of 2022",
    recognizes=lambda shapes: _ANCHOR in shapes and _has_old_attention(shapes),
    table=_old_names,
)
VQ = own_layout(
    "AutoencoderVQ",
    _ANCHOR,
    title="diffusers VQModel",
    recognizes=lambda shapes: _ANCHOR in shapes and _has_codebook(shapes),
    infer=infer_vq,
    own_keys=r"(encoder|decoder|quant_conv|post_quant_conv|quantize)\.",
)
HIERARCHICAL = own_layout(
    "HierarchicalVQ",
    "encoders.0.downsampling.0.weight",
    title="HierarchicalVQ",
    not_shown="l2_normalized and the scale of its latents",
    recognizes=lambda shapes: (
        {"encoders.0.downsampling.0.weight", "codebooks.0.embedding.weight"} <= shapes.keys()
    ),
    infer=infer_hierarchical,
    own_keys=r"(encoders|decoders|codebooks|quantize_convs|upsamplers)\.|usage_\d",
)
