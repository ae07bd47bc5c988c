"""Fine-tune the decoder of a pipeline's VAE on images of your own, and save the pipeline with it.

    python examples/finetune_decoder.py PIPELINE photos/ --out sharper --set run.steps=2000

The encoder stays as it is, to the bit, so that the denoiser needs no training. PIPELINE is a diffusers folder; --set changes
settings of the preset finetune-decoder. A run that is stopped (Ctrl-C) saves the pipeline with the decoder so far, and ends with
exit code 130; the same command goes on from its last checkpoint.
"""

import argparse
import signal
import sys
from pathlib import Path

from diffusers import DiffusionPipeline

from latent_codec import LatentCodec
from latent_codec.cli import main as latent_codec


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline")
    parser.add_argument("images")
    parser.add_argument("--out", type=Path, default=Path("sharper"))
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    args = parser.parse_args(argv)

    run = args.out / "run"
    command = [
        "train",
        "finetune-decoder",
        "--codec",
        args.pipeline,
        "--data",
        args.images,
        "--out",
        str(run),
    ]
    for setting in args.set:
        command += ["--set", setting]
    status = latent_codec(command)
    stopped = status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    if (status != 0 and not stopped) or not (run / "codec").is_dir():
        raise SystemExit("the training did not end well; its message is above.")
    if stopped:
        print(
            f"stopped: {args.out / 'pipeline'} gets the decoder so far; the same command goes on",
            file=sys.stderr,
        )

    codec = LatentCodec.from_pretrained(run)
    assert codec.space_fingerprint == LatentCodec.from_pretrained(args.pipeline).space_fingerprint
    DiffusionPipeline.from_pretrained(args.pipeline, vae=codec.autoencoder).save_pretrained(
        args.out / "pipeline"
    )
    print(args.out / "pipeline")
    return status


if __name__ == "__main__":
    sys.exit(main())
