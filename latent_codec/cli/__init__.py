"""The command line: `latent-codec VERB`.

A verb is a row of VERBS and two modules of its name: `cli/VERB.py` with its help text (the docstring), `add_arguments(parser)` and,
where something can be refused at once, `check(args)`, which import nothing heavy; and `cli/work/VERB.py` with `run(args)`.
A verb may have two words: `anomaly fit` is the module `anomaly_fit`.
"""

import argparse
import io
import os
import shutil
import sys
from importlib import import_module

from latent_codec import __version__, deprecated
from latent_codec.cli.arguments import check_arguments
from latent_codec.cli.messages import is_foreseen, one_line, shown
from latent_codec.cli.progress import loading_libraries

VERBS = {
    "roundtrip": ("use", "send images through a codec and back"),
    "encode": ("use", "images -> latent files"),
    "import-latents": ("use", "latents of other programs -> a data set of latents"),
    "decode": ("use", "latent files -> images"),
    "translate": ("use", "latents of one codec -> latents of another"),
    "sample": ("use", "generate images from a prior or a trained VAE"),
    "comfyui install": ("use", "add nodes to a ComfyUI: codecs, previews, .lcf files"),
    "comfyui uninstall": ("use", "take them away again"),
    "train": ("train", "train or fine-tune a codec, a prior, a classifier"),
    "calibrate": ("train", "measure scale, shift and float16 safety into a codec"),
    "fit-preview": ("train", "fit a fast preview of a codec's latents"),
    "pipeline": ("train", "join a codec and its priors to a pipeline"),
    "convert": ("train", "foreign checkpoints <-> diffusers components"),
    "compress": ("compress", "images -> small files (.lcf)"),
    "decompress": ("compress", "compressed files -> images or latent files"),
    "fit-entropy": ("compress", "fit an entropy model to a codec"),
    "rd": ("compress", "rate-distortion against JPEG, WebP, AVIF, JPEG XL"),
    "info": ("inspect", "what a codec, checkpoint or file is"),
    "evaluate": ("inspect", "measure a codec, or the likelihood under a prior"),
    "diffusability": ("inspect", "how well a diffusion model trains on codecs' latents"),
    "ui": ("inspect", "a page in the browser: all of this, by hand"),
    "interpolate": ("analyze", "morph images through their latents"),
    "attribute fit": ("analyze", "find the direction of an attribute in latents"),
    "attribute apply": ("analyze", "move images along that direction"),
    "traverse": ("analyze", "what each dimension of a latent vector changes"),
    "groups": ("analyze", "what each group of a hierarchical codec's latents says"),
    "disentanglement": ("analyze", "which latent dimension follows which factor of images"),
    "features": ("analyze", "images -> a vector each, for other programs"),
    "probe": ("analyze", "how well a linear classifier tells classes by features"),
    "cluster": ("analyze", "group images by their features, and map them"),
    "anomaly fit": ("analyze", "normal images -> a detector of unusual ones"),
    "anomaly score": ("analyze", "say which images are unusual, and where"),
}
"""Of each verb, its group in the help and what it does."""

GROUPS = {
    "use": "use a model",
    "train": "train and prepare one",
    "compress": "compress images",
    "inspect": "inspect and measure",
    "analyze": "see what latents are good for",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage, which `--help` prints, would hide what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in lines of at most 79 columns."""

    def __init__(self, prog: str):
        super().__init__(prog, width=min(79, shutil.get_terminal_size().columns - 2))


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; only the arguments of `verb` are imported, so that `--help` answers at once."""
    parser = _Parser(
        prog="latent-codec",
        usage="latent-codec [-h] [--version] VERB ...",
        description="Train, measure and use the autoencoder side of latent diffusion.\n\n" + _list_of_verbs(),
        epilog="""examples:
  latent-codec roundtrip                     a sample photograph, and back
  latent-codec roundtrip cat.jpg --out seen  an image of your own
  latent-codec roundtrip --help              what a verb does, with examples

Results go to stdout, progress and notes to stderr. The exit status is 0, or 2
where the input was at fault.""",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"latent-codec {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, prog="latent-codec", help=argparse.SUPPRESS
    )
    for name in [verb] if verb in VERBS else VERBS:
        if name != verb:
            verbs.add_parser(name, add_help=False)
            continue
        module = _module(name)
        description, _, examples = module.__doc__.partition("\nExamples:\n")
        subparser = verbs.add_parser(
            name,
            description=description,
            epilog=examples and f"examples:\n{examples}",
            formatter_class=_Help,
        )
        module.add_arguments(subparser)
        deprecated.add_old_flags(subparser, name)
        subparser.set_defaults(parser=subparser)
    seconds = [name.partition(" ")[2] for name in VERBS if name.startswith(f"{verb} ")]
    if seconds:
        what = "\n".join(_line_of(f"{verb} {second}") for second in seconds)
        subparser = verbs.add_parser(verb, description=what, formatter_class=_Help)
        subparser.add_argument("second", choices=seconds, help="whose --help says more")
    return parser


def module_name(verb: str) -> str:
    """`fit-preview` -> fit_preview; `anomaly fit` -> anomaly_fit."""
    return verb.replace("-", "_").replace(" ", "_")


def _module(verb: str, package: str = "latent_codec.cli"):
    return import_module(f"{package}.{module_name(verb)}")


def _with_verb(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments, in which a verb of two words is one of them, and the verb, or what was typed in its place."""
    place = next((place for place, word in enumerate(argv) if not word.startswith("-")), None)
    if place is None:
        return argv, None
    verb = " ".join(argv[place : place + 2])
    if verb in VERBS:
        return [*argv[:place], verb, *argv[place + 2 :]], verb
    return argv, argv[place]


def _line_of(verb: str) -> str:
    return f"  {verb:17}  {VERBS[verb][1]}"


def _list_of_verbs() -> str:
    lines = []
    for group, title in GROUPS.items():
        lines += [f"{title}:"]
        lines += [_line_of(verb) for verb, (its_group, _) in VERBS.items() if its_group == group]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status: 0 when it succeeded, 2 with a one-line message when the input was at fault, 130 when it was
        interrupted, 128 + the signal's number when a signal stopped a training, 141 (as of SIGPIPE) when nobody reads its results any more.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be UTF-8, and goes out as it is
        sys.stdout.reconfigure(errors="surrogateescape")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`); the next file would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the rest of this process
    argv, verb = _with_verb(argv)
    args = None
    try:
        try:
            parser = build_parser(verb)
            if "" in argv:  # which would be the current folder
                parser.error("an argument is empty, such as a variable that is not set; give a name")
            args = parser.parse_args(argv)
            with shown(verb):
                status = _run(args) or 0
        finally:
            _flush_results()  # here, and not on leaving Python, where a closed pipe can only be complained of
        return status
    except KeyboardInterrupt:
        print("latent-codec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the results has read enough: `latent-codec ... | head`
        _discard_results()
        return 141
    except Exception as error:
        if not is_foreseen(error):
            raise
        message = one_line(error, parser if args is None else args.parser)
        print(f"latent-codec {verb}: {message}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int | None:
    check_arguments(args)
    verb = _module(args.verb)
    if hasattr(verb, "check"):
        verb.check(args)
    if getattr(args, "subfolder", None) is not None:
        from latent_codec.components.codec_folders import in_subfolder

        if isinstance(args.codec, list):
            args.codec = [in_subfolder(each, args.subfolder) for each in args.codec]
        else:
            args.codec = in_subfolder(args.codec, args.subfolder)
    with loading_libraries():
        work = _module(args.verb, "latent_codec.cli.work")
    return work.run(args)


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
