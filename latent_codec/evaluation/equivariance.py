"""How latents behave under what a diffusion model takes for granted: turned and shrunk ones decode to turned and shrunk images,
and high frequencies are as rare in them as in images (EQ-VAE, arXiv:2502.09509; scale equivariance, arXiv:2502.14831)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec import metrics
from latent_codec.codec import LatentCodec
from latent_codec.evaluation.meters import Batch, Figure
from latent_codec.files import plain

MAX_IMAGES = 32
"""Images that are measured, the first ones: each takes more than another round trip."""
HALF_NYQUIST = 0.25
"""Cycles per position: of half the frequency that a grid can hold."""


@dataclass(frozen=True, kw_only=True)
class Equivariance:
    """What `EquivarianceMeter` found: means over images."""

    quarter_turn: Figure
    """dB of PSNR that latents turned by a quarter lose against latents as they are."""
    half_size: Figure
    """dB that latents shrunk to half their sides lose against the latents of the shrunk image."""
    high_frequencies: Figure
    """Share of the latents' power, without their mean, above half of Nyquist's frequency."""
    image_high_frequencies: Figure
    """The same of the images, shrunk to the latents' grid."""

    def to_dict(self) -> dict:
        return plain(asdict(self))


class EquivarianceMeter:
    """Gathers `Equivariance`, of the largest part of an image that holds whole latents when it is halved."""

    def __init__(self, codec: LatentCodec):
        self.codec = codec
        self.rows: list[list[float]] = []
        self.why_not = ""
        if codec.upscale > 1:
            self.why_not = f"{codec.name} decodes to {codec.upscale} times the size of what it encodes"
        if codec.family.only_size is not None:
            self.why_not = f"{codec.name} takes images of one size only"

    def add(self, batch: Batch) -> None:
        """Decode the transformed latents of a batch."""
        multiple = 2 * self.codec.family.side_multiple
        sides = [side - side % multiple for side in batch.originals.shape[2:]]
        if self.why_not or len(self.rows) >= MAX_IMAGES:
            return
        if not all(sides):
            self.why_not = f"images are smaller than {multiple} px"
            return
        some = slice(MAX_IMAGES - len(self.rows))
        codec, image = self.codec, batch.originals[some, :, : sides[0], : sides[1]]
        if sides == list(batch.originals.shape[2:]):
            latents = batch.encoding.latents[some].float()
            plain_psnr = metrics.psnr(batch.reconstructions[some], image)
        else:
            latents = codec.encode(image).float()
            plain_psnr = self._psnr(latents, image)
        small = F.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)
        small_latents = F.interpolate(latents, scale_factor=0.5, mode="bilinear", antialias=True)
        small_psnr = self._psnr(codec.encode(small), small)
        turned = plain_psnr - self._psnr(latents.rot90(1, (2, 3)), image.rot90(1, (2, 3)))
        halved = small_psnr - self._psnr(small_latents, small)
        on_grid = F.interpolate(image, latents.shape[2:], mode="bilinear", antialias=True)
        columns = turned, halved, _high_share(latents), _high_share(on_grid)
        self.rows += torch.stack([column.cpu() for column in columns], 1).tolist()

    def _psnr(self, latents: Tensor, image: Tensor) -> Tensor:
        decoded = self.codec.decode(latents, size=tuple(image.shape[2:]), output_type="pt")
        return metrics.psnr(metrics.round_to_8_bits(decoded), image)

    def result(self) -> Equivariance:
        notes = (
            "dB that latents turned by a quarter lose",
            "dB that latents shrunk by half lose against encoding the shrunk image",
            "share of the latents' power above half of Nyquist's frequency",
            "the same of images on the latents' grid",
        )
        fields = Equivariance.__dataclass_fields__
        if not self.rows:
            return Equivariance(**{name: Figure(value=None, note=self.why_not) for name in fields})
        means = torch.tensor(self.rows, dtype=torch.float64).mean(0).tolist()
        of = f", of {len(self.rows)} images"
        found = {name: Figure(value=mean, note=note + of) for name, mean, note in zip(fields, means, notes)}
        return Equivariance(**found)


def _high_share(grid: Tensor) -> Tensor:
    """Of each of (N, C, h, w): power above HALF_NYQUIST along either axis over all but the constant part; 0 where there is none."""
    power = torch.fft.fft2(grid.float()).abs().square()
    power[..., 0, 0] = 0
    down, across = (torch.fft.fftfreq(side, device=grid.device).abs() for side in grid.shape[2:])
    is_high = (down[:, None] > HALF_NYQUIST) | (across > HALF_NYQUIST)
    return (power * is_high).sum((1, 2, 3)) / power.sum((1, 2, 3)).clamp_min(1e-12)
