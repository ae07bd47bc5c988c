"""A small Stable Diffusion pipeline with random weights around a codec, to try things on: it knows no images, and draws noise in seconds."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from latent_codec.codec import LatentCodec

WIDTH = 32
"""Of every layer."""
MAX_TOKENS = 16
"""Of a prompt."""


def build_tiny_pipeline(codec: LatentCodec, *, size: int = 128, seed: int = 0) -> StableDiffusionPipeline:
    """Make a pipeline whose text encoder and denoiser have random weights, with `codec` as its VAE.

    Args:
        codec: an AutoencoderKL, as StableDiffusionPipeline takes it.
        size: of its images, in pixels.

    Raises:
        ValueError: for a codec of another class, or whose pixels per latent `size` is no multiple of.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    codec.family.check_pipeline("StableDiffusionPipeline", codec.name)
    factor = codec.latent_space.downsampling_factor
    if size % (2 * factor):
        raise ValueError(f"size: expected a multiple of {2 * factor} pixels for {codec.name}, got {size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=size // factor,
            in_channels=codec.latent_space.channels,
            out_channels=codec.latent_space.channels,
            block_out_channels=(WIDTH, WIDTH),
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=WIDTH,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=99,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=WIDTH,
            )
        )
    return StableDiffusionPipeline(
        vae=codec.autoencoder,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=text_encoder.eval(),
        tokenizer=letter_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def letter_tokenizer():
    """A CLIP tokenizer that knows the letters a to z, each a token."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=MAX_TOKENS)
