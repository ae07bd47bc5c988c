"""Previews: the 1x1 map, the palette, the tiny decoder and the codec itself, fitted, stored and refused."""

import json
import math
import resource
from pathlib import Path

import diffusers
import pytest
import torch
from helpers.processes import run_forked
from helpers.training import write_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_todays_families import flux2
from torch.nn import functional as F

from latent_codec import AutoencoderVQ, HierarchicalVQ, LatentCodec, LatentSpace
from latent_codec.errors import SettingError
from latent_codec.families.latent_space import POSITION_FIRST, unpack_positions
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.previews import LatentPreviewer
from latent_codec.previews.fitting import (
    Sample,
    colored_noise,
    correlation,
    fit_linear,
    fit_map,
    fit_palette,
)
from latent_codec.previews.palette import Palette
from latent_codec.previews.preview_files import NAME, StoredPreview, preview_path, write_preview
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import TrainingConfig, load_config
from latent_codec.training.loop import train
from latent_codec.training.report import read_metrics
from latent_codec.training.tiny_decoder_task import build_tiny_decoder

BLOCKS = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def build(kind=diffusers.AutoencoderKL, channels=3, seed=0, **config) -> LatentCodec:
    torch.manual_seed(seed)
    if kind is HierarchicalVQ:
        small = {"hidden_channels": 8, "residual_channels": 4, "embed_dim": 4, "codebook_sizes": 16}
        model = HierarchicalVQ(in_channels=channels, strides=[4, 2], **(small | config))
    else:
        if kind is not diffusers.AutoencoderKL:
            config = {"num_vq_embeddings": 16} | config
        model = kind(in_channels=channels, out_channels=channels, **(BLOCKS | config))
    for codebook in [each.embedding for each in getattr(model, "quantizers", [])]:
        torch.nn.init.normal_(codebook.weight)
    return LatentCodec(model)


def patch_codec(tmp_path, make_images, **model) -> LatentCodec:
    """A codec that really codes: the principal components of the images' blocks, without any training."""
    arguments = {
        "block_out_channels": [16, 32],
        "norm_num_groups": 4,
        "latent_channels": 3,
        "mid_block_add_attention": False,
    }
    config = TrainingConfig.from_dict(
        {
            "model": {"arguments": arguments | model, "initialization": "linear"},
            "data": {"height": 16},
            "objective": {"posterior": "mean"},
            "optimizer": {"batch_size": 1},
            "run": {"steps": 1, "precision": "fp32", "calibration_images": 0},
        }
    )
    return LatentCodec(train(config, build_autoencoder(config), make_images, tmp_path / "linear").network)


def smooth(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return colored_noise((count, channels, height, width), 1.0, generator)


@pytest.fixture(scope="module")
def make_images(tmp_path_factory):
    """Smooth color images, since noise has no color to preview."""
    from latent_codec.images.tensors import write_image

    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(smooth(12, 3, 40, 56)):
        write_image((image / 3).clamp(-1, 1), folder / f"{number:02d}.png")
    return open_source(folder)


# ------------------------------------------------------------------------------------------ the previewer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_linear_is_a_matrix_at_every_position(dtype):
    weight, bias = torch.tensor([[0.5, 0], [0, 0.25], [1, -1]]), torch.tensor([0.0, 0.5, -0.25])
    latents = torch.tensor([[[[1.0, -4.0, 0.5]], [[1.0, 0.0, 0.25]]]], dtype=dtype)
    before = latents.clone()
    images = LatentPreviewer.linear(weight, bias)(latents)
    expected = torch.tensor([[0.5, 0.75, -0.25], [-1.0, 0.5, -1.0], [0.25, 0.5625, 0.0]])
    assert images.dtype == torch.float32 and images.device.type == "cpu"
    assert torch.equal(images, expected.T.reshape(1, 3, 1, 3))
    assert torch.equal(latents, before)


def test_what_a_previewer_says_of_itself():
    previewer = LatentPreviewer.linear(torch.zeros(3, 5), torch.zeros(3))
    assert (previewer.kind, previewer.latent_channels, previewer.space) == ("linear", 5, LatentSpace(5, 8))
    full = LatentPreviewer.full(build(latent_channels=3))
    assert (full.kind, full.latent_channels, full.space.downsampling_factor) == ("full", 3, 2)


def test_no_graph_grows_from_a_preview():
    latents = torch.zeros(1, 4, 2, 2, requires_grad=True)
    assert not LatentPreviewer.linear(torch.ones(3, 4), torch.zeros(3))(latents).requires_grad


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (
            torch.zeros(1, 5, 2, 2),
            r"expected latents \(B, 4, h, w\), got shape \(1, 5, 2, 2\)",
        ),
        (torch.zeros(4, 2, 2), r"expected latents \(B, 4, h, w\), got shape \(4, 2, 2\)"),
        (torch.zeros(1, 4, 0, 2), "expected latents"),
        (
            torch.zeros(1, 4, 2, 2, dtype=torch.int64),
            "expected latents as a floating-point tensor, got int64",
        ),
        ([[0.0]], "expected latents as a tensor, got list"),
        (torch.full((1, 4, 2, 2), math.nan), "NaN or infinity"),
        (torch.full((1, 4, 2, 2), math.inf), "NaN or infinity"),
    ],
)
def test_wrong_latents_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        LatentPreviewer.linear(torch.ones(3, 4), torch.zeros(3))(latents)


def test_wrong_maps_are_refused():
    with pytest.raises(
        ValueError,
        match=r"expected weight \(3, C\) or \(3, C, 3, 3\) and bias \(3,\), got shapes \(4, 3\) and",
    ):
        LatentPreviewer.linear(torch.zeros(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="weight is for 4 channels; the space has 16"):
        LatentPreviewer.linear(torch.zeros(3, 4), torch.zeros(3), space=LatentSpace(16, 8))
    with pytest.raises(ValueError, match="decoder is for 4 channels; the space has 16"):
        LatentPreviewer.tiny(TinyDecoder(4, (8,), (1,)), space=LatentSpace(16, 8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_full_is_the_codecs_decode_in_rgb(channels):
    codec = build(channels=channels, scaling_factor=0.5, shift_factor=0.25)
    latents = smooth(2, 4, 5, 7)
    images = LatentPreviewer.full(codec)(latents)
    decoded = codec.decode(latents, output_type="pt")
    if channels == 4:
        opacity = decoded[:, 3:] / 2 + 0.5
        decoded = decoded[:, :3] * opacity + (1 - opacity)
    torch.testing.assert_close(images, decoded.expand(2, 3, 10, 14))


def test_full_is_reduced_to_a_side():
    codec = build()
    latents = smooth(1, 4, 8, 16)
    images = LatentPreviewer.full(codec, max_side=16)(latents)
    assert images.shape == (1, 3, 8, 16)
    torch.testing.assert_close(images, codec.decode(F.avg_pool2d(latents, 2), output_type="pt"))
    assert LatentPreviewer.full(codec, max_side=13)(latents).shape == (1, 3, 6, 12)
    assert LatentPreviewer.full(codec, max_side=30)(smooth(1, 4, 1, 22)).shape == (1, 3, 2, 30)
    assert torch.equal(
        LatentPreviewer.full(codec, max_side=500)(latents), codec.decode(latents, output_type="pt")
    )
    with pytest.raises(ValueError, match=r"max_side: expected at least 2, .* got 1"):
        LatentPreviewer.full(codec, max_side=1)


# ------------------------------------------------------------------------------------------ indices


def test_a_palette_adds_levels_up_and_leaves_out_what_is_unknown():
    palette = Palette(torch.tensor([0.5, 0, 0]), [torch.eye(3) / 4, -torch.eye(3)[:2] / 8])
    previewer = LatentPreviewer.linear(torch.zeros(3, 4), torch.zeros(3), palette=palette)
    top, bottom = torch.tensor([[[0, 2]]]), torch.tensor([[[0, 1, -1, 1], [-1, 0, 1, 1]]])
    images = previewer.indices([top, bottom])
    red = torch.tensor([[0.625, 0.75, 0.5, 0.5], [0.75, 0.625, 0.5, 0.5]])
    green = torch.tensor([[0, -0.125, 0, -0.125], [0, 0, -0.125, -0.125]])
    blue = torch.tensor([[0, 0, 0.25, 0.25], [0, 0, 0.25, 0.25]])
    assert torch.equal(images, torch.stack([red, green, blue])[None])
    # the top level alone, as a list or not, is shown on its own grid
    assert torch.equal(previewer.indices(top), previewer.indices([top]))
    assert torch.equal(previewer.indices(top), torch.tensor([[[[0.75, 0.5]], [[0, 0]], [[0, 0.25]]]]))
    nothing = previewer.indices(torch.full((2, 3, 3), -1))
    assert torch.equal(nothing, torch.tensor([0.5, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 3, 3))


def test_a_mask_says_what_is_known_too():
    previewer = LatentPreviewer.linear(
        torch.zeros(3, 4), torch.zeros(3), palette=Palette(torch.zeros(3), [torch.ones(4, 3)])
    )
    grid, mask = torch.tensor([[[0, 1], [2, 3]]] * 2), torch.tensor([[True, False], [True, True]])
    expected = previewer.indices(torch.tensor([[[0, -1], [2, 3]]] * 2))
    assert torch.equal(previewer.indices(grid, known_mask=mask), expected)
    assert torch.equal(previewer.indices([grid], known_mask=[mask.expand(2, 2, 2)]), expected)
    assert expected[0, 0].tolist() == [[1, 0], [1, 1]]
    with pytest.raises(ValueError, match="expected a mask for each of 1 index maps, got 2"):
        previewer.indices(grid, known_mask=[mask, mask])
    with pytest.raises(
        ValueError,
        match=r"known_mask of level 0 \(2, 2, 2\) or \(2, 2\) in torch.bool, got shape \(2, 2\) in",
    ):
        previewer.indices(grid, known_mask=mask.float())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(1, 2, 2), r"indices of level 0: expected int64, .* got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"indices of level 0 \(2, h, w\), got shape \(2, 2\)"),
        (torch.full((1, 2, 2), 4), "expected 0 to 3, or -1 where not known yet, got 4 to 4"),
        (torch.full((1, 2, 2), -2), "got -2 to -2"),
        ([torch.zeros(1, 2, 2).long()] * 2, "expected 1 to 1 index maps"),
        ([], "expected 1 to 1 index maps, top level first, got 0"),
    ],
)
def test_wrong_indices_are_refused(indices, message):
    palette = Palette(torch.zeros(3), [torch.ones(4, 3)])
    previewer = LatentPreviewer.linear(torch.zeros(3, 4), torch.zeros(3), palette=palette)
    with pytest.raises(ValueError, match=message):
        previewer.indices(indices)


def test_a_codec_without_codebook_has_no_colors_of_codewords():
    for previewer in (
        LatentPreviewer.full(build()),
        LatentPreviewer.linear(torch.zeros(3, 4), torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="takes latents, not indices"):
            previewer.indices(torch.zeros(1, 2, 2).long())


@pytest.mark.parametrize("kind", [AutoencoderVQ, HierarchicalVQ, diffusers.VQModel])
def test_full_decodes_indices_and_fills_in_the_middle_codeword(kind):
    codec = build(kind)
    grids = codec.encode_indices((smooth(2, 3, 16, 24) / 3).clamp(-1, 1))
    previewer = LatentPreviewer.full(codec)
    assert torch.equal(previewer.indices(grids), codec.decode_indices(grids, output_type="pt"))
    if kind is HierarchicalVQ:
        weight = codec.autoencoder.quantizers[1].embedding.weight
    else:
        weight = codec.autoencoder.quantize.embedding.weight
    middle = int(torch.cdist(weight.mean(0, keepdim=True), weight).argmin())
    partial, filled = [grid.clone() for grid in grids], [grid.clone() for grid in grids]
    partial[-1][:, 2:], filled[-1][:, 2:] = -1, middle
    assert torch.equal(previewer.indices(partial), codec.decode_indices(filled, output_type="pt"))
    reduced = LatentPreviewer.full(codec, max_side=12).indices(grids)
    # of a HierarchicalVQ whole codewords of the top level, 8 px wide
    assert reduced.shape == ((2, 3, 8, 8) if kind is HierarchicalVQ else (2, 3, 8, 12))
    alone = LatentPreviewer.full(codec, max_side=16).indices(grids[:1])
    assert alone.shape == ((2, 3, 8, 16) if kind is HierarchicalVQ else (2, 3, 10, 16))


# ------------------------------------------------------------------------------------------ fitting


def test_a_palette_is_the_mean_color_per_codeword_and_unused_ones_follow_their_vectors():
    torch.manual_seed(0)
    codebook = torch.randn(8, 2)
    colors = (codebook @ torch.randn(2, 3)) / 4
    grid = torch.randint(0, 7, (4, 32, 32))  # never the last
    shown = colors[grid].permute(0, 3, 1, 2)
    palette = fit_palette([codebook], [Sample(torch.zeros(0), [grid], shown)])
    found = palette.mean + palette.tables[0]
    torch.testing.assert_close(found, colors, rtol=0, atol=1e-3)
    # what no vector explains is learned where it is seen
    odd = colors.clone()
    odd[0] += 0.5
    palette = fit_palette([codebook], [Sample(torch.zeros(0), [grid], odd[grid].permute(0, 3, 1, 2))])
    torch.testing.assert_close((palette.mean + palette.tables[0])[:7], odd[:7], rtol=0, atol=0.01)


def test_the_top_level_shows_all_it_can_alone():
    torch.manual_seed(0)
    top, bottom = torch.randint(0, 4, (4, 8, 8)), torch.randint(0, 4, (4, 16, 16))
    tables = torch.randn(4, 3) / 4, torch.randn(4, 3) / 16
    coarse = tables[0][top].permute(0, 3, 1, 2)
    shown = F.interpolate(coarse, scale_factor=2) + tables[1][bottom].permute(0, 3, 1, 2)
    codebooks = [torch.randn(4, 2), torch.randn(4, 2)]
    palette = fit_palette(codebooks, [Sample(torch.zeros(0), [top, bottom], shown)])
    previewer = LatentPreviewer.linear(torch.zeros(3, 4), torch.zeros(3), palette=palette)
    assert correlation(previewer.indices([top]), F.avg_pool2d(shown, 2)) > 0.97
    assert correlation(previewer.indices([top, bottom]), shown) > 0.99


def test_correlation_is_pearsons():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert correlation(a, b) == pytest.approx(float(expected), abs=1e-6)
    assert correlation(a, 2 * a + 3) == pytest.approx(1)
    assert correlation(a, torch.ones_like(a)) == 0


def test_colored_noise_has_the_spectrum_that_it_is_asked_for():
    noise = smooth(200, 1, 32, 48)
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    assert noise.std() == pytest.approx(1, abs=1e-3)
    # amplitude 1 / f is power 1 / f^2: from 2 to 8 cycles a side a factor of 16
    assert power[2, 0] / power[8, 0] == pytest.approx(16, rel=0.3)
    white = (
        torch.fft.rfft2(colored_noise((200, 1, 32, 48), 0, torch.Generator().manual_seed(0))).abs().square()
    )
    assert white.mean((0, 1))[2, 0] / white.mean((0, 1))[8, 0] == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_a_linear_preview_shows_images_of_a_codec_that_codes(tmp_path, make_images, scale):
    codec = patch_codec(tmp_path, make_images, scaling_factor=scale)
    image = make_images.read(3).float() / 127.5 - 1
    shown = F.avg_pool2d(image[None], 2)
    latents = codec.encode(image)
    fit = fit_linear(codec, make_images)
    assert fit.num_images == 11 and fit.seconds > 0 and fit.skipped == () and fit.palette is None
    assert fit.correlation > 0.99
    previewer = LatentPreviewer.linear(fit.weight, fit.bias, space=codec.latent_space)
    assert correlation(previewer(latents), shown) > 0.99
    assert fit_linear(codec, SomeImages(make_images, [*range(12)] * 3)).num_images == 21  # are enough
    blind = fit_linear(codec)
    assert (blind.num_images, blind.correlation) == (0, None)
    assert correlation(LatentPreviewer.linear(blind.weight, blind.bias)(latents), shown) > 0.95


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [diffusers.AutoencoderKL, AutoencoderVQ, HierarchicalVQ, diffusers.VQModel])
def test_any_codec_gets_a_preview_with_and_without_images(kind, channels, tmp_path):
    codec = build(kind, channels)
    source = open_source(write_images(tmp_path, 3, channels, size=(21, 17)))
    for fit in (fit_linear(codec, source, num_images=2), fit_linear(codec)):
        previewer = LatentPreviewer.linear(
            fit.weight, fit.bias, space=codec.latent_space, palette=fit.palette
        )
        image = source.read(0, channels).float() / 127.5 - 1
        latents = codec.encode(image)
        images = previewer(latents)
        assert images.shape == (1, 3, *latents.shape[2:]) and images.abs().max() <= 1
        if channels == 1:
            torch.testing.assert_close(images, images[:, :1].expand(-1, 3, -1, -1))
        assert (fit.palette is None) == (kind is diffusers.AutoencoderKL)
        if fit.palette is not None:
            grids = codec.encode_indices(image)
            assert previewer.indices(grids).shape == (1, 3, *grids[-1].shape[1:])


def test_unreadable_images_are_left_out_and_named(tmp_path):
    folder = write_images(tmp_path, 3)
    (folder / "01.png").write_bytes(b"no image")
    fit = fit_linear(build(), open_source(folder))
    assert fit.num_images == 2 and len(fit.skipped) == 1 and "01.png" in fit.skipped[0]
    for name in ("00.png", "02.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image could be read; the first of 3: .*00.png"):
        fit_linear(build(), open_source(folder))


def test_more_images_are_taken_where_a_1x1_map_is_too_coarse(tmp_path):
    source, seen = open_source(write_images(tmp_path, 30, size=(8, 8))), []
    assert fit_linear(build(), source, on_progress=lambda *each: seen.append(each)).num_images == 27
    assert seen == [(done, 21) for done in range(1, 22)] + [(done, 27) for done in range(22, 28)]
    assert fit_linear(build(), source, num_images=24).num_images == 21


def test_a_3x3_map_is_fitted_where_colors_depend_on_neighbors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 32, 40, generator=generator)
    weight, bias = torch.randn(3, 4, 3, 3, generator=generator), torch.tensor([0.5, 0.0, -0.25])
    bordered = F.pad(latents, (1, 1, 1, 1), mode="replicate")
    found, found_bias = fit_map([Sample(latents, [], F.conv2d(bordered, weight, bias))])
    torch.testing.assert_close(found, weight, rtol=0, atol=2e-3)
    torch.testing.assert_close(found_bias, bias, rtol=0, atol=2e-3)

    pointwise = F.conv2d(latents, weight[:, :, 1:2, 1:2], bias)
    assert fit_map([Sample(latents, [], pointwise)])[0].shape == (3, 4)
    few = Sample(latents[:, :, :4, :4], [], F.conv2d(bordered, weight)[:, :, :4, :4])
    assert fit_map([few])[0].shape == (3, 4)

    codec = build()
    codec.save_pretrained(tmp_path / "codec")
    write_preview(preview_path(tmp_path / "codec"), codec, StoredPreview(found, found_bias, None, None))
    shown = LatentPreviewer.from_pretrained(tmp_path / "codec")(latents / 50)
    torch.testing.assert_close(shown, F.conv2d(bordered / 50, found, found_bias).clamp(-1, 1))


# ------------------------------------------------------------------------------------------ files


def stored(codec: LatentCodec, tiny: TinyDecoder | None = None) -> StoredPreview:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.rand(size, 3, generator=generator) - 0.5 for size in codec.codebook_sizes]
    palette = Palette(torch.full((3,), 0.125), tables) if codec.is_discrete else None
    weight = torch.rand(3, codec.latent_space.raw_channels, generator=generator)
    return StoredPreview(weight, torch.full((3,), 0.25), palette, tiny)


def saved(codec: LatentCodec, folder: Path, tiny: TinyDecoder | None = None) -> Path:
    codec.save_pretrained(folder)
    write_preview(preview_path(folder), codec, stored(codec, tiny))
    return folder


@pytest.mark.parametrize("kind", [diffusers.AutoencoderKL, AutoencoderVQ, HierarchicalVQ])
def test_a_previewer_finds_what_was_stored_next_to_the_codec(kind, tmp_path):
    codec = build(kind, scaling_factor=0.5)
    previewer = LatentPreviewer.from_pretrained(saved(codec, tmp_path / "codec"))
    expected = stored(codec)
    latents = smooth(1, codec.latent_space.channels, 4, 6)
    same = LatentPreviewer.linear(expected.weight, expected.bias, palette=expected.palette)
    assert previewer.kind == "linear" and previewer.space == codec.latent_space
    assert torch.equal(previewer(latents), same(latents))
    if codec.is_discrete:
        grids = codec.encode_indices((smooth(1, 3, 8, 8) / 3).clamp(-1, 1))
        assert torch.equal(previewer.indices(grids), same.indices(grids))
    full = LatentPreviewer.from_pretrained(tmp_path / "codec", kind="full")
    assert full.kind == "full" and torch.equal(full(latents), LatentPreviewer.full(codec)(latents))


def test_a_tiny_decoder_is_taken_where_there_is_one(tmp_path):
    codec = build()
    torch.manual_seed(1)
    tiny = TinyDecoder(4, (8, 8), (1, 1), latent_magnitude=2.0).eval()
    folder = saved(codec, tmp_path / "codec", tiny)
    previewer = LatentPreviewer.from_pretrained(folder)
    latents = smooth(2, 4, 4, 6)
    with torch.no_grad():
        expected = tiny.half().float()(latents).clamp(-1, 1)  # as stored
    assert previewer.kind == "tiny"
    assert previewer(latents).shape == (2, 3, 8, 12)
    torch.testing.assert_close(previewer(latents), expected)
    torch.testing.assert_close(previewer(latents.double()), expected)
    assert LatentPreviewer.from_pretrained(folder, kind="linear").kind == "linear"


def test_a_preview_of_another_codec_is_refused_with_both_fingerprints(tmp_path):
    one, other = build(seed=0), build(seed=1)
    saved(one, tmp_path / "codec")
    other.save_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match="shows the latents of codec") as refusal:
        LatentPreviewer.from_pretrained(tmp_path / "codec")
    assert one.fingerprint in str(refusal.value) and other.fingerprint in str(refusal.value)


def test_a_preview_of_another_pipelines_latents_is_refused_with_both_pipelines(tmp_path):
    codec = LatentCodec(flux2(), pipeline="Ideogram4Pipeline")
    folder = saved(codec, tmp_path / "mine")
    previewer = LatentPreviewer.from_pretrained(folder, pipeline="Ideogram4Pipeline")
    assert previewer.space == codec.latent_space
    latents = smooth(1, 16, 4, 6)
    grid = unpack_positions(latents, POSITION_FIRST)  # a pixel each
    expected = LatentPreviewer.linear(stored(codec).weight, stored(codec).bias)(grid)
    assert torch.equal(previewer(latents), expected) and expected.shape == (1, 3, 8, 12)
    fit = fit_linear(codec)  # 4 channels
    assert fit.weight.shape[:2] == (3, 4)
    assert LatentPreviewer.from_pretrained(folder).space == codec.latent_space  # as it was saved
    message = rf"in Ideogram4Pipeline \({codec.fingerprint}\), not the latents of mine in ErnieImagePipeline"
    with pytest.raises(ValueError, match=message):
        LatentPreviewer.from_pretrained(folder, pipeline="ErnieImagePipeline")
    saved(LatentCodec(flux2()), folder)  # FLUX.2's own
    assert LatentPreviewer.from_pretrained(folder, pipeline="Flux2Pipeline").space.channels == 16


def test_a_decoder_that_was_trained_further_needs_its_own_preview(tmp_path):
    codec = build()
    saved(codec, tmp_path / "codec")
    with torch.no_grad():
        codec.autoencoder.decoder.conv_out.bias += 0.1
    codec.weights_changed()
    codec.save_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match="fit-preview"):
        LatentPreviewer.from_pretrained(tmp_path / "codec")


def test_what_is_missing_is_said_with_the_verb_that_makes_it(tmp_path):
    codec = build()
    codec.save_pretrained(tmp_path)
    missing = f"no preview in the folder of {tmp_path.name}; latent-codec fit-preview fits one"
    for kind in (None, "linear", "tiny"):
        with pytest.raises(SettingError, match=missing):
            LatentPreviewer.from_pretrained(tmp_path, kind=kind)
    write_preview(tmp_path / NAME, codec, stored(codec))
    with pytest.raises(
        SettingError, match="has no tiny decoder, got 'tiny'; latent-codec fit-preview trains one"
    ):
        LatentPreviewer.from_pretrained(tmp_path, kind="tiny")
    with pytest.raises(SettingError, match="for the best fitted one, got 'small'"):
        LatentPreviewer.from_pretrained(tmp_path, kind="small")


def test_damaged_previews_are_refused(tmp_path):
    codec = build(AutoencoderVQ)
    path = saved(codec, tmp_path) / NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for broken, message in (
        ({key: tensors[key] for key in tensors if key != "palette.0"}, "damaged"),
        (tensors | {"linear.weight": torch.zeros(3, 9)}, "damaged"),
        (tensors | {"palette.0": torch.zeros(15, 3)}, "damaged"),
    ):
        save_file(broken, path, metadata)
        with pytest.raises(ValueError, match=message):
            LatentPreviewer.from_pretrained(tmp_path)
    facts = json.loads(metadata["latent_codec_preview"])
    save_file(tensors, path, {"latent_codec_preview": json.dumps(facts | {"format": 3})})
    with pytest.raises(ValueError, match="format 3; this version reads 1 and 2"):
        LatentPreviewer.from_pretrained(tmp_path)
    save_file(tensors, path, {"latent_codec_preview": json.dumps(facts | {"tiny": {}})})
    with pytest.raises(ValueError, match="damaged"):
        LatentPreviewer.from_pretrained(tmp_path)
    for content in (b"", b"no safetensors", path.read_bytes()[:-7]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no preview, or damaged"):
            LatentPreviewer.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_preview_that_was_there(tmp_path):
    codec = build()
    path = saved(codec, tmp_path / "codec") / NAME
    before, names = path.read_bytes(), {each.name for each in path.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError):
            write_preview(path, codec, stored(codec))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert {each.name for each in path.parent.iterdir()} == names


@pytest.mark.parametrize("name", ["default", "default-vq"])
def test_the_shipped_codecs_carry_fitted_previews(name):
    codec, previewer = LatentCodec.from_pretrained(name), LatentPreviewer.from_pretrained(name, kind="linear")
    assert previewer.space == codec.latent_space
    image = (colored_noise((3, 64, 96), 2.0, torch.Generator().manual_seed(0)) / 3).clamp(-1, 1)
    decoded = F.avg_pool2d(codec.decode(codec.encode(image), output_type="pt"), 8)
    assert correlation(previewer(codec.encode(image)), decoded) > 0.9
    if codec.is_discrete:
        assert correlation(previewer.indices(codec.encode_indices(image)), decoded) > 0.9


def test_a_fresh_process_previews_the_shipped_codec():
    done = run_forked(
        "import torch\n"
        "from latent_codec.previews import LatentPreviewer\n"
        "previewer = LatentPreviewer.from_pretrained(kind='linear')\n"
        "print(previewer.kind, tuple(previewer(torch.zeros(2, 4, 3, 5)).shape))\n"
    )
    assert done.stdout == "linear (2, 3, 3, 5)\n"


# ------------------------------------------------------------------------------------------ tiny decoders


@pytest.mark.parametrize("latent_channels", [1, 4, 32])
def test_a_tiny_decoder_is_autoencoder_tinys(latent_channels):
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8), (2, 1, 1)
    ours = TinyDecoder(latent_channels, widths, blocks).eval()
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=blocks,
        latent_channels=latent_channels,
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    latents = 3 * smooth(2, latent_channels, 4, 6)
    previewer = LatentPreviewer.tiny(ours)
    assert previewer.space == LatentSpace(latent_channels, 4)
    with torch.no_grad():
        expected = theirs.decode(latents).sample.clamp(-1, 1)
    assert expected.std() > 0.05
    torch.testing.assert_close(previewer(latents), expected, rtol=0, atol=1e-5)


def test_wrong_tiny_decoders_are_refused():
    with pytest.raises(ValueError, match="num_blocks: expected one per level, 2"):
        TinyDecoder(4, (8, 8), (1,))
    with pytest.raises(ValueError, match="latent_magnitude is 0"):
        TinyDecoder(4, (8,), (1,), latent_magnitude=0)


def tiny_preview(codec: Path, *overrides: str):
    small = ["model.arguments.block_out_channels=[16, 16]", "data.height=16", "data.by_area=false"]
    small += ["run.log_every=1", "optimizer.learning_rate=3e-3", "optimizer.warmup_steps=5"]
    return load_config("tiny-preview", [*small, *overrides], codec=str(codec))


def test_a_tiny_decoder_learns_what_its_teacher_paints(tmp_path, make_images):
    codec = patch_codec(tmp_path, make_images, scaling_factor=0.2)
    codec.save_pretrained(tmp_path / "codec")
    config = tiny_preview(tmp_path / "codec", "run.steps=80", "optimizer.learning_rate=1e-2")
    decoder = build_tiny_decoder(config, make_images)
    result = train(config, decoder, make_images, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 6
    image = make_images.read(0).float() / 127.5 - 1
    latents = codec.encode(image)
    painted = LatentPreviewer.tiny(result.network, space=codec.latent_space)(latents)
    assert correlation(painted, codec.decode(latents, output_type="pt")) > 0.8
    assert (tmp_path / "run" / "samples" / "00000080.png").is_file()
    # the clamp lets through what this codec's latents are
    assert decoder.config.latent_magnitude > latents.abs().max() / 3


def test_distillation_resumes_to_the_same_weights_and_only_with_its_teacher(tmp_path, make_images):
    build(seed=0).save_pretrained(tmp_path / "codec")

    def run(out: str, steps: int):
        config = tiny_preview(tmp_path / "codec", f"run.steps={steps}", 'optimizer.schedule="constant"')
        return train(config, build_tiny_decoder(config, make_images), make_images, tmp_path / out).network

    straight = run("straight", 4).state_dict()
    run("broken", 2)
    resumed = run("broken", 4).state_dict()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    build(seed=1).save_pretrained(tmp_path / "codec")
    with pytest.raises(
        ValueError, match=r"model.teacher: expected the codec that the run in .* was started with"
    ):
        run("broken", 6)


def test_what_a_tiny_decoder_cannot_be_trained_by_is_refused(tmp_path, make_images):
    build().save_pretrained(tmp_path / "codec")
    with pytest.raises(
        ValueError, match=r"takes 4 channels and enlarges by 4; .* has 4 channels at a factor of 2"
    ):
        build_tiny_decoder(
            tiny_preview(
                tmp_path / "codec",
                "model.arguments.block_out_channels=[8, 8, 8]",
                "model.arguments.num_blocks=[1, 1, 1]",
            ),
            make_images,
        )
    with pytest.raises(ValueError, match=r"objective.lpips_weight: expected none for TinyDecoder: .* codec"):
        tiny_preview(tmp_path / "codec", "objective.lpips_weight=1")
    with pytest.raises(
        ValueError, match=r"data.label: expected none for TinyDecoder: .* prior .* classifier"
    ):
        tiny_preview(tmp_path / "codec", "data.label=class")
    with pytest.raises(ValueError, match=r"model.teacher: expected none for AutoencoderKL: .* preview"):
        load_config("default-f8c4", ["model.teacher=default"])
    with pytest.raises(ValueError, match=r"model.teacher: expected .* codec that a TinyDecoder learns from"):
        table = tiny_preview(tmp_path / "codec").to_dict()
        del table["model"]["teacher"]
        build_tiny_decoder(TrainingConfig.from_dict(table), make_images)
