"""VQ-VAE-2 with two levels as rosinality/vq-vae-2-pytorch keeps it: a state dict, the codebooks (dim, size).

The top level is called t, the bottom one b. A residual block's convolutions are 1 and 3 of its `conv`; an encoder's and a
decoder's layers are numbered through, ReLUs included.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from latent_codec.conversion.renaming import (
    Change,
    ConversionError,
    Format,
    LeftOut,
    Rename,
    Scale,
    Shapes,
    count_keys,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

STRIDES = (4, 2)
"""The original's: from the image to the bottom grid, and from there to the top one."""
_LEVELS = ("t", "b")
_FIRST_RESIDUAL = {"enc_t": 3, "enc_b": 5}
_ENCODER_CONVS = {"enc_t": (0, 2), "enc_b": (0, 2, 4)}


def recognizes(shapes: Shapes) -> bool:
    return "enc_b.blocks.0.weight" in shapes and "quantize_t.embed" in shapes


def infer(shapes: Shapes) -> dict:
    needed = ("enc_b.blocks.0.weight", "enc_t.blocks.2.weight", "quantize_t.embed", "quantize_b.embed")
    absent = [key for key in needed if key not in shapes]
    if absent:
        raise ConversionError(f"{', '.join(absent)} is missing; is the file whole?")
    first = _FIRST_RESIDUAL["enc_b"]
    blocks = count_keys(shapes, "enc_b.blocks.*.conv.1.weight", first)
    residual = shapes.get(f"enc_b.blocks.{first}.conv.1.weight", (32,))[0]
    (embed_dim, top_size), (_, bottom_size) = shapes["quantize_t.embed"], shapes["quantize_b.embed"]
    return {
        "in_channels": shapes["enc_b.blocks.0.weight"][1],
        "strides": STRIDES,
        "hidden_channels": shapes["enc_t.blocks.2.weight"][0],
        "num_residual_blocks": blocks,
        "residual_channels": residual,
        "embed_dim": embed_dim,
        "codebook_sizes": top_size if top_size == bottom_size else (top_size, bottom_size),
    }


def table(config: Mapping) -> list[Rename]:
    blocks = config["num_residual_blocks"]
    rows = [Rename("upsample_t", "upsamplers.0.0")]
    for level, (name, stride) in enumerate(zip(_LEVELS, reversed(STRIDES))):
        encoder, decoder = f"enc_{name}", ("dec_t", "dec")[level]
        for layer in _ENCODER_CONVS[encoder]:
            rows.append(Rename(f"{encoder}.blocks.{layer}", f"encoders.{level}.downsampling.{layer}"))
        rows += _residual(f"{encoder}.blocks", _FIRST_RESIDUAL[encoder], f"encoders.{level}.residual", blocks)
        rows.append(Rename(f"{decoder}.blocks.0", f"decoders.{level}.conv_in"))
        rows += _residual(f"{decoder}.blocks", 1, f"decoders.{level}.residual", blocks)
        for layer in range(0, stride, 2):  # one transposed convolution for stride 2, two for 4
            rows.append(
                Rename(f"{decoder}.blocks.{blocks + 2 + layer}", f"decoders.{level}.upsampling.{layer}")
            )
        rows += [
            Rename(f"quantize_conv_{name}", f"quantize_convs.{level}"),
            Rename(f"quantize_{name}.embed", f"codebooks.{level}.embedding.weight", Change.TRANSPOSED),
            Rename(f"quantize_{name}.cluster_size", f"usage_{level}"),
        ]
    return rows


def _residual(theirs: str, first: int, ours: str, count: int) -> list[Rename]:
    return [
        Rename(f"{theirs}.{first + block}.conv.{layer}", f"{ours}.{block}.{conv}")
        for block in range(count)
        for layer, conv in ((1, "conv1"), (3, "conv2"))
    ]


def refuses(component: "nn.Module") -> str | None:
    config = component.config
    if tuple(config.strides) != STRIDES:
        return f"its strides are {tuple(config.strides)}; the original has two levels, of strides {STRIDES}"
    if config.l2_normalized:
        return "its codewords are l2-normalized; the original compares them as they are"
    return None


def complete(state_dict: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """With the running sums, embed times cluster_size, which the original loads and training goes on from."""
    sums = {
        f"quantize_{name}.embed_avg": state_dict[f"quantize_{name}.embed"]
        * state_dict[f"quantize_{name}.cluster_size"]
        for name in _LEVELS
    }
    return state_dict | {key: value.contiguous() for key, value in sums.items()}


FORMAT = Format(
    names=("vq-vae-2",),
    title="VQ-VAE-2 of rosinality/vq-vae-2-pytorch",
    class_name="HierarchicalVQ",
    anchor="enc_b.blocks.0.weight",
    fixed="the original code, which compares codewords as they are",
    recognizes=recognizes,
    infer=infer,
    table=table,
    left_out=(LeftOut(r"quantize_[tb]\.embed_avg$", "quantize_*.embed_avg, running sums of the training"),),
    refuses=refuses,
    complete=complete,
    scale=Scale(1.0, None, "codewords are used as they are"),
)
