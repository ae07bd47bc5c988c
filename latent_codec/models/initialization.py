"""Start an autoencoder as the best linear code of its data, instead of as noise.

A freshly made autoencoder spends most of a short training finding what linear
algebra knows at once: which few projections of an 8x8 block matter, and how to
paint them back. `initialize_linear_code` writes that solution into the residual
stream, where the skip connections carry it, and leaves the residual branches
silent (their last convolution is zero), so that training begins at the linear
code's fidelity and learns what is beyond it:

    image --conv_in: copy--> [2x2 blocks --PCA--> half the grid] x levels --conv_out--> latents
    latents --conv_in: up to 3x3 neighbors--> [nearest x2 --least squares 3x3--> finer blocks] x levels --> image

Where the latents are one vector per image, its parts are those of the whole image: every position of a decoder's
grid has a map of its own, because the zeros around a small grid tell its positions apart.

With a codebook between them, k-means of the latents, this is vector quantization of the image's blocks, and a
decoder that smooths their edges.

There are two obstacles between a residual network and a linear map, both in the head
`conv_norm_out -> SiLU -> conv_out`, and both are met exactly:

- SiLU: channels come in pairs x, -x, because silu(x) - silu(-x) = x.
- Group norm removes every group's mean and scale, which are the image's own
  brightness and contrast. Constant offsets (+A, +A, -A, -A) on the two pairs x, -x
  and y, -y ("anchors") leave the group's mean at zero and hold its standard
  deviation at sqrt(A^2 + var) ~ A whatever the image; norm's own affine takes A
  away again.
"""

import math

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.errors import SettingError
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.grid_quantizer import GridQuantizer
from latent_codec.models.quantizers import VectorQuantizer, k_means
from latent_codec.regression import ridge_regression
from latent_codec.tensors import check_shape

NUM_FITTED = 64
"""Images that a fit looks at, or more where grids are small: enough for the thousand unknowns of least squares."""
NUM_POSITIONS = 16_000
IMAGES_AT_ONCE = 16
_NEAREST = (4, 1, 3, 5, 7, 0, 2, 6, 8)
"""The places of a 3x3 kernel from its middle on, of which the decoder sees as many as its first layer is wide."""


@torch.no_grad()
def initialize_evenly(autoencoder: nn.Module) -> None:
    """Give every convolution of a new `autoencoder` outputs of its inputs' variance, and silence residual branches.

    Kaiming's normal initialization (arXiv:1502.01852, equation 10, without the factor 2 of a rectifier), no
    biases, and the last convolution of every residual branch 0. torch's own default shrinks the signal in every
    layer and adds biases to it, so that one vector per image, six levels deep, is lost among them for the
    first thousand steps of a training.
    """
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if name.endswith(".conv2"):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def initialize_codebooks(autoencoder: ModelMixin, images: Tensor, *, seed: int = 0) -> None:
    """Start each codebook of a discrete `autoencoder` from its latents, the top level's first.

    A learned one by k-means. A fixed one stays where it is; its latents come to it: the layer before it is changed so
    that their channels have mean 0, are not correlated, and spread as the grid's values do.

    Args:
        autoencoder: AutoencoderVQ or HierarchicalVQ.
        images: (N, in_channels, height, width) in [-1, 1]; give some latents per codeword.
        seed: of k-means' first draw.
    """
    levels: dict[VectorQuantizer, list[int]] = {}
    for level, quantizer in enumerate(autoencoder.quantizers):
        levels.setdefault(quantizer, []).append(level)
    for quantizer, served in levels.items():
        # Lower levels see the codewords above them, so that each pass comes after the codebook before. Of levels that share
        # one, what the upper ones leave is only seen in a second pass.
        if quantizer.is_fixed:
            (level,) = served
            _spread_latents(autoencoder, autoencoder.quantizer_inputs[level], quantizer, images)
            continue
        for _ in range(min(len(served), 2) if quantizer.has_distances else 0):
            parts = [autoencoder.encode_quantized(part) for part in images.split(IMAGES_AT_ONCE)]
            grids = [outputs[level].latents for outputs in parts for level in served]
            vectors = torch.cat([grid.movedim(1, -1).flatten(0, 2) for grid in grids])
            centers = k_means(vectors, quantizer.codebook_size, seed=seed, normalize=quantizer.l2_normalized)
            quantizer.embedding.weight.copy_(centers)


def _spread_latents(
    autoencoder: ModelMixin, layer: nn.Conv2d, quantizer: GridQuantizer, images: Tensor
) -> None:
    """Center what a layer gives, and bring it to the quantizer's axes."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for part in images.split(IMAGES_AT_ONCE):
        autoencoder.encode_quantized(part)
    handle.remove()
    vectors = torch.cat([grid.movedim(1, -1).flatten(0, 2) for grid in seen]).double()
    mean = vectors.mean(0)
    axes = quantizer.start_from(vectors - mean)
    weight = axes @ layer.weight.double().flatten(1)
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(axes @ (layer.bias - mean))


@torch.no_grad()
def initialize_linear_code(
    autoencoder: AutoencoderKL | AutoencoderVQ,
    images: Tensor,
    *,
    quantizer: VectorQuantizer | None = None,
    anchor: float = 8.0,
) -> None:
    """Make a new `autoencoder` compute the principal components of `images`' blocks, and undo them.

    The encoder becomes a cascade of principal component analyses of 2x2 blocks
    (together: of f x f blocks), the decoder a cascade of ridge regressions from the
    upsampled coarser level to the finer one's blocks. Latents have mean 0. An
    AutoencoderKL's are whitened to variance 1, with a posterior standard deviation of
    1 %; an AutoencoderVQ's share one scale, so that distances stay those of the
    image's blocks, and go through a codebook by k-means before they are decoded.

    Args:
        autoencoder: its convolutions are overwritten where the linear code needs
            them, and keep their initial values elsewhere.
        images: (N, in_channels, height, width) in [-1, 1], sides divisible by the
            downsampling factor; some dozens of crops are enough, with a codebook some latents per codeword, and
            where an image is one vector some images per channel of the last level.
        quantizer: of an AutoencoderVQ.
        anchor: A, in units of an image's range [-1, 1]. At 8 a group's scale moves by about 1 %: a frame of
            gray or noise changes the image inside by about 1 %, one of plain black or white by about 6 %
            (a random start: by more than all of it). But x + A keeps fewer of x's digits: at 8 a trained
            codec lost 0.31 dB in bfloat16, at 3 0.05 dB.

    Raises:
        ValueError: if the widths cannot carry the code (`_check` lists what they need), or
            `images` vary in fewer directions than there are latent channels.
    """
    _check(autoencoder, images, quantizer)
    for part in (autoencoder.encoder, autoencoder.decoder):
        for module in part.modules():
            if isinstance(module, ResnetBlock2D):
                _silence(module.conv2)
                if module.conv_shortcut is not None:
                    _carry(module.conv_shortcut, min(module.in_channels, module.out_channels))
            elif isinstance(module, Attention):
                _silence(module.to_out[0])
    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        if conv is not None:
            _carry(conv, conv.in_channels)
    images = images.float()
    latents = _write_encoder(autoencoder, images, one_scale=quantizer is not None)
    if quantizer is not None:
        vectors = latents.movedim(1, -1).flatten(0, 2)
        quantizer.embedding.weight.copy_(k_means(vectors, quantizer.codebook_size))
        latents = quantizer.lookup(quantizer.assign(latents))
    _write_decoder(autoencoder, images, latents)
    _anchor(autoencoder.encoder.conv_norm_out, autoencoder.encoder.mid_block.resnets[-1].conv2.bias, anchor)
    _anchor(
        autoencoder.decoder.conv_norm_out, autoencoder.decoder.up_blocks[-1].resnets[-1].conv2.bias, anchor
    )


def _write_encoder(autoencoder: AutoencoderKL | AutoencoderVQ, images: Tensor, *, one_scale: bool) -> Tensor:
    """Write the analysis cascade; return the latents."""
    encoder, latent_channels = autoencoder.encoder, autoencoder.config.latent_channels
    downsamplers = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
    _carry(encoder.conv_in, images.shape[1])

    code = images
    for level, conv in enumerate(downsamplers):
        last = level == len(downsamplers) - 1
        width = min(conv.out_channels, encoder.down_blocks[level + 1].resnets[0].out_channels)
        patches = F.pixel_unshuffle(code, 2)
        basis = _principal_components(patches, width // 2 if last else width)
        # pixel_unshuffle orders channels as (channel, row, column), which is how a kernel is laid out.
        kernel = basis.view(len(basis), code.shape[1], 2, 2) / 2
        if last:  # in pairs, for the head
            kernel = torch.stack([kernel, -kernel], 1).flatten(0, 1)
        conv.weight[: len(kernel)] = 0
        conv.weight[: len(kernel), : code.shape[1], :2, :2] = kernel
        conv.bias[: len(kernel)] = 0
        code = torch.einsum("kc,nchw->nkhw", basis / 2, patches)

    components = code[:, :latent_channels]
    std, mean = torch.std_mean(components, dim=(0, 2, 3))
    if not std.min() > 1e-4 * std.max():
        raise ValueError(
            f"the images' blocks vary in fewer directions than the {latent_channels} latent channels: give more "
            "images, ones that differ, or fewer channels."
        )
    if one_scale:
        std = std.max().expand_as(std)
    head = encoder.conv_out
    _silence(head)
    for channel in range(latent_channels):
        head.weight[channel, 2 * channel, 1, 1] = 1 / std[channel]
        head.weight[channel, 2 * channel + 1, 1, 1] = -1 / std[channel]
        head.bias[channel] = -mean[channel] / std[channel]
    head.bias[latent_channels:] = 2 * math.log(0.01)  # an AutoencoderKL's posterior
    return (components - mean[:, None, None]) / std[:, None, None]


def _write_decoder(autoencoder: AutoencoderKL | AutoencoderVQ, images: Tensor, latents: Tensor) -> None:
    """Write the synthesis cascade from `latents` to the principal components of finer and finer blocks of `images`."""
    decoder, is_one_vector = autoencoder.decoder, latents.shape[-2:] == (1, 1)
    upsamplers = [block.upsamplers[0].conv for block in decoder.up_blocks if block.upsamplers]
    targets = [images]  # finest first
    for conv, block in reversed(list(zip(upsamplers[:-1], decoder.up_blocks[1:]))):
        patches = F.pixel_unshuffle(targets[-1], 2)
        basis = _principal_components(patches, min(conv.out_channels, block.resnets[0].out_channels))
        targets.append(torch.einsum("kc,nchw->nkhw", basis, patches))
    if is_one_vector:
        _carry(decoder.conv_in, latents.shape[1])
        state = latents
    else:
        channels = latents.shape[1]
        places = _NEAREST[: decoder.conv_in.out_channels // channels]
        kept = [9 * channel + place for channel in range(channels) for place in sorted(places)]
        decoder.conv_in.weight[: len(kept)] = torch.eye(9 * channels)[kept].view(-1, channels, 3, 3)
        decoder.conv_in.bias[: len(kept)] = 0
        state = F.unfold(latents, 3, padding=1)[:, kept].unflatten(2, latents.shape[-2:])

    for conv, target in zip(upsamplers, reversed(targets)):
        target = _enough(target)
        state = state[: len(target)]
        upsampled = F.interpolate(state, scale_factor=2, mode="nearest")
        weight, bias = _fit_convolution(upsampled, target, borders=is_one_vector)
        conv.weight[: len(weight)] = 0
        conv.weight[: len(weight), : state.shape[1]] = weight
        conv.bias[: len(weight)] = bias
        state = F.conv2d(upsampled, weight, bias, padding=1)

    # The last block turns each image channel x into the pair x, -x that the head undoes.
    last = decoder.up_blocks[-1].resnets
    shortcut, head = last[0].conv_shortcut, decoder.conv_out
    image_channels = state.shape[1]
    shortcut.weight[: 2 * image_channels] = 0
    shortcut.bias[: 2 * image_channels] = 0
    _silence(head)
    for channel in range(image_channels):
        pair = slice(2 * channel, 2 * channel + 2)
        shortcut.weight[pair, channel, 0, 0] = torch.tensor([1.0, -1.0])
        head.weight[channel, pair, 1, 1] = torch.tensor([1.0, -1.0])


def _silence(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _carry(conv: nn.Conv2d, channels: int) -> None:
    """Make the first `channels` outputs copy the first inputs; the others keep their initial weights."""
    center = conv.kernel_size[0] // 2
    conv.weight[:channels] = 0
    conv.bias[:channels] = 0
    conv.weight[torch.arange(channels), torch.arange(channels), center, center] = 1


def _anchor(norm: nn.GroupNorm, bias: Tensor, anchor: float) -> None:
    """Offset the channels that `bias` feeds by +A, +A, -A, -A, ..., and let `norm` pass them on unchanged."""
    offsets = anchor * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(norm.num_channels // 4)
    bias += offsets
    norm.weight.fill_(anchor)
    norm.bias.copy_(-offsets)


def _principal_components(blocks: Tensor, count: int) -> Tensor:
    """The first `count` principal directions of (N, C, H, W) `blocks`' channels: (min(count, C), C), orthonormal."""
    samples = _enough(blocks).movedim(1, -1).flatten(0, -2).double()
    samples = samples - samples.mean(0)
    _, directions = torch.linalg.eigh(samples.mT @ samples)
    return directions.flip(1)[:, :count].mT.to(blocks.dtype)


def _enough(grids: Tensor) -> Tensor:
    """The first of (N, C, h, w) `grids`, as many as a fit needs."""
    return grids[: max(NUM_FITTED, NUM_POSITIONS // grids[0, 0].numel())]


def _fit_convolution(features: Tensor, target: Tensor, *, borders: bool) -> tuple[Tensor, Tensor]:
    """Ridge-regress `target` on `features`' 3x3 neighborhoods: a convolution's weight and bias.

    Of grids that are parts of larger ones `borders` is False: the zeros around them would bias the fit.
    """
    rows = (F.unfold(each[None], 3, padding=int(borders))[0].T for each in features)
    goals = target if borders else target[:, :, 1:-1, 1:-1]
    weight, bias = ridge_regression(zip(rows, (each.flatten(1).T for each in goals)))
    return weight.view(-1, features.shape[1], 3, 3), bias


def _check(
    autoencoder: AutoencoderKL | AutoencoderVQ, images: Tensor, quantizer: VectorQuantizer | None
) -> None:
    """Refuse what cannot become a linear code, before anything is overwritten."""
    config = autoencoder.config
    if quantizer is not None:
        if config.l2_normalized:
            expected = "False for a linear start, whose latents have every length"
            raise SettingError("l2_normalized", expected, True)
        if config.assignment == "linear":
            raise SettingError("assignment", '"nearest" for a linear start, by k-means', config.assignment)
        if config.vq_embed_dim not in (None, config.latent_channels):
            expected = f"latent_channels, {config.latent_channels}, for a linear start"
            raise SettingError("vq_embed_dim", expected, config.vq_embed_dim)
    widths, latent_channels = config.block_out_channels, config.latent_channels
    factor = 2 ** (len(widths) - 1)
    check_shape(images, "images", ("N", config.in_channels, "H", "W"))
    if any(side % factor for side in images.shape[-2:]):
        raise ValueError(f"expected images with sides divisible by {factor}, got shape {tuple(images.shape)}")
    if config.out_channels != config.in_channels:
        expected = f"in_channels, {config.in_channels}, for a linear start"
        raise SettingError("out_channels", expected, config.out_channels)
    described = f"block_out_channels {tuple(widths)} with norm_num_groups {config.norm_num_groups}"
    divisor = 4 * config.norm_num_groups
    if any(width % divisor for width in (widths[0], widths[-1])):
        raise ValueError(f"{described}: a linear start needs the first and last width divisible by {divisor}")
    if len(widths) < 2 or widths[0] == widths[1]:
        # The last block pairs the image's channels in the shortcut that changes the width.
        raise ValueError(f"{described}: a linear start needs two widths or more, and the first two different")
    if widths[0] < 4 * config.in_channels or widths[-1] < latent_channels:
        least = f"at least {4 * config.in_channels} first and {latent_channels} last"
        raise ValueError(f"{described} are too narrow for a linear start: {least}")
    components = config.in_channels
    for level in range(len(widths) - 1):
        last = level == len(widths) - 2
        components = min(4 * components, min(widths[level : level + 2]) // (2 if last else 1))
    if components < latent_channels:
        raise ValueError(
            f"{described} cannot be linear: {components} components of the {factor}x{factor} blocks reach the latents, a linear start "
            f"needs as many as latent_channels, {latent_channels}."
        )
