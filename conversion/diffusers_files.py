"""Own key layouts of diffusers' and our classes as single files, without the config.json that belongs next to them."""

from collections.abc import Mapping

from latent_codec.conversion import ldm_kl, taming_vq
from latent_codec.conversion.encoder_decoder import DIFFUSERS, infer_levels
from latent_codec.conversion.renaming import Change, Format, Network, Rename, Shapes

_ANCHOR = "encoder.mid_block.resnets.0.norm1.weight"
_ENCODER_DECODER = r"(encoder|decoder|quant_conv|post_quant_conv|quantize)\."
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
    strides, sizes, blocks = [], [], 0
    while (first := f"encoders.{len(sizes)}.downsampling.0.weight") in shapes:
        convs = 1
        while f"encoders.{len(sizes)}.downsampling.{2 * convs}.weight" in shapes:
            convs += 1
        strides.insert(0, 2 ** (convs - 1))
        in_channels = shapes[first][1]
        sizes.append(shapes[f"codebooks.{len(sizes)}.embedding.weight"][0])
    while (block := f"encoders.0.residual.{blocks}.conv1.weight") in shapes:
        residual_channels = shapes[block][0]
        blocks += 1
    return {
        "in_channels": in_channels,
        "strides": tuple(strides),
        "hidden_channels": shapes["quantize_convs.0.weight"][1],
        "num_residual_blocks": blocks,
        "embed_dim": shapes["codebooks.0.embedding.weight"][1],
        "codebook_sizes": tuple(sizes),
    } | ({"residual_channels": residual_channels} if blocks else {})


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


def configured(class_name: str, anchor: str, **parts) -> Format:
    """A format of whose networks only a config tells, which names and shapes are then held against."""
    return Format(
        names=("diffusers",),
        title=f"diffusers {class_name}",
        class_name=class_name,
        anchor=anchor,
        not_shown="what its layers are",
        infer=lambda shapes: {},
        table=lambda config: own_names(class_name, config),
        own_keys=r"(encoder|decoder|quant_conv|post_quant_conv)\.",
        **parts,
    )


KL = Format(
    names=("diffusers",),
    title="diffusers AutoencoderKL",
    class_name="AutoencoderKL",
    anchor=_ANCHOR,
    recognizes=lambda shapes: (
        _ANCHOR in shapes and not _has_codebook(shapes) and not _has_old_attention(shapes)
    ),
    infer=infer_kl,
    table=lambda config: own_names("AutoencoderKL", config),
    own_keys=_ENCODER_DECODER,
)
OLD_KL = Format(
    names=(),
    title="diffusers AutoencoderKL with its attention's names of 2022",
    class_name="AutoencoderKL",
    anchor=_ANCHOR,
    recognizes=lambda shapes: _ANCHOR in shapes and _has_old_attention(shapes),
    infer=infer_kl,
    table=_old_names,
    own_keys=_ENCODER_DECODER,
)
VQ = Format(
    names=("diffusers",),
    title="diffusers VQModel",
    class_name="AutoencoderVQ",
    anchor=_ANCHOR,
    recognizes=lambda shapes: _ANCHOR in shapes and _has_codebook(shapes),
    infer=infer_vq,
    table=lambda config: own_names("AutoencoderVQ", config),
    own_keys=_ENCODER_DECODER,
)
HIERARCHICAL = Format(
    names=("diffusers",),
    title="HierarchicalVQ",
    class_name="HierarchicalVQ",
    anchor="encoders.0.downsampling.0.weight",
    not_shown="l2_normalized and the scale of its latents",
    recognizes=lambda shapes: (
        {"encoders.0.downsampling.0.weight", "codebooks.0.embedding.weight"} <= shapes.keys()
    ),
    infer=infer_hierarchical,
    table=lambda config: own_names("HierarchicalVQ", config),
    own_keys=r"(encoders|decoders|codebooks|quantize_convs|upsamplers)\.|usage_\d",
)
