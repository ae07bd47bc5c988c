"""`latent-codec decompress`."""

import argparse
import hashlib
import sys
import warnings
from functools import cache
from pathlib import Path

from torch import Tensor

from latent_codec import LatentCodec, bitstream
from latent_codec.bitstream.compression import tile_for
from latent_codec.bitstream.container import read_file
from latent_codec.bitstream.corrections import SUFFIX as CORRECTION
from latent_codec.bitstream.corrections import Correction, read_correction
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.cli.messages import one_line
from latent_codec.cli.progress import progress, showing
from latent_codec.cli.work.compressed_files import advice_for_damage, first_sentence
from latent_codec.cli.work.decoded_files import (
    base_name,
    check_vocoder,
    incomplete,
    load_vocoder,
    write_decoded,
)
from latent_codec.cli.work.opening import load_codec
from latent_codec.components.codec_facts import shipped_name
from latent_codec.components.codec_folders import DEFAULT
from latent_codec.images.origins import RangeOrigin, Wholes
from latent_codec.images.tensors import write_image
from latent_codec.latents.latent_files import is_latent_file, save_indices, save_latents


def run(args: argparse.Namespace) -> int:
    @cache
    def opened(name: str) -> tuple[LatentCodec, EntropyModel | None]:
        codec = load_codec(args, name=name)
        if args.entropy is not None:
            return codec, bitstream.load_entropy_model(args.entropy)
        return codec, bitstream.sidecar(codec)

    if args.codec is not None:
        opened(args.codec)  # what is wrong with it is not the files' fault
    vocoder = load_vocoder(args)
    status, wholes = 0, Wholes()
    for path, name in progress(args.files, "decompressing"):
        data = b""
        try:
            data = read_file(path)
            codec, model = opened(args.codec or _codec_of(data))
            written = _decompress(codec, model, data, path, name, args, wholes, vocoder)
            if written is not None:
                print(written)
        except ValueError as error:
            status = 2
            print(f"latent-codec decompress: {path}: {_message(error, path, data, args)}", file=sys.stderr)
    for stem, origin, part in incomplete(wholes, "decompress"):
        out = args.out / f"{stem}{origin.suffix}"
        origin.write_parts([(origin, part)], out)
        print(out)
    return status


def _codec_of(data: bytes) -> str:
    """The shipped codec that made a file, or the usual one, whose fingerprint the error message names."""
    return shipped_name(bitstream.unpack(data, partial=True).header.space_fingerprint) or DEFAULT


def _decompress(
    codec: LatentCodec,
    model: EntropyModel | None,
    data: bytes,
    path: Path,
    name: Path,
    args: argparse.Namespace,
    wholes: Wholes,
    vocoder,
) -> Path | None:
    """Decode a file and write the result, whose path is returned; None of a slice whose volume is not complete yet."""
    correction = path.with_suffix(CORRECTION)
    as_it_was = correction.is_file() and not (args.latents or args.region or args.partial or args.format)
    found_correction = read_correction(correction.read_bytes()) if as_it_was else None
    if found_correction and found_correction.compressed != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{correction.name} corrects another file: compress it again, or remove {correction.name}"
        )
    check_vocoder(found_correction.origin if found_correction else None, vocoder)
    header = bitstream.unpack(data, partial=True).header
    with warnings.catch_warnings(record=True) as warned, showing(f"decoding {path.name}") as report:
        warnings.simplefilter("always", bitstream.PartialWarning)
        found = bitstream.decompress(
            codec,
            data,
            entropy_model=model,
            region=args.region,
            latents=args.latents,
            partial=args.partial,
            output_type="pt" if found_correction else "pil",
            tile=tile_for(header) if args.tile is None else args.tile or None,
            on_progress=report,
        )
    for warning in warned:
        print(f"latent-codec decompress: {path}: {warning.message}", file=sys.stderr)
    if found_correction:
        return _write_corrected(found_correction, found, path, name, args, wholes, vocoder)
    suffix = "safetensors" if args.latents else args.format or "png"
    out = args.out / name.with_name(f"{name.name}.{suffix}")
    if args.latents:
        save = save_indices if header.is_indices else save_latents
        save(out, found, codec=codec, names=[path.name], sizes=[(header.height, header.width)])
    else:
        write_image(found, out)
    return out


def _write_corrected(
    correction: Correction,
    image: Tensor,
    path: Path,
    name: Path,
    args: argparse.Namespace,
    wholes: Wholes,
    vocoder,
) -> Path | None:
    """Write an image in its own units, or keep it until its volume is complete."""
    origin = correction.origin
    out = args.out / name.with_name(f"{name.name}{origin.suffix}")
    if not isinstance(origin, RangeOrigin):
        write_decoded(image.cpu(), origin, out, vocoder)
        return out
    stored, is_certain = correction.apply(image.cpu())
    if not is_certain:
        print(
            f"latent-codec decompress: {path}: Note: this machine decodes other values than the one that compressed it; "
            f"errors may be above {correction.max_error:g}",
            file=sys.stderr,
        )
    if origin.whole is None:
        origin.write_stored(stored, out)
        return out
    parts = wholes.add(origin, stored)
    if parts is None:
        return None
    out = args.out / name.parent / f"{base_name(origin.whole)}{origin.suffix}"
    origin.write_parts(parts, out)
    return out


def _message(error: ValueError, path: Path, data: bytes, args: argparse.Namespace) -> str:
    """The error's message, with advice for the command line."""
    what = first_sentence(error)
    if isinstance(error, bitstream.NotCompressedError) and is_latent_file(path):
        return f"{what}. It is a latent file: `latent-codec decode` opens it"
    if isinstance(error, bitstream.WrongCodecError):
        shipped = shipped_name(bitstream.unpack(data, partial=True).header.space_fingerprint)
        return f"{what}. Pass --codec {shipped or 'with the one that made it'}"
    if isinstance(error, bitstream.WrongEntropyModelError):
        return f"{what}. Pass that one by --entropy"
    if isinstance(error, (bitstream.TruncatedError, bitstream.CorruptError)):
        return f"{what}. {advice_for_damage(data)}"
    return one_line(error, args.parser)
