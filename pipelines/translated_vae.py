"""TranslatedVAE: one codec's latents for the pipeline, another codec's decoder for its images."""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_codec.codec import LatentCodec
from latent_codec.models.latent_translator import LatentTranslator


class TranslatedVAE(nn.Module):
    """A pipeline's `vae` that is `source`'s in everything but `decode`: its images are those of `target`'s decoder.

        image --source's encoder--> raw latents                                      as the pipeline's own vae
        image <--target's decoder-- latents' <--translator-- latents <-- raw latents

        pipe.vae = TranslatedVAE(LatentCodec(pipe.vae), translator, LatentCodec.from_pretrained("other"))

    So a denoiser draws images by another codec's decoder without being trained again. Config, scale, dtype and whatever else a
    pipeline asks for are those of the source's autoencoder, which is kept as it is. With an upscaling translator images are
    larger than the pipeline was asked for. A pipeline is saved without it: save its own vae and the translator.

    Args:
        source: the codec that the pipeline's denoiser was trained for.
        translator: from source to target.
        target: the codec that decodes.

    Raises:
        ValueError: for a translator of other codecs, naming both.
    """

    def __init__(self, source: LatentCodec, translator: LatentTranslator, target: LatentCodec):
        super().__init__()
        translator.check_source(source)
        translator.check_target(target)
        self.codec, self.target = source, target
        self.autoencoder = source.autoencoder
        self.translator = translator
        self.decoding_autoencoder = target.autoencoder

    def __getattr__(self, name: str) -> Any:
        """What a pipeline asks of its vae and is not here: the source's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("autoencoder"), name)

    @property
    def dtype(self) -> torch.dtype:
        return self.autoencoder.dtype

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @apply_forward_hook
    def encode(self, x: Tensor, *args, **kwargs) -> Any:
        """As the source's autoencoder does."""
        return self.autoencoder.encode(x, *args, **kwargs)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """The source's raw latents, (B, c, h, w) or with one frame (B, c, 1, h, w) -> images of the target's decoder.

        Returns:
            Images in [-1, 1], in the dtype of `z`; with a frame axis where `z` has one.
        """
        raw_latents = z[:, :, 0] if z.ndim == 5 else z
        latents = self.codec.translate(self.codec.latent_space.normalize(raw_latents), self.translator)
        images = self.target.decode(latents, output_type="pt").to(z.dtype)
        if z.ndim == 5:
            images = images.unsqueeze(2)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images -> the images that a pipeline would decode from their latents."""
        latents = self.codec.encode(sample)
        return self.decode(self.codec.latent_space.denormalize(latents), return_dict=return_dict)
