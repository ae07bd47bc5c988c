"""Draw one image twice: with a pipeline's own VAE, and with a codec in its place.

    python examples/swap_vae.py PIPELINE "a lighthouse at dusk" --codec runs/sharper --out side-by-side.png

PIPELINE is a diffusers folder or an id on the hub. The codec has to speak the same latents: the pipeline's own VAE with a
fine-tuned decoder does, see finetune_decoder.py.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from latent_codec import LatentCodec
from latent_codec.images.tensors import hstack_images, write_image


def draw(pipe: DiffusionPipeline, prompt: str, steps: int):
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline")
    parser.add_argument("prompt")
    parser.add_argument("--codec", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="side-by-side.png")
    args = parser.parse_args(argv)

    codec = LatentCodec.from_pretrained(args.codec)
    own = DiffusionPipeline.from_pretrained(args.pipeline)
    swapped = DiffusionPipeline.from_pretrained(args.pipeline, vae=codec.autoencoder)
    images = [draw(pipe, args.prompt, args.steps) for pipe in (own, swapped)]
    write_image(hstack_images(images), args.out)
    if LatentCodec(own.vae).space_fingerprint != codec.space_fingerprint:
        print(
            "The encoders or scales differ: the codec shows other latents than the denoiser learned to draw."
        )
    print(args.out)


if __name__ == "__main__":
    main()
