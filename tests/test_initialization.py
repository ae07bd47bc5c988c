"""The linear start, a codec that computes principal components before it has learned anything; and the even start."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from helpers.training import tiny_config
from torch import nn
from torch.nn import functional as F

from latent_codec.models.initialization import initialize_evenly, initialize_linear_code
from latent_codec.training.build import build_autoencoder

FACTOR = 4
INSIDE = slice(2 * FACTOR, -2 * FACTOR)  # the decoder's zero padding spoils the border: left to training


def build(channels=3, widths=(16, 32, 64), latent_channels=4, **config):
    torch.manual_seed(0)
    levels = len(widths)
    return AutoencoderKL(
        **{
            "in_channels": channels,
            "out_channels": channels,
            "latent_channels": latent_channels,
            "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            **config,
        }
    )


def smooth(channels=3, count=8, side=48, seed=0):
    """Images without sharp edges, (count, channels, side, side) in [-1, 1]; colors hang together as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 9, 9, generator=generator) * 2 - 1
    coarse = 0.7 * coarse[:, :1] + 0.3 * coarse
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


def blocky(channels=3, count=8, side=48, seed=0):
    """Images of flat rectangles whose edges fall within blocks."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 10, 10, generator=generator) * 2 - 1
    enlarged = F.interpolate(coarse, scale_factor=5, mode="nearest")
    return enlarged[..., 1 : 1 + side, 1 : 1 + side].contiguous()


def initialized(images, **config):
    autoencoder = build(channels=images.shape[1], **config).eval()
    initialize_linear_code(autoencoder, images)
    return autoencoder


@torch.no_grad()
def encode(autoencoder, images):
    return autoencoder.encode(images).latent_dist.mode()


@torch.no_grad()
def decode(autoencoder, latents):
    return autoencoder.decode(latents).sample


def reconstruct(autoencoder, images):
    return decode(autoencoder, encode(autoencoder, images))


def error_inside(reconstruction, images):
    return (reconstruction - images)[..., INSIDE, INSIDE].square().mean().item()


def principal_components(images, count, factor=FACTOR):
    """NumPy's own: whitened components (N, count, h, w), and the images painted back from them."""
    n, channels, height, width = images.shape
    h, w = height // factor, width // factor
    grid = images.numpy().astype(np.float64).reshape(n, channels, h, factor, w, factor)
    blocks = grid.transpose(0, 2, 4, 1, 3, 5).reshape(n * h * w, channels * factor * factor)
    mean = blocks.mean(0)
    left, singular, directions = np.linalg.svd(blocks - mean, full_matrices=False)
    whitened = (left[:, :count] * np.sqrt(len(blocks))).reshape(n, h, w, count)
    painted = (left[:, :count] * singular[:count]) @ directions[:count] + mean
    painted = painted.reshape(n, h, w, channels, factor, factor).transpose(0, 3, 1, 4, 2, 5)
    return torch.from_numpy(whitened.transpose(0, 3, 1, 2)), torch.from_numpy(painted.reshape(images.shape))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("images", [smooth, blocky])
def test_latents_are_the_whitened_principal_components(images, channels):
    images = images(channels)
    latents = encode(initialized(images), images).double()
    expected, _ = principal_components(images, 4)
    signs = (latents * expected).sum((0, 2, 3), keepdim=True).sign()
    # Group norm's anchors hold the scale to 1 %; latents reach 4 standard deviations.
    assert (latents - signs * expected).abs().max() < 0.04
    assert (latents - signs * expected).square().mean().sqrt() < 0.01
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=0.01)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4, dtype=torch.float64), atol=0.01)


def test_the_posterior_is_narrow():
    images = smooth()
    with torch.no_grad():
        posterior = initialized(images).encode(images).latent_dist
    assert torch.allclose(posterior.std, torch.full_like(posterior.std, 0.01))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("images", [smooth, blocky])
def test_reconstruction_is_as_good_as_the_linear_codes(images, channels):
    images = images(channels)
    _, linear = principal_components(images, 4)
    assert error_inside(reconstruct(initialized(images), images), images) <= 1.15 * error_inside(
        linear, images
    )


def test_images_it_was_not_fitted_to_come_back_as_well():
    autoencoder = initialized(smooth())
    others = smooth(seed=1)
    _, linear = principal_components(others, 4)
    assert error_inside(reconstruct(autoencoder, others), others) <= 1.15 * error_inside(linear, others)


@pytest.mark.parametrize("last", [16, 32])
def test_a_narrow_decoder_starts_from_fewer_neighbors(last):
    images = smooth()
    autoencoder = build(widths=(16, 32, last)).eval()
    initialize_linear_code(autoencoder, images)
    _, linear = principal_components(images, 4)
    assert error_inside(reconstruct(autoencoder, images), images) <= 1.3 * error_inside(linear, images)


def test_an_image_that_is_one_vector_starts_as_its_principal_components():
    """The last width is too narrow for 3x3 neighbors: around one vector there are none."""
    images, others = smooth(1, count=700, side=8), smooth(1, count=100, side=8, seed=1)
    autoencoder = build(channels=1, widths=(16, 32, 64, 64), latent_channels=12).eval()
    initialize_linear_code(autoencoder, images)

    latents = encode(autoencoder, images).double()
    expected, linear = principal_components(images, 12, factor=8)
    signs = (latents * expected).sum((0, 2, 3), keepdim=True).sign()
    assert latents.shape == (700, 12, 1, 1)
    assert (latents - signs * expected).abs().max() < 0.04
    # An upsampled vector is equal at four positions, which only the zeros around them tell apart: not all of it comes back.
    error, best = F.mse_loss(reconstruct(autoencoder, images), images), F.mse_loss(linear, images.double())
    assert images.var() - error > 0.65 * (images.var() - best)
    assert F.mse_loss(reconstruct(autoencoder, others), others) < 1.15 * error


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_constant_image_keeps_its_brightness(channels):
    """Fitted to images in which no channel stands out, so that gray lies in the code, as it nearly does in photographs."""
    images = smooth(channels)
    images = torch.cat([images.roll(shift, 1) for shift in range(channels)])
    autoencoder = initialized(images)
    for value in (-0.9, -0.3, 0.0, 0.5, 0.9):
        flat = torch.full((1, channels, 48, 48), value)
        error = (reconstruct(autoencoder, flat) - flat)[..., INSIDE, INSIDE].abs().max()
        # 2 % of the range [-1, 1]; the darkest and brightest move group norm's scale as far as it goes.
        assert error <= (0.04 if abs(value) <= 0.5 else 0.08), value


def test_decoding_moved_latents_gives_a_moved_image():
    autoencoder = initialized(smooth())
    latents = encode(autoencoder, smooth(count=1))
    moved = decode(autoencoder, latents.roll((1, 2), (2, 3)))
    expected = decode(autoencoder, latents).roll((FACTOR, 2 * FACTOR), (2, 3))
    inside = slice(5 * FACTOR, -5 * FACTOR)  # away from the borders of both
    assert (moved - expected)[..., inside, inside].abs().max() < 1e-3


def change_by_context(autoencoder, center, frame):
    """RMS of what a frame around `center`, nine times its area in all, changes in its middle, over the middle's own RMS."""
    side = center.shape[-1]
    image = frame.expand(1, 3, 3 * side, 3 * side).clone()
    image[..., side : 2 * side, side : 2 * side] = center
    middle = slice(side // 2 - 8, side // 2 + 8)
    alone = reconstruct(autoencoder, center)[..., middle, middle]
    framed = reconstruct(autoencoder, image)[..., side : 2 * side, side : 2 * side][..., middle, middle]
    return ((framed - alone).square().mean() / alone.square().mean()).sqrt().item()


def test_context_hardly_reach_far_away():
    """Group norm reads the whole image; the anchors keep it from acting on what it reads."""
    linear, ordinary = initialized(smooth()), build().eval()
    center = smooth(count=1, side=48, seed=1)
    noise = torch.rand(1, 3, 144, 144, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert change_by_context(linear, center, torch.zeros(1)) < 0.02
    assert change_by_context(linear, center, noise) < 0.02
    for extreme in (-torch.ones(1), torch.ones(1)):
        change = change_by_context(linear, center, extreme)
        assert change < 0.1
        assert change < change_by_context(ordinary, center, extreme) / 5


@pytest.mark.parametrize(
    "config",
    [
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"layers_per_block": 2},
        {"mid_block_add_attention": False},
        {
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        },
    ],
)
def test_the_linear_code_does_not_depend_on_what_surrounds_it(config):
    images = smooth(side=24)
    plain, other = initialized(images), initialized(images, **config)
    assert torch.allclose(encode(other, images), encode(plain, images), atol=0.05)
    _, linear = principal_components(images, 4)
    assert error_inside(reconstruct(other, images), images) <= 1.15 * error_inside(linear, images)


def test_residual_branches_are_silent_and_receive_gradient():
    images = smooth(side=24)
    autoencoder = initialized(images)
    reconstruction = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample
    F.mse_loss(reconstruction, images).backward()
    blocks = [module for module in autoencoder.modules() if isinstance(module, ResnetBlock2D)]
    attentions = [module for module in autoencoder.modules() if isinstance(module, Attention)]
    assert len(blocks) == 3 + 2 + 6 + 2 and len(attentions) == 2
    for last in [block.conv2 for block in blocks] + [attention.to_out[0] for attention in attentions]:
        assert last.weight.abs().max() == 0
        assert last.weight.grad.abs().max() > 0


def test_the_same_images_give_the_same_weights():
    first, second = (initialized(smooth(side=24)).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"widths": (16, 32, 40)}, "norm_num_groups 4: a linear start needs the first and last width divisible by 16"),
        ({"widths": (24, 32, 64)}, "first and last width divisible by 16"),
        ({"widths": (16, 64, 16), "latent_channels": 17}, "too narrow for a linear start: at least 12 first and 17 last"),
        ({"widths": (16, 32, 64), "channels": 5}, "at least 20 first"),
        ({"widths": (16, 16, 64)}, "the first two different"),
        ({"widths": (64,)}, "two widths or more"),
        ({"widths": (16, 8, 64), "latent_channels": 5}, "4 components of the 4x4 blocks reach the latents"),
        ({"out_channels": 1}, "out_channels: expected in_channels, 3, for a linear start, got 1"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_linear_are_refused_untouched(config, message):
    autoencoder = build(**config)
    before = {key: tensor.clone() for key, tensor in autoencoder.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refusal:
        initialize_linear_code(autoencoder, torch.zeros(2, config.get("channels", 3), 16, 16))
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in autoencoder.state_dict().items())


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 18, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\)|images with sides divisible by 4"):
        initialize_linear_code(build(), torch.zeros(shape))


def test_images_without_variety_are_refused():
    """Blank images have no principal components: dividing by their spread would give infinite weights."""
    for images in (torch.zeros(4, 3, 16, 16), torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 16, 16)):
        with pytest.raises(ValueError, match="vary in fewer directions than the 4 latent channels"):
            initialize_linear_code(build(), images)


def test_a_smaller_anchor_keeps_more_digits_in_bfloat16():
    images = smooth()

    def lost(anchor):
        autoencoder = build()
        initialize_linear_code(autoencoder, images, anchor=anchor)
        exact = reconstruct(autoencoder.eval(), images)
        return (reconstruct(autoencoder.bfloat16(), images.bfloat16()).float() - exact).square().mean()

    assert lost(3.0) < lost(8.0) / 2


def evenly(**config):
    autoencoder = build(**config)
    initialize_evenly(autoencoder)
    return autoencoder


def convolutions(autoencoder):
    return {name: module for name, module in autoencoder.named_modules() if isinstance(module, nn.Conv2d)}


def test_an_even_start_keeps_the_variance_through_every_convolution():
    for name, conv in convolutions(evenly()).items():
        if name.endswith(".conv2"):
            continue
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(16, conv.in_channels, 24, 24, generator=generator)
        with torch.no_grad():
            variance = conv(features)[..., 1:-1, 1:-1].var().item()  # within the zero padding
        # A sum of n squared normal weights strays from n by sqrt(2 n); five times that, and the features' own.
        assert abs(variance - 1) < 5 * math.sqrt(2 / conv.weight.numel()) + 0.05, name


def test_an_even_start_has_no_biases_and_silent_residual_branches_that_receive_gradient():
    autoencoder = evenly()
    assert all(conv.bias is None or conv.bias.abs().max() == 0 for conv in convolutions(autoencoder).values())
    blocks = [module for module in autoencoder.modules() if isinstance(module, ResnetBlock2D)]
    assert len(blocks) == 3 + 2 + 6 + 2
    for block in blocks:
        features = torch.randn(2, block.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        carried = features if block.conv_shortcut is None else block.conv_shortcut(features)
        torch.testing.assert_close(block(features, None), carried)

    images = smooth(side=24)
    reconstruction = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample
    F.mse_loss(reconstruction, images).backward()
    assert all(block.conv2.weight.grad.abs().max() > 0 for block in blocks)


def test_after_an_even_start_a_deep_code_tells_images_apart():
    """Six levels down to one vector: how far vectors of different images lie apart, in units of their own length."""
    images = smooth(side=32)
    deep = {"widths": (8, 16, 32, 32, 32, 32), "mid_block_add_attention": False}

    def apart(autoencoder):
        codes = encode(autoencoder.eval(), images).flatten(1)
        return (codes.std(0).norm() / codes.square().mean(0).sqrt().norm()).item()

    assert apart(evenly(**deep)) > 0.7
    assert apart(evenly(**deep)) > 2 * apart(build(**deep))


def test_build_autoencoder_starts_evenly_as_the_configuration_says():
    even, again, random = (
        build_autoencoder(tiny_config(model={"initialization": start}))
        for start in ("even", "even", "random")
    )
    assert all(conv.bias is None or conv.bias.abs().max() == 0 for conv in convolutions(even).values())
    assert any(conv.bias.abs().max() > 0 for conv in convolutions(random).values() if conv.bias is not None)
    assert all(torch.equal(first, second) for first, second in zip(even.parameters(), again.parameters()))
