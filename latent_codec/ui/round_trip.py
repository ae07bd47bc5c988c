"""Round trip: an image through a codec and back, what is lost, in numbers and for the eye."""

import time
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from latent_codec import metrics
from latent_codec.codec import LatentCodec
from latent_codec.evaluation.comparison import difference_image
from latent_codec.evaluation.cost import wait_for
from latent_codec.evaluation.one_vector import fit_image
from latent_codec.images.tensors import to_image, to_pil

TIMES = 4
"""So much larger differences are shown."""


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    original: Image.Image
    """As the codec takes it."""
    reconstruction: Image.Image
    difference: Image.Image
    """TIMES as large; mid-gray means equal."""
    figures: dict[str, str]
    notes: list[str]


def round_trip(codec: LatentCodec, image: Tensor) -> RoundTrip:
    """Send an image (C, H, W) in [-1, 1] through a codec and back."""
    codec.check_keeps_size("the comparison with the original")
    image = to_image(image, channels=codec.channels)
    fitted, notes = fit_image(image, codec), []
    if fitted.shape != image.shape:
        side = fitted.shape[-1]
        notes.append(
            f"{codec.name} takes the middle square, {side}x{side} px: one vector stands for an image"
        )
    start = time.perf_counter()
    latents = codec.encode(fitted)
    (found,) = codec.decode(latents, size=tuple(fitted.shape[-2:]), output_type="pt")
    wait_for(codec.device)
    seconds = time.perf_counter() - start
    found = metrics.round_to_8_bits(found.cpu())
    numbers, values = latents[0].numel(), fitted.numel()
    figures = {
        "image": f"{fitted.shape[2]}x{fitted.shape[1]} px",
        "latents": f"{'x'.join(map(str, latents.shape[1:]))}: {values / numbers:.0f} times fewer numbers",
        **quality(found, fitted),
        "time": f"{seconds:.2f} s",
    }
    return RoundTrip(
        original=to_pil(fitted),
        reconstruction=to_pil(found),
        difference=to_pil(difference_image(fitted, found, TIMES)),
        figures=figures,
        notes=notes,
    )


def quality(image: Tensor, original: Tensor) -> dict[str, str]:
    """PSNR and LPIPS of an image (C, H, W) in words, or why there is none."""
    found = metrics.compare(image[None], original[None], ("psnr", "lpips"))
    (psnr,), (lpips,) = found.values()
    return {
        "PSNR": "identical" if psnr == float("inf") else f"{psnr:.2f} dB",
        "LPIPS": f"- ({why_no_lpips(original)})" if lpips is None else f"{lpips:.3f}",
    }


def why_no_lpips(original: Tensor) -> str:
    if not metrics.lpips_available():
        return f"its weights {metrics.lpips_weights().name} are not on this machine"
    return f"it needs {metrics.MIN_SIDES['lpips']} px per side"
