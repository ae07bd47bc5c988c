"""Rate and distortion through files, equal bytes, and Bjontegaard's difference."""

import io
import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from latent_codec.evaluation.image_formats import ImageFormat, image_formats
from latent_codec.evaluation.intervals import paired_difference
from latent_codec.evaluation.rate_distortion import fidelity, measure_rate_distortion
from latent_codec.evaluation.rate_distortion_images import (
    CELL,
    equal_bytes_grid,
    plot_rate_distortion,
)
from latent_codec.evaluation.rate_distortion_result import (
    Fidelity,
    RateDistortion,
    Trial,
    bd_rate,
    upward,
)
from latent_codec.images.sources import open_source
from latent_codec.images.tensors import to_image
from latent_codec.metrics import psnr


class Png:
    """A compressor of one rate, without loss."""

    name, suffix, qualities = "png", ".png", (None,)

    def encode(self, image, quality):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def decode(self, data):
        return Image.open(io.BytesIO(data))


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (height, width) in enumerate(((61, 83), (40, 56), (48, 48))):
        smooth(height, width, seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def measured(photos, tmp_path):
    webp, jpeg = image_formats(["webp", "jpeg"])
    return measure_rate_distortion(
        webp,
        [jpeg, Png()],
        open_source(photos),
        tmp_path / "files",
        qualities=[5, 60],
        rates=(2.0, 1e-3),
    )


def point(rate: float, *, psnr=None, ms_ssim=None, lpips=None) -> Trial:
    return Trial(
        comparison="curve",
        compressor="x",
        quality=None,
        num_bytes=0,
        bits_per_pixel=rate,
        psnr=psnr,
        ms_ssim=ms_ssim,
        lpips=lpips,
    )


# ------------------------------------------------------------------------------------------ through files


def test_a_trial_is_the_file_on_disk(measured, photos, tmp_path):
    formats = {"webp": ImageFormat("webp"), "jpeg": ImageFormat("jpeg"), "png": Png()}
    originals = open_source(photos)
    assert {trial.index for trial in measured.trials} == {0, 1, 2}
    for trial in measured.trials:
        path = tmp_path / "files" / trial.file
        original = to_image(Path(trial.image))
        assert trial.image == originals.name(trial.index)
        assert trial.num_bytes == path.stat().st_size
        assert trial.bits_per_pixel == 8 * trial.num_bytes / (original.shape[1] * original.shape[2])
        decoded = to_image(formats[trial.compressor].decode(path.read_bytes()))
        assert trial.psnr == psnr(decoded[None], original[None]).item()
        assert trial.ms_ssim is None  # under 176 px


def test_qualities_of_a_curve_are_those_asked_for_and_means_are_over_images(measured):
    low, high = measured.curve("webp")
    assert (low.quality, high.quality) == (5, 60)
    trials = [each for each in measured.select("curve", "webp") if each.quality == 60]
    assert len(trials) == 3
    assert high.psnr == pytest.approx(sum(each.psnr for each in trials) / 3)
    assert high.bits_per_pixel == pytest.approx(sum(each.bits_per_pixel for each in trials) / 3)
    jpeg = [each.quality for each in measured.curve("jpeg")]
    assert len(jpeg) >= 4 and jpeg == sorted(set(jpeg))


def test_qualities_that_are_given_bound_every_format(photos, tmp_path):
    (webp, jpeg), source = image_formats(["webp", "jpeg"]), open_source(photos)
    found = measure_rate_distortion(webp, [jpeg], source, tmp_path / "files", qualities=[0, 10], limit=1)
    highest = found.curve("webp")[-1].bits_per_pixel
    first, *others = found.curve("jpeg")
    assert first.quality == 1  # a format that does not go as low has its coarsest, whatever it takes
    assert all(each.bits_per_pixel < 2.3 * highest for each in others)


def test_default_qualities_span_the_rates(tmp_path):
    (tmp_path / "photos").mkdir()
    smooth(112, 112).resize((448, 448), Image.Resampling.BICUBIC).save(tmp_path / "photos/a.png")
    (webp,) = image_formats(["webp"])
    result = measure_rate_distortion(webp, [], open_source(tmp_path / "photos"), tmp_path / "files")
    curve = result.curve("webp")
    rates = [each.bits_per_pixel for each in curve]
    assert 4 <= len(curve) <= 6 and rates == sorted(rates)
    assert rates[0] < 0.2 < rates[-1] < 0.8
    assert curve[0].ms_ssim < curve[-1].ms_ssim < 1


def test_a_compressor_that_starts_above_the_rates_still_has_a_curve(photos, tmp_path):
    source = open_source(photos)
    result = measure_rate_distortion(ImageFormat("jpeg"), [], source, tmp_path / "files")
    curve = result.curve("jpeg")
    assert curve[0].quality == 1 and curve[0].bits_per_pixel > 0.5
    assert len(curve) >= 4 and curve[-1].bits_per_pixel > 2 * curve[0].bits_per_pixel


def test_equal_bytes_is_the_finest_that_is_not_larger(measured, photos):
    for number in range(3):
        ours, jpeg, png = (measured.select("2 bpp", name)[number] for name in ("webp", "jpeg", "png"))
        image = Image.open(ours.image)
        assert ours.fits and ours.bits_per_pixel <= 2
        assert len(ImageFormat("webp").encode(image, ours.quality + 1)) * 8 / (image.width * image.height) > 2
        if jpeg.fits:
            assert jpeg.num_bytes <= ours.num_bytes
            assert len(ImageFormat("jpeg").encode(image, jpeg.quality + 1)) > ours.num_bytes
        else:
            assert jpeg.quality == 1 and jpeg.num_bytes > ours.num_bytes
        assert not png.fits and png.num_bytes > ours.num_bytes and math.isinf(png.psnr)


def test_where_even_the_coarsest_is_too_large_it_stands_and_is_marked(measured):
    ours = measured.select("0.001 bpp", "webp")
    assert [each.quality for each in ours] == [0, 0, 0] and not any(each.fits for each in ours)
    webp, jpeg, png = measured.rivals("0.001 bpp")
    assert (webp.num_larger, png.num_larger) == (3, 3)
    assert png.num_ours_better["psnr"] == 0  # it has no loss
    better = sum(mine.psnr > other.psnr for mine, other in zip(ours, measured.select("0.001 bpp", "jpeg")))
    assert (jpeg.num_ours_better["psnr"], jpeg.num_ours_better["ms_ssim"]) == (better, None)


def test_a_compressor_of_one_rate_is_compared_at_it(photos, tmp_path):
    result = measure_rate_distortion(
        Png(), image_formats(["jpeg"]), open_source(photos), tmp_path / "files", rates=(0.1, 7)
    )
    assert result.comparisons == ["its own rate"]
    for ours, jpeg in zip(
        result.select("its own rate", "png"), result.select("its own rate", "jpeg"), strict=True
    ):
        assert ours.fits and jpeg.num_bytes <= ours.num_bytes
    assert result.bd_rates()["jpeg"]["psnr"].percent is None
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["curves"]["png"][0]["psnr"] is None  # infinite


def test_images_that_cannot_be_read_are_named(photos, tmp_path):
    (photos / "0.png").write_bytes(b"\x89PNG cut short")
    webp = image_formats(["webp"])[0]
    done = []
    result = measure_rate_distortion(
        webp,
        [],
        open_source(photos),
        tmp_path / "files",
        qualities=[10],
        on_progress=lambda *both: done.append(both),
    )
    assert result.num_images == 2
    assert len(result.skipped) == 1 and "0.png" in result.skipped[0]
    assert done[-1][0] == done[-1][1]
    for number in "12":
        (photos / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image could be read; the first of 3: .*0\.png"):
        measure_rate_distortion(webp, [], open_source(photos), tmp_path / "more")


def test_two_of_one_name_are_refused(photos, tmp_path):
    webp = ImageFormat("webp")
    with pytest.raises(ValueError, match="the codec is called webp"):
        measure_rate_distortion(webp, [Png(), webp], open_source(photos), tmp_path / "files")


def test_limit_and_ceiling(photos, tmp_path):
    result = measure_rate_distortion(
        ImageFormat("webp"),
        [],
        open_source(photos),
        tmp_path / "files",
        qualities=[10],
        limit=1,
        reconstruct=lambda images: images * 0.5,
    )
    assert result.num_images == 1 and len(result.ceilings) == 1
    original = to_image(photos / "0.png")
    assert result.ceiling.psnr == pytest.approx(psnr(original[None] / 2, original[None]).item())


def test_gray_images(photos, tmp_path):
    result = measure_rate_distortion(
        ImageFormat("avif"),
        image_formats(["jpeg", "webp"]),
        open_source(photos),
        tmp_path / "files",
        channels=1,
        qualities=[90],
        limit=1,
    )
    original = open_source(photos).image(0, 1)
    (trial,) = result.select("curve", "avif")
    decoded = to_image(Image.open(tmp_path / "files" / trial.file), channels=1)
    assert trial.psnr == psnr(decoded[None], original[None]).item() > 30


def test_fidelity_of_large_images_has_ms_ssim():
    original = to_image(smooth(180, 176))
    found = fidelity(original, original)
    assert math.isinf(found.psnr) and found.ms_ssim == pytest.approx(1)
    worse = fidelity(original * 0.9, original)
    assert found.better(worse, "psnr") and found.better(worse, "ms_ssim")
    assert not worse.better(found, "ms_ssim")


def test_less_lpips_is_better():
    near, far, none = (Fidelity(psnr=20, ms_ssim=None, lpips=each) for each in (0.1, 0.2, None))
    assert near.better(far, "lpips") and not far.better(near, "lpips")
    assert not near.better(none, "lpips") and not none.better(near, "lpips")
    assert not near.better(far, "psnr")  # equal


# ------------------------------------------------------------------------------------------ formats


def test_jpeg_is_progressive_and_halves_its_chroma():
    data = ImageFormat("jpeg").encode(smooth(64, 64), 50)
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["progressive"]
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
    plain = io.BytesIO()
    smooth(64, 64).save(plain, "JPEG", quality=50)
    assert len(data) < plain.tell()


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif", "jxl"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_takes_its_coarsest_and_finest_quality(name, mode):
    if name == "jxl" and find_spec("pillow_jxl") is None:
        pytest.skip("needs the extra `jxl`")
    (form,) = image_formats([name])
    image = smooth(33, 47).convert(mode)
    sizes = []
    for quality in (form.qualities[0], form.qualities[-1]):
        data = form.encode(image, quality)
        assert form.decode(data).size == (47, 33)
        sizes.append(len(data))
    assert sizes[0] < sizes[1]
    with pytest.raises(OSError):
        form.decode(Png().encode(image, None))


def test_formats_that_there_are_not():
    with pytest.raises(ValueError, match=r"no format 'gif'.*allowed are jpeg, webp, avif, jxl"):
        image_formats(["webp", "gif"])
    if find_spec("pillow_jxl") is None:
        assert [each.name for each in image_formats()] == ["jpeg", "webp", "avif"]
        with pytest.raises(ValueError, match="pip install pillow-jxl-plugin`, or leave jxl out"):
            image_formats(["jxl"])


# ------------------------------------------------------------------------------------------ BD-rate


@pytest.mark.parametrize("metric", ["psnr", "ms_ssim", "lpips"])
def test_half_the_bytes_at_every_quality_are_minus_fifty_percent(metric):
    values = {"psnr": (22, 25, 29, 32), "ms_ssim": (0.7, 0.9, 0.95, 0.98), "lpips": (0.6, 0.4, 0.2, 0.15)}[
        metric
    ]
    rates = (0.1, 0.2, 0.5, 0.7)
    anchor = [point(rate, **{metric: value}) for rate, value in zip(rates, values)]
    test = [point(rate / 2, **{metric: value}) for rate, value in zip(rates, values)]
    assert bd_rate(anchor, test, metric).percent == pytest.approx(-50)
    assert bd_rate(test, anchor, metric).percent == pytest.approx(100)
    assert bd_rate(anchor[::-1], test, metric).percent == pytest.approx(-50)


def test_it_is_the_mean_of_log_rate_over_the_quality_of_both():
    """Straight lines: ln r = q / 10 and ln r = q / 5 - 6; over 26 to 32 they differ by q / 10 - 6, on average -3.1."""
    anchor = [point(math.exp(q / 10), psnr=q) for q in (20, 24, 28, 32)]
    test = [point(math.exp(q / 5 - 6), psnr=q) for q in (26, 29, 34, 40)]
    found = bd_rate(anchor, test, "psnr")
    assert found.percent == pytest.approx(100 * (math.exp(-3.1) - 1))
    assert found.note == "26.00 to 32.00 dB"


def curve(*values, rates=(0.1, 0.2, 0.3, 0.4)):
    return [point(rate, psnr=value) for rate, value in zip(rates, values)]


def test_curves_without_overlap_have_no_figure():
    anchor = curve(26, 27, 27.5, 28)
    found = bd_rate(anchor, curve(20, 22, 24, 25.5), "psnr")
    assert found.percent is None
    assert found.note == "no overlap: theirs has 26.00 to 28.00 dB, ours 20.00 to 25.50 dB"
    assert bd_rate(anchor, [point(0.1), point(0.2)], "psnr").note == "no figures of PSNR"


def test_three_points_or_less_than_a_decibel_in_common_give_no_figure():
    anchor = curve(24, 25, 26, 28)
    assert bd_rate(anchor, curve(24, 26, 28), "psnr").note == "needs 4 rates, ours has 3"
    assert bd_rate(curve(24, 26, 28), anchor, "psnr").note == "needs 4 rates, theirs has 3"
    assert (
        bd_rate(anchor, curve(24, 24, 26, 28), "psnr").note == "needs 4 rates, ours has 3"
    )  # one is no better
    short = bd_rate(anchor, curve(27.1, 28, 29, 30), "psnr")
    assert short.percent is None and short.note == "overlap of 0.90 dB, needs 1 dB"
    assert bd_rate(anchor, curve(27, 28, 29, 30), "psnr").percent is not None


def test_points_that_cost_more_for_less_are_left_out():
    anchor = curve(20, 24, 28, 30)
    worse = [point(0.25, psnr=23.9), point(0.22, psnr=24.0), point(0.5, psnr=math.inf)]
    test = curve(20, 24, 28, 30, rates=(0.05, 0.1, 0.15, 0.2))
    assert bd_rate([*anchor, *worse], test, "psnr").percent == pytest.approx(-50)


def test_ms_ssim_counts_in_decibels():
    assert upward("ms_ssim", 0.99) == pytest.approx(20)
    assert upward("ms_ssim", 1.0) == math.inf
    assert upward("lpips", 0.2) == -0.2 and upward("psnr", 31.0) == 31.0


# ------------------------------------------------------------------------------------------ for the eye


def test_plot_and_grid(measured, photos, tmp_path):
    compressors = [*image_formats(["webp", "jpeg"]), Png()]
    plot_rate_distortion(measured, tmp_path / "rd.png")
    with Image.open(tmp_path / "rd.png") as plot:
        assert plot.format == "PNG" and plot.width > 400
    grid = equal_bytes_grid(measured, compressors, open_source(photos), tmp_path / "files", num_images=2)
    rows, columns = 2 * 2, 4
    assert grid.height >= rows * 48 and grid.width >= columns * 83
    assert grid.width < columns * CELL * 2


def test_the_grid_shows_the_middle_of_the_files_images(tmp_path):
    (tmp_path / "photos").mkdir()
    smooth(400, 500).save(tmp_path / "photos/a.png")
    source, png = open_source(tmp_path / "photos"), Png()
    result = measure_rate_distortion(png, [], source, tmp_path / "files")
    grid = to_image(equal_bytes_grid(result, [png], source, tmp_path / "files"))
    middle = to_image(tmp_path / "photos/a.png")[:, 40:360, 90:410]
    assert torch.equal(grid[:, -CELL:, :CELL], middle)
    assert torch.equal(grid[:, -CELL:, CELL + 4 : 2 * CELL + 4], middle)


# ------------------------------------------------------------------------------------------ paired differences


def figures(metric: str, *values) -> list[Trial]:
    return [
        Trial(
            **{
                "comparison": "1 bpp",
                "compressor": "x",
                "quality": 1,
                "num_bytes": 100,
                "bits_per_pixel": 1.0,
                "psnr": None,
                "ms_ssim": None,
                "lpips": None,
                metric: value,
            },
            index=index,
        )
        for index, value in enumerate(values)
    ]


def test_a_paired_difference_has_students_interval():
    """Differences -1, -2, -3: mean -2, s = 1, and t of 2 degrees of freedom is 4.302653 at 97.5 %."""
    found = paired_difference(figures("psnr", 24, 28, 30), figures("psnr", 25, 30, 33), "psnr")

    half = 4.302653 / math.sqrt(3)
    assert found.mean == -2
    assert (found.low, found.high) == pytest.approx((-2 - half, -2 + half), abs=1e-5)
    assert found.ahead is None  # from -4.48 to 0.48


@pytest.mark.parametrize(
    ("metric", "ahead"),
    [("psnr", True), ("ms_ssim", True), ("haarpsi", True), ("lpips", False), ("gmsd", False)],
)
def test_ahead_is_more_or_less_by_the_metric(metric, ahead):
    ours, theirs = figures(metric, 0.51, 0.62, 0.71), figures(metric, 0.4, 0.5, 0.6)
    assert paired_difference(ours, theirs, metric).ahead is ahead
    assert paired_difference(theirs, ours, metric).ahead is not ahead
    assert paired_difference(ours, ours, metric).ahead is None


def test_images_without_figures_are_no_pairs():
    ours, theirs = figures("psnr", 30, math.inf, None, 31), figures("psnr", 29, 30, 30, 29)
    assert paired_difference(ours, theirs, "psnr").mean == 1.5
    assert paired_difference(ours[:3], theirs[:3], "psnr") is None


def test_equal_bytes_say_how_many_bytes_more_and_by_how_much_each_metric_differs(measured):
    ours, jpeg = measured.rivals("2 bpp")[:2]
    trials = {name: measured.select("2 bpp", name) for name in ("webp", "jpeg")}
    total = {name: sum(trial.num_bytes for trial in each) for name, each in trials.items()}
    assert ours.more_bytes == 0 and ours.differences["psnr"].mean == 0
    assert jpeg.more_bytes == pytest.approx(total["jpeg"] / total["webp"] - 1)
    assert jpeg.differences["psnr"].mean == pytest.approx(ours.mean.psnr - jpeg.mean.psnr)
    assert jpeg.differences["ms_ssim"] is None


def test_without_curves_only_equal_bytes_are_measured(photos, tmp_path):
    webp, jpeg = image_formats(["webp", "jpeg"])
    result = measure_rate_distortion(
        webp, [jpeg], open_source(photos), tmp_path / "files", qualities=[], rates=(2.0,)
    )
    assert {trial.comparison for trial in result.trials} == {"2 bpp"} and len(result.trials) == 6
    assert not result.has_curves and result.to_dict()["curves"] == {"webp": [], "jpeg": []}
    assert isinstance(result, RateDistortion) and "thread" in result.device


def test_untrained_metrics_are_measured_where_piq_is_installed(measured):
    trials = measured.select("2 bpp", "webp")
    installed = find_spec("piq") is not None
    assert all((trial.gmsd is not None) is (trial.haarpsi is not None) is installed for trial in trials)
