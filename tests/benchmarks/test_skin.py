"""How far codecs are off in the color of skin: a* and b* over patches of faces.

    pytest tests/benchmarks/test_skin.py -s -o addopts=

prints the table that the model cards quote, as Markdown. Needs the data folder next to the checkout; half a minute of one core
for each codec. CODECS="default runs/mine" takes other codecs, NUM_FACES=600 all faces.
"""

import os
from statistics import mean

import torch
from tables import table
from torch import Tensor
from torch.nn import functional as F

from latent_codec import LatentCodec
from latent_codec.evaluation.reconstruction import reconstruct
from latent_codec.images.sources import open_source, spread
from latent_codec.metrics import lab, psnr

CODECS = os.environ.get("CODECS", "default default-eq default-16").split()
NUM_FACES = int(os.environ.get("NUM_FACES", 64))
PATCH = 8


def skin(image: Tensor) -> Tensor:
    """(H / 8, W / 8), bool: squares that are skin all over, by the rule of daylight of Kovac, Peer and Solina (EUROCON 2003)."""
    values = (image[0] + 1) * 127.5
    red, green, blue = values
    spread_of_values = values.amax(0) - values.amin(0)
    is_skin = (red > 95) & (green > 40) & (blue > 20) & (spread_of_values > 15)
    is_skin &= ((red - green).abs() > 15) & (red > green) & (red > blue)
    return F.avg_pool2d(is_skin[None].float(), PATCH)[0] > 0.95


def errors(codec: LatentCodec, faces: list[Tensor]) -> tuple[Tensor, float]:
    """(2, patches), by how much a* and b* are off in the mean of each patch of skin, and the mean PSNR."""
    found, scores = [], []
    for face in faces:
        copy = reconstruct(codec, face)
        difference = F.avg_pool2d((lab(copy) - lab(face))[:, 1:], PATCH)[0]
        found.append(difference[:, skin(face)])
        scores.append(psnr(copy, face).item())
    return torch.cat(found, 1), mean(scores)


def test_color_of_skin(shared):
    source = open_source(shared / "data/faces/faces-test.tar")
    chosen = spread(len(source), NUM_FACES)
    faces = [source.image(index, 3)[None, :, 2:106, :88] for index in chosen]  # whole patches
    rows = []
    for name in CODECS:
        off, score = errors(LatentCodec.from_pretrained(name), faces)
        rows.append([name, *off.abs().mean(1).tolist(), *off.mean(1).tolist(), score])
        assert off.shape[1] > 10 * len(faces), "hardly any skin was found"
    table(
        f"{off.shape[1]} patches of skin of 8x8 px, of {len(faces)} faces",
        ["", "error of a*", "error of b*", "a* too high by", "b* too high by", "PSNR, dB"],
        rows,
    )
