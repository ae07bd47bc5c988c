"""Turn latent files, and data sets of latents, back into images, cropped to
their first size.

Images of 8 bits become PNGs. Where a latent file says that an image was
another one, it is written in its own units: 16-bit PNG or TIFF, float TIFF;
slices of DICOM and NIfTI become one NAME.nii.gz for each volume, with its
geometry and without anything else of the headers. Slices whose volume is not
complete are written one by one.

Latents of another latent space than the codec's are refused. A codec whose
decoder only differs (a fine-tuned one) decodes them, with a note on stderr.

Latent files of shipped codecs find theirs without --codec. A file names the
pipeline whose latents it holds, if --for-pipeline named one or the codec was
in its folder; --for-pipeline names another.

Latents of spectrograms (audio:) become sounds, NAME.wav with NAME.png, the
spectrogram. Griffin-Lim finds the phases, unless --vocoder names a HiFi-GAN.

Plain arrays (.npy, .npz) and tensors (.pt) do not name their codec: --codec
has to, and it cannot be checked. They are (C, h, w) or (N, C, h, w), scaled
and shifted as a denoiser takes them; of several arrays in a file, those with
"latent" in their names are taken.

Examples:
  latent-codec decode latents/cat.safetensors   writes decoded/cat.png
  latent-codec decode latents/ --out images     every latent file in it;
                                                subfolders are kept
  latent-codec decode cache/cat.npz --codec mine
                                                latents of another program
"""

import argparse
from pathlib import Path

from latent_codec.cli import arguments
from latent_codec.cli.compressed_files import is_compressed_file
from latent_codec.files import check_is_file, find_files
from latent_codec.latents.locations import is_data_set

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth")
"""What folders are searched for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="latent files, .npy, .npz or .pt files, folders of them, or data sets of latents",
    )
    arguments.add_out_argument(parser, "decoded", "images")
    arguments.add_window_argument(parser, "write PNGs to look at instead of files in original units,")
    arguments.add_vocoder_argument(parser)
    arguments.add_codec_arguments(
        parser, None, "the shipped codec that made the latents; plain arrays and tensors need one"
    )
    arguments.add_tile_argument(parser)


def check(args: argparse.Namespace) -> None:
    args.files = find_latent_files(args.files, SUFFIXES)
    for file, _ in args.files:
        if file.is_file() and is_compressed_file(file):
            raise ValueError(f"{file} is a compressed file: `latent-codec decompress` opens it")


def find_latent_files(arguments: list[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """Each file with the folder, below `--out`, for what is made of it: the one that it has in a folder given.

    Args:
        suffixes: what folders are searched for.

    Raises:
        ValueError: if a folder holds none.
    """
    found = []
    for root in map(Path, arguments):
        if is_data_set(root):
            found.append((root, Path()))
            continue
        if not root.is_dir():
            check_is_file(root)
            found.append((root, Path()))
            continue
        files = find_files(root, suffixes)
        if not files:
            raise ValueError(
                f"no latent files ({', '.join(suffixes)}) in {root}; `latent-codec encode` writes them"
            )
        found += [(file, file.parent.relative_to(root)) for file in files]
    return found
