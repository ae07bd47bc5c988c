"""Build a small Stable Diffusion pipeline with random weights around a codec, to try things on: it draws noise, in seconds.

    python examples/tiny_pipeline.py PIPELINE
    python examples/tiny_pipeline.py PIPELINE --codec runs/mine --size 256

PIPELINE is the folder that it writes: a diffusers folder with the codec as its VAE, a U-Net and a text encoder of few layers,
and a tokenizer that knows the letters. The codec's preview, where it has one, goes with it. swap_vae.py, preview_generation.py and `latent-codec ui --pipeline` take it.
"""

import argparse
from pathlib import Path

from latent_codec import LatentCodec
from latent_codec.pipelines.tiny_pipeline import build_tiny_pipeline
from latent_codec.previews.preview_files import copy_preview


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--codec", default="default")
    parser.add_argument("--size", type=int, default=128, help="of its images, in pixels (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    codec = LatentCodec.from_pretrained(args.codec)
    build_tiny_pipeline(codec, size=args.size, seed=args.seed).save_pretrained(args.pipeline)
    copy_preview(codec, LatentCodec.from_pretrained(args.pipeline))
    print(args.pipeline)


if __name__ == "__main__":
    main()
