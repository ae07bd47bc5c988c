"""Residual quantization over scales: against VAR's algorithms written down plainly, its grids, and every part of the package
that meets a level whose indices cover a fraction of pixels."""

import json
from fractions import Fraction

import pytest
import torch
from helpers.training import tiny_config, write_images
from torch.nn import functional as F

from latent_codec import LatentCodec, MultiScaleVQ, PixelCNN
from latent_codec.bitstream import compress
from latent_codec.cli import main
from latent_codec.evaluation.codes import codeword_tiles, index_map
from latent_codec.pipelines import HierarchicalPriorPipeline
from latent_codec.training.config import dump_toml
from latent_codec.training.report import read_metrics

SIDES = (1, 2, 3, 4)
ARGUMENTS = {
    "downsampling_factor": 4,
    "sides": SIDES,
    "hidden_channels": 8,
    "num_residual_blocks": 1,
    "residual_channels": 4,
    "embed_dim": 4,
    "codebook_size": 16,
}


def tiny(**config) -> MultiScaleVQ:
    """A small model of 16-pixel squares whose latents spread over its codewords, as a trained one's do."""
    torch.manual_seed(0)
    model = MultiScaleVQ(**ARGUMENTS | config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        model.quantize.embedding.weight.normal_()
    return model.eval()


def make_image(height=16, width=32, batch=2) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_indices_and_image_are_those_of_vars_algorithms():
    model, image = tiny(), make_image()
    features = model.quantize_conv(model.encoder(image))
    shapes, total, grids = [(side, 2 * side) for side in SIDES], torch.zeros_like(features), []
    for shape, phi in zip(shapes, model.phis):
        part = F.interpolate(features - total, size=shape, mode="area").movedim(1, -1)
        grids.append((part[..., None, :] - model.quantize.embedding.weight).square().sum(-1).argmin(-1))
        part = model.quantize.embedding.weight[grids[-1]].movedim(-1, 1)
        large = part if shape == shapes[-1] else F.interpolate(part, size=shapes[-1], mode="bicubic")
        total = total + 0.5 * large + 0.5 * phi(large)

    found = model.encode_indices(image)
    assert all(torch.equal(one, other) for one, other in zip(found, grids, strict=True))
    assert torch.cat([grid.flatten() for grid in grids]).unique().numel() > 8
    torch.testing.assert_close(model.encode(image).latents, total)
    torch.testing.assert_close(model.decode_indices(found), model.image_decoder(total))


@torch.no_grad()
def test_the_first_scales_decode_by_themselves_and_what_is_not_known_adds_nothing():
    model = tiny()
    grids = model.encode_indices(make_image())
    coarse = model.decode_indices(grids[:2])
    torch.testing.assert_close(
        coarse, model.image_decoder(model.latents_of([model.quantize.lookup(each) for each in grids[:2]]))
    )
    known = [torch.full_like(grid, level < 2, dtype=torch.bool) for level, grid in enumerate(grids)]
    torch.testing.assert_close(model.decode_indices(grids, known), coarse)
    assert (model.decode_indices(grids) - coarse).abs().max() > 0.01


@torch.no_grad()
def test_the_condition_of_a_scale_is_what_those_before_it_add_up_to_on_its_own_grid():
    model = tiny()
    grids = model.encode_indices(make_image())
    for level in range(1, len(SIDES)):
        condition = model.upper_features(grids[:level])
        assert condition.shape == (2, model.condition_channels(level), *grids[level].shape[1:])
    torch.testing.assert_close(model.upper_features(grids), model.encode(make_image()).latents)


def test_gradients_pass_through_all_scales_to_encoder_phis_and_decoder():
    model, image = tiny().train(), make_image()
    outputs = model.encode_quantized(image)
    loss = F.mse_loss(model.decode_quantized([output.quantized for output in outputs]), image)
    loss.backward()
    for part in (model.encoder, model.quantize_conv, model.phis[0], model.image_decoder):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())


def test_sides_in_pixels_are_fractions_and_grids_exact():
    """VAR's own: a factor of 16 and images of 256 pixels."""
    model = MultiScaleVQ(hidden_channels=2, residual_channels=2, embed_dim=2, codebook_size=4)
    assert model.position_sides[:4] == [256, 128, Fraction(256, 3), 64]
    expected = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    assert model.grid_shapes(256, 256) == expected
    assert model.grid_shapes(512, 256) == [(2 * side, side) for side, _ in expected]
    codec = LatentCodec(model, name="var")
    assert [each.side for each in codec.levels] == model.position_sides and codec.family.side_multiple == 256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sides": (1, 3, 2)}, "expected ascending sides, got (1, 3, 2)"),
        ({"sides": (2, 3)}, "expected sides that the first one divides, got (2, 3)"),
        ({"downsampling_factor": 6}, "a downsampling_factor that is a power of two, got 6"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(ValueError) as refused:
        tiny(**config)
    assert message in str(refused.value)


@pytest.fixture(scope="module")
def make_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_images):
    """A training of three steps."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        model={"class_name": "MultiScaleVQ", "arguments": ARGUMENTS},
        codebook={"start_step": 1, "kmeans_crops": 6},
        objective={"level_dropout": 0.5},
        run={"steps": 3},
    )
    (folder / "tiny.toml").write_text(dump_toml(config.to_dict()))
    command = ["train", str(folder / "tiny.toml"), "--data", str(make_images), "--out", str(folder / "run")]
    assert main(command) == 0
    return folder / "run"


def test_it_trains_and_its_scales_share_one_learner(run):
    metrics = read_metrics(run)[-1]
    assert metrics["used_codes"] > 4 and metrics["commitment_4"] > 0 and "used_codes_1" not in metrics
    codec = LatentCodec.from_pretrained(run)
    assert codec.codebook_sizes == [16] * 4 and isinstance(codec.autoencoder, MultiScaleVQ)
    # The codebook began with k-means, moved on by the average, and is one in network and average.
    assert codec.autoencoder.quantize.embedding.weight.std() > 0.01


def test_verbs_take_it(run, make_images, tmp_path, capsys):
    assert main(["info", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["grids"] == [[1, 1], [2, 2], [3, 3], [4, 4]] and facts["codeword_dims"] == [4] * 4
    assert main(["evaluate", str(make_images), "--codec", str(run), "--json", "--limit", "2"]) == 0
    levels = json.loads(capsys.readouterr().out)["codes"]["levels"]
    assert [level["first_grid"] for level in levels] == [[2 * side, 2 * side] for side in SIDES]
    image, latents, back = make_images / "00.png", tmp_path / "a.safetensors", tmp_path / "images"
    assert main(["encode", str(image), "--codec", str(run), "--out", str(latents), "--indices"]) == 0
    assert main(["decode", str(latents), "--codec", str(run), "--out", str(back)]) == 0
    assert len(list(back.rglob("*.png"))) == 1


def test_images_of_its_codewords_and_indices_are_whole_pixels():
    codec = LatentCodec(tiny(), name="tiny")
    assert codeword_tiles(codec, 2).shape == (16, 3, 5, 5)  # 16 pixels by 3 indices
    grids = codec.encode_indices(make_image()[:1])
    assert index_map(grids[2][0], side=codec.levels[2].side).size == (32, 16)


def test_compressed_files_have_no_place_for_its_grids():
    codec = LatentCodec(tiny(), name="tiny")
    with pytest.raises(ValueError, match=r"tiny: expected levels .* got sides of 16, 8, 16/3, 4 pixels"):
        compress(codec, make_image()[0])


@torch.no_grad()
def test_priors_over_scales_make_a_pipeline_of_two_and_ten_are_refused():
    vae = tiny(sides=(1, 3))
    own = {"hidden_channels": 8, "num_layers": 2, "codebook_size": 16}
    torch.manual_seed(0)
    top, bottom = (
        PixelCNN(**own, sample_size=(1, 1)),
        PixelCNN(**own, condition_channels=vae.condition_channels(1)),
    )
    pipeline = HierarchicalPriorPipeline(vae, top, bottom)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(num_images=2, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert drawn.images.shape == (2, 3, 12, 12)
    assert [each.shape[1:] for each in drawn.indices] == [(1, 1), (3, 3)]
    with pytest.raises(
        ValueError,
        match=r"MultiScaleVQ of 4 levels, and there are 2 priors .* more than three levels are not",
    ):
        HierarchicalPriorPipeline(tiny(), top, bottom)
