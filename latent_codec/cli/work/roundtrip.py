"""`latent-codec roundtrip`."""

import argparse
import time
from pathlib import Path

from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.cli.work.decoded_files import check_vocoder, incomplete, load_vocoder, write_decoded
from latent_codec.cli.work.opening import NamedImages, load_codec, open_data
from latent_codec.cli.work.printing import by, print_json
from latent_codec.evaluation.codes import fixed_length_bits_per_pixel
from latent_codec.evaluation.comparison import side_by_side
from latent_codec.evaluation.cost import wait_for
from latent_codec.images.origins import Origin, RangeOrigin, Wholes, as_stored
from latent_codec.images.sample_photograph import SAMPLE_SIZE, sample_photograph
from latent_codec.images.tensors import center_crop, hstack_images, write_image
from latent_codec.images.windows import window_range
from latent_codec.metrics import psnr, ssim


def run(args: argparse.Namespace) -> int:
    is_sample = not args.data
    if is_sample:
        args.data = [sample_photograph()]
    images = NamedImages(open_data(args), args)
    codec = load_codec(args)
    vocoder = load_vocoder(args)
    codec.check_keeps_size("the comparison with the original")
    window = None if args.window is None else window_range(args.window)
    results, wholes = [], Wholes()
    for index, name, image in images.read(codec.channels, "round trips"):
        origin = images.source.origin(index)
        check_vocoder(origin, vocoder)
        if window is not None and not isinstance(origin, RangeOrigin):
            images.fail(f"{images.source.name(index)}: it has no unit, so leave --window out")
            continue
        image = center_crop(image, SAMPLE_SIZE) if is_sample else image
        results.append(_roundtrip(codec, image, name, args, origin, wholes, window, vocoder))
        if not args.json:
            _print(results[-1])
    for stem, origin, part in incomplete(wholes, "roundtrip"):
        path = Path(args.out) / Path(origin.whole).parent / f"{stem}-decoded{origin.suffix}"
        origin.write_parts([(origin, part)], path)
    if args.json:
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint}
        print_json(facts | {"images": results, "failed": images.failed})
    return 2 if images.failed else 0


def _roundtrip(
    codec: LatentCodec,
    image: Tensor,
    name: Path,
    args: argparse.Namespace,
    origin: Origin | None,
    wholes: Wholes,
    window: tuple[float, float] | None,
    vocoder,
) -> dict:
    start = time.perf_counter()
    latents = codec.encode(image, tile=args.tile)
    wait_for(codec.device)
    encoded = time.perf_counter()
    (reconstruction,) = codec.decode(latents, size=tuple(image.shape[-2:]), output_type="pt", tile=args.tile)
    wait_for(codec.device)
    decoded = time.perf_counter()

    (reconstruction,) = as_stored(reconstruction.cpu()[None], [origin])
    path = Path(args.out) / name.with_name(f"{name.name}-roundtrip.png")
    shown = image, reconstruction
    if window is not None and isinstance(origin, RangeOrigin):
        shown = tuple(origin.windowed(each, window) for each in shown)
    is_sound = origin is not None and origin.kind == "sound"  # wide, so one below the other
    write_image(side_by_side(*shown, columns=1 if is_sound else 3), path)
    return {
        "name": str(name),
        "psnr": psnr(reconstruction[None], image[None]).item(),
        "ssim": ssim(reconstruction[None], image[None]).item() if min(image.shape[-2:]) >= 11 else None,
        "size": list(image.shape[-2:]),
        "latent_shape": list(latents.shape[1:]),
        "encode_seconds": encoded - start,
        "decode_seconds": decoded - encoded,
        "path": str(path),
        **(_in_units(origin, image, reconstruction) if isinstance(origin, RangeOrigin) else {}),
        **(_restored(origin, reconstruction, name, args, wholes, vocoder) if origin else {}),
        **(_indices(codec, image, path) if codec.indices_suffice else {}),
    }


def _in_units(origin: RangeOrigin, image: Tensor, reconstruction: Tensor) -> dict:
    """Errors in the image's unit."""
    rmse, largest = origin.errors(reconstruction, image)
    return {
        "unit": origin.unit,
        "value_range": [origin.low, origin.high],
        "rmse": rmse,
        "largest_error": largest,
    }


def _restored(
    origin: Origin, reconstruction: Tensor, name: Path, args: argparse.Namespace, wholes: Wholes, vocoder
) -> dict:
    """Write the reconstruction as a file of the image's own kind; of a volume with its last slice."""
    whole = Path(name.name if origin.whole is None else origin.whole)
    path = Path(args.out) / name.parent / f"{whole.name}-decoded{origin.suffix}"
    if origin.whole is None:
        write_decoded(reconstruction, origin, path, vocoder)
    elif (parts := wholes.add(origin, origin.part(reconstruction))) is not None:
        origin.write_parts(parts, path)
    else:
        return {}
    return {"decoded_path": str(path)}


def _indices(codec: LatentCodec, image: Tensor, roundtrip_path: Path) -> dict:
    """Sizes of indices and codebooks, top level first, and their cost; of several levels an image of the top level, the two top ones, to all."""
    size = tuple(image.shape[-2:])
    index_maps = codec.encode_indices(image)
    facts = {
        "grids": [list(indices.shape[1:]) for indices in index_maps],
        "codebook_sizes": codec.codebook_sizes,
        "bits_per_pixel_at_fixed_length": fixed_length_bits_per_pixel(codec, *size),
    }
    if len(index_maps) > 1:
        stages = [codec.decode_indices(index_maps[:n], size=size)[0] for n in range(1, len(index_maps) + 1)]
        path = roundtrip_path.with_name(roundtrip_path.name.removesuffix("-roundtrip.png") + "-levels.png")
        write_image(hstack_images(stages), path)
        facts["levels_path"] = str(path)
    return facts


def _print(result: dict) -> None:
    ssim_ = "n/a (under 11 px)" if result["ssim"] is None else f"{result['ssim']:.4f}"
    encoded = f"latents {by(result['latent_shape'])}"
    if "grids" in result:
        sizes = zip(result["grids"], result["codebook_sizes"])
        grids = " + ".join(f"{by(grid)} of {codebook_size:,}" for grid, codebook_size in sizes)
        encoded = (
            f"indices {grids}, {result['bits_per_pixel_at_fixed_length']:.4f} bits per pixel at fixed length"
        )
    seen = " and ".join(result[key] for key in ("path", "levels_path", "decoded_path") if key in result)
    psnr_ = f"PSNR {result['psnr']:.2f} dB"
    if "rmse" in result:
        unit = f" {result['unit']}" if result["unit"] else ""
        low, high = result["value_range"]
        psnr_ += f" of {low:g} to {high:g}{unit}, RMSE {result['rmse']:.4g}{unit}, at most {result['largest_error']:.4g}{unit}"
    print(
        f"{result['name']}: {psnr_}, SSIM {ssim_}, {by(result['size'])} -> {encoded}, "
        f"encode {result['encode_seconds']:.2f} s, decode {result['decode_seconds']:.2f} s, see {seen}"
    )
