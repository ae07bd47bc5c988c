"""Fidelity of images to their originals, and the distance between two sets of images.

Images are NCHW floats in [-1, 1]; every image metric gives one float32 number
per image, shaped (N,). Nothing here is ever fetched from a network: a metric whose
weights are absent says so (`lpips_available`).
"""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from latent_codec.tensors import check_shape

LPIPS_TRUNKS = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
"""The ImageNet weights that each form of LPIPS needs, by torchvision's file name."""

LPIPS_MIN_SIDE = {"squeeze": 17, "alex": 31, "vgg": 16}
"""Pixels per side under which the trunk's pooling leaves nothing to compare."""

PIQ_MIN_SIDE = 16
"""Pixels per side of HaarPSI's largest wavelet; GMSD would take less."""

_D65 = (0.95047, 1.0, 1.08883)
_XYZ_OF_SRGB = [
    [weight / white for weight in row]
    for row, white in zip(
        (
            (0.4124564, 0.3575761, 0.1804375),
            (0.2126729, 0.7151522, 0.0721750),
            (0.0193339, 0.1191920, 0.9503041),
        ),
        _D65,
    )
]
"""Of linear sRGB, relative to white."""

MS_SSIM_MIN_SIDE = 176
"""Five scales, each half the last, under an 11-pixel window; torchmetrics asks for side // 16 > 10."""

MIN_SIDES = {
    "psnr": 1,
    "ssim": 6,
    "ms_ssim": MS_SSIM_MIN_SIDE,
    "lpips": LPIPS_MIN_SIDE["squeeze"],
    "gmsd": PIQ_MIN_SIDE,
    "haarpsi": PIQ_MIN_SIDE,
}
"""Pixels per side that each metric of `compare` needs."""


def compare(images: Tensor, references: Tensor, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Compute several of MIN_SIDES' metrics, each a figure per image.

    None where the images are too small for a metric, or the weights or the package that it needs are absent.
    """
    functions = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "gmsd": gmsd, "haarpsi": haarpsi}
    functions["lpips"] = lpips_distance
    absent = [] if lpips_available() else ["lpips"]
    absent += [] if piq_available() else ["gmsd", "haarpsi"]
    return {
        name: functions[name](images, references).tolist()
        if name not in absent and min(references.shape[2:]) >= MIN_SIDES[name]
        else [None] * len(references)
        for name in names
    }


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(2^2 / MSE), in dB; infinite where nothing differs."""
    _check_pair(images, references)
    mse = (images.float() - references.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1: Gaussian window of 11 px, sigma 1.5, mean over channels.

    Raises:
        ValueError: if a side is shorter than 6 px, which the window's reflection needs.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, references, min_side=6, metric="SSIM")
    # The luminance term is not shift-invariant: the paper's constants are for images from 0 up.
    return structural_similarity_index_measure(
        images.float() / 2 + 0.5, references.float() / 2 + 0.5, data_range=1.0, reduction="none"
    ).view(-1)


def ms_ssim(images: Tensor, references: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang, Simoncelli and Bovik 2003): five scales with the paper's exponents.

    Raises:
        ValueError: if a side is shorter than `MS_SSIM_MIN_SIDE`.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    _check_pair(images, references, min_side=MS_SSIM_MIN_SIDE, metric="MS-SSIM")
    return multiscale_structural_similarity_index_measure(
        images.float() / 2 + 0.5, references.float() / 2 + 0.5, data_range=1.0, reduction="none"
    ).view(-1)


def gmsd(images: Tensor, references: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation (Xue et al. 2014), by piq: 0 for equal images, less is better.

    No codec here is trained on it.

    Raises:
        ValueError: if a side is shorter than `PIQ_MIN_SIDE`.
        ModuleNotFoundError: if piq is not installed.
    """
    return _piq("gmsd", images, references)


def haarpsi(images: Tensor, references: Tensor) -> Tensor:
    """Haar wavelet-based perceptual similarity (Reisenhofer et al. 2018), by piq: 1 for equal images.

    No codec here is trained on it.

    Raises:
        ValueError: if a side is shorter than `PIQ_MIN_SIDE`.
        ModuleNotFoundError: if piq is not installed.
    """
    return _piq("haarpsi", images, references)


def piq_available() -> bool:
    """Whether `gmsd` and `haarpsi` can be computed: piq is an optional dependency."""
    return find_spec("piq") is not None


def lpips_distance(images: Tensor, references: Tensor, *, net: str = "squeeze") -> Tensor:
    """LPIPS between images, without gradients; see `load_lpips` for the differentiable module."""
    with torch.no_grad():
        return _lpips_on(net, images.device)(images.float(), references.float())


def lpips_available(net: str = "squeeze") -> bool:
    """Whether `load_lpips(net)` finds its weights on this machine."""
    return lpips_weights(net).is_file()


def lpips_weights(net: str = "squeeze") -> Path:
    """Where the trunk of LPIPS `net` is looked for: torch's hub folder, which `TORCH_HOME` moves."""
    if net not in LPIPS_TRUNKS:
        raise ValueError(f"LPIPS has no network {net!r}; it has {', '.join(LPIPS_TRUNKS)}")
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_TRUNKS[net]


class PerceptualDistance(nn.Module):
    """Learned perceptual image patch similarity, LPIPS v0.1 (Zhang et al., arXiv:1801.03924).

    Frozen, and always in evaluation mode (its linear heads have dropout); gradients
    flow to both arguments.
    """

    def __init__(self, lpips_module: nn.Module, net: str):
        super().__init__()
        self.lpips = lpips_module.requires_grad_(False)
        self.net = net
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance per image, (N,), 0 for equal ones.

        Args:
            images, references: (N, C, H, W) in [-1, 1]. One channel counts as gray;
                of four channels the first three (color) are compared.

        Raises:
            ValueError: on unequal shapes, two or more than four channels, or a side under
                `LPIPS_MIN_SIDE[net]`.
        """
        _check_pair(images, references, min_side=LPIPS_MIN_SIDE[self.net], metric=f"LPIPS ({self.net})")
        return self.lpips(as_rgb(images), as_rgb(references)).flatten()


def load_lpips(net: str = "squeeze") -> PerceptualDistance:
    """LPIPS as a frozen, differentiable module; its trunk's weights are read from torch's hub folder.

    Raises:
        FileNotFoundError: if the trunk's weights are not on this machine; they are never downloaded.
        OSError: if their file is damaged.
    """
    path = lpips_weights(net)
    if not path.is_file():
        raise FileNotFoundError(
            f"LPIPS ({net}) needs the weights {path}, which are not there. Put torchvision's file "
            f"{path.name} at that place, or point TORCH_HOME at a folder that has hub/checkpoints/{path.name}"
        )
    import lpips

    with warnings.catch_warnings():
        # lpips still calls torchvision by arguments that it has deprecated.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        # Asked for a random trunk it reads no file and no network: the weights come from ours.
        module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # torchvision's `features.3.bias` is `slice2.3.bias` in lpips.
        trunk = {name: weights["features." + name.split(".", 1)[1]] for name in module.net.state_dict()}
        module.net.load_state_dict(trunk)
    except (RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
        what = f"the LPIPS weights {path} are damaged or not torchvision's"
        raise OSError(f"{what}; put a good copy there") from error
    return PerceptualDistance(module, net)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features (equation 6 of arXiv:1706.08500).

    Args:
        features_a, features_b: (number of images, number of features); at least two rows each.
    """
    gaussians: list[Tensor] = []
    for features in (features_a, features_b):
        check_shape(features, "features", ("images", "features"))
        if len(features) < 2:
            raise ValueError(f"expected features of 2 images or more, got {len(features)}")
        gaussians += [features.double().mean(0), features.double().T.cov()]
    return frechet_distance_of_gaussians(*gaussians)


def frechet_distance_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64.

    The trace of the product's root is the sum of the singular values of A^(1/2) B^(1/2),
    whose factors are roots of symmetric matrices: unlike a general matrix root it stays
    real and stable when the covariances are singular.
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"{mean_a.numel()} features cannot be compared with {mean_b.numel()}")
    mean_a, cov_a, mean_b, cov_b = (tensor.double() for tensor in (mean_a, cov_a, mean_b, cov_b))
    roots = torch.linalg.svdvals(_symmetric_root(cov_a) @ _symmetric_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots
    return max(distance.item(), 0.0)


def as_rgb(images: Tensor) -> Tensor:
    """Three channels for networks that know only color: gray repeated, alpha left out."""
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels not in (3, 4):
        raise ValueError(f"images of {channels} channels are no color images: expected 1, 3 or 4 channels")
    return images[:, :3]


def lab(images: Tensor) -> Tensor:
    """CIE 1976 L*a*b* of sRGB images (N, 1, 3 or 4, H, W) in [-1, 1], white point D65: (N, 3, H, W), L from 0 to 100.

    IEC 61966-2-1's transfer function and primaries; L* = 116 f(Y) - 16, a* = 500 (f(X) - f(Y)), b* = 200 (f(Y) - f(Z)) with
    f(t) = t^(1/3), and a line for t up to (6/29)^3 (CIE 15).
    """
    coded = (as_rgb(images).float() / 2 + 0.5).clamp(0, 1)
    linear = torch.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("kc,nchw->nkhw", images.new_tensor(_XYZ_OF_SRGB, dtype=torch.float32), linear)
    x, y, z = torch.where(
        xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29
    ).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def round_to_8_bits(images: Tensor) -> Tensor:
    """The images as a file of 8 bits per channel would hold them: clamped to [-1, 1], in steps of 2/255."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The root of a positive semi-definite matrix; eigenvalues that rounding made negative count as zero."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T


@cache
def _lpips_on(net: str, device: torch.device) -> PerceptualDistance:
    return load_lpips(net).to(device)


def _piq(name: str, images: Tensor, references: Tensor) -> Tensor:
    """A full-reference metric of piq's, (N,), of images scaled to [0, 1]."""
    _check_pair(images, references, min_side=PIQ_MIN_SIDE, metric=name.upper())
    if not piq_available():
        raise ModuleNotFoundError(f"{name} needs the package piq: pip install piq")
    import piq

    pair = ((each.float() / 2 + 0.5).clamp(0, 1) for each in (images, references))
    return getattr(piq, name)(*pair, data_range=1.0, reduction="none").view(-1)


def _check_pair(
    images: Tensor, references: Tensor, *, min_side: int = 1, metric: str = "this metric"
) -> None:
    check_shape(images, "images", ("N", "C", "H", "W"))
    check_shape(references, "references", images.shape)
    if min(images.shape[2:]) < min_side:
        height, width = images.shape[2:]
        raise ValueError(f"{metric} needs sides of at least {min_side} px; these images are {width}x{height}")
