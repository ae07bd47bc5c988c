"""What the default codec has to beat: a linear code of the same size, and JPEG at the same PSNR.

    pytest tests/benchmarks/test_compression_baselines.py -s -o addopts=

prints the tables that the README quotes. Needs the data folder next to the checkout.
"""

import io
from statistics import mean

import pytest
import torch
from PIL import Image
from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.components.codec_folders import ASSETS
from latent_codec.evaluation.reconstruction import reconstruct
from latent_codec.images.sources import ImageSource, open_source
from latent_codec.images.tensors import to_image, to_pil
from latent_codec.metrics import lpips_available, lpips_distance, ms_ssim, psnr, round_to_8_bits

BLOCK = 8
CHANNELS = 4


def to_blocks(image: Tensor) -> Tensor:
    """(1, 3, H, W) -> (blocks, 3 * 8 * 8), float64; what does not fill a block is left out."""
    height, width = (side // BLOCK * BLOCK for side in image.shape[2:])
    return torch.nn.functional.unfold(image[..., :height, :width].double(), BLOCK, stride=BLOCK)[0].T


def from_blocks(blocks: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.fold(blocks.T[None], size, BLOCK, stride=BLOCK)


def principal_components(source: ImageSource) -> tuple[Tensor, Tensor]:
    """Mean block (192,) and the directions of largest variance (192, 192), best first."""
    count, total, products = 0, 0, 0
    for i in range(len(source)):
        blocks = to_blocks(source.image(i, 3)[None])
        count += len(blocks)
        total = total + blocks.sum(0)
        products = products + blocks.T @ blocks
    average = total / count
    _, directions = torch.linalg.eigh(products / count - average.outer(average))
    return average, directions.flip(1)


def test_linear_code(shared, kodak):
    """PCA of 8x8x3 blocks, fitted on the training photos: the best linear code of any width."""
    average, directions = principal_components(open_source(shared / "data/photos"))

    print("\nPCA of 8x8x3 blocks on kodak, PSNR in dB:")
    found = {}
    for channels in (CHANNELS, 8, 16):
        basis = directions[:, :channels]
        scores = []
        for image in kodak:
            blocks = (to_blocks(image) - average) @ basis @ basis.T + average
            scores.append(psnr(round_to_8_bits(from_blocks(blocks, image.shape[2:])), image).item())
        found[channels] = mean(scores)
        print(f"  {channels:2d} channels  {found[channels]:.2f}")

    # 0.1 dB: the reference figures were fitted to another sample of the same photos' blocks.
    assert found == pytest.approx({4: 23.30, 8: 26.10, 16: 28.72}, abs=0.1)


def jpeg_round_trip(image: Tensor, quality: int) -> tuple[Tensor, float]:
    """The image after Pillow's JPEG (4:2:0, optimized, progressive), and its bits per pixel."""
    file = io.BytesIO()
    to_pil(image[0]).save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, progressive=True)
    bits = 8 * file.tell() / (image.shape[2] * image.shape[3])
    return to_image(Image.open(file))[None], bits


def figures(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over images of reconstruction against original."""
    metrics = {"PSNR": psnr, "MS-SSIM": ms_ssim}
    if lpips_available("squeeze"):
        metrics["LPIPS-squeeze"] = lpips_distance
    return {name: mean(metric(*pair).item() for pair in pairs) for name, metric in metrics.items()}


def jpeg_figures(kodak: list[Tensor], quality: int) -> dict[str, float]:
    trips = [jpeg_round_trip(image, quality) for image in kodak]
    found = figures([(copy, image) for (copy, _), image in zip(trips, kodak)])
    return found | {"bits per pixel": mean(bits for _, bits in trips)}


def jpeg_at_psnr(kodak: list[Tensor], wanted: float) -> tuple[dict[str, float], float]:
    """JPEG's figures where its mean PSNR is `wanted`, between two neighboring qualities, and that quality."""
    low, high = 1, 95
    while high - low > 1:
        middle = (low + high) // 2
        scores = [psnr(jpeg_round_trip(image, middle)[0], image).item() for image in kodak]
        low, high = (middle, high) if mean(scores) <= wanted else (low, middle)
    below, above = jpeg_figures(kodak, low), jpeg_figures(kodak, high)
    assert below["PSNR"] <= wanted <= above["PSNR"], f"no JPEG quality of 1 to 95 gives {wanted:.2f} dB"
    share = (wanted - below["PSNR"]) / (above["PSNR"] - below["PSNR"])
    return {name: below[name] + share * (above[name] - below[name]) for name in below}, low + share


@pytest.mark.skipif(
    not (ASSETS / "default-f8c4" / "config.json").is_file(), reason="needs the shipped codec default-f8c4"
)
def test_default_codec_against_jpeg_of_equal_psnr(kodak):
    codec = LatentCodec.from_pretrained("default")
    ours = figures([(reconstruct(codec, image), image) for image in kodak])

    jpeg, quality = jpeg_at_psnr(kodak, ours["PSNR"])

    print(f"\n{'kodak':16}{codec.name:>16}{f'JPEG quality {quality:.1f}':>20}")
    for name, value in jpeg.items():
        print(f"{name:16}{format(ours[name], '.4f') if name in ours else '-':>16}{value:20.4f}")
    latents = 16 * codec.latent_space.channels / codec.latent_space.downsampling_factor**2
    print(f"The codec's latents take {latents:.2f} bits per pixel in float16, before any entropy coding.")

    assert jpeg["PSNR"] == pytest.approx(ours["PSNR"])
    assert ours["PSNR"] > 23.30, "under the linear code of test_linear_code: nothing learned"


def test_jpeg_search_brackets_the_psnr_it_is_asked_for(kodak):
    few = kodak[:2]
    for wanted in (24.0, 30.0):
        found, quality = jpeg_at_psnr(few, wanted)
        below, above = (jpeg_figures(few, int(quality) + step) for step in (0, 1))
        assert below["PSNR"] <= wanted <= above["PSNR"]
        assert below["bits per pixel"] <= found["bits per pixel"] <= above["bits per pixel"]
