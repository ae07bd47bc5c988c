"""`latent-codec compress`."""

import argparse
from pathlib import Path

from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.bitstream import prepare
from latent_codec.bitstream.compression import Decoded, check_quality, tile_for
from latent_codec.bitstream.container import SUFFIX
from latent_codec.bitstream.corrections import SUFFIX as CORRECTION
from latent_codec.bitstream.corrections import make_correction
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.cli.messages import one_line
from latent_codec.cli.work.compressed_files import needed_entropy_model
from latent_codec.cli.work.opening import NamedImages, load_codec, open_data
from latent_codec.cli.work.printing import print_json
from latent_codec.components.codec_folders import DEFAULT
from latent_codec.errors import SettingError
from latent_codec.files import replacing
from latent_codec.images.origins import Origin, RangeOrigin
from latent_codec.images.sources import FolderImages, ImageSource
from latent_codec.metrics import psnr, round_to_8_bits

FOR_HIGH_RATES, HIGH_RATE = "default-rd", 0.2
"""The codec whose files are better than the usual one's from so many bits per pixel on (its model card has both)."""


def run(args: argparse.Namespace) -> int:
    images = NamedImages(open_data(args), args)
    is_high = args.entropy is None and (args.target_bpp or 0) >= HIGH_RATE
    codec = load_codec(args, name=args.codec or (FOR_HIGH_RATES if is_high else DEFAULT))
    model = needed_entropy_model(args, codec)
    _check(args, codec, model)
    results = []
    for index, name, image in images.read(codec.channels, "compressing"):
        try:
            result = _compress(codec, model, image, name, args, images.source, index)
        except ValueError as error:
            images.fail(f"{images.source.name(index)}: {one_line(error, args.parser)}")
            continue
        results.append(result)
        if not args.json:
            print(f"{result['path']}: {_figures(result)}{_how(result, codec)}")
    total = _total(results) if results else None
    if args.json:
        facts = {
            "codec": codec.name,
            "space_fingerprint": codec.space_fingerprint,
            "entropy_fingerprint": model and model.fingerprint,
        }
        print_json(facts | {"images": results, "total": total, "failed": images.failed})
    elif len(results) > 1:
        print(f"{len(results)} images: {_figures(total)}")
    return 2 if images.failed else 0


def _check(args: argparse.Namespace, codec: LatentCodec, model: EntropyModel | None) -> None:
    """Refuse settings that fit no image, before the first is read."""
    multiple = codec.family.side_multiple
    if args.tile % multiple:
        raise SettingError(
            "tile", f"a multiple of {multiple} pixels for {codec.name}, or 0 for no tiles", args.tile
        )
    if codec.indices_suffice and args.quality is not None:
        expected = f"none for {codec.name}, whose indices are stored without loss"
        raise SettingError("quality", expected, args.quality)
    if args.quality is not None:
        check_quality(args.quality, model)


def _compress(
    codec: LatentCodec,
    model: EntropyModel | None,
    image: Tensor,
    name: Path,
    args: argparse.Namespace,
    source: ImageSource,
    index: int,
) -> dict:
    height, width = image.shape[-2:]
    origin = source.origin(index)
    if args.max_error is not None and not isinstance(origin, RangeOrigin):
        what = "an image of 8 bits" if origin is None else f"a {origin.kind}"
        raise SettingError("max_error", f"none of {what}, which has no unit", args.max_error)
    target = args.target_bytes
    if args.target_bpp is not None:
        target = int(args.target_bpp * height * width / 8)
    prepared = prepare(codec, image, entropy_model=model, tile=args.tile or None)
    try:
        data, decoded = prepared.compress_and_read(quality=args.quality, target_bytes=target)
    except SettingError as error:
        if args.target_bpp is None or error.setting != "target_bytes":
            raise
        advice = f"it allows {target} bytes"
        raise SettingError("target_bpp", error.expected, args.target_bpp, advice=advice) from error
    header, bits = decoded.container.header, decoded.code_length
    out = args.out / name.with_name(f"{name.name}{SUFFIX}")
    result = {
        "name": name.as_posix(),
        "path": str(out),
        "size": [height, width],
        "bytes": len(data),
        "bits_per_pixel": 8 * len(data) / (height * width),
        "bits_without_overhead": bits,
        "bits_per_pixel_without_overhead": bits / (height * width),
        "coding": "fixed length" if header.entropy_fingerprint is None else "entropy coded",
        "tiles": header.num_tiles,
    }
    result |= {"levels": len(header.levels)} if header.is_indices else {"quality": header.step_size_index}
    if args.psnr:
        reconstruction = round_to_8_bits(decoded.image(output_type="pt").cpu())
        found = psnr(reconstruction[None], image.cpu()[None]).item()
        result["psnr"] = found if found < float("inf") else None  # JSON has no infinity
    if isinstance(origin, RangeOrigin):
        result |= {"unit": origin.unit, "max_error": args.max_error}
    if origin is not None:
        correction = _correction(origin, data, decoded, source, index, args.max_error)
        result["correction_bytes"] = len(correction)
        with replacing(out.with_suffix(CORRECTION)) as written:
            written.write_bytes(correction)
    with replacing(out) as written:
        written.write_bytes(data)
    return result


def _correction(
    origin: Origin,
    data: bytes,
    decoded: Decoded,
    source: ImageSource,
    index: int,
    max_error: float | None,
) -> bytes:
    """The content of the file next to a compressed image that is not of 8 bits."""
    if max_error is None:
        return make_correction(origin, data)
    image = decoded.image(output_type="pt", tile=tile_for(decoded.container.header)).cpu()
    original = source.stored(index) if isinstance(source, FolderImages) else None
    return make_correction(origin, data, image, original, max_error)


def _total(results: list[dict]) -> dict:
    pixels = sum(result["size"][0] * result["size"][1] for result in results)
    total = {key: sum(result[key] for result in results) for key in ("bytes", "bits_without_overhead")}
    total |= {
        "bits_per_pixel": 8 * total["bytes"] / pixels,
        "bits_per_pixel_without_overhead": total["bits_without_overhead"] / pixels,
    }
    if any("correction_bytes" in result for result in results):
        total["correction_bytes"] = sum(result.get("correction_bytes", 0) for result in results)
    if "psnr" in results[0]:
        finite = [result["psnr"] for result in results if result["psnr"] is not None]
        total["psnr"] = sum(finite) / len(finite) if finite else None
    return total


def _figures(found: dict) -> str:
    text = (
        f"{found['bytes']:,} bytes, {found['bits_per_pixel']:.4f} bits per pixel "
        f"({found['bits_per_pixel_without_overhead']:.4f} without overhead)"
    )
    if "correction_bytes" in found:
        text += f", corrections {found['correction_bytes']:,} bytes"
        if found.get("max_error") is not None:
            text += f", errors at most {found['max_error']:g} {found['unit']}".rstrip()
    if "psnr" in found:
        text += ", PSNR infinite" if found["psnr"] is None else f", PSNR {found['psnr']:.2f} dB"
    return text


def _how(result: dict, codec: LatentCodec) -> str:
    if "quality" in result:
        return f", quality {result['quality']}"
    fixed = ", fixed length" if result["coding"] == "fixed length" else ""
    levels = len(codec.codebook_sizes)
    return fixed + (f", {result['levels']} of {levels} levels" if result["levels"] < levels else "")
