"""Training a TinyDecoder: it learns to give the images of a codec's own decoder from the same latents."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.components.loading import open_component
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource
from latent_codec.images.tensors import write_image
from latent_codec.models.tiny_decoder import TinyDecoder
from latent_codec.previews.full import rgb
from latent_codec.training.build import construct, load_codec
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import TrainingCrops
from latent_codec.training.report import SAMPLE_SIDE
from latent_codec.training.task import Task, TaskInputs, collate

NUM_SAMPLES = 8


def build_tiny_decoder(
    config: TrainingConfig, source: ImageSource, codec: LatentCodec | None = None
) -> TinyDecoder:
    """A new decoder from `model.arguments`, or `model.pretrained`, in float32.

    Channels and blocks follow from `model.teacher`, and the clamp is at three standard deviations of its latents.

    Raises:
        ValueError: for an argument that it does not have or cannot use, or another upsampling factor than the teacher's.
    """
    codec = load_codec(config) if codec is None else codec
    if config.model.pretrained:
        decoder = open_component(config.model.pretrained, "preview", [TinyDecoder]).train()
    else:
        arguments = dict(config.model.arguments)
        depth = codec.latent_space.downsampling_factor.bit_length()
        arguments.setdefault("latent_channels", codec.latent_space.channels)
        arguments.setdefault("block_out_channels", [64, 48, 32, *[16] * depth][:depth])
        arguments.setdefault("num_blocks", [*[3] * (depth - 1), 1])
        if "latent_magnitude" not in arguments:
            crops = TrainingCrops.configured(config, source, codec.channels)
            latents = codec.encode(collate(crops, range(NUM_SAMPLES)))
            arguments["latent_magnitude"] = 3 * float(latents.float().std())
        decoder = construct(TinyDecoder, arguments, config.run.seed)
    theirs, ours = codec.latent_space, decoder.config
    if (theirs.channels, theirs.downsampling_factor) != (ours.latent_channels, decoder.upsampling_factor):
        raise ValueError(
            f"the decoder takes {ours.latent_channels} channels and enlarges by {decoder.upsampling_factor}; "
            f"{codec.name} has {theirs.channels} channels at a factor of {theirs.downsampling_factor}."
        )
    return decoder


class TinyDecoderTask(Task):
    """Mean squared error against the codec's decode of the same latents (distillation, arXiv:1503.02531).

    crop --codec--> latents --codec's decoder--> image --+
                       +------TinyDecoder------> image --+--> mse
    """

    def __init__(
        self, config: TrainingConfig, network: TinyDecoder, inputs: TaskInputs, accelerator: Accelerator
    ):
        self.codec = inputs.codec
        self.codec.autoencoder.to(accelerator.device)
        crops = TrainingCrops.configured(config, inputs.source, self.codec.channels)
        super().__init__(config, network, crops, accelerator)

    @classmethod
    def check(cls, config: TrainingConfig, network: TinyDecoder, inputs: TaskInputs) -> None:
        if config.data.binarize:
            raise config.error("data.binarize", "false for a TinyDecoder, whose codec has gray values")

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        return f"loss {terms['loss']:.5f}, {terms['psnr']:.2f} dB to the codec's decode"

    def resume(self, state: dict[str, Any], out: Path) -> None:
        self.check_teacher(self.codec, state.get("teacher"), self.codec.fingerprint, "fingerprint", out)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.codec.fingerprint}

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        latents, decoded = self._lesson(batch)
        reconstruction = self.model(latents).float()
        with torch.no_grad():
            error = (reconstruction.clamp(-1, 1) - decoded).square().mean((1, 2, 3))
            psnr = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
        return F.mse_loss(reconstruction, decoded), {"psnr": psnr}

    @torch.no_grad()
    def write_samples(self, path: Path) -> None:
        """The codec's decodes over the averaged decoder's."""
        latents, decoded = self._lesson(collate(self.dataset, range(NUM_SAMPLES)))
        reconstruction = self.ema.module.eval()(latents).float().clamp(-1, 1)
        rows, names = [decoded.cpu(), reconstruction.cpu()], ["codec's decode", "tiny decoder"]
        columns = [f"crop {number}" for number in range(1, len(decoded) + 1)]
        write_image(sheet(rows, row_titles=names, column_titles=columns, side=SAMPLE_SIDE), path)

    @torch.no_grad()
    def _lesson(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Crops -> latents, and RGB as the codec decodes them."""
        latents = self.codec.encode(images)
        return latents.float(), rgb(self.codec.decode(latents, output_type="pt"))
