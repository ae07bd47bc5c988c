"""The command line: `latent-codec VERB`. One file per verb: it parses, calls, prints."""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from latent_codec import __version__
from latent_codec.cli import progress

VERBS = {
    "roundtrip": "send images through a codec and back; with no image, a sample photograph",
    "encode": "images -> latent files",
    "decode": "latent files -> images",
    "info": "what a codec, a checkpoint or a latent file is",
    "convert": "foreign checkpoints -> diffusers components, and back, with every key accounted for",
    "compress": "images -> small files: quantised latents or indices, entropy coded",
    "decompress": "compressed files -> images, or latent files",
    "rd": "rate-distortion of a codec beside JPEG, WebP, AVIF and JPEG XL, through real files",
    "evaluate": "measure a codec on images, or the likelihood of images under a prior",
    "train": "train or fine-tune a codec from a preset",
    "calibrate": "measure scale, shift and half-precision safety on data, and write them into the codec",
    "fit-preview": "fit what shows a codec's latents at once, as images, to its folder",
    "fit-entropy": "fit what says how likely a codec's values are, for compressed files, to its folder",
    "pipeline": "join a codec and its priors to a pipeline, which draws images",
    "sample": "draw images from a prior, or decode random latents of a trained VAE",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage, which `--help` prints, would hide what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; only `verb`'s module is imported, so that `--help` answers at once."""
    parser = _Parser(
        prog="latent-codec",
        description="Train, measure and use the autoencoder side of latent diffusion.",
        epilog="""begin with:
  latent-codec roundtrip                     a sample photograph through the shipped codec and back
  latent-codec roundtrip cat.jpg --out seen  an image of your own
  latent-codec roundtrip --help              what a verb does, with examples

Results go to stdout, progress and complaints to stderr. The exit status is 0, or 2 where the input was at fault.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    """Run one verb.

    Returns:
        The exit status: 0 when it succeeded, 2 with a one-line message when the input was at fault, 130 when it was
        interrupted, 128 + the signal's number when a signal stopped a training, 141 (as of SIGPIPE) when nobody reads its results any more.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be UTF-8, and goes out as it is
        sys.stdout.reconfigure(errors="surrogateescape")
    verb = next((word for word in argv if not word.startswith("-")), None)
    args = None
    for name in ("stdout", "stderr"):
        if (
            getattr(sys, name) is None
        ):  # closed by the caller (`>&-`); else the next file opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the rest of this process
    try:
        try:
            parser = build_parser(verb)
            if "" in argv:  # which would be the current folder
                parser.error("an argument is empty, such as a variable that is not set; give a name")
            args = parser.parse_args(argv)
            progress.starting("loading libraries")
            if getattr(args, "subfolder", None) is not None:
                from latent_codec.components.codec_folders import in_subfolder

                args.codec = in_subfolder(args.codec, args.subfolder)
            with _warnings_in_words(verb):
                status = args.run(args) or 0
        finally:
            progress.clear()
            _flush_results()  # here, and not on leaving Python, where a closed pipe can only be complained of
        return status
    except KeyboardInterrupt:
        print("latent-codec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the results has read enough: `latent-codec ... | head`
        _discard_results()
        return 141
    except Exception as error:
        if not _is_foreseen(error):
            raise
        message = " ".join(_in_words(error).split())
        if _is_short_of_memory(error) and hasattr(args, "tile"):
            message = f"the memory does not suffice: work in tiles, such as --tile 512 ({message or 'out of memory'})"
        print(f"latent-codec {verb}: {message or type(error).__name__}", file=sys.stderr)
        return 2


@contextmanager
def _warnings_in_words(verb: str) -> Iterator[None]:
    """Show the library's log on stderr, and each warning as one line, without the place in the code that it is about, which users of a verb cannot change."""

    def in_words(message, category, filename, lineno, line=None) -> str:
        if issubclass(category, UserWarning):
            return f"latent-codec {verb}: Note: {' '.join(str(message).split())}\n"
        return before(message, category, filename, lineno, line)

    before, warnings.formatwarning = warnings.formatwarning, in_words
    logger, lines = logging.getLogger("latent_codec"), logging.StreamHandler()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        warnings.formatwarning = before
        logger.removeHandler(lines)


def _flush_results() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_results()
        raise OSError(error.errno, error.strerror, "standard output") from error


def _discard_results() -> None:
    """Let what is not yet written go nowhere, or Python would complain of it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_words(error: Exception) -> str:
    """The message, without the number and the quotes that the system's own errors have."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    if not isinstance(error.filename, str):
        return error.strerror
    path = Path(error.filename)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        for each in (path, *path.parents):
            if each.is_file():
                return f"{each} is a file, where a folder is needed; name another"
    return f"{path}: {error.strerror}"


def _is_foreseen(error: Exception) -> bool:
    """Whether input, files or memory are at fault, and not this program, which shows a traceback."""
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return True
    # Asked by name, so that safetensors need not be imported for it.
    return _is_short_of_memory(error) or type(error).__name__ == "SafetensorError"


def _is_short_of_memory(error: Exception) -> bool:
    """Asked by name, so that torch need not be imported for it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(error)
