"""Say what a thing is: a codec, a prior, a pipeline of both, a checkpoint, a
data set of latents, or a file of latents, of features, compressed or of an
entropy model.

A compressed file says all this without its codec. With --verbose its symbols
are decoded, too, where the codec is available (a shipped one, or the one of
--codec), for the bits without overhead: their code length under the entropy
model. Keys of a checkpoint count by their names; with --verbose its network is
built, which takes longer, and keys that are missing, unexpected or of another
shape are listed. Of a damaged file it says which sections are lost, and exits
with 2.

Of a data set of latents (a folder or a URL) every shard is read and compared
with its checksum; those that are missing or damaged are named, and it exits
with 2. With --sheet some of its samples are drawn: decoded, if their codec is
a shipped one or is named by --codec.

With --audit: what a codec is made for, and where it works as it is: in each
family of diffusers' pipelines, ComfyUI, A1111 and InvokeAI. If not, why, how
far latents are off where a pipeline ignores a scale or shift in silence, and
which export or setting helps.

With --against: whether a denoiser trained on the other codec's latents still
fits. It compares weights tensor by tensor, the latents of images, and what
each decoder makes of the other's latents. Images of your own (--data) tell
more than the sample photograph.

Examples:
  latent-codec info                          the shipped codec; default-vq is
                                             another, fashion-mnist a pipeline
  latent-codec info runs/mine                a run, a diffusers folder, a
                                             pipeline, an id on the hub
  latent-codec info flux2 --for-pipeline Ideogram4Pipeline
                                             a codec as this pipeline sees it
  latent-codec info latents/cat.safetensors  a latent file: its codec, images
                                             and labels
  latent-codec info latents/ --sheet seen.png
                                             a data set of latents: what it
                                             holds, whether it is whole
  latent-codec info compressed/cat.lcf       a compressed file: what it holds,
                                             its codec, where its bits go
  latent-codec info mine/entropy.safetensors an entropy model
  latent-codec info sd-v1-5.safetensors      a checkpoint of another layout
  latent-codec info sd-v1-5.safetensors --verbose
  latent-codec info runs/mine --audit
  latent-codec info runs/mine --against runs/other --data photos/
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.cli.compressed_files import add_entropy_argument, is_compressed_file
from latent_codec.components.codec_folders import is_foreign_file
from latent_codec.components.weight_files import LATENTS, metadata_of
from latent_codec.latents.locations import may_be_data_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "thing", nargs="?", default="default", metavar="THING", help="a codec, prior, pipeline or file"
    )
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--audit", action="store_true", help="say where this codec loads, and why not")
    question.add_argument(
        "--against", metavar="REFERENCE", help="say whether a denoiser of that codec fits this one"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="DATA",
        default=[],
        help="compare on these images, for --against: a folder, tars, hf:owner/name (default: a sample photograph)",
    )
    arguments.add_limit_argument(parser, 8)
    arguments.add_device_argument(parser)
    parser.add_argument(
        "--codec",
        metavar="NAME_OR_PATH",
        help="open a compressed file, for --verbose, or a data set's samples, for --sheet, with this codec "
        "(default: the shipped one of their fingerprint)",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="write an image of some samples of a data set of latents"
    )
    parser.add_argument(
        "--no-checksums", action="store_true", help="do not read the shards of a data set of latents"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="count the bits of a compressed file without overhead, or compare every key of a checkpoint with its network",
    )
    arguments.add_subfolder_argument(parser)
    arguments.add_pipeline_argument(parser)
    add_entropy_argument(parser)
    arguments.add_json_argument(parser)


def check(args: argparse.Namespace) -> None:
    if args.data and args.against is None:
        raise ValueError("--data is for --against REFERENCE; name the codec to compare with")
    path, is_audit = Path(args.thing), args.audit or args.against is not None
    if not is_audit and may_be_data_set(args.thing):
        if args.verbose or args.entropy is not None or (args.codec is not None and args.sheet is None):
            raise ValueError("of a data set of latents --codec is for --sheet, and there is no more to say")
        return
    if args.sheet is not None or args.no_checksums:
        raise ValueError("--sheet and --no-checksums are for data sets of latents; leave them out")
    with_codec = args.codec is not None or args.entropy is not None
    if with_codec and (is_audit or not is_compressed_file(path)):
        raise ValueError("--codec and --entropy are for compressed files (.lcf); leave them out")
    if args.verbose and (is_audit or not (is_compressed_file(path) or _is_checkpoint(path))):
        raise ValueError(
            "--verbose is for compressed files (.lcf) and checkpoints of another layout; leave it out"
        )
    if with_codec and not args.verbose:
        raise ValueError("--codec and --entropy are for counting bits; add --verbose, or leave them out")


def _is_checkpoint(path: Path) -> bool:
    """Whether this is one file of weights, and nothing else that this package writes as one."""
    if not is_foreign_file(path):
        return False
    from latent_codec.bitstream.entropy_model import FORMAT as ENTROPY_MODEL  # brings numpy

    return metadata_of(path).get("format") not in (LATENTS, ENTROPY_MODEL)
