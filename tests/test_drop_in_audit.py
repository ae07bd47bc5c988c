"""The drop-in audit: weights to the bit, drift and decodings against figures computed by hand, the thresholds."""

import copy
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec import AutoencoderVQ, HierarchicalVQ, LatentCodec
from latent_codec.evaluation.calibration import calibrate, measure, normalize_latents
from latent_codec.evaluation.drop_in_audit import CLOSE, RELATED, audit_drop_in
from latent_codec.families import LatentSpace
from latent_codec.images.sources import ImageSource
from latent_codec.metrics import psnr, round_to_8_bits


def build(seed=0, kind=diffusers.AutoencoderKL, name="mine", **config):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    defaults = {"block_out_channels": (8, 8), "norm_num_groups": 4, "mid_block_add_attention": False}
    return LatentCodec(kind(**blocks | defaults | config), name=name)


def twin(codec, name="theirs"):
    return LatentCodec(copy.deepcopy(codec.autoencoder), name=name)


def disturb(parameter, amount):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 4, 4, generator=generator) * 2 - 1
    fine = torch.nn.functional.interpolate(coarse, size=(16, 24), mode="bilinear")
    return list(fine)


# ------------------------------------------------------------------------------------------ weights


def test_a_codec_fits_itself_and_nothing_drifts(images):
    mine = build()
    audit = audit_drop_in(mine, twin(mine), images)
    assert audit.fit == "same" and audit.verdict.startswith("same latent space: encoder equal to the bit")
    assert audit.encoder.are_equal and audit.decoder.are_equal
    assert audit.drift == 0 and audit.num_images == 3
    assert all(each.correlation == pytest.approx(1) and each.mean_difference == 0 for each in audit.channels)
    assert audit.psnr == audit.psnr_of_reference == audit.psnr_by_reference


def test_a_fine_tuned_decoder_is_named_tensor_by_tensor(images):
    mine = build()
    theirs = twin(mine)
    disturb(theirs.autoencoder.decoder.conv_out.weight, 0.1)
    disturb(theirs.autoencoder.post_quant_conv.weight, 0.1)
    audit = audit_drop_in(mine, theirs, images)
    assert audit.fit == "same" and audit.drift == 0
    assert audit.decoder.differing == ("decoder.conv_out.weight", "post_quant_conv.weight")
    assert audit.decoder.num_equal == audit.decoder.num_tensors - 2
    assert audit.psnr != audit.psnr_by_reference == audit.psnr_of_reference


@pytest.mark.parametrize("key", ["encoder.conv_in.weight", "quant_conv.bias"])
def test_one_bit_in_the_encoder_is_seen(key):
    mine = build()
    theirs = twin(mine)
    tensor = theirs.autoencoder.get_parameter(key)
    with torch.no_grad():
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))
    audit = audit_drop_in(mine, theirs)
    assert audit.encoder.differing == (key,) and audit.decoder.are_equal
    assert audit.fit == "unknown" and audit.drift is None and audit.channels == () and audit.psnr is None
    assert f"in 1 of {audit.encoder.num_tensors} tensors" in audit.verdict and "images" in audit.verdict


def test_tensors_that_one_lacks_or_that_differ_in_shape():
    mine, theirs = build(), build(use_quant_conv=False, latent_channels=4, block_out_channels=(8, 16))
    audit = audit_drop_in(mine, theirs)
    assert {"quant_conv.weight", "quant_conv.bias"} <= set(audit.encoder.missing)
    assert "encoder.conv_out.weight" in audit.encoder.differing
    counted = audit.encoder.num_equal + len(audit.encoder.differing) + len(audit.encoder.missing)
    assert counted == audit.encoder.num_tensors


def test_equal_weights_in_another_network_are_not_the_same_encoder(images):
    mine = build()
    config = dict(mine.autoencoder.config) | {"norm_num_groups": 2}
    theirs = LatentCodec(diffusers.AutoencoderKL.from_config(config), name="theirs")
    theirs.autoencoder.load_state_dict(mine.autoencoder.state_dict())
    audit = audit_drop_in(mine, theirs)
    assert audit.encoder.are_equal and audit.fit == "unknown" and "config" in audit.verdict
    assert audit.config_differences == ("norm_num_groups 4 and 2",)
    measured = audit_drop_in(mine, theirs, images)
    assert measured.drift > CLOSE and measured.fit in ("related", "another")


def test_config_entries_that_do_not_touch_the_encoder_do_not_count():
    mine = build()
    theirs = twin(mine)
    theirs.autoencoder.register_to_config(sample_size=999, force_upcast=False)
    assert audit_drop_in(mine, theirs).fit == "same"


def test_the_codebook_counts_as_what_makes_latents():
    mine = build(kind=AutoencoderVQ, num_vq_embeddings=16, latent_channels=4)
    theirs = twin(mine)
    disturb(theirs.autoencoder.quantize.embedding.weight, 0.1)
    audit = audit_drop_in(mine, theirs)
    assert audit.encoder.differing == ("quantize.embedding.weight",)
    # A plain VQModel with the same weights is the same encoder.
    plain = build(kind=diffusers.VQModel, num_vq_embeddings=16, latent_channels=4, scaling_factor=1.0)
    plain.autoencoder.load_state_dict(mine.autoencoder.state_dict(), strict=False)
    assert audit_drop_in(mine, plain).encoder.differing == ()


def test_of_several_levels_the_upper_decoders_count_as_encoder():
    torch.manual_seed(0)
    mine = LatentCodec(HierarchicalVQ(hidden_channels=8, residual_channels=4, embed_dim=2, codebook_sizes=16))
    theirs = twin(mine)
    disturb(next(theirs.autoencoder.decoders[1].parameters()), 0.1)
    assert audit_drop_in(mine, theirs).fit == "same"
    disturb(next(theirs.autoencoder.decoders[0].parameters()), 0.1)
    assert audit_drop_in(mine, theirs).fit == "unknown"


# ------------------------------------------------------------------------------------------ space


def test_the_same_encoder_with_another_scale(images):
    mine = build(scaling_factor=0.5, shift_factor=0.0)
    theirs = twin(mine)
    theirs.latent_space = LatentSpace(4, 2, scaling_factor=1.0, shift_factor=0.25)
    audit = audit_drop_in(mine, theirs, images)
    assert audit.fit == "rescaled" and "another scale" in audit.verdict
    assert audit.drift > 0 and all(each.correlation == pytest.approx(1) for each in audit.channels)
    for each in audit.channels:
        # (raw - 0) * 0.5 next to (raw - 0.25) * 1
        assert each.std == pytest.approx(each.reference_std / 2)
        assert each.mean == pytest.approx((each.reference_mean + 0.25) / 2, abs=1e-6)
    assert (audit.space, audit.reference_space) == (mine.latent_space, theirs.latent_space)


@pytest.mark.parametrize(
    "config",
    [{"latent_channels": 8}, {"block_out_channels": (8,) * 3}],
)
def test_latents_that_cannot_be_compared_name_both(config):
    levels = len(config.get("block_out_channels", (8, 8)))
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    with pytest.raises(ValueError, match=r"latents of mine have 4 channels.*2x2.*those of theirs have [48]"):
        audit_drop_in(build(), build(name="theirs", **config | types))


# ------------------------------------------------------------------------------------------ figures


def test_figures_are_what_a_reader_would_compute(images):
    mine, theirs = build(0, scaling_factor=0.3), build(1, name="theirs", shift_factor=0.1)
    audit = audit_drop_in(mine, theirs, images)
    # (C, positions) of all images
    a, b = (
        torch.cat([codec.encode(image)[0].flatten(1) for image in images], 1).double().numpy()
        for codec in (mine, theirs)
    )
    for channel, each in enumerate(audit.channels):
        assert each.mean == pytest.approx(a[channel].mean())
        assert each.std == pytest.approx(a[channel].std())
        assert each.reference_mean == pytest.approx(b[channel].mean())
        assert each.reference_std == pytest.approx(b[channel].std())
        assert each.mean_difference == pytest.approx(a[channel].mean() - b[channel].mean())
        assert each.correlation == pytest.approx(np.corrcoef(a[channel], b[channel])[0, 1])
    spread = np.sqrt(b.var(axis=1).mean())
    assert audit.drift == pytest.approx(np.sqrt(((a - b) ** 2).mean()) / spread)

    def decoded_by(decoder, encoder):
        figures = [
            psnr(round_to_8_bits(decoder.decode(encoder.encode(image), output_type="pt")), image[None])
            for image in images
        ]
        return float(torch.cat(figures).double().mean())

    assert audit.psnr == pytest.approx(decoded_by(mine, mine))
    assert audit.psnr_of_reference == pytest.approx(decoded_by(theirs, theirs))
    assert audit.psnr_by_reference == pytest.approx(decoded_by(theirs, mine))
    assert audit.psnr_of_reference_by_codec == pytest.approx(decoded_by(mine, theirs))


def test_images_of_any_kind_and_size(tmp_path):
    mine = build()
    theirs = build(1, name="theirs", in_channels=1, out_channels=1)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (13, 21, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png")
    audit = audit_drop_in(mine, theirs, [tmp_path / "odd.png", pixels, Image.fromarray(pixels)])
    assert audit.num_images == 3 and math.isfinite(audit.drift) and math.isfinite(audit.psnr)


@pytest.mark.parametrize("amount, fit", [(1e-4, "close"), (0.08, "related"), (3.0, "another")])
def test_fit_follows_the_drift(images, amount, fit):
    mine = build()
    theirs = twin(mine)
    disturb(theirs.autoencoder.encoder.conv_out.weight, amount)
    audit = audit_drop_in(mine, theirs, images)
    assert audit.fit == fit and audit.verdict.startswith(fit)
    low, high = {"close": (0, CLOSE), "related": (CLOSE, RELATED), "another": (RELATED, math.inf)}[fit]
    assert low < audit.drift <= high
    assert f"{audit.drift:.2g}" in audit.verdict


def test_half_precision_weights_are_close_but_not_equal(images):
    mine = build()
    theirs = twin(mine)
    theirs.autoencoder.half().float()
    audit = audit_drop_in(mine, theirs, images)
    assert not audit.encoder.are_equal and audit.fit == "close" and 0 < audit.drift < CLOSE / 10


class Photographs(ImageSource):
    def __init__(self, images):
        self.pixels = [((image + 1) * 127.5).round().to(torch.uint8) for image in images]

    def __len__(self):
        return len(self.pixels)

    def name(self, index):
        return str(index)

    def read(self, index, channels=3):
        return self.pixels[index]


def test_a_scale_folded_into_the_weights_is_close(images):
    """Mean and std in the config, or in the quant convolutions: the same latents up to rounding."""
    theirs = build(name="theirs")
    calibrate(theirs, measure(theirs, Photographs(images)), "channels")
    mine = twin(theirs, "mine")
    normalize_latents(mine.autoencoder, theirs.latent_space.mean, theirs.latent_space.std)
    mine.latent_space = LatentSpace(4, 2, mean=(0.0,) * 4, std=(1.0,) * 4)
    audit = audit_drop_in(mine, theirs, images)
    assert set(audit.encoder.differing) == {"quant_conv.weight", "quant_conv.bias"}
    assert audit.fit == "close" and audit.drift < 1e-4


def test_a_constant_channel_has_no_correlation(images):
    mine = build()
    with torch.no_grad():
        mine.autoencoder.quant_conv.weight[0] = 0
    audit = audit_drop_in(mine, build(1), images)
    assert audit.channels[0].correlation is None and audit.channels[0].std == 0
    assert audit.channels[1].correlation is not None


def test_refusals(images):
    mine = build()
    with pytest.raises(ValueError, match="expected at least one image"):
        audit_drop_in(mine, mine, [])
    flat = twin(mine)
    with torch.no_grad():
        flat.autoencoder.quant_conv.weight.zero_()
    with pytest.raises(ValueError, match="same everywhere"):
        audit_drop_in(mine, flat, images)


def test_plain_data_without_infinity(images):
    mine = build()
    found = audit_drop_in(mine, twin(mine), images).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["encoder"]["num_equal"] > 0
    assert audit_drop_in(mine, twin(mine)).to_dict()["psnr"] is None
