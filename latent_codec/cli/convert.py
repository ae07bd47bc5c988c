"""Turn foreign checkpoints into diffusers components, and components into foreign checkpoints.

  latent-codec convert vae.ckpt runs/mine --scale sd1            a latent-diffusion VAE -> a diffusers folder
  latent-codec convert sd-v1-5.safetensors runs/vae              the VAE inside a whole Stable Diffusion file
  latent-codec convert vqgan.ckpt runs/vqgan --config model.yaml a VQGAN, its yaml held against the weights
  latent-codec convert taesd_encoder.pth taesd_decoder.pth runs/taesd
  latent-codec convert runs/mine mine.safetensors --to ldm       a component -> latent-diffusion's names
  latent-codec convert default-vq taming.ckpt --to taming
  latent-codec convert run.pt runs/ema --entry ema --scale sd1   the averaged weights of a training checkpoint
  latent-codec convert my-vae.safetensors runs/vae --config config.json
                                                                 a diffusers weight file without its folder

The format is recognized by the keys and the shapes of the tensors, under any prefix and in any entry of
the file, and so is most of the config; nothing is fetched. Every key is mapped, left out by a rule that
is named, missing, or unexpected: one of the last two is an error, and nothing is written. So is a weight
that is NaN, infinite or an integer. What was written is read again and compared.

Weights do not show the groups of norms, the activation and the scale. Original codes fix the first two.
A weight file in diffusers' own key layout needs its config.json: in the file's metadata (files written
here have it), next to it, or by --config. --norm-num-groups N does for a file whose other settings are
its class's defaults.

Files are safetensors, or pickles of tensors; a pickle that would run code is refused.

The scale of the latents is rarely in the file. It is known for whole Stable Diffusion, SDXL, SD3 and
FLUX models, for files with a scale_factor and those written here, and is 1 for VQ and tiny
autoencoders. Else say it (--scale, --scaling-factor), or let it be measured (--calibrate).
"""

import argparse
import math
from pathlib import Path

from latent_codec.cli.arguments import add_json_argument
from latent_codec.cli.progress import showing

FOREIGN = ("ldm", "taming", "taesd", "vq-vae-2")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a checkpoint file, the two files of a tiny autoencoder, or a codec (folder, shipped name, hub id)",
    )
    parser.add_argument(
        "destination", type=Path, metavar="DESTINATION", help="a folder, or a file with --to ldm ..."
    )
    parser.add_argument(
        "--to",
        choices=("diffusers", *FOREIGN),
        default="diffusers",
        help="the format to write (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the written weights (default: as they are)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a diffusers config.json for the weights, or the original's yaml, which has to agree",
    )
    parser.add_argument(
        "--norm-num-groups",
        type=int,
        metavar="N",
        help="groups of the norms, for weights in diffusers' own key layout without their config.json",
    )
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="which entry or prefix of the file to take, such as ema (default: the only autoencoder, or the one that is "
        "not averaged)",
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--scale", choices=("sd1", "sdxl", "sd3", "flux"), help="of the latents: this family's"
    )
    scale.add_argument("--scaling-factor", type=float, metavar="X", help="of the latents")
    scale.add_argument("--calibrate", metavar="DATA", help="measure the scale of the latents on these images")
    parser.add_argument(
        "--shift-factor", type=float, metavar="X", help="of the latents, beside --scaling-factor"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    import json

    _check(args)
    with showing(f"converting {args.sources[0]}"):
        codec = _open_codec(args)
        facts = _convert_codec(args, codec) if codec is not None else _convert_files(args)
    if args.json:
        print(json.dumps(facts))
        return
    _print(facts)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not fit together and for destinations that cannot be written."""
    from latent_codec.components.weight_files import check_folder_to_save

    if args.shift_factor is not None and args.scaling_factor is None:
        raise ValueError("--shift-factor needs --scaling-factor; give both")
    for flag, number in (("--scaling-factor", args.scaling_factor), ("--shift-factor", args.shift_factor)):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{flag} is {number}; expected a finite number")
    if args.scaling_factor is not None and args.scaling_factor <= 0:  # which no codec can be opened with
        raise ValueError(f"--scaling-factor is {args.scaling_factor:g}; expected a number above 0")
    if args.norm_num_groups is not None and args.norm_num_groups < 1:
        raise ValueError(f"--norm-num-groups is {args.norm_num_groups}; expected 1 or more")
    if args.to != "diffusers" and args.calibrate is not None:
        raise ValueError("--calibrate measures a diffusers folder; convert to one first")
    if args.to == "diffusers":
        if args.destination.suffix in SUFFIXES:
            raise ValueError(
                f"{args.destination} is a file's name, and a diffusers component is a folder: name one, or say by "
                f"--to what the file is to hold ({', '.join(FOREIGN)})"
            )
        check_folder_to_save(args.destination)
        return
    if args.destination.exists():
        raise ValueError(f"{args.destination} exists; name a new file")
    if args.to == "taesd":
        if args.destination.suffix in SUFFIXES:
            raise ValueError(
                f"{args.destination} is a file's name; taesd has two files: name a folder for them"
            )
    elif args.destination.suffix not in SUFFIXES:
        raise ValueError(f"{args.destination} has none of the suffixes {', '.join(SUFFIXES)}")


def _open_codec(args: argparse.Namespace):
    """The codec that a folder, a shipped name or a hub id stands for; None for foreign files."""
    paths = [Path(source) for source in args.sources]
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device; give a checkpoint file or a codec's folder")
    files = [path.is_file() for path in paths]
    if all(files):
        return None
    if len(files) > 1:
        folder = args.sources[files.index(False)]
        raise ValueError(f"{folder} is no file; several sources are the two files of a tiny autoencoder")
    if args.entry is not None or args.norm_num_groups is not None:
        raise ValueError(
            f"--entry and --norm-num-groups are for checkpoint files; {args.sources[0]} is a codec"
        )
    from latent_codec import LatentCodec

    return LatentCodec.from_pretrained(args.sources[0])


def _convert_files(args: argparse.Namespace) -> dict:
    """Foreign files -> a diffusers folder, or another foreign format by way of the component."""
    from dataclasses import replace

    from latent_codec.conversion.foreign import read_foreign
    from latent_codec.conversion.ldm_config import check_config, scale_of

    settings, original = _settings(args)
    foreign = read_foreign(args.sources, entry=args.entry, settings=settings)
    scale = _asked_scale(args) or (original and scale_of(original)) or foreign.scale
    foreign = replace(foreign, scale=scale)
    foreign.keys.check(foreign.name)
    if original is not None:
        check_config(original, foreign.network.config, str(args.config))
    if scale is None and args.calibrate is None:
        raise ValueError(
            f"nothing in {foreign.name} says the scale of its latents; give --scale sd1, sdxl, sd3 or flux, or "
            "--scaling-factor X (1 leaves them as they are), or --calibrate IMAGES to measure it"
        )
    from latent_codec.conversion.writing import write_diffusers, write_foreign

    if args.to == "diffusers":
        write_diffusers(foreign, args.destination, dtype=_dtype(args), card=_card(foreign))
        written = [args.destination]
        if args.calibrate is not None:
            scale = _calibrate(args.destination, args.calibrate)
    else:
        written = write_foreign(foreign.component(), args.to, args.destination, dtypes=_dtype(args))
    place = {
        "wrapper": foreign.wrapper,
        "prefix": foreign.prefix.rstrip(".") or None,
        "averaged_weights": [each.rstrip(".") for each in foreign.averages],
        "settings_known_by": foreign.settings,
    }
    return _facts(foreign.format.title, foreign.keys.counts(), scale, written) | place


def _settings(args: argparse.Namespace):
    """The `Settings` that `--config` or `--norm-num-groups` give, and the original's yaml, if `--config` is that."""
    from latent_codec.conversion.ldm_config import SETTINGS, read_config
    from latent_codec.conversion.settings import Settings, combine, read_diffusers_config

    asked, original = None, None
    if args.norm_num_groups is not None:
        rule = f"norm_num_groups {args.norm_num_groups} as asked, the class's defaults for the others"
        asked = Settings({"norm_num_groups": args.norm_num_groups}, rule)
    if args.config is None:
        return asked, original
    config = read_diffusers_config(args.config)
    if config is None:
        original = read_config(args.config)
    return combine(
        asked, SETTINGS if config is None else Settings(config, f"the given {args.config.name}")
    ), original


def _convert_codec(args: argparse.Namespace, codec) -> dict:
    """A codec -> a foreign file, or a diffusers folder of another precision."""
    import torch

    from latent_codec.components.codec_folders import find_weights
    from latent_codec.components.loading import open_weights
    from latent_codec.conversion.renaming import Scale
    from latent_codec.conversion.writing import write_component, write_foreign

    if args.config is not None or args.calibrate is not None:
        raise ValueError(
            "--config and --calibrate are for checkpoint files; a codec has its own config (see calibrate)"
        )
    asked = _asked_scale(args)
    if asked is not None:
        scale = {"scaling_factor": asked.scaling_factor, "shift_factor": asked.shift_factor}
        codec.autoencoder.register_to_config(
            **{key: value for key, value in scale.items() if key in codec.autoencoder.config}
        )
    stored = open_weights(find_weights(args.sources[0])).dtypes
    dtypes: dict[str, torch.dtype] | torch.dtype = _dtype(args) or stored
    if args.to == "diffusers":
        write_component(codec.autoencoder, args.destination, dtypes=dtypes)
        written = [args.destination]
    else:
        written = write_foreign(codec.autoencoder, args.to, args.destination, dtypes=dtypes)
    config = codec.autoencoder.config
    own = Scale(codec.latent_space.scaling_factor, config.get("shift_factor"), "the codec's own config")
    counts = {"mapped": len(codec.autoencoder.state_dict())}
    return _facts(f"diffusers {type(codec.autoencoder).__name__}", counts, asked or own, written)


def _asked_scale(args: argparse.Namespace):
    from latent_codec.conversion.renaming import Scale
    from latent_codec.conversion.scales import named_scale

    if args.scale is not None:
        return named_scale(args.scale)
    if args.scaling_factor is not None:
        return Scale(args.scaling_factor, args.shift_factor, "as asked")
    return None


def _calibrate(folder: Path, data: str):
    """Measure scale and shift on images and write them into the folder."""
    from latent_codec import LatentCodec
    from latent_codec.conversion.renaming import Scale
    from latent_codec.evaluation.calibration import calibrate, measure
    from latent_codec.images.sources import open_source

    codec = LatentCodec.from_pretrained(folder)
    with showing("calibrating") as report:
        calibrate(codec, measure(codec, open_source(data), on_progress=report), "scale")
    codec.save_pretrained(folder)
    return Scale(codec.latent_space.scaling_factor, codec.latent_space.shift_factor, f"measured on {data}")


def _dtype(args: argparse.Namespace):
    import torch

    return args.dtype and getattr(torch, args.dtype)


def _card(foreign) -> str:
    """The model card of a converted checkpoint."""
    counts = "\n".join(f"- {name}: {count}" for name, count in foreign.keys.counts().items())
    scale = "measured after conversion" if foreign.scale is None else foreign.scale.rule
    return (
        f"# {foreign.network.network_class.__name__} from {foreign.name}\n\n"
        f"Converted from the {foreign.format.title} `{foreign.name}` by latent-codec.\n\n"
        f"Keys:\n\n{counts}\n\nScale of the latents: {scale}.\n\n"
        "The weights' licence is that of the source.\n"
    )


def _facts(title: str, counts: dict[str, int], scale, written: list[Path]) -> dict:
    return {
        "source": title,
        "keys": counts,
        "scaling_factor": scale.scaling_factor,
        "shift_factor": scale.shift_factor,
        "scale_known_by": scale.rule,
        "written": [str(path) for path in written],
    }


def _print(facts: dict) -> None:
    import sys

    place = " in ".join(each for each in (facts.get("prefix"), facts.get("wrapper")) if each)
    print(facts["source"] + (f" under {place}" if place else ""), file=sys.stderr)
    for name, count in facts["keys"].items():
        print(f"{count:6,} keys {name}", file=sys.stderr)
    shift = "" if facts["shift_factor"] is None else f", shift_factor {facts['shift_factor']:g}"
    print(f"scaling_factor {facts['scaling_factor']:g}{shift}: {facts['scale_known_by']}", file=sys.stderr)
    if facts.get("settings_known_by"):
        print(f"settings that weights do not show: {facts['settings_known_by']}", file=sys.stderr)
    for entry in facts.get("averaged_weights", ()):
        print(f"Note: averaged weights are in {entry}; --entry {entry} takes those", file=sys.stderr)
    for path in facts["written"]:
        print(path)
