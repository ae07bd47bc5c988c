"""Decode random latents of a trained VAE, as one picture with a grid of samples.

  latent-codec sample --codec runs/faces --num 16
  latent-codec sample --codec runs/faces --num 64 --seed 7 --temperature 0.8 --out faces.png

z ~ N(0, I) is drawn as a denoiser would hand it over and goes through the codec's own scale and shift:
where calibration found the latents of pictures away from mean 0 and std 1, the samples follow
that mean and std, per channel where the config has them per channel. What was drawn is printed.

Every position of the grid is drawn on its own. A codec with one vector per picture (a 1x1 grid)
paints whole pictures from that; one with a larger grid paints textures, since what holds
positions together is learned by a denoiser or a prior. Discrete codecs are refused for that reason.
"""

import argparse
import math
from pathlib import Path

from latent_codec.cli.arguments import add_codec_arguments, add_json_argument, by, load_codec, with_progress

BATCH_PIXELS = 512 * 512
DEFAULT_SIDE = 256  # for codecs whose config names no size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_codec_arguments(parser)
    parser.add_argument("--num", type=int, default=16, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the random numbers; a larger --num adds samples to the same first ones (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="draw from N(0, T^2): below 1 nearer to the mean picture (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="pixels of a sample, such as 64x96 or 64 (default: what the codec was trained on)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        metavar="PICTURE",
        help="the grid (default: %(default)s)",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    import json

    import torch

    from latent_codec.pictures import picture_grid, write_picture

    if args.num < 1:
        raise ValueError(f"--num is {args.num}; 1 or more samples")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature is {args.temperature}; 0 or more")
    size = _parse_size(args.size) if args.size else None
    codec = load_codec(args)
    if codec.is_discrete:
        raise ValueError(
            f"{codec.name} is a {type(codec.autoencoder).__name__}: its codewords do not follow a normal distribution, "
            "and sampling them needs a prior fitted to them, which this release does not have"
        )
    side = codec.autoencoder.config.get("sample_size") or DEFAULT_SIDE
    height, width = size or (side, side)
    factor = codec.space.downsampling_factor
    shape = codec.space.channels, -(-height // factor), -(-width // factor)

    # Drawn on the CPU, one sample after another: the same on every device and for every number of samples.
    generator = torch.Generator().manual_seed(args.seed)
    latents = args.temperature * torch.stack(
        [torch.randn(shape, generator=generator) for _ in range(args.num)]
    )
    batches = latents.split(max(BATCH_PIXELS // (height * width), 1))
    samples = [
        picture
        for batch in with_progress(batches, "sampling")
        for picture in codec.decode(batch.to(codec.device), size=(height, width))
    ]
    write_picture(picture_grid(samples, math.ceil(math.sqrt(args.num))), args.out)

    drawn = _what_was_drawn(codec.space, args.temperature)
    if args.json:
        facts = {
            "codec": codec.name,
            "fingerprint": codec.fingerprint,
            "num": args.num,
            "seed": args.seed,
            "temperature": args.temperature,
            "size": [height, width],
            "latent_shape": list(shape),
            "drawn": drawn,
            "path": str(args.out),
        }
        print(json.dumps(facts))
        return
    grid = by(shape)
    print(f"{args.num} samples of {height}x{width} from {grid} latents, seed {args.seed}, see {args.out}")
    print(f"drawn: {drawn}")


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if not (1 <= len(sides) <= 2 and all(side.isdecimal() and int(side) > 0 for side in sides)):
        raise ValueError(f"--size is {text}; expected HEIGHTxWIDTH in pixels, such as 64x96, or one side")
    return int(sides[0]), int(sides[-1])


def _what_was_drawn(space, temperature: float) -> str:
    """The distribution of the raw latents, in words."""
    times = "" if temperature == 1 else f" times {temperature:g}"
    if space.mean is not None and (set(space.mean), set(space.std)) != ({0.0}, {1.0}):
        return (
            f"raw latents with per-channel mean {_listed(space.mean)} and "
            f"std {_listed(value / space.scaling_factor for value in space.std)}{times}"
        )
    if space.shift_factor == 0 and space.scaling_factor == 1:
        return f"raw latents from N(0, I), as they are{times}"
    return (
        f"raw latents with mean {space.shift_factor:.4g} and std {1 / space.scaling_factor:.4g}{times}, "
        "the same for every channel"
    )


def _listed(values) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"
