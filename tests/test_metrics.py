"""Every metric against a reference written another way, its limits, and its gradients."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import convolve, gaussian_filter
from torch.nn import functional as F

from latent_codec.metrics import (
    LPIPS_MIN_SIDE,
    MS_SSIM_MIN_SIDE,
    PIQ_MIN_SIDE,
    as_rgb,
    frechet_distance,
    frechet_distance_of_gaussians,
    gmsd,
    haarpsi,
    load_lpips,
    lpips_available,
    lpips_distance,
    ms_ssim,
    piq_available,
    psnr,
    round_to_8_bits,
    ssim,
)

needs_lpips = pytest.mark.skipif(
    not lpips_available("squeeze"), reason="needs the SqueezeNet weights in torch's hub folder (TORCH_HOME)"
)

needs_piq = pytest.mark.skipif(not piq_available(), reason="needs the extra `metrics`")


def make_images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 5, stride=1, padding=2).mul(2).clamp(-1, 1)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    original = make_images(*shape)
    return original, (original + 0.1 * make_images(*shape, seed=1)).clamp(-1, 1)


def similarity_maps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and contrast-structure maps of two planes in [0, 1], from the 2004 paper's formulas."""

    def blur(plane: np.ndarray) -> np.ndarray:
        return gaussian_filter(plane, 1.5, mode="mirror", radius=5)

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return structure * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1), structure


def planes(images: torch.Tensor) -> np.ndarray:
    return images.double().numpy() / 2 + 0.5


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_psnr_is_that_of_8_bit_files(channels):
    original, copy = (round_to_8_bits(images) for images in pair(2, channels, 24, 17))
    bytes_a, bytes_b = ((images.double().numpy() + 1) * 127.5 for images in (original, copy))

    expected = 10 * np.log10(255**2 / ((bytes_a - bytes_b) ** 2).mean(axis=(1, 2, 3)))

    np.testing.assert_allclose(psnr(copy, original).numpy(), expected, rtol=1e-5)  # float32 means


def test_psnr_of_one_gray_level_is_the_textbook_figure():
    black = torch.full((1, 3, 8, 8), -1.0)

    assert psnr(black + 2 / 255, black).item() == pytest.approx(48.1308, abs=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_ssim_is_the_papers_formula(channels):
    original, copy = pair(2, channels, 21, 34)

    expected = [
        np.mean([similarity_maps(a, b)[0] for a, b in zip(image_a, image_b)])
        for image_a, image_b in zip(planes(copy), planes(original))
    ]

    # 1e-4: variances are differences of float32 means in the library, of float64 ones here.
    np.testing.assert_allclose(ssim(copy, original).numpy(), expected, atol=1e-4)


def test_ms_ssim_is_the_papers_product_over_five_scales():
    original, copy = pair(1, 1, 200, 180)
    a, b = planes(copy)[0, 0], planes(original)[0, 0]

    expected = 1.0
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        whole, structure = similarity_maps(a, b)
        expected *= (whole if scale == 4 else structure[5:-5, 5:-5]).mean() ** exponent
        height, width = a.shape[0] // 2 * 2, a.shape[1] // 2 * 2
        a, b = (
            plane[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
            for plane in (a, b)
        )

    assert ms_ssim(copy, original).item() == pytest.approx(expected, abs=1e-4)  # float32 against float64


def test_a_image_equals_itself():
    image = make_images(2, 3, MS_SSIM_MIN_SIDE, MS_SSIM_MIN_SIDE)

    assert psnr(image, image).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(image, image), torch.ones(2))
    torch.testing.assert_close(ms_ssim(image, image), torch.ones(2))


def test_metrics_are_per_image():
    original, copy = pair(3, 3, MS_SSIM_MIN_SIDE, MS_SSIM_MIN_SIDE)
    copy[1] = original[1]

    for metric in (psnr, ssim, ms_ssim):
        together = metric(copy, original)
        alone = torch.cat([metric(copy[i : i + 1], original[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # convolutions of other batch sizes
        assert together.argmax() == 1


@needs_lpips
def test_lpips_is_the_papers_weighted_distance_of_unit_features():
    import lpips
    import torchvision

    original, copy = pair(2, 3, 40, 33)
    trunk = torchvision.models.squeezenet1_1(weights="IMAGENET1K_V1").features.eval()
    heads = torch.load(
        Path(lpips.__file__).parent / "weights/v0.1/squeeze.pth", map_location="cpu", weights_only=True
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(images: torch.Tensor) -> list[torch.Tensor]:
        hidden = ((images / 2 + 0.5).movedim(1, -1) - mean).div(std).movedim(-1, 1)
        found = []
        for i, layer in enumerate(trunk):
            hidden = layer(hidden)
            if i in (1, 4, 7, 9, 10, 11, 12):
                found.append(F.normalize(hidden.clone(), dim=1))
        return found

    expected = torch.zeros(2)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(features(copy), features(original))):
            expected += ((a - b) ** 2 * heads[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))

    # 1 %: lpips rounds the mean and std of ImageNet to three digits in [-1, 1].
    torch.testing.assert_close(lpips_distance(copy, original), expected, rtol=1e-2, atol=1e-4)


@needs_lpips
def test_lpips_is_frozen_and_passes_gradients_to_the_image():
    distance = load_lpips().train()
    original, copy = pair(2, 3, 32, 32)
    copy.requires_grad_(True)

    distance(copy, original).mean().backward()
    step = (copy - 5 * copy.grad).detach()

    assert copy.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distance.parameters())
    assert not any(module.training for module in distance.modules())  # its heads' dropout stays off
    assert (distance(step, original) < distance(copy, original)).all()


@needs_lpips
def test_lpips_of_gray_and_of_alpha_images():
    original, copy = pair(2, 4, 32, 32)

    assert lpips_distance(original, original).tolist() == [0, 0]
    assert torch.equal(lpips_distance(copy, original), lpips_distance(copy[:, :3], original[:, :3]))
    gray_a, gray_b = original[:, :1], copy[:, :1]
    torch.testing.assert_close(
        lpips_distance(gray_b, gray_a), lpips_distance(gray_b.repeat(1, 3, 1, 1), gray_a.repeat(1, 3, 1, 1))
    )
    with pytest.raises(ValueError, match="2 channels"):
        lpips_distance(original[:, :2], copy[:, :2])


@needs_lpips
def test_lpips_takes_the_smallest_side_it_states_and_no_smaller():
    side = LPIPS_MIN_SIDE["squeeze"]

    assert lpips_distance(*pair(1, 3, side, side)).shape == (1,)
    with pytest.raises(ValueError, match=f"at least {side} px; these images are {side}x{side - 1}"):
        lpips_distance(*pair(1, 3, side - 1, side))


def test_lpips_without_weights_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    assert not lpips_available("squeeze")
    with pytest.raises(FileNotFoundError, match="squeezenet1_1-b8a52dc0"):
        load_lpips()
    with pytest.raises(ValueError, match="'resnet'; it has squeeze, alex, vgg"):
        load_lpips("resnet")


def test_damaged_lpips_weights_are_an_error_not_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth"
    weights.parent.mkdir(parents=True)
    other = io.BytesIO()
    torch.save({"features.0.weight": torch.zeros(3)}, other)
    for content in (b"", b"not weights at all", other.getvalue()):
        weights.write_bytes(content)
        with pytest.raises(OSError, match="damaged"):
            load_lpips()


def test_frechet_distance_is_the_textbook_matrix_root():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    b = torch.randn(200, 12, generator=generator) + 0.3

    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    shift = a.double().mean(0).numpy() - b.double().mean(0).numpy()
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * root)

    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    zero, identity = torch.zeros(3), torch.eye(3)

    shifted = frechet_distance_of_gaussians(zero, identity, torch.tensor([3.0, 0, 4]), identity)
    stretched = frechet_distance_of_gaussians(zero, identity, zero, torch.diag(torch.tensor([4.0, 9, 0])))

    assert shifted == pytest.approx(25)
    assert stretched == pytest.approx((2 - 1) ** 2 + (3 - 1) ** 2 + 1)


def test_frechet_distance_with_fewer_images_than_features():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 4, generator=generator), 1 + torch.randn(30, 4, generator=generator)
    embed = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64)).Q[:4]

    assert frechet_distance(a.double() @ embed, b.double() @ embed) == pytest.approx(
        frechet_distance(a, b), abs=1e-6
    )
    assert frechet_distance(a.double() @ embed, a.double() @ embed) == pytest.approx(0, abs=1e-6)


def test_shapes_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match=r"references \(1, 3, 8, 8\), got shape \(1, 3, 8, 9\)"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="SSIM needs sides of at least 6 px; these images are 8x5"):
        ssim(torch.zeros(1, 3, 5, 8), torch.zeros(1, 3, 5, 8))
    with pytest.raises(ValueError, match="MS-SSIM needs sides of at least 176 px"):
        ms_ssim(torch.zeros(1, 3, 175, 300), torch.zeros(1, 3, 175, 300))
    with pytest.raises(ValueError, match="features of 2 images or more, got 1"):
        frechet_distance(torch.zeros(1, 5), torch.zeros(9, 5))
    with pytest.raises(ValueError, match="5 features cannot be compared with 4"):
        frechet_distance(torch.zeros(3, 5), torch.zeros(9, 4))


def test_8_bit_rounding_gives_the_nearest_of_256_levels():
    levels = torch.arange(256) / 127.5 - 1
    image = torch.tensor([-3.0, -1, -0.9999, 0.0039, 0.5, 1, 7]).view(1, 1, 1, 7)

    rounded = round_to_8_bits(image).flatten()

    nearest = levels[(image.clamp(-1, 1).view(-1, 1) - levels).abs().argmin(1)]
    torch.testing.assert_close(rounded, nearest)
    assert torch.equal(as_rgb(image), image.repeat(1, 3, 1, 1))


# ------------------------------------------------------------------------------------------ GMSD and HaarPSI


@needs_piq
def test_gmsd_is_the_papers_on_gray_images():
    """Prewitt gradients of the image halved by 2x2 means; the deviation of (2 ga gb + c) / (ga^2 + gb^2 + c)."""
    original, other = pair(1, 1, 32, 48)

    def gradient(image: torch.Tensor) -> np.ndarray:
        halved = F.avg_pool2d(image / 2 + 0.5, 2)[0, 0].double().numpy()
        kernel = np.outer([1, 1, 1], [1, 0, -1]) / 3
        return np.hypot(*(convolve(halved, each, mode="constant") for each in (kernel, kernel.T)))

    a, b = gradient(original), gradient(other)
    c = 170 / 255**2
    similarity = (2 * a * b + c) / (a**2 + b**2 + c)
    assert gmsd(other, original).item() == pytest.approx(similarity.std(), rel=1e-3)  # float32


@needs_piq
def test_gmsd_and_haarpsi_of_equal_and_of_noisier_images():
    original = make_images(3, 3, 64, 48)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    noisy, noisier = (original + strength * noise for strength in (0.1, 0.3))
    torch.testing.assert_close(gmsd(original, original), torch.zeros(3))
    torch.testing.assert_close(haarpsi(original, original), torch.ones(3))
    assert (gmsd(noisy, original) < gmsd(noisier, original)).all()
    assert (haarpsi(noisy, original) > haarpsi(noisier, original)).all()
    assert haarpsi(noisy, original).shape == gmsd(noisy, original).shape == (3,)
    side = PIQ_MIN_SIDE
    for metric in (gmsd, haarpsi):
        assert torch.isfinite(metric(*pair(1, 3, side, side))).all()
        with pytest.raises(ValueError, match=f"{side} px"):
            metric(*pair(1, 3, side - 1, side))


@pytest.mark.skipif(piq_available(), reason="piq is installed")
@pytest.mark.parametrize("metric", [gmsd, haarpsi])
def test_without_piq_its_metrics_say_what_to_install(metric):
    with pytest.raises(ModuleNotFoundError, match="pip install piq"):
        metric(*pair(1, 3, 16, 16))
