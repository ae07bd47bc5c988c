"""Several VAEs next to each other: reconstructions in a grid, with their PSNR."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_codec.comfyui.images import to_images, to_pixels
from latent_codec.evaluation.comparison import difference_image
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import center_crop
from latent_codec.metrics import as_rgb, psnr, round_to_8_bits


def compare_vaes(pixels: Tensor, vaes: Sequence[Any], differences: bool) -> tuple[Tensor, str]:
    """Send IMAGE (B, H, W, C) through each VAE and back.

    Returns:
        IMAGE of the grid, and a line for each VAE. PSNR is the mean over the images, of 8 bits per channel; where a VAE crops
        images to sides that it can take, it is that of their middle.
    """
    originals = as_rgb(to_images(pixels))
    columns, titles, lines = [list(originals)], ["original"], []
    for number, vae in enumerate(vaes, 1):
        decoded = vae.decode(vae.encode(pixels[..., :3]))
        found = as_rgb(to_images(decoded.flatten(0, -4)))
        expected = torch.stack([center_crop(image, tuple(found.shape[2:])) for image in originals])
        name = _name(vae) or f"VAE {number}"
        decibels = psnr(round_to_8_bits(found), round_to_8_bits(expected)).mean().item()
        columns.append(list(found))
        titles.append(f"{name}\n{decibels:.2f} dB")
        lines.append(f"{name}: PSNR {decibels:.2f} dB, {_shape(vae)}")
    rows = []
    for original, *reconstructions in zip(*columns):
        rows.append([original, *reconstructions])
        if differences:
            middles = [center_crop(original, tuple(each.shape[1:])) for each in reconstructions]
            rows.append([torch.ones_like(original), *map(difference_image, middles, reconstructions)])
    grid = sheet(rows, column_titles=titles)
    return to_pixels((grid.float() / 127.5 - 1)[None]), "\n".join(lines)


def _name(vae: Any) -> str | None:
    network = vae.first_stage_model
    return network.codec.name if hasattr(network, "codec") else None


def _shape(vae: Any) -> str:
    return f"{vae.latent_channels} channels at 1/{vae.spacial_compression_decode()}"
