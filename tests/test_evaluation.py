"""Evaluating codecs: the figures against independent sums, what is refused and why, the files and the verb."""

import dataclasses
import json
import math
import mmap
import re

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from latent_codec import LatentCodec
from latent_codec.cli import main
from latent_codec.codec import Encoding
from latent_codec.evaluation.comparison import comparison_image
from latent_codec.evaluation.cost import CostMeter
from latent_codec.evaluation.frechet import (
    MIN_CROPS,
    FeatureNetwork,
    FrechetMeter,
    grid_crops,
    load_feature_network,
)
from latent_codec.evaluation.latents import LatentMeter, plot_latent_histograms
from latent_codec.evaluation.meters import Batch
from latent_codec.evaluation.reconstruction import (
    Figure,
    evaluate,
    evaluate_codec,
    lpips_trained,
)
from latent_codec.images.sources import open_source
from latent_codec.metrics import frechet_distance, lpips_available, psnr, round_to_8_bits

needs_lpips = pytest.mark.skipif(
    not lpips_available("squeeze"), reason="needs the SqueezeNet weights in torch's hub folder (TORCH_HOME)"
)


def tiny_kl(channels: int = 3) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        latent_channels=3,
        mid_block_add_attention=False,  # quadratic in the pixels
        scaling_factor=0.5,
        shift_factor=0.25,
    )


def batch_of_latents(latents: torch.Tensor, posterior=None) -> Batch:
    return Batch(originals=torch.zeros(1, 3, 8, 8), encoding=Encoding(latents, posterior, None))


def save_images(folder, *sizes: tuple[int, int], mode: str = "RGB") -> None:
    """Smooth colored images of (width, height)."""
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(folder / f"image{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    save_images(folder, (32, 24), (32, 24), (17, 33), (40, 40))
    return folder


@pytest.fixture(scope="module")
def codec():
    return LatentCodec(tiny_kl())


@pytest.fixture(scope="module")
def evaluation(codec, folder):
    return evaluate(open_source(folder), codec)


@pytest.fixture(scope="module")
def codec_folder(codec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "tiny"
    codec.save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))


def test_psnr_is_that_of_the_image_files_averaged_over_images(evaluation, codec, folder, tmp_path):
    expected = []
    for path in sorted(folder.iterdir()):
        original = Image.open(path)
        latents = codec.encode(path)
        codec.decode(latents, size=(original.height, original.width))[0].save(tmp_path / "copy.png")
        copy = np.asarray(Image.open(tmp_path / "copy.png"), np.float64)
        expected.append(10 * math.log10(255**2 / np.mean((copy - np.asarray(original, np.float64)) ** 2)))

    assert [image.name for image in evaluation.images] == [str(path) for path in sorted(folder.iterdir())]
    # 0.01 dB: an image alone and in a batch of two may round a pixel differently.
    assert [image.psnr for image in evaluation.images] == pytest.approx(expected, abs=0.01)
    assert evaluation.psnr.value == pytest.approx(np.mean(expected), abs=0.01)
    assert "8 bits" in evaluation.psnr.note
    assert [(image.width, image.height) for image in evaluation.images][2] == (17, 33)


def test_latent_figures_are_those_of_the_latents_and_of_the_posterior(evaluation, codec, folder):
    latents, kl = [], []
    for path in sorted(folder.iterdir()):
        latents.append(codec.encode(path)[0].flatten(1))
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1
        height, width = pixels.shape[2:]
        padded = torch.nn.functional.pad(pixels, (0, width % 2, 0, height % 2), mode="replicate")
        with torch.no_grad():
            posterior = codec.autoencoder.encode(padded).latent_dist
        normal = torch.distributions.Normal(posterior.mean, posterior.std)
        standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
        kl.append(torch.distributions.kl_divergence(normal, standard)[0].flatten(1))

    latents, kl = torch.cat(latents, 1).double(), torch.cat(kl, 1).double()

    assert evaluation.latents.mean == pytest.approx(latents.mean(1).tolist(), abs=1e-5)
    assert evaluation.latents.std == pytest.approx(latents.std(1, correction=0).tolist(), abs=1e-5)
    assert evaluation.latents.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert sum(map(sum, evaluation.latents.histogram)) == latents.numel()


def test_distance_from_normal_is_the_kolmogorov_smirnov_statistic():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 50, 60, generator=generator)
    latents[:, 1] += 0.5
    latents[:, 2] *= 3
    latents[:, 3] = 1000.0
    meter = LatentMeter(4)
    for each in latents.split(1):
        meter.add(batch_of_latents(each))

    found = meter.result().distance_from_normal

    expected = [scipy.stats.kstest(latents[:, i].flatten().numpy(), "norm").statistic for i in range(4)]
    # 0.01: the histogram's bins are 0.02 wide, which hold at most 0.008 of N(0, 1).
    assert found == pytest.approx(expected, abs=0.01)
    assert found[0] < 0.02 < 0.1 < found[1]
    assert found[3] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["VQModel", "AutoencoderTiny"])
def test_codecs_without_a_posterior_have_no_kl(kind, folder):
    torch.manual_seed(0)
    if kind == "VQModel":
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        autoencoder = VQModel(
            **blocks, block_out_channels=(8, 8), norm_num_groups=2, latent_channels=3, num_vq_embeddings=16
        )
    else:
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        autoencoder = AutoencoderTiny(
            **channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=3
        )

    evaluation = evaluate(open_source(folder), LatentCodec(autoencoder))

    assert evaluation.latents.kl is None
    assert "no posterior" in evaluation.latents.kl_note
    assert math.isfinite(evaluation.psnr.value)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_gray_and_alpha_codecs(channels, mode, tmp_path):
    save_images(tmp_path, (24, 24), (32, 20), mode=mode)
    codec, source = LatentCodec(tiny_kl(channels)), open_source(tmp_path)

    evaluation = evaluate(source, codec)

    assert len(evaluation.images) == 2 and math.isfinite(evaluation.psnr.value)
    assert comparison_image(codec, source, evaluation).mode == "RGB"


def test_metrics_that_the_images_are_too_small_for_give_the_reason(evaluation, codec, tmp_path):
    assert evaluation.ms_ssim.value is None
    assert "176 px" in evaluation.ms_ssim.note

    save_images(tmp_path, (180, 176), (32, 24))
    mixed = evaluate(open_source(tmp_path), codec)

    assert mixed.ms_ssim.value == mixed.images[0].ms_ssim
    assert mixed.images[1].ms_ssim is None
    assert mixed.ms_ssim.note.startswith("of 1 of 2 images; the others are too small")


def test_without_weights_it_says_so_and_goes_on(no_weights, codec, folder):
    evaluation = evaluate(open_source(folder), codec)

    assert evaluation.lpips.value is None and "squeezenet1_1" in evaluation.lpips.note
    assert evaluation.frechet.value is None and "Inception" in evaluation.frechet.note
    assert all(image.lpips is None for image in evaluation.images)
    assert evaluation.psnr.value is not None and evaluation.ssim.value is not None


@needs_lpips
@pytest.mark.parametrize(
    ("front_matter", "answer", "note"),
    [
        ("lpips_trained: true", True, "was trained on LPIPS, which"),
        ("lpips_trained: false", False, None),
        ("license: mit", None, "no model card says"),
        ("[broken", None, "no model card says"),
    ],
)
def test_lpips_is_marked_as_the_model_card_says(codec_folder, folder, front_matter, answer, note, tmp_path):
    (codec_folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n# A codec\n")
    codec = LatentCodec.from_pretrained(codec_folder)
    save_images(tmp_path, (24, 24))

    figure = evaluate(open_source(tmp_path), codec).lpips

    assert lpips_trained(codec) is answer
    assert figure.value > 0
    assert (note in figure.note) if note else "trained" not in figure.note


def test_half_precision_gives_the_same_figures_or_a_reason(codec_folder, evaluation, folder):
    half = evaluate(open_source(folder), LatentCodec.from_pretrained(codec_folder, dtype=torch.bfloat16))

    assert half.dtype == "bfloat16" and half.fingerprint == evaluation.fingerprint
    # bfloat16 keeps 8 bits: a relative error of 1/256 per layer.
    assert half.psnr.value == pytest.approx(evaluation.psnr.value, abs=0.1)
    assert half.latents.kl == pytest.approx(evaluation.latents.kl, rel=0.05)

    meter = LatentMeter(1)
    moments = torch.cat([torch.full((1, 1, 2, 2), math.inf), torch.zeros(1, 1, 2, 2)], 1)
    meter.add(batch_of_latents(torch.zeros(1, 1, 2, 2), DiagonalGaussianDistribution(moments)))
    assert meter.result().kl is None and "not finite" in meter.result().kl_note


def test_unreadable_images_are_left_out_and_listed(codec, tmp_path):
    save_images(tmp_path, (24, 24), (24, 24))
    (tmp_path / "image0x.png").write_bytes((tmp_path / "image0.png").read_bytes()[:200])

    evaluation = evaluate(open_source(tmp_path), codec)

    assert len(evaluation.images) == 2
    assert len(evaluation.skipped) == 1 and "image0x.png" in evaluation.skipped[0]

    for i in range(2):
        (tmp_path / f"image{i}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no image could be read; the first of 3: .*image0"):
        evaluate(open_source(tmp_path), codec)


def test_a_limit_spreads_over_the_source_and_progress_counts_it(codec, folder):
    seen = []

    evaluation = evaluate(
        open_source(folder), codec, limit=2, on_progress=lambda done, total: seen.append((done, total))
    )

    assert [image.index for image in evaluation.images] == [0, 2]
    assert seen[-1] == (2, 2)


def test_the_former_order_of_arguments_warns(evaluation, codec, folder):
    with pytest.warns(DeprecationWarning, match="is now evaluate"):
        found = evaluate_codec(codec, open_source(folder), limit=1)
    assert found.images[0].name == evaluation.images[0].name


def test_evaluate_takes_paths_and_names(evaluation, codec, codec_folder, folder):
    found = evaluate(folder, codec_folder, limit=3)

    assert [image.index for image in found.images] == [0, 1, 2]
    assert (found.codec, found.fingerprint) == (codec_folder.name, codec.fingerprint)
    # 1e-5: an image alone and in a batch of two may round differently.
    expected = [image.psnr for image in evaluation.images[:3]]
    assert [image.psnr for image in found.images] == pytest.approx(expected, rel=1e-5)


def test_grid_crops_are_the_centered_squares_row_by_row():
    images = torch.arange(2 * 3 * 7 * 9).view(2, 3, 7, 9).float()

    crops = grid_crops(images, 3)

    assert crops.shape == (2 * 2 * 3, 3, 3, 3)
    assert torch.equal(crops[0], images[0, :, 0:3, 0:3])  # 7 = 2 * 3 + 1: the odd row is left below
    assert torch.equal(crops[4], images[0, :, 3:6, 3:6])
    assert torch.equal(crops[11], images[1, :, 3:6, 6:9])


def test_frechet_meter_gives_the_distance_of_all_crops_features():
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(3, 3, 8 * 28, 8 * 24, generator=generator) * 2 - 1
    copies = (originals * 0.9 + 0.05).clamp(-1, 1)
    network = FeatureNetwork(
        "mean and spread", lambda x: torch.cat([x.mean((2, 3)), x.std((2, 3))], 1), min_side=2
    )
    meter = FrechetMeter(network, 8)
    for original, copy in zip(originals.split(1), copies.split(1)):
        meter.add(Batch(originals=original, reconstructions=copy))

    expected = frechet_distance(*(network.features(grid_crops(images, 8)) for images in (originals, copies)))

    assert meter.num_crops == 3 * 28 * 24 >= MIN_CROPS
    assert meter.result().value == pytest.approx(expected, rel=1e-6)
    assert expected > 0


def test_frechet_distance_of_too_few_crops_is_refused_with_a_remedy():
    network = FeatureNetwork("means", lambda images: images.mean((2, 3)), min_side=2)
    few, enough_if_smaller = FrechetMeter(network, 128), FrechetMeter(network, 128)
    for meter, size in ((few, (256, 300)), (few, (100, 90)), (enough_if_smaller, (32 * 50, 32 * 40))):
        meter.add(Batch(originals=torch.zeros(1, 3, *size), reconstructions=torch.zeros(1, 3, *size)))

    notes = [meter.result().note for meter in (few, enough_if_smaller)]
    assert notes == [
        "needs 2000 crops; the images give 5 crops of 90-128 px: take more images",
        "needs 2000 crops; the images give 120 crops of 128 px: take smaller crops, of 32 px",
    ]
    assert few.result().value is None
    with pytest.raises(ValueError, match="crops of 1 px are too small for means, which needs 2 px"):
        FrechetMeter(network, 1)


@needs_lpips
def test_evaluate_names_the_squeezenet_features_it_used(codec, tmp_path, monkeypatch):
    monkeypatch.setattr("latent_codec.evaluation.frechet.MIN_CROPS", 100)
    save_images(tmp_path, (17 * 10, 17 * 10))

    figure = evaluate(open_source(tmp_path), codec, frechet_crop=17).frechet

    assert figure.value > 0
    assert figure.note == "SqueezeNet features, 100 crops of 17 px"


@pytest.mark.parametrize("name", ["weights", "pt"])
def test_inception_is_used_where_its_weights_lie(name, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", reason="needs the extra `fid`")
    from torchvision.models import inception_v3

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = (
        tmp_path
        / "hub/checkpoints"
        / {
            "weights": "weights-inception-2015-12-05-6726825d.pth",
            "pt": "pt_inception-2015-12-05-6726825d.pth",
        }[name]
    )
    path.parent.mkdir(parents=True)
    random = inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    torch.save(random.state_dict(), path)

    network = load_feature_network()

    assert network.name == "Inception features"
    assert network.features(torch.rand(2, 3, 20, 20) * 2 - 1).shape == (2, 2048)
    path.write_bytes(b"damaged")
    with pytest.raises(OSError, match=r"Inception weights .* damaged"):
        load_feature_network()


def test_no_feature_network_without_weights(no_weights):
    assert load_feature_network() is None


def test_cost_meter_gives_result_time_and_memory():
    def touch_64_mb() -> str:
        with mmap.mmap(-1, 64_000_000) as memory:  # fresh from the system, not from an allocator's stock
            memory.write(b"x" * 64_000_000)
        return "touched"

    meter = CostMeter(torch.device("cpu"))

    result = meter.timed("encode", touch_64_mb, megapixels=2.0)
    meter.timed("encode", lambda: None, megapixels=1e9)
    meter.timed("encode", lambda: None, megapixels=1e9)

    assert result == "touched"
    assert meter.seconds["encode"][0] > 0
    assert meter.seconds_per_megapixel("encode") == sorted(meter.seconds["encode"])[1]
    if meter.bytes_before is None:
        pytest.skip("this system does not forget its memory peak on request")
    assert meter.peak_bytes > meter.bytes_before + 50e6  # 64 MB were held at once


@pytest.mark.parametrize(("sizes", "rows"), [([(40, 30)], 1), ([(40, 30)] * 2, 2), ([(40, 30)] * 5, 3)])
def test_comparison_shows_worst_median_best(codec, tmp_path, sizes, rows):
    save_images(tmp_path, *sizes)
    source = open_source(tmp_path)
    evaluation = evaluate(source, codec)

    sheet = comparison_image(codec, source, evaluation)
    ranked = evaluation.by_quality()

    gap, factor = 4, 4  # 30 px are enlarged to about 128
    top = sheet.height - rows * (30 * factor + gap) + gap  # below the titles of the columns
    left = sheet.width - 3 * (40 * factor + gap) + gap  # right of those of the rows
    assert [image.psnr for image in ranked] == sorted(image.psnr for image in evaluation.images)
    worst = np.asarray(Image.open(ranked[0].name))
    shown = np.asarray(sheet)[top : top + 30 * factor : factor, left : left + 40 * factor : factor]
    assert np.array_equal(shown, worst)
    assert (
        top > 10 and left > 40 and np.asarray(sheet)[:top].min() == np.asarray(sheet)[:, :left].min() == 0
    )  # titles


def test_histograms_are_drawn_for_any_number_of_channels(tmp_path):
    for channels in (1, 5):
        meter = LatentMeter(channels)
        meter.add(batch_of_latents(torch.randn(1, channels, 4, 4)))
        plot_latent_histograms(meter.result(), tmp_path / "latents.png", title="Latents")
        with Image.open(tmp_path / "latents.png") as image:
            assert image.format == "PNG" and min(image.size) > 100


def test_json_has_no_infinity(evaluation):
    images = [dataclasses.replace(evaluation.images[0], psnr=math.inf)]
    perfect = dataclasses.replace(evaluation, psnr=Figure(value=math.inf, note="identical"), images=images)

    found = json.loads(json.dumps(perfect.to_dict(), allow_nan=False))

    assert found["psnr"] == {"value": None, "note": "identical"}
    assert found["images"][0]["psnr"] is None
    assert found["num_images"] == 1


def test_evaluate_verb_prints_json_alone_and_writes_its_files(codec_folder, folder, tmp_path, capsys):
    arguments = ["evaluate", str(folder), "--codec", str(codec_folder), "--device", "cpu"]

    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["data"] == [str(folder)] and found["num_images"] == 4
    assert found["psnr"]["value"] > 0 and len(found["latents"]["mean"]) == 3
    assert found["encode_seconds_per_megapixel"] > 0 and found["decode_seconds_per_megapixel"] > 0
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert written == {key: value for key, value in found.items() if key != "files"}
    for name in ("images.png", "latents.png"):
        with Image.open(tmp_path / "out" / name) as image:
            image.verify()


def test_evaluate_verb_prints_a_table_with_reasons(codec_folder, folder, tmp_path, capsys, no_weights):
    arguments = [
        "evaluate",
        str(folder),
        "--codec",
        str(codec_folder),
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]

    assert main(arguments) == 0

    out = capsys.readouterr().out
    assert re.search(r"PSNR\s+\d+\.\d\d", out)
    assert re.search(r"LPIPS\s+-\s+the weights", out)
    assert "latent channel" in out and "images.png" in out


def test_evaluate_verb_on_nothing_is_one_line(codec_folder, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nowhere"), "--codec", str(codec_folder)]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "nowhere" in captured.err


def test_evaluate_verb_checks_where_it_writes_before_it_measures(codec_folder, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert main(["evaluate", str(folder), "--codec", str(codec_folder), "--out", str(tmp_path / "file")]) == 2

    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == ""


def test_evaluation_says_what_turned_and_shrunk_latents_lose(codec, folder):
    found = evaluate(folder, codec).equivariance
    assert "of 4 images" in found.quarter_turn.note
    image = open_source(folder).image(3)[None]  # 40x40, which is even in latents when it is halved
    latents = codec.encode(image)
    losses = []
    for psnr_of, turned in ((latents, 0), (latents.rot90(1, (2, 3)), 1)):
        decoded = codec.decode(psnr_of, output_type="pt")
        losses.append(psnr(round_to_8_bits(decoded), image.rot90(turned, (2, 3))).item())
    alone = evaluate([folder / "image3.png"], codec).equivariance
    assert alone.quarter_turn.value == pytest.approx(losses[0] - losses[1], abs=1e-3)
    assert 0 < alone.high_frequencies.value < 1 and alone.image_high_frequencies.value < 0.1


def test_images_too_small_to_be_halved_have_no_equivariance(tmp_path):
    save_images(tmp_path, (12, 12))
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    found = evaluate(tmp_path, LatentCodec(tiny)).equivariance
    assert found.half_size.value is None and "smaller than 16 px" in found.half_size.note
