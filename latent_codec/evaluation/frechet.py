"""Frechet distance between crops of images and of their reconstructions, on features of a classifier.

The classic figure (FID, arXiv:1706.08500) uses the Inception network converted from TensorFlow.
Its weights are used where torch's hub folder has them and torch-fidelity is installed;
otherwise features of SqueezeNet 1.1 are, and the result carries their name: the two scales
cannot be compared with each other, nor figures of another crop size or number of crops.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latent_codec.evaluation.meters import Batch, Figure
from latent_codec.metrics import (
    as_rgb,
    frechet_distance,
    frechet_distance_of_gaussians,
    load_lpips,
    lpips_available,
)
from latent_codec.torch_settings import ignoring_caller_settings

MIN_CROPS = 2000
"""Under this many, the estimate's bias is larger than what codecs differ by."""

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""The same weights under the names that torch-fidelity and pytorch-fid give them."""


NO_FEATURES = "neither Inception's nor SqueezeNet's weights are in torch's hub folder"
"""Why there is no distance where `load_feature_network` finds nothing."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns (N, 3, h, w) images in [-1, 1] into (N, features)."""

    name: str
    features: Callable[[Tensor], Tensor]
    min_side: int


class FrechetMeter:
    """Gathers the mean and covariance of features of crops, of originals and of reconstructions.

    Crops are squares cut on a grid without overlap, centered, of `crop` px or of the
    image's shorter side where that is less.
    """

    def __init__(self, network: FeatureNetwork, crop: int):
        if crop < network.min_side:
            raise ValueError(
                f"Frechet crops of {crop} px are too small for {network.name}, which needs {network.min_side} px"
            )
        self.network = network
        self.crop = crop
        self.num_crops = 0
        self.sizes: set[int] = set()
        self.shapes: list[tuple[int, int, int]] = []
        self.sums: list[Tensor] = []
        self.products: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """Count in the originals and the reconstructions."""
        count, _, height, width = batch.originals.shape
        self.shapes.append((count, height, width))
        size = min(self.crop, height, width)
        if size < self.network.min_side:
            return
        for which, images in enumerate((batch.originals, batch.reconstructions)):
            crops = as_rgb(grid_crops(images, size))
            found = torch.cat([self.network.features(some) for some in crops.split(32)])
            found = found.cpu().double()  # not every accelerator has float64
            if len(self.sums) == which:
                width = found.shape[1]
                self.sums.append(found.new_zeros(width))
                self.products.append(found.new_zeros(width, width))
            self.sums[which] += found.sum(0)
            self.products[which] += found.T @ found
        self.num_crops += len(crops)
        self.sizes.add(size)

    @property
    def crops(self) -> str:
        """How many crops of what size: `2304 crops of 128 px`."""
        sizes = sorted(self.sizes) or [self.crop]
        return f"{self.num_crops} crops of {'-'.join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))} px"

    def result(self) -> Figure:
        """The squared Frechet distance; none with fewer than MIN_CROPS crops."""
        if self.num_crops < MIN_CROPS:
            smaller = next((size for size in (64, 32) if self._count(size) >= MIN_CROPS), None)
            remedy = f"smaller crops, of {smaller} px" if smaller else "more images"
            note = f"needs {MIN_CROPS} crops; the images give {self.crops}: take {remedy}"
            return Figure(value=None, note=note)
        gaussians = []
        for total, product in zip(self.sums, self.products):
            mean = total / self.num_crops
            gaussians += [mean, (product - self.num_crops * mean.outer(mean)) / (self.num_crops - 1)]
        distance = frechet_distance_of_gaussians(*gaussians)
        return Figure(value=distance, note=f"{self.network.name}, {self.crops}")

    def _count(self, size: int) -> int:
        """Crops that a smaller grid would have given."""
        return sum(count * (height // size) * (width // size) for count, height, width in self.shapes)


def frechet(images: Tensor, others: Tensor, network: FeatureNetwork | None = None) -> float:
    """Squared Frechet distance between the features of two sets of images (N, C, H, W), uint8 or in [-1, 1].

    Its bias grows as the sets shrink: only distances of equally many images can be compared.

    Args:
        network: whose features; None: as `feature_network` finds it.
    """
    network = network or feature_network(images.device)
    return frechet_distance(features_of(images, network), features_of(others, network))


@ignoring_caller_settings()
def features_of(
    images: Tensor, network: FeatureNetwork, on_progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """A network's features, float32 (N, features) on the CPU, of images (N, C, H, W), uint8 or in [-1, 1].

    Args:
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: if the images are smaller than the network takes.
    """
    if min(images.shape[2:]) < network.min_side:
        sizes = f"{images.shape[3]}x{images.shape[2]}"
        raise ValueError(f"{network.name} need images of {network.min_side} px or more, got {sizes}")
    found: list[Tensor] = []
    for some in images.split(64):
        some = some.float() / 127.5 - 1 if some.dtype == torch.uint8 else some.float()
        found.append(network.features(as_rgb(some)).cpu())
        if on_progress:
            on_progress(sum(map(len, found)), len(images))
    return torch.cat(found)


def feature_network(device: torch.device | str = "cpu") -> FeatureNetwork:
    """What `load_feature_network` finds.

    Raises:
        ValueError: if it finds none.
    """
    network = load_feature_network(device)
    if network is None:
        raise ValueError(
            f"images are compared by the features of a network, and {NO_FEATURES}; put them there"
        )
    return network


def grid_crops(images: Tensor, size: int) -> Tensor:
    """All squares of a centered grid without overlap: (N, C, H, W) -> (N * rows * columns, C, size, size)."""
    height, width = images.shape[2:]
    rows, columns = height // size, width // size
    top, left = (height - rows * size) // 2, (width - columns * size) // 2
    grid = images[:, :, top : top + rows * size, left : left + columns * size]
    grid = grid.unflatten(2, (rows, size)).unflatten(4, (columns, size))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def load_feature_network(device: torch.device | str = "cpu") -> FeatureNetwork | None:
    """Inception where it can be had, else SqueezeNet, else None. Nothing is downloaded.

    Raises:
        OSError: if the weights found are damaged.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    inception = next((folder / name for name in INCEPTION_FILES if (folder / name).is_file()), None)
    if inception is not None and importlib.util.find_spec("torch_fidelity"):
        return _inception(inception, device)
    if lpips_available("squeeze"):
        return _squeezenet(device)
    return None


def _inception(path: Path, device: torch.device | str) -> FeatureNetwork:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(path, weights_only=True)  # torch-fidelity unpickles the file without this check
        module = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        raise OSError(f"the Inception weights {path} are damaged; put a good copy there") from error
    module.to(device)

    def features(images: Tensor) -> Tensor:
        return module((images * 127.5 + 127.5).round().to(torch.uint8))[0]

    return FeatureNetwork("Inception features", features, min_side=8)


def _squeezenet(device: torch.device | str) -> FeatureNetwork:
    """The 512 features that SqueezeNet 1.1's classifier reads, averaged over the image."""
    perceptual = load_lpips("squeeze").to(device).lpips
    layers = nn.Sequential(
        perceptual.scaling_layer, *(getattr(perceptual.net, f"slice{i}") for i in range(1, 8))
    )

    def features(images: Tensor) -> Tensor:
        return layers(images).mean((2, 3))

    return FeatureNetwork("SqueezeNet features", features, min_side=17)
