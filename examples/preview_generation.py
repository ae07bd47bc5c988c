"""Watch a pipeline draw: a PNG file for every step, and the run as an animation.

    python examples/preview_generation.py PIPELINE "a lighthouse at dusk" --out run
    python examples/preview_generation.py PIPELINE "a lighthouse at dusk" --codec CODEC --out run

PIPELINE is a diffusers folder or an id on the hub. Without --codec its own VAE decodes the previews, small; a codec that
`latent-codec fit-preview` was run on has a preview that takes milliseconds.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from latent_codec import LatentCodec
from latent_codec.pipelines import AnimatedWebP, LatentPreviewCallback, PngFolder
from latent_codec.previews import LatentPreviewer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline")
    parser.add_argument("prompt")
    parser.add_argument("--codec")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("run"))
    args = parser.parse_args(argv)

    pipe = DiffusionPipeline.from_pretrained(args.pipeline)
    if args.codec:
        previewer = LatentPreviewer.from_pretrained(args.codec)
    else:
        # Opened once more: previews are made on a thread of their own, and the pipeline needs its VAE itself.
        previewer = LatentPreviewer.full(LatentCodec.from_pretrained(args.pipeline), max_side=256)
    sinks = [
        PngFolder(args.out / "steps"),
        AnimatedWebP(args.out / "run.webp"),
        lambda image, step: print(f"step {step} shows {image.info['shows']}"),
    ]
    with LatentPreviewCallback(pipe, previewer, sinks) as preview:
        generator = torch.Generator().manual_seed(0)
        output = pipe(
            args.prompt, num_inference_steps=args.steps, generator=generator, callback_on_step_end=preview
        )
    output.images[0].save(args.out / "image.png")


if __name__ == "__main__":
    main()
