"""Start a decoder of another shape from one that knows the latents, instead of at random.

Layer by layer, in the order in which the decoder computes: of the known decoder's channels those are kept from which the
others are best predicted, and each convolution becomes the ridge regression of what the known one gives there on what reaches
it here, so that it makes up for the channels that are gone and for the errors before it (channel pruning with least squares,
arXiv:1707.06168).

    latents --known conv_in--> y --known layer--> y' ...      kept channels of y' are what a layer should give
    latents --------conv_in--> x --------layer--> x' ...      its weights: least squares of kept y' from x
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.regression import RIDGE

NUM_POSITIONS = 16_000
"""That a fit looks at; it stays near the known weights where these say little."""


@torch.no_grad()
def start_other_decoder(
    decoder: Decoder, known: Decoder, latents: Tensor, images: Tensor | None = None
) -> None:
    """Give `decoder`, in place, weights with which it decodes nearly as `known` does.

    Args:
        decoder: new, of at most the known one's widths and layers per block, and of its blocks, norms and attention.
            Its `conv_out` may have several outputs for each one of the known one's: a pixel's subpixels.
        known: another decoder of the same latents.
        latents: of a few crops, as the decoders take them, (N, C, h, w).
        images: what subpixels are fitted to, (N, outputs of `decoder`, H, W), where there are any.
    """
    groups = decoder.conv_norm_out.num_groups
    kept = _kept_of_stages(decoder, known, latents)
    everything = torch.arange(latents.shape[1])
    _fit(decoder.conv_in, known.conv_in, latents, known.conv_in(latents)[:, kept[0]], everything, kept[0])
    x, y = decoder.conv_in(latents), known.conv_in(latents)

    first, *others = zip(decoder.mid_block.resnets, known.mid_block.resnets)
    x, y = _start_resnet(*first, [first[1]], x, y, kept[0], kept[0], groups)
    attentions = zip(decoder.mid_block.attentions, known.mid_block.attentions)
    for pair, (attention, known_attention) in zip(others, attentions):
        if attention is not None:
            x, y = _start_attention(attention, known_attention, x, y, kept[0])
        x, y = _start_resnet(*pair, [pair[1]], x, y, kept[0], kept[0], groups)

    for block, known_block, before, after in zip(decoder.up_blocks, known.up_blocks, kept, kept[1:]):
        last = len(block.resnets) - 1
        for place, (resnet, theirs) in enumerate(zip(block.resnets, known_block.resnets)):
            following = known_block.resnets[place:] if place == last else [theirs]
            x, y = _start_resnet(resnet, theirs, following, x, y, after if place else before, after, groups)
        for upsampler, theirs in zip(block.upsamplers or (), known_block.upsamplers or ()):
            enlarged, y = F.interpolate(x, scale_factor=2.0, mode="nearest"), theirs(y)
            _fit(upsampler.conv, theirs.conv, enlarged, y[:, after], after, after)
            x = upsampler(x)

    _copy_norm(decoder.conv_norm_out, known.conv_norm_out, kept[-1])
    x, y = decoder.conv_act(decoder.conv_norm_out(x)), known.conv_act(known.conv_norm_out(y))
    per_output = decoder.conv_out.out_channels // known.conv_out.out_channels
    outputs = torch.arange(known.conv_out.out_channels).repeat_interleave(per_output)
    wanted = known.conv_out(y)[:, outputs] if images is None else images
    _fit(decoder.conv_out, known.conv_out, x, wanted, kept[-1], outputs)


def _start_resnet(
    block: ResnetBlock2D,
    known: ResnetBlock2D,
    following: list[ResnetBlock2D],
    x: Tensor,
    y: Tensor,
    kept_in: Tensor,
    kept_out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Fit a block to `known`, and its sum to what the blocks of `following`, `known` first, give; return both results."""
    _copy_norm(block.norm1, known.norm1, kept_in)
    inner = block.nonlinearity(block.norm1(x))
    hidden = known.conv1(known.nonlinearity(known.norm1(y)))
    kept = _choose(_covariance(hidden), block.conv1.out_channels, groups)
    _fit(block.conv1, known.conv1, inner, hidden[:, kept], kept_in, kept)
    _copy_norm(block.norm2, known.norm2, kept)
    inner = block.nonlinearity(block.norm2(block.conv1(inner)))
    direct = y if known.conv_shortcut is None else known.conv_shortcut(y)
    for each in following:
        y = each(y, None)
    if block.conv_shortcut is not None:
        _fit(block.conv_shortcut, known.conv_shortcut, x, direct[:, kept_out], kept_in, kept_out)
    carried = x if block.conv_shortcut is None else block.conv_shortcut(x)
    _fit(block.conv2, known.conv2, inner, y[:, kept_out] - carried, kept, kept_out)
    return block(x, None), y


def _start_attention(
    attention: Attention, known: Attention, x: Tensor, y: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit queries, keys and values, then their way back into the sum; return both results."""
    _copy_norm(attention.group_norm, known.group_norm, kept)
    mine, theirs = (each.group_norm(z.flatten(2)).mT for each, z in ((attention, x), (known, y)))
    width = attention.to_q.out_features
    wanted = {name: getattr(known, name)(theirs) for name in ("to_q", "to_k", "to_v")}
    together = _choose(_covariance(torch.cat((wanted["to_q"], wanted["to_k"])).mT), width, 1)
    chosen = {"to_q": together, "to_k": together, "to_v": _choose(_covariance(wanted["to_v"].mT), width, 1)}
    for name, rows in chosen.items():
        _fit(getattr(attention, name), getattr(known, name), mine, wanted[name][..., rows], kept, rows)
    queries, keys, values = (getattr(attention, name)(mine)[:, None] for name in wanted)
    attended = F.scaled_dot_product_attention(queries, keys, values)[:, 0]
    y = known(y)
    change = (y[:, kept] - x).flatten(2).mT
    _fit(attention.to_out[0], known.to_out[0], attended, change, chosen["to_v"], kept)
    return attention(x), y


def _kept_of_stages(decoder: Decoder, known: Decoder, latents: Tensor) -> list[Tensor]:
    """Channels of the known one's that are kept between the residual blocks: of the middle, and of each up block.

    They are the same ones where neither decoder changes its width, because sums carry them on.
    """
    y, outputs = known.conv_in(latents), []
    for stage in (known.mid_block, *known.up_blocks):
        y = stage(y)
        outputs.append(_covariance(y))
    widths = [decoder.conv_in.out_channels] + [each.resnets[0].out_channels for each in decoder.up_blocks]
    chains: list[list[int]] = []
    for stage, width in enumerate(widths):
        if chains and (width, len(outputs[stage])) == (widths[stage - 1], len(outputs[stage - 1])):
            chains[-1].append(stage)
        else:
            chains.append([stage])
    kept = []
    for chain in chains:
        together = torch.stack([outputs[stage] / outputs[stage].trace() for stage in chain]).sum(0)
        chosen = _choose(together, widths[chain[0]], decoder.conv_norm_out.num_groups)
        kept += [chosen] * len(chain)
    return kept


def _covariance(maps: Tensor) -> Tensor:
    """Of the channels of (N, C, ...)."""
    return torch.cov(maps.movedim(1, 0).flatten(1)).double().cpu()


def _choose(covariance: Tensor, count: int, groups: int) -> Tensor:
    """The `count` channels, as many of each group, from which the others are best predicted: a pivoted Cholesky factorization's first."""
    total = len(covariance)
    if count == total:
        return torch.arange(total)
    rest, left = covariance.clone(), torch.full((groups,), count // groups)
    group_of, chosen = torch.arange(total) // (total // groups), []
    for _ in range(count):
        variance = rest.diagonal().clone()
        variance[left[group_of] == 0] = -1
        variance[chosen] = -1
        pivot = int(variance.argmax())
        chosen.append(pivot)
        left[group_of[pivot]] -= 1
        column = rest[:, pivot] / rest[pivot, pivot].clamp_min(1e-12).sqrt()
        rest = rest - column[:, None] * column
    return torch.tensor(sorted(chosen))


def _copy_norm(norm: nn.GroupNorm, known: nn.GroupNorm, kept: Tensor) -> None:
    norm.weight.copy_(known.weight[kept])
    norm.bias.copy_(known.bias[kept])


def _fit(
    layer: nn.Conv2d | nn.Linear,
    known: nn.Conv2d | nn.Linear | None,
    inputs: Tensor,
    wanted: Tensor,
    kept_in: Tensor,
    kept_out: Tensor,
) -> None:
    """Start from the known one's weights (None: it passes its input on), and add the ridge regression of what is still missing."""
    is_linear = isinstance(layer, nn.Linear)
    if known is None:
        matrix = (kept_out[:, None] == kept_in).to(layer.weight)
        layer.weight.copy_(matrix.view_as(layer.weight))
        layer.bias.zero_()
    else:
        layer.weight.copy_(known.weight[kept_out][:, kept_in])
        layer.bias.copy_(known.bias[kept_out])
    missing = wanted - layer(inputs)
    per_item = max(NUM_POSITIONS // len(inputs), 1)
    generator = torch.Generator().manual_seed(0)
    gram, moments = 0, 0
    for rows, goal in zip(inputs, missing):
        if not is_linear:
            side = layer.kernel_size[0]
            rows, goal = F.unfold(rows[None], side, padding=side // 2)[0].T, goal.flatten(1).T
        if len(rows) > per_item:
            some = torch.randperm(len(rows), generator=generator)[:per_item].to(rows.device)
            rows, goal = rows[some], goal[some]
        rows = F.pad(rows, (0, 1), value=1.0)
        # In float32, unlike `ridge_regression`: wide decoders have thousands of columns, and float64 takes twice as long.
        gram, moments = gram + (rows.T @ rows).double().cpu(), moments + (rows.T @ goal).double().cpu()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram + ridge, moments).T.to(layer.weight)
    layer.weight += change[:, :-1].reshape(layer.weight.shape)
    layer.bias += change[:, -1]
