"""Codes: figures against hand-made counts and independent sums, what the images show, files and verbs."""

import json
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.cli.work.summaries import SUMMARIES
from latent_codec.codec import Encoding
from latent_codec.evaluation.codes import (
    CodeMeter,
    code_usage,
    codebook_image,
    codeword_tiles,
    false_colors,
    fixed_length_bits_per_pixel,
    grid_shapes,
    index_map,
    mean_colors,
)
from latent_codec.evaluation.meters import Batch
from latent_codec.evaluation.reconstruction import evaluate
from latent_codec.images.sources import open_source
from latent_codec.latents.latent_files import load_latents
from latent_codec.models.autoencoder_vq import AutoencoderVQ
from latent_codec.models.hierarchical_vq import HierarchicalVQ

BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}
SIZES = [(24, 32), (24, 32), (33, 17)]


def spread_codewords(quantizers) -> None:
    """So that images use several codewords, as those of a trained codebook."""
    with torch.no_grad():
        for quantizer in quantizers:
            quantizer.embedding.weight.normal_()


def autoencoder_vq(**config) -> LatentCodec:
    torch.manual_seed(0)
    model = AutoencoderVQ(**BLOCKS, **{"num_vq_embeddings": 16, "latent_channels": 3} | config)
    spread_codewords(model.quantizers)
    return LatentCodec(model, name="single")


def vq_model() -> LatentCodec:
    torch.manual_seed(0)
    return LatentCodec(diffusers.VQModel(**BLOCKS, num_vq_embeddings=16), name="theirs")


def autoencoder_movq() -> LatentCodec:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32,) * 3, "down_block_types": ("DownEncoderBlock2D",) * 3}
    up = ("AttnUpDecoderBlock2D",) * 3
    return LatentCodec(
        diffusers.VQModel(**blocks, up_block_types=up, norm_type="spatial", num_vq_embeddings=16)
    )


def hierarchical_vq(**config) -> LatentCodec:
    """Two levels: an index for 8 x 8 pixels, and one for 4 x 4."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "residual_channels": 4, "embed_dim": 4, "sample_size": 32}
    model = HierarchicalVQ(**{"strides": (4, 2), "codebook_sizes": (8, 16)} | sizes | config)
    spread_codewords(model.quantizers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    return LatentCodec(model, name="levels")


def batch_of_indices(indices: torch.Tensor, side: int) -> Batch:
    """Of an image of this side, on one level."""
    return Batch(originals=torch.zeros(1, 3, side, side), encoding=Encoding(None, None, [indices]))


BUILDERS = {"AutoencoderVQ": autoencoder_vq, "VQModel": vq_model, "HierarchicalVQ": hierarchical_vq}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth colored images of two sizes, one of them odd."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"photo{i}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The codecs as folders, by class."""
    folder = tmp_path_factory.mktemp("codecs")
    for name, build in BUILDERS.items():
        build().save_pretrained(folder / name)
    return folder


# ------------------------------------------------------------------------------------------ figures


def test_figures_of_hand_made_counts():
    usage = code_usage(torch.tensor([4, 2, 1, 1, 0]), (2, 4), num_pixels=32)

    assert usage.entropy == pytest.approx(1.75)  # 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 bits
    assert usage.perplexity == pytest.approx(2**1.75)
    assert (usage.codebook_size, usage.num_indices, usage.used_codes, usage.dead_codes) == (5, 8, 4, 1)
    assert usage.bits_per_pixel == pytest.approx(1.75 * 8 / 32)
    assert usage.fixed_length_bits_per_pixel == pytest.approx(math.log2(5) * 8 / 32)


@pytest.mark.parametrize(
    ("counts", "entropy"), [([7] * 8, 3.0), ([0, 9, 0, 0], 0.0), ([3], 0.0), ([10**12, 10**12], 1.0)]
)
def test_entropy_at_its_limits(counts, entropy):
    usage = code_usage(torch.tensor(counts), (1, 1), num_pixels=1)

    assert usage.entropy == pytest.approx(entropy) and math.copysign(1, usage.entropy) == 1
    assert usage.perplexity == pytest.approx(2**entropy)


@pytest.mark.parametrize("kind", BUILDERS)
def test_evaluation_counts_the_indices_of_all_images(kind, photos):
    codec = BUILDERS[kind]()

    codes = evaluate(open_source(photos), codec).codes

    grids = [codec.encode_indices(path) for path in sorted(photos.iterdir())]
    num_pixels = sum(height * width for height, width in SIZES)
    assert codes.num_pixels == num_pixels and codes.first_size == SIZES[0]
    assert len(codes.levels) == len(codec.codebook_sizes)
    bits = []
    for level, usage in enumerate(codes.levels):
        indices = torch.cat([each[level].flatten() for each in grids])
        values, counts = torch.unique(indices, return_counts=True)
        shares = counts.double() / len(indices)
        entropy = float(-(shares * shares.log2()).sum())
        assert usage.used_codes == len(values) > 1
        assert usage.dead_codes == codec.codebook_sizes[level] - len(values)
        assert usage.num_indices == len(indices) == sum(usage.counts)
        assert usage.entropy == pytest.approx(entropy)
        assert usage.first_grid == tuple(grids[0][level].shape[1:])
        bits.append((entropy, math.log2(codec.codebook_sizes[level]), len(indices)))
    assert codes.bits_per_pixel == pytest.approx(sum(entropy * n for entropy, _, n in bits) / num_pixels)
    fixed = sum(length * n for _, length, n in bits) / num_pixels
    assert codes.fixed_length_bits_per_pixel == pytest.approx(fixed)


def test_continuous_codecs_have_no_codes(photos):
    torch.manual_seed(0)
    codec = LatentCodec(diffusers.AutoencoderKL(**BLOCKS))

    evaluation = evaluate(open_source(photos), codec, limit=1)

    assert evaluation.codes is None and evaluation.to_dict()["codes"] is None
    assert evaluation.latents.kl is not None
    assert not codec.indices_suffice and codec.levels == []


def test_the_meter_refuses_other_levels_and_an_empty_count():
    meter = CodeMeter(hierarchical_vq())
    with pytest.raises(ValueError, match="shorter"):
        meter.add(batch_of_indices(torch.zeros(1, 3, 3, dtype=torch.int64), 24))
    with pytest.raises(ValueError, match="no indices were counted"):
        meter.result()


def test_the_note_says_when_indices_are_too_few_and_when_they_are_not_what_is_decoded():
    grid = torch.zeros(1, 16, 16, dtype=torch.int64)
    for codec, count, note in [
        (autoencoder_vq(), 1, ""),
        (autoencoder_vq(num_vq_embeddings=64), 1, "fewer than 10 indices per codeword"),
        (autoencoder_vq(num_vq_embeddings=64), 3, ""),
        (autoencoder_movq(), 1, "not snapped to the codebook"),
    ]:
        meter = CodeMeter(codec)
        for _ in range(count):
            meter.add(batch_of_indices(grid, 32))
        found = meter.result().note
        assert (note in found) if note else found == ""


@pytest.mark.parametrize("size", [(32, 32), (33, 17), (1, 1), (8, 40)])
@pytest.mark.parametrize("kind", BUILDERS)
def test_grid_shapes_are_those_of_the_indices(kind, size):
    codec = BUILDERS[kind]()
    grids = codec.encode_indices(torch.zeros(3, *size))

    assert grid_shapes(codec, *size) == [tuple(grid.shape[1:]) for grid in grids]
    bits = sum(grid.numel() * math.log2(size) for grid, size in zip(grids, codec.codebook_sizes))
    assert fixed_length_bits_per_pixel(codec, *size) == pytest.approx(bits / math.prod(size))


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_tile_is_what_a_constant_grid_paints(kind):
    codec = BUILDERS[kind]()
    (*_, last), side = codec.codebook_sizes, codec.levels[-1].side

    tiles = codeword_tiles(codec, level=len(codec.codebook_sizes) - 1)

    assert tiles.shape == (last, 3, side, side) and tiles.dtype == torch.uint8
    assert len(tiles.flatten(1).unique(dim=0)) > last / 2  # codewords look different
    if kind != "HierarchicalVQ":
        (image,) = codec.decode_indices([torch.full((1, 5, 5), 3)], output_type="pt")
        middle = image[:, 2 * side : 3 * side, 2 * side : 3 * side]
        # One level of 255: a batch may round differently.
        assert (tiles[3] - (middle + 1) * 127.5).abs().max() <= 1


def test_a_top_codeword_is_shown_amid_mean_codewords_of_the_levels_below():
    codec = hierarchical_vq()
    codec.autoencoder.set_usage(1, torch.arange(16))

    tiles = codeword_tiles(codec, level=0)

    (image,) = codec.decode_indices([torch.full((1, 5, 5), 6)], output_type="pt")  # the bottom left out
    assert tiles.shape == (8, 3, 8, 8)
    assert (tiles[6] - (image[:, 16:24, 16:24] + 1) * 127.5).abs().max() <= 1


def test_a_bottom_codeword_is_shown_amid_mean_codewords_of_the_top():
    codec = hierarchical_vq()
    model = codec.autoencoder
    before = codeword_tiles(codec, level=1)
    with torch.no_grad():
        model.quantizers[0].embedding.weight[:] = model.mean_codeword(0)

    torch.testing.assert_close(codeword_tiles(codec, level=1), before, rtol=0, atol=1)
    (image,) = codec.decode_indices(
        [torch.zeros(1, 3, 3, dtype=torch.int64), torch.full((1, 6, 6), 9)], output_type="pt"
    )
    assert (before[9] - (image[:, 12:16, 12:16] + 1) * 127.5).abs().max() <= 1


def test_tiles_are_decoded_a_part_at_a_time(monkeypatch):
    codec, seen = autoencoder_vq(num_vq_embeddings=50), []
    whole = codeword_tiles(codec)
    monkeypatch.setattr("latent_codec.evaluation.codes.DECODE_PIXELS", 20 * 10 * 10)

    parts = codeword_tiles(codec, on_progress=lambda done, total: seen.append((done, total)))

    assert seen == [(20, 50), (40, 50), (50, 50)]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1)  # a batch may round differently


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_alpha_codecs_are_painted_in_rgb(channels):
    codec = autoencoder_vq(in_channels=channels, out_channels=channels)
    with torch.no_grad():
        codec.autoencoder.decoder.conv_out.bias[-1] = -1e3 if channels == 4 else 1e3

    assert (codeword_tiles(codec) == 255).all()  # nothing, on white; or white itself
    assert codebook_image(codec).mode == "RGB"


def test_half_precision_paints_the_same_within_its_rounding():
    codec = hierarchical_vq()
    tiles = codeword_tiles(codec, 1)
    codec.autoencoder.to(torch.bfloat16)
    half = codeword_tiles(codec, 1)
    # bfloat16 keeps 8 bits of each of some ten layers' values.
    assert (tiles.float() - half.float()).abs().mean() < 4


def flat_tiles(colors) -> torch.Tensor:
    return torch.tensor(colors, dtype=torch.uint8).view(-1, 3, 1, 1).expand(-1, 3, 2, 2).contiguous()


def test_codewords_are_sorted_by_luma_into_rows_and_by_hue_within():
    codec = autoencoder_vq(num_vq_embeddings=9)
    dark = [[60, 20, 20], [20, 60, 20], [20, 20, 60]]
    medium = [[140, 100, 100], [100, 140, 100], [100, 100, 140]]
    light = [[250, 210, 210], [210, 250, 210], [210, 210, 250]]
    shuffled = [(medium + light + dark)[i] for i in (8, 3, 0, 6, 2, 5, 7, 1, 4)]

    image = codebook_image(codec, tiles=flat_tiles(shuffled))

    assert image.width == image.height == 8 * (768 // 8)  # 3 tiles of 2 px and 2 gaps of 1 px, enlarged
    factor = 768 // 8
    cells = np.asarray(image)[factor // 2 :: factor, factor // 2 :: factor]
    rows = [[cells[3 * row, 3 * column].tolist() for column in range(3)] for row in range(3)]
    # By hue: blue (-120 degrees), red (0), green (120).
    assert rows == [[each[2], each[0], each[1]] for each in (dark, medium, light)]
    assert (cells[2] == 255).all() and (cells[:, 5] == 255).all()


def test_unused_codewords_come_last_below_a_stripe():
    codec = autoencoder_vq(num_vq_embeddings=5)
    gray = [[value] * 3 for value in (0, 50, 100, 150, 200)]

    image = codebook_image(codec, tiles=flat_tiles(gray), counts=[1, 0, 4, 0, 2])

    factor = image.width // 8
    column = np.asarray(image)[factor // 2 :: factor, factor // 2, 0].tolist()
    # Three columns: used 0, 100, 200; a stripe of 2 px; unused 50, 150.
    assert column == [0, 0, 255, 255, 50, 50]
    with pytest.raises(
        ValueError, match="expected 5 counts and tiles, as level 0 has codewords, got 4 and 5"
    ):
        codebook_image(codec, tiles=flat_tiles(gray), counts=[1] * 4)


@pytest.mark.parametrize("codebook_size", [1, 2, 16])
def test_codebooks_of_any_size_are_painted(codebook_size):
    codec = autoencoder_vq(num_vq_embeddings=codebook_size)
    image = codebook_image(codec)
    assert 384 <= max(image.size) <= 768


def test_tiles_of_a_level_that_is_not_there():
    with pytest.raises(ValueError, match="level is 2; levels has levels 0 to 1"):
        codeword_tiles(hierarchical_vq(), 2)
    with pytest.raises(ValueError, match="level is 0; codec has no codebook"):
        codeword_tiles(LatentCodec(diffusers.AutoencoderKL(**BLOCKS)))


def test_an_index_map_has_a_square_of_its_color_for_each_index():
    grid = torch.tensor([[0, 1, 2], [2, 2, 0]])
    colors = torch.tensor([[10, 20, 30], [0, 255, 0], [9, 9, 9]], dtype=torch.uint8)

    image = index_map(grid, side=4, size=(7, 9), colors=colors)

    assert image.size == (9, 7)
    pixels = np.asarray(image)
    for row in range(7):
        for column in range(9):
            assert pixels[row, column].tolist() == colors[grid[row // 4, column // 4]].tolist()
    assert index_map(grid, side=4).size == (12, 8)


def test_false_colors_tell_all_indices_apart_and_never_change():
    colors = false_colors(16384)
    assert len(colors.unique(dim=0)) > 16300
    assert torch.equal(false_colors(100), colors[:100])
    near = (colors[1:300].int() - colors[:299].int()).abs().amax(1)
    assert near.min() > 40  # neighboring indices are far apart in one channel at least

    high, low = index_map(torch.tensor([[900, 3]]), side=1), index_map(torch.tensor([[3, 1]]), side=1)
    assert high.getpixel((1, 0)) == low.getpixel((0, 0))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (torch.zeros(1, 2, 2, dtype=torch.int64), r"got shape \(1, 2, 2\)"),
        (torch.tensor([[0, 3]]), "run from 0 to 3; there are 3 colors"),
        (torch.tensor([[0, -1]]), "run from -1 to 0; there are 3 colors"),
    ],
)
def test_index_maps_refuse_what_has_no_color(grid, message):
    with pytest.raises(ValueError, match=message):
        index_map(grid, side=4, colors=torch.zeros(3, 3, dtype=torch.uint8))


def test_mean_colors_round():
    tiles = torch.tensor([[0, 255], [3, 4]], dtype=torch.uint8).view(2, 1, 1, 2).expand(-1, 3, 1, 2)
    assert mean_colors(tiles)[:, 0].tolist() == [128, 4]  # 127.5 and 3.5, to even


# ------------------------------------------------------------------------------------------ verbs


@pytest.mark.parametrize("kind", ["AutoencoderVQ", "HierarchicalVQ"])
def test_evaluate_prints_the_levels_as_json_and_writes_two_images(kind, folders, photos, tmp_path, capsys):
    arguments = ["evaluate", str(photos), "--codec", str(folders / kind), "--device", "cpu"]

    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    codec = LatentCodec.from_pretrained(folders / kind)
    assert [level["codebook_size"] for level in found["codes"]["levels"]] == codec.codebook_sizes
    for level in found["codes"]["levels"]:
        assert set(level) == {
            "codebook_size",
            "first_grid",
            "num_indices",
            "used_codes",
            "dead_codes",
            "perplexity",
            "entropy",
            "bits_per_pixel",
            "fixed_length_bits_per_pixel",
        }
        assert 1 < level["perplexity"] <= level["used_codes"] <= level["codebook_size"]
        assert level["bits_per_pixel"] < level["fixed_length_bits_per_pixel"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"images.png", "latents.png", "codebook.png", "indices.png", "evaluation.json"} | set(
        SUMMARIES
    )
    assert {str(tmp_path / name) for name in written} == set(found["files"])
    with Image.open(tmp_path / "codebook.png") as codebook, Image.open(tmp_path / "indices.png") as indices:
        assert codebook.width >= 384
        assert codebook.height > 384 * len(codec.codebook_sizes)  # an image and a caption for each level
        assert indices.height > 128 * len(codec.codebook_sizes)


def test_evaluate_prints_a_table_of_codes_and_no_kl(folders, photos, tmp_path, capsys):
    arguments = ["evaluate", str(photos), "--codec", str(folders / "HierarchicalVQ"), "--device", "cpu"]

    assert main([*arguments, "--out", str(tmp_path), "--limit", "1"]) == 0

    out = capsys.readouterr().out
    fixed = (3 * 4 * 3 + 6 * 8 * 4) / (24 * 32)  # 3x4 indices of 8 codewords, 6x8 of 16
    assert re.search(r"  0 \(top\) +8 +\d+ +\d+ +\d+\.\d +\d\.\d{3} +\d\.\d{4} +0\.0469", out)
    assert re.search(r"  1 \(bottom\) +16 ", out)
    assert re.search(rf"  all +\d\.\d{{4}} +{fixed:.4f}", out)
    assert "Indices: 3x4 + 6x8 for the first image, 24x32." in out
    assert "fewer than 10 indices per codeword" in out
    assert "KL" not in out and "posterior" not in out


def test_roundtrip_of_levels_prints_grids_and_shows_them_one_by_one(folders, photos, tmp_path, capsys):
    arguments = ["roundtrip", str(photos / "photo2.png"), "--codec", str(folders / "HierarchicalVQ")]

    assert main([*arguments, "--out", str(tmp_path)]) == 0

    bits = (5 * 3 * 3 + 10 * 6 * 4) / (33 * 17)
    out = capsys.readouterr().out
    assert f"33x17 -> indices 5x3 of 8 + 10x6 of 16, {bits:.4f} bits per pixel at fixed length, " in out
    assert out.endswith(f"see {tmp_path / 'photo2-roundtrip.png'} and {tmp_path / 'photo2-levels.png'}\n")
    codec = LatentCodec.from_pretrained(folders / "HierarchicalVQ")
    grids = codec.encode_indices(photos / "photo2.png")
    sheet = np.asarray(Image.open(tmp_path / "photo2-levels.png"))
    assert sheet.shape == (33, 2 * 17 + 4, 3)
    (top,), (whole,) = (codec.decode_indices(grids[:n], size=(33, 17)) for n in (1, 2))
    assert np.array_equal(sheet[:, :17], np.asarray(top))
    assert np.array_equal(sheet[:, 21:], np.asarray(whole))
    assert not np.array_equal(np.asarray(top), np.asarray(whole))


def test_roundtrip_of_one_codebook_gives_grid_and_bits(folders, photos, tmp_path, capsys):
    arguments = ["roundtrip", str(photos / "photo0.png"), "--codec", str(folders / "AutoencoderVQ"), "--json"]

    assert main([*arguments, "--out", str(tmp_path)]) == 0

    (result,) = json.loads(capsys.readouterr().out)["images"]
    assert result["grids"] == [[12, 16]] and result["codebook_sizes"] == [16]
    assert result["bits_per_pixel_at_fixed_length"] == 12 * 16 * 4 / (24 * 32)
    assert [path.name for path in tmp_path.iterdir()] == ["photo0-roundtrip.png"]


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("AutoencoderVQ", ([16], [3], 32, [[16, 16]], 1.0)),
        ("VQModel", ([16], [3], 32, [[16, 16]], 1.0)),
        ("HierarchicalVQ", ([8, 16], [4, 4], 32, [[4, 4], [8, 8]], (16 * 3 + 64 * 4) / 1024)),
    ],
)
def test_info_gives_codebooks_grids_and_bits(kind, facts, folders, capsys):
    assert main(["info", str(folders / kind), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = "codebook_sizes", "codeword_dims", "sample_size", "grids", "bits_per_pixel_at_fixed_length"
    assert tuple(found[key] for key in keys) == facts

    assert main(["info", str(folders / kind)]) == 0
    grids = " + ".join(f"{height}x{width}" for height, width in facts[3])
    assert re.search(rf"^grids +{re.escape(grids)}$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("out", ["files", "all.safetensors"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_discrete_codecs_store_indices_that_decode_to_the_round_trip(
    kind, out, folders, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    codec = LatentCodec.from_pretrained(folders / kind)
    assert main(["encode", str(photos), "--codec", str(folders / kind), "--out", out]) == 0
    files = capsys.readouterr().out.split()

    stored = [levels for file in files for levels in load_latents(file, codec=codec).indices]
    for levels, path in zip(stored, sorted(photos.iterdir()), strict=True):
        expected = codec.encode_indices(path)
        assert all(torch.equal(one, other) for one, other in zip(levels, expected, strict=True))

    assert main(["decode", *files, "--codec", str(folders / kind)]) == 0
    for path, size in zip(sorted(photos.iterdir()), SIZES):
        (expected,) = codec.decode(codec.encode(path), size=size)
        decoded = np.asarray(Image.open(f"decoded/{path.name}"), int)
        # One level of 255: diffusers' scale is taken off latents and not off indices.
        assert np.abs(decoded - np.asarray(expected)).max() <= 1

    capsys.readouterr()
    assert main(["info", files[0], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "indices" and facts["dtype"] == "int64"
    assert facts["images"][0]["grids"] == [list(grid.shape[1:]) for grid in stored[0]]
    assert main(["info", files[0]]) == 0
    shapes = " + ".join("x".join(map(str, grid.shape[1:])) for grid in stored[0])
    assert f"photo0.png: 24x32 -> {shapes}\n" in capsys.readouterr().out


def test_latents_of_a_discrete_codec_on_request(folders, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["encode", str(photos / "photo2.png"), "--codec", str(folders / "AutoencoderVQ")]
    assert main([*arguments, "--latents"]) == 0
    codec = LatentCodec.from_pretrained(folders / "AutoencoderVQ")
    (latents,) = load_latents("latents/photo2.safetensors").latents
    assert torch.equal(latents, codec.encode(photos / "photo2.png"))

    assert main([*arguments, "--tile", "64"]) == 2
    assert "indices have no tiled form" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--latents", "--indices"])


def test_movq_whose_latents_are_decoded_unquantized_stays_with_latents(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    movq = autoencoder_movq()
    assert movq.is_discrete and not movq.indices_suffice
    movq.save_pretrained("movq")
    for flags, kind in (([], "latents"), (["--indices"], "indices")):
        assert main(["encode", str(photos / "photo0.png"), "--codec", "movq", *flags]) == 0
        assert getattr(load_latents("latents/photo0.safetensors"), kind) is not None
    capsys.readouterr()
    assert main(["roundtrip", str(photos / "photo0.png"), "--codec", "movq"]) == 0
    assert "-> latents 3x6x8, " in capsys.readouterr().out
