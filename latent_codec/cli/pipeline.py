"""Join a codec and its priors to a pipeline, which generates images.

A codec of several levels takes one prior for each, top level first. The
classifier is for rejection sampling (`latent-codec sample --keep`). Parts that
do not fit together are refused.

DIR is a diffusers pipeline with a model card, for

  latent-codec sample runs/joined
  latent-codec evaluate photos/ --prior runs/joined
  PriorPipeline.from_pretrained("runs/joined")
                    or HierarchicalPriorPipeline, as is printed

Examples:
  latent-codec pipeline --codec runs/mine --prior runs/prior --out runs/joined
  latent-codec pipeline --codec runs/levels --prior runs/top runs/bottom \\
      --out runs/joined
  latent-codec pipeline --prior runs/pixels --out runs/joined
                    a prior over pixels has no codec
  latent-codec pipeline --codec runs/mine --prior runs/prior \\
      --classifier runs/judge --class-names shirt,shoe,bag --out runs/joined
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments

COMPONENTS = {
    1: ("prior",),
    2: ("top_prior", "bottom_prior"),
    3: ("top_prior", "middle_prior", "bottom_prior"),
}
"""What pipelines call their priors, by the number of levels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec",
        metavar="NAME_OR_PATH",
        help="join the codec that the priors learned; none for a prior over pixels",
    )
    arguments.add_subfolder_argument(parser)
    arguments.add_pipeline_argument(parser)
    parser.add_argument(
        "--prior",
        nargs="+",
        required=True,
        metavar="P",
        help="join these run or prior folders, one for each level of the codec, top first",
    )
    parser.add_argument(
        "--classifier", metavar="K", help="join this run or model folder of an ImageClassifier"
    )
    parser.add_argument(
        "--class-names",
        metavar="A,B,...",
        help="name the classes, in the order of labels (default: the classifier's, if it has names)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="store weights in this precision; float16 halves the files, and any precision loads them (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="write the pipeline here")


def check(args: argparse.Namespace) -> None:
    number = len(args.prior)
    if number not in COMPONENTS:
        raise ValueError(
            f"expected 1 to {max(COMPONENTS)} folders after --prior, one for each level of the codec, got {number}"
        )
    if args.codec is None and number > 1:
        raise ValueError(f"expected --codec, since {number} priors are of a codec's levels")
    if args.codec is None and args.for_pipeline is not None:
        raise ValueError("--for-pipeline says whose latents those of --codec are, which is missing")
    folder = args.out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save the pipeline in")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds other files and no pipeline; give a new or empty folder")
