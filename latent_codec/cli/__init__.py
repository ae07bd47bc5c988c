"""The command line: `latent-codec VERB`. One file per verb: it parses, calls, prints."""

import argparse
import sys
from importlib import import_module

from latent_codec import __version__

VERBS = {
    "roundtrip": "send pictures through a codec and back; with no picture, a sample photograph",
    "encode": "pictures -> latent files",
    "decode": "latent files -> pictures",
    "info": "what a codec, a checkpoint or a latent file is",
    "convert": "foreign checkpoints -> diffusers components, and back, with every key accounted for",
    "compress": "pictures -> small files: quantised latents or indices, entropy coded",
    "decompress": "compressed files -> pictures, or latent files",
    "rd": "rate-distortion of a codec beside JPEG, WebP, AVIF and JPEG XL, through real files",
    "evaluate": "measure a codec on pictures, or the likelihood of pictures under a prior",
    "train": "train or fine-tune a codec from a preset",
    "calibrate": "measure scale, shift and half-precision safety on data, and write them into the codec",
    "fit-preview": "fit what shows a codec's latents at once, as pictures, to its folder",
    "fit-entropy": "fit what says how likely a codec's values are, for compressed files, to its folder",
    "pipeline": "join a codec and its priors to a pipeline, which draws pictures",
    "sample": "draw pictures from a prior, or decode random latents of a trained VAE",
}


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; only `verb`'s module is imported, so that `--help` answers at once."""
    parser = argparse.ArgumentParser(
        prog="latent-codec",
        description="Train, measure and use the autoencoder side of latent diffusion.",
        epilog="`latent-codec VERB --help` explains one verb. Results go to stdout, progress to stderr.",
    )
    parser.add_argument("--version", action="version", version=f"latent-codec {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        if name != verb:
            verbs.add_parser(name, help=summary, add_help=False)
            continue
        module = import_module(f"latent_codec.cli.{name.replace('-', '_')}")
        subparser = verbs.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it succeeded, 2 with a one-line message when the input was at fault."""
    argv = sys.argv[1:] if argv is None else list(argv)
    verb = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(verb).parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("latent-codec: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_foreseen(error):
            raise
        message = " ".join(str(error).split())
        print(f"latent-codec {args.verb}: {message or type(error).__name__}", file=sys.stderr)
        return 2


def _is_foreseen(error: Exception) -> bool:
    """Whether input, files or memory are at fault, and not this program, which shows a traceback."""
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return True
    # Asked by name, so that torch and safetensors need not be imported for it.
    name = f"{type(error).__module__}.{type(error).__name__}"
    return name.endswith(("OutOfMemoryError", "SafetensorError")) or "DefaultCPUAllocator" in str(error)
