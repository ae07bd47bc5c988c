"""Measure a codec's latents and its half-precision safety on images, and write
both into its config.

Mean and standard deviation of every latent channel are measured (posterior
noise included), the largest activation, and the loss of bfloat16 and float16
against float32: force_upcast tells pipelines that float16 is not safe. Scale
and shift can be written in three ways:

  (default)      one scaling_factor and one shift_factor for all channels:
                 Stable Diffusion 3 and FLUX.1 read both, Stable Diffusion 1
                 and 2 only the scale. FLUX.2 (in its batch norm), Wan,
                 Qwen-Image, LTX, Mochi and Cosmos read nothing but mean and
                 std of each channel, and get those
  --per-channel  latents_mean and latents_std, with a scale of 1: of an
                 AutoencoderKL read only by SDXL's pipelines
  --normalize    mean and std folded into the weights of quant_conv and
                 post_quant_conv, so that every pipeline agrees; images are
                 reconstructed as before

All three change the latents: those made before no longer decode, and a
denoiser trained on them no longer fits. --keep-space leaves them as they are
and writes force_upcast only. Where scale and shift are already those measured,
the default leaves them as they are, too.

A codec's own folder is updated in place, complete or not at all, its weights
stored in the precision they had. A shipped codec, one from the hub and a
single file are never changed: name --out.

Examples:
  latent-codec calibrate photos/ --codec runs/mine   scale and shift
  latent-codec calibrate photos/ --codec runs/mine --normalize
                                     mean 0, std 1 for every pipeline
  latent-codec calibrate photos/ --codec stabilityai/sd-vae-ft-mse \\
      --out calibrated --keep-space
"""

import argparse

from latent_codec.cli import arguments
from latent_codec.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_data_arguments(parser, limit=256)
    arguments.add_codec_arguments(parser)
    arguments.add_copy_argument(parser, "the new config")
    conventions = parser.add_mutually_exclusive_group()
    for flag, convention, text in (
        ("--normalize", "normalize", "fold mean and std into the weights"),
        ("--per-channel", "channels", "write latents_mean and latents_std"),
        ("--keep-space", "keep", "leave the latents as they are; write force_upcast only"),
    ):
        conventions.add_argument(flag, dest="convention", action="store_const", const=convention, help=text)
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.dtype != "float32":
        raise SettingError("dtype", "float32, against which the others are measured", args.dtype)
