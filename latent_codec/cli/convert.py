"""Turn foreign checkpoints into diffusers components, and components into
what other programs load.

The format is recognized by the keys and the shapes of the tensors, under any
prefix and in any entry of the file, and so is most of the config; nothing is
fetched. Every key is mapped, left out by a rule that is named, missing, or
unexpected: one of the last two is an error, and nothing is written. So is a
weight that is NaN, infinite or an integer. The written file is read again and
compared.

Weights do not show the groups of norms, the activation and the scale. Original
codes fix the first two. A weight file in diffusers' own key layout needs its
config.json: in the file's metadata (files written here have it), next to it,
or by --config. --norm-num-groups N suffices for a file whose other settings
are its class's defaults.

Files are safetensors, or pickles of tensors; a pickle that would run code is
refused.

The scale of the latents is rarely in the file. It is known for whole Stable
Diffusion, SDXL, SD3 and FLUX models, for files with a scale_factor and those
written here, for FLUX.2, Wan, Qwen-Image and HunyuanImage, and is 1 for VQ and
tiny autoencoders. Else give it (--scale, --scaling-factor), or let it be
measured (--calibrate).

Programs such as ComfyUI build one network, whatever a file holds. --host
writes what a program loads, under its names: a narrower AutoencoderKL is
embedded in that network, missing parts are added, and latents and images stay
the same. --embed does only that. Such a program scales latents by its
denoiser's own figures; --fold-scale folds them into the weights, for a
denoiser that was trained on this codec's latents. DESTINATION is then the
program's folder.

diffusers reads single files, too, and asks the network for a config unless
it is given one:
  AutoencoderKL.from_single_file("mine.safetensors", config="runs/mine")

Examples:
  latent-codec convert vae.ckpt runs/mine --scale sd1
                      a latent-diffusion VAE -> a diffusers folder
  latent-codec convert sd-v1-5.safetensors runs/vae
                      the VAE inside a whole Stable Diffusion file
  latent-codec convert vqgan.ckpt runs/vqgan --config model.yaml
                      a VQGAN, its yaml compared with the weights
  latent-codec convert taesd_encoder.pth taesd_decoder.pth runs/taesd
  latent-codec convert flux2_ae.safetensors runs/flux2
                      FLUX.2's, under the names of BFL, ComfyUI or diffusers
  latent-codec convert qwen_image_vae.safetensors runs/qwen \\
      --class-name AutoencoderKLQwenImage
  latent-codec convert runs/mine mine.safetensors --to ldm
                      a component -> latent-diffusion's names
  latent-codec convert default ComfyUI/models/vae --host comfyui \\
      --fold-scale sd1
  latent-codec convert madebyollin/taesdxl webui/models/VAE-taesd \\
      --host a1111 --family sdxl
                      taesdxl_encoder.pth and taesdxl_decoder.pth
  latent-codec convert default --to latent2rgb
                      print the linear preview for a ComfyUI latent format
  latent-codec convert default-vq taming.ckpt --to taming
  latent-codec convert run.pt runs/ema --entry ema --scale sd1
                      the averaged weights of a training checkpoint
  latent-codec convert my-vae.safetensors runs/vae --config config.json
                      a diffusers weight file without its folder
"""

import argparse

from latent_codec.cli import arguments
from latent_codec.conversion.embedding import NETWORKS
from latent_codec.conversion.hosts import HOSTS
from latent_codec.conversion.scales import SCALES
from latent_codec.exporting import FOREIGN, LATENT2RGB

_FAMILIES = ("sd1", "sdxl", "sd3", "flux", "flux2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a checkpoint file, the two files of a tiny autoencoder, or a codec (folder, shipped name, hub id)",
    )
    parser.add_argument(
        "out",
        nargs="?",
        metavar="DESTINATION",
        help="a folder, a file with --to ldm ..., or the folder of a --host; --to latent2rgb needs none",
    )
    parser.add_argument(
        "--to",
        choices=("diffusers", *FOREIGN, LATENT2RGB),
        metavar="FORMAT",
        help=f"write this format: diffusers, {', '.join(FOREIGN)}; or print factors and bias of the linear preview: "
        f"{LATENT2RGB} (default: what --host loads, or diffusers)",
    )
    parser.add_argument(
        "--host",
        choices=tuple(HOSTS),
        metavar="PROGRAM",
        help=f"write what this program loads, under the names that it looks for: {', '.join(HOSTS)}",
    )
    parser.add_argument(
        "--family",
        choices=_FAMILIES,
        metavar="F",
        help=f"name a tiny autoencoder's files for this family of the host's denoisers: {', '.join(_FAMILIES)}",
    )
    parser.add_argument(
        "--embed",
        choices=tuple(NETWORKS),
        metavar="NETWORK",
        help="write a narrower AutoencoderKL as a part of this network, sd for Stable Diffusion's, which is SDXL's, SD3's "
        "and FLUX's, too",
    )
    parser.add_argument(
        "--fold-scale",
        choices=tuple(SCALES),
        metavar="F",
        help=f"fold the scale of family F's denoisers into the weights, one of {', '.join(SCALES)}: latents scaled by "
        "it are this codec's",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="store the weights in this precision (default: as they are)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="read this diffusers config.json for the weights, or the original's yaml, which has to agree",
    )
    parser.add_argument(
        "--norm-num-groups",
        type=int,
        metavar="N",
        help="set the groups of the norms, for weights in diffusers' own key layout without their config.json",
    )
    parser.add_argument(
        "--class-name",
        metavar="CLASS",
        help="build this diffusers class, where a file fits several: AutoencoderKLWan (default) or "
        "AutoencoderKLQwenImage for the one file of both",
    )
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="take this entry or prefix of the file, such as ema (default: the only autoencoder, or the one that is "
        "not averaged)",
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--scale",
        choices=tuple(SCALES),
        metavar="F",
        help=f"write the scale of family F's latents, one of {', '.join(SCALES)}",
    )
    scale.add_argument("--scaling-factor", type=float, metavar="X", help="write this scale of the latents")
    scale.add_argument("--calibrate", metavar="DATA", help="measure the scale of the latents on these images")
    parser.add_argument(
        "--shift-factor",
        type=float,
        metavar="X",
        help="write this shift of the latents, with --scaling-factor",
    )
    arguments.add_json_argument(parser)
