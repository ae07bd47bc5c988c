"""Training a TinyDecoder: it learns to paint what a codec's own decoder does, from the same latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.components.loading import open_component
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import image_grid, write_image
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.previews.full import rgb
from latent_codec.training.build import construct
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import TrainingCrops
from latent_codec.training.task import Task

NUM_SAMPLES = 8


def build_tiny_decoder(config: TrainingConfig, source: ImageSource) -> TinyDecoder:
    """A new decoder from `model.arguments`, or `model.pretrained`, in float32.

    Channels and levels follow from `model.teacher`, and the clamp is at three standard deviations of its latents.

    Raises:
        ValueError: for an argument that it does not have or cannot use, or another upsampling factor than the teacher's.
    """
    if not config.model.teacher:
        raise ValueError(
            "a TinyDecoder imitates a codec's decoder: name the codec by --codec, or model.teacher."
        )
    codec = LatentCodec.from_pretrained(config.model.teacher)
    if config.model.pretrained:
        decoder = open_component(config.model.pretrained, "preview", [TinyDecoder]).train()
    else:
        arguments = dict(config.model.arguments)
        levels = codec.latent_space.downsampling_factor.bit_length()
        arguments.setdefault("latent_channels", codec.latent_space.channels)
        arguments.setdefault("block_out_channels", [64, 48, 32, *[16] * levels][:levels])
        arguments.setdefault("num_blocks", [*[3] * (levels - 1), 1])
        if "latent_magnitude" not in arguments:
            crops = TrainingCrops.configured(config, source, codec.channels)
            images = torch.stack([crops[position] for position in range(NUM_SAMPLES)])
            arguments["latent_magnitude"] = 3 * float(codec.encode(images).float().std())
        decoder = construct(TinyDecoder, arguments, config.run.seed)
    theirs, ours = codec.latent_space, decoder.config
    if (theirs.channels, theirs.downsampling_factor) != (ours.latent_channels, decoder.upsampling_factor):
        raise ValueError(
            f"the decoder takes {ours.latent_channels} channels and enlarges by {decoder.upsampling_factor}; "
            f"{codec.name} has {theirs.channels} channels at a factor of {theirs.downsampling_factor}."
        )
    return decoder


def check_tiny_decoder(config: TrainingConfig, decoder: TinyDecoder, source: ImageSource, stream) -> None:
    """Refuse what a decoder cannot be trained by, before anything is written."""
    if stream is not None:
        raise ValueError("a TinyDecoder trains on images at hand: leave --stream out.")
    if config.data.binarize:
        raise ValueError("data.binarize is for codecs: a TinyDecoder sees what its codec sees.")


class TinyDecoderTask(Task):
    """Mean squared error against the codec's decode of the same latents (distillation, arXiv:1503.02531).

        crop --codec--> latents --codec's decoder--> image --+
                           +------TinyDecoder------> image --+--> mse

    Args:
        config: of the run.
        decoder: what `build_tiny_decoder` gave.
        source: images.
        accelerator: device, precision and processes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        decoder: TinyDecoder,
        source: ImageSource,
        accelerator: Accelerator,
        *,
        stream=None,
        resumes: bool = False,
    ):
        super().__init__(config, decoder, accelerator)
        self.codec = LatentCodec.from_pretrained(config.model.teacher, device=accelerator.device)
        self.crops = TrainingCrops.configured(config, source, self.codec.channels)
        self.num_images = len(source)
        self.train_directly(decoder)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        return f"loss {terms['loss']:.5f}, {terms['psnr']:.2f} dB to the codec's decode"

    @property
    def skipped(self) -> list[str]:
        return self.crops.skipped

    def resume(self, state: dict[str, Any], out: Path) -> None:
        found = self.codec.fingerprint
        if state.get("teacher", found) != found:
            raise ValueError(
                f"{out} learned from a codec with the fingerprint {state['teacher']}, and {self.codec.name} has {found}: give "
                "the one it was started with, or another run folder."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.codec.fingerprint}

    def batches(self, start: int) -> Iterator[tuple[list[int], Tensor]]:
        return self.positions(start, self.crops)

    def terms(self, batch: tuple[list[int], Tensor], step: int) -> dict[str, Tensor]:
        latents, decoded = self._lesson(batch[1])
        painted = self.model(latents).float()
        with torch.no_grad():
            error = (painted.clamp(-1, 1) - decoded).square().mean((1, 2, 3))
            psnr = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
        return {"loss": F.mse_loss(painted, decoded), "psnr": psnr}

    @torch.no_grad()
    def write_samples(self, path: Path) -> None:
        """The codec's decodes over the averaged decoder's."""
        images = torch.stack([self.crops[position] for position in range(NUM_SAMPLES)])
        latents, decoded = self._lesson(images)
        painted = self.ema.module.eval()(latents).float().clamp(-1, 1)
        write_image(image_grid([*decoded.cpu(), *painted.cpu()], columns=NUM_SAMPLES), path)

    @torch.no_grad()
    def _lesson(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Crops -> latents, and RGB as the codec decodes them."""
        latents = self.codec.encode(images)
        return latents, rgb(self.codec.decode(latents, output_type="pt"))
