"""An AutoencoderKL as another network that computes the same, in float64, and scales folded into weights."""

import diffusers
import pytest
import torch

from latent_codec import LatentCodec
from latent_codec.conversion.embedding import SD, as_network, misfits
from latent_codec.conversion.folding import fold_scale
from latent_codec.conversion.renaming import ConversionError, Scale
from latent_codec.conversion.scales import SCALES, named_scale

WIDE = {
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": True,
}
"""Stable Diffusion's network, an eighth as wide, with as many channels per level and group."""


def kl(**config):
    """Random weights of an AutoencoderKL in float64, norms and biases included."""
    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    autoencoder = diffusers.AutoencoderKL(**types | config)
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return autoencoder.double().eval()


@torch.no_grad()
def outputs(autoencoder, images):
    """Mean and log variance of the posterior, and the image of the mean."""
    posterior = autoencoder.encode(images).latent_dist
    return posterior.mean, posterior.logvar, autoencoder.decode(posterior.mean).sample


def largest_difference(one, other, images=None):
    images = torch.randn(1, 3, 24, 16, dtype=torch.float64) if images is None else images
    pairs = list(zip(outputs(one, images), outputs(other, images)))
    assert all(a.std() > 1e-3 for a, _ in pairs)  # else nothing would be compared
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "config",
    [
        {"block_out_channels": (4, 8, 16, 16), "norm_num_groups": 1, "layers_per_block": 1},
        {
            "block_out_channels": (8, 16, 32, 32),
            "norm_num_groups": 4,
            "layers_per_block": 2,
        },  # groups of half the width
        {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "mid_block_add_attention": False},
        {  # SD3's and FLUX's layout
            "block_out_channels": (12, 24, 48, 48),
            "norm_num_groups": 3,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "latent_channels": 16,
        },
        WIDE,
    ],
    ids=["narrower", "half as wide", "no middle attention", "no quant convs", "as wide"],
)
def test_a_narrower_network_is_embedded_exactly(config):
    autoencoder = kl(**config)
    embedded = as_network(autoencoder, WIDE)
    for key, value in WIDE.items():
        assert embedded.config[key] == value
    assert embedded.config.use_quant_conv == autoencoder.config.use_quant_conv
    assert largest_difference(autoencoder, embedded) <= 1e-12
    both = as_network(embedded, {"use_quant_conv": True, "use_post_quant_conv": True})
    assert both.quant_conv is not None
    assert largest_difference(autoencoder, both) <= 1e-12


def test_the_shipped_codec_fits_into_stable_diffusions_network():
    codec = LatentCodec.from_pretrained("default")
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    embedded = as_network(codec.autoencoder, SD)
    assert sum(each.numel() for each in embedded.parameters()) == 83_653_863  # as Stable Diffusion's
    assert largest_difference(codec.autoencoder, embedded, images) <= 1e-5  # float32
    assert largest_difference(codec.autoencoder.double(), embedded.double(), images.double()) <= 1e-12


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 2, "layers_per_block": 3},
            "layers_per_block is 3",
        ),
        ({"block_out_channels": (8, 16, 32), "norm_num_groups": 2}, "has 3 levels, and that network 4"),
        (
            {"block_out_channels": (8, 16, 32, 64), "norm_num_groups": 2},
            "would fit",
        ),
        ({"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8}, "at most 4 groups"),
        (
            {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 2},
            "levels 2 and 3 are 16 and 32 channels wide",
        ),
        ({"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 2, "act_fn": "relu"}, "act_fn is relu"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(config, reason):
    autoencoder = kl(**config)
    assert any(reason in each for each in misfits(autoencoder.config, WIDE))
    with pytest.raises(ConversionError, match="does not fit into that network exactly"):
        as_network(autoencoder, WIDE)


def test_what_is_said_to_fit_fits():
    (reason,) = misfits(kl(block_out_channels=(8, 16, 32, 64), norm_num_groups=2).config, WIDE)
    assert "block_out_channels (8, 16, 32, 32) with norm_num_groups 2 would fit" in reason
    assert not misfits(kl(block_out_channels=(8, 16, 32, 32), norm_num_groups=2).config, WIDE)


def test_quant_convs_are_multiplied_into_their_neighbors():
    autoencoder = kl(block_out_channels=(4, 8), norm_num_groups=2)
    without = {"use_quant_conv": False, "use_post_quant_conv": False}
    with pytest.raises(ConversionError, match="pads what it adds to with zeros"):
        as_network(autoencoder, without)
    autoencoder.post_quant_conv.bias.data.zero_()
    assert largest_difference(autoencoder, as_network(autoencoder, without)) <= 1e-12


@pytest.mark.parametrize("family", SCALES)
@pytest.mark.parametrize(
    "space",
    [
        {"scaling_factor": 0.7},
        {"scaling_factor": 2.0, "shift_factor": 0.3},
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 0.5]},
    ],
)
@pytest.mark.parametrize("has_quant_convs", [True, False])
def test_a_hosts_scale_is_folded_exactly(family, space, has_quant_convs):
    layout = {"use_quant_conv": has_quant_convs, "use_post_quant_conv": has_quant_convs}
    codec = LatentCodec(kl(block_out_channels=(4, 8), norm_num_groups=2, **space, **layout))
    folded = LatentCodec(fold_scale(codec.autoencoder, named_scale(family)))
    scaling_factor, shift_factor = SCALES[family]
    assert folded.latent_space.scaling_factor == scaling_factor
    assert folded.latent_space.shift_factor == (shift_factor or 0.0) and folded.latent_space.is_plain
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        mine, theirs = (each.autoencoder.encode(images).latent_dist for each in (codec, folded))
        latents = codec.latent_space.normalize(mine.mean)
        torch.testing.assert_close(
            folded.latent_space.normalize(theirs.mean), latents, rtol=1e-12, atol=1e-12
        )
        spread = codec.latent_space.normalize(mine.mean + mine.std) - latents
        their_spread = folded.latent_space.normalize(theirs.mean + theirs.std) - latents
        torch.testing.assert_close(their_spread, spread, rtol=1e-10, atol=1e-10)
        decoded = [
            each.autoencoder.decode(each.latent_space.denormalize(latents)).sample for each in (codec, folded)
        ]
    torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-11, atol=1e-11)


def test_no_quant_convs_are_added_where_nothing_is_shifted():
    autoencoder = kl(
        block_out_channels=(4, 8), norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False
    )
    assert fold_scale(autoencoder, Scale(0.5, None, "asked")).quant_conv is None
    assert fold_scale(autoencoder, Scale(0.5, 0.1, "asked")).quant_conv is not None
