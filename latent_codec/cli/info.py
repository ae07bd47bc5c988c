"""Say what a thing is: a codec, a prior, a pipeline of both, a checkpoint, or a file of latents, compressed or of an entropy model.

  latent-codec info                           the shipped codec; default-vq is another, fashion-mnist a pipeline
  latent-codec info runs/mine                 a run, a diffusers folder, a pipeline, an id on the hub
  latent-codec info runs/joined               a pipeline over priors, and what is in it
  latent-codec info latents/cat.safetensors   a latent file: whose latents, which images and labels
  latent-codec info compressed/cat.lcf        a compressed file: what it holds, whose it is, where its bits go
  latent-codec info mine/entropy.safetensors  an entropy model: of which codec, and the fingerprint that its files name
  latent-codec info sd-v1-5.safetensors       a checkpoint of another layout: what it is, its keys by rule
  latent-codec info sd-v1-5.safetensors --verbose
                                              and whether every key that its network needs is there, in its shape

A compressed file says all this without its codec. With --verbose its values are decoded, too, where the codec is at hand (a
shipped one, or the one that --codec names), for the bits without overhead: what the values cost by the entropy
model. Keys of a checkpoint count by their names; with --verbose its network is built, which takes longer, and keys that are
missing, unexpected or of another shape are listed. Of a damaged file it says which sections are lost, and exits with 2.

Of a codec it also answers two questions:

  latent-codec info runs/mine --audit
      Where does it load and work as it is: in diffusers' pipelines (Stable Diffusion 1 and 2, SDXL, SD3,
      FLUX), ComfyUI, A1111 and InvokeAI? If not: why, and which export or setting helps.

  latent-codec info runs/mine --against stabilityai/sd-vae-ft-mse --images photos/
      Does a denoiser trained on the other codec's latents still fit? Weights tensor by tensor, how far the
      latents drift on the images, and what each decoder makes of the other's latents. Without --images
      it looks at the sample photograph that comes with matplotlib; images of your own tell more.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latent_codec import deprecated
from latent_codec.cli.arguments import add_json_argument, add_subfolder_argument, by, device_of
from latent_codec.cli.compressed_files import (
    add_entropy_argument,
    describe_compressed_file,
    is_compressed_file,
)
from latent_codec.cli.progress import showing, with_progress

if TYPE_CHECKING:
    pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "thing", nargs="?", default="default", metavar="THING", help="a codec, prior, pipeline or file"
    )
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--audit", action="store_true", help="where this codec loads, and why not")
    question.add_argument(
        "--against", metavar="REFERENCE", help="whether a denoiser of that codec fits this one"
    )
    parser.add_argument("--images", metavar="DATA", help="for --against: a folder, tars, hf:owner/name")
    deprecated.add_old_flag(parser, "--pictures")
    parser.add_argument(
        "--num",
        type=int,
        default=8,
        metavar="N",
        help="take N of the images, items floor(i * total / N), i = 0 .. N - 1 (default: %(default)s)",
    )
    parser.add_argument("--device", help="for --against: cpu, cuda ... (default: a GPU if there is one)")
    parser.add_argument(
        "--codec",
        metavar="NAME_OR_PATH",
        help="for --verbose: the codec that made a compressed file (default: a shipped one, if it is that)",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="of a compressed file: count the bits without overhead; of a checkpoint: hold every key against its network",
    )
    add_subfolder_argument(parser)
    add_entropy_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.images is not None and args.against is None:
        raise ValueError("--images are for --against REFERENCE; name the codec to compare with")
    path = Path(args.thing)
    with_codec = args.codec is not None or args.entropy is not None
    if with_codec and (args.audit or args.against is not None or not is_compressed_file(path)):
        raise ValueError("--codec and --entropy are for what a compressed file (.lcf) is; leave them out")
    if args.verbose and (
        args.audit or args.against is not None or not (is_compressed_file(path) or _is_checkpoint(path))
    ):
        raise ValueError(
            "--verbose is for what a compressed file (.lcf) or a checkpoint of another layout is; leave it out"
        )
    if with_codec and not args.verbose:
        raise ValueError("--codec and --entropy are for counting bits; add --verbose, or leave them out")
    if args.audit:
        _audit_hosts(args)
        return 0
    if args.against is not None:
        _audit_drop_in(args)
        return 0
    facts = describe(args.thing, args.codec, args.entropy, verbose=args.verbose)
    if args.json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key.replace('_', ' '):{width}}  {_for_people(value)}")
    if damage := facts.get("damage"):
        print(f"latent-codec info: {args.thing}: {damage}", file=sys.stderr)
        return 2
    return 0


def describe(
    thing: str, codec: str | None = None, entropy: Path | None = None, *, verbose: bool = False
) -> dict:
    """What `thing` is, as JSON-ready facts.

    Args:
        codec: of a compressed file, as `describe_compressed_file` takes it; None for other things.
        entropy: likewise.
        verbose: count the bits of a compressed file, and hold a checkpoint's keys against its network.

    Raises:
        ValueError: if it is nothing that is known here.
        OSError: if it cannot be read.
    """
    from latent_codec.bitstream.entropy_model import FORMAT as ENTROPY_MODEL
    from latent_codec.components.codec_facts import facts_of, read_facts
    from latent_codec.components.codec_folders import ASSETS, SHIPPED_PIPELINES, is_foreign_file
    from latent_codec.components.weight_files import LATENTS, metadata_of

    path = ASSETS / thing if thing in SHIPPED_PIPELINES else Path(thing)
    if is_compressed_file(path):
        return describe_compressed_file(path, codec, entropy, count_bits=verbose)
    format_ = metadata_of(path).get("format")
    if format_ == LATENTS:
        return _describe_latent_file(path)
    if format_ == ENTROPY_MODEL:
        return _describe_entropy_model(path)
    if is_foreign_file(path):
        facts = None if verbose else read_facts(path)
        return facts.describe() if facts is not None else _describe_checkpoint(path, verbose=verbose)
    if _class_name(path / "model_index.json").endswith("PriorPipeline"):
        return _describe_pipeline(path)
    if any(
        _class_name(folder / "config.json") in ("PixelCNN", "PixelSNAIL") for folder in (path, path / "prior")
    ):
        return _describe_prior(path)
    facts = read_facts(thing)
    if facts is None:
        from latent_codec import LatentCodec

        facts = facts_of(LatentCodec.from_pretrained(thing))
    return facts.describe()


def _is_checkpoint(path: Path) -> bool:
    """Whether this is one file of weights, and nothing else that this package writes as one."""
    from latent_codec.components.codec_folders import is_foreign_file
    from latent_codec.components.weight_files import LATENTS, metadata_of

    if not is_foreign_file(path):
        return False
    from latent_codec.bitstream.entropy_model import FORMAT as ENTROPY_MODEL

    return metadata_of(path).get("format") not in (LATENTS, ENTROPY_MODEL)


def _class_name(config: Path) -> str:
    """The class that a diffusers config names; empty if there is none."""
    from latent_codec.components.weight_files import read_config_file

    try:
        return read_config_file(config)["_class_name"]
    except (OSError, ValueError):
        return ""


def _describe_pipeline(folder: Path) -> dict:
    """Its parts by their names, top prior first."""
    from latent_codec import LatentCodec
    from latent_codec.components.codec_facts import facts_of
    from latent_codec.pipelines.folders import load_pipeline, priors_of

    pipe = load_pipeline(folder)
    facts = {
        "kind": "pipeline",
        "name": folder.resolve().name,
        "class": type(pipe).__name__,
        "class_names": pipe.config.class_names,
    }
    facts |= {name: _prior_facts(prior) for name, prior in priors_of(pipe).items()}
    if pipe.vae is not None:
        codec = facts_of(LatentCodec(pipe.vae)).describe()
        facts["vae"] = {key: value for key, value in codec.items() if key not in ("kind", "name")}
    if pipe.classifier is not None:
        facts["classifier"] = {"class": type(pipe.classifier).__name__}
    return facts


def _describe_prior(path: Path) -> dict:
    from latent_codec.components.prior_folders import load_prior

    return {"kind": "prior", "name": path.resolve().name} | _prior_facts(load_prior(path))


def _prior_facts(prior) -> dict:
    config = prior.config
    return {
        "class": type(prior).__name__,
        "parameters": prior.num_parameters(),
        "over": config.get("data", "codes"),
        "values_per_index": prior.num_values,
        "indices_per_position": prior.data_channels,
        "num_classes": config.num_classes,
        "condition": prior.condition_network and prior.condition_network.expected,
        "sample_size": config.sample_size and list(config.sample_size),
        "space_fingerprint": config.space_fingerprint,
    }


def _describe_latent_file(path: Path) -> dict:
    from latent_codec.latents.latent_files import load_latents

    found = load_latents(path)
    codes = [[latents] for latents in found.latents] if found.latents else found.indices
    return {
        "kind": "latents" if found.latents else "indices",
        "codec": found.codec_name,
        "space_fingerprint": found.space_fingerprint,
        "fingerprint": found.fingerprint,
        "dtype": str(codes[0][0].dtype).removeprefix("torch."),
        "labelled": sum(label is not None for label in found.labels),
        "images": [
            {"name": name, "size": list(size)}
            | _shapes(levels, found.indices is not None)
            | ({} if label is None else {"label": label})
            for name, size, levels, label in zip(found.names, found.sizes, codes, found.labels)
        ],
    }


def _shapes(levels: list, are_indices: bool) -> dict:
    """`shape` of an image's latents, or `grids`, of each level, of its indices."""
    shapes = [list(each.shape[1:]) for each in levels]
    return {"grids": shapes} if are_indices else {"shape": shapes[0]}


def _describe_entropy_model(path: Path) -> dict:
    from latent_codec.bitstream import load_entropy_model

    model = load_entropy_model(path)
    sizes = {name: array.size for name, array in model.arrays().items()}
    facts = {
        "kind": "entropy model",
        "model": model.kind,
        "codec": model.codec_name,
        "space_fingerprint": model.space_fingerprint,
        "fingerprint": model.fingerprint,
        "bytes": path.stat().st_size,
        "tables": len(model.tables),
        "networks": len(getattr(model, "networks", ())),
        "weights": sum(size for name, size in sizes.items() if name.endswith(".weights")),
    }
    if not model.num_step_sizes:
        codebooks = model.tables.sizes if model.kind == "static" else model.codebook_sizes
        return facts | {"values": "indices", "codebook_sizes": [int(size) for size in codebooks]}
    return facts | {
        "values": "latents",
        "num_steps": model.num_step_sizes,
        "coarsest_steps": model.step_sizes[0].tolist(),
        "finest_steps": model.step_sizes[-1].tolist(),
    }


def _describe_checkpoint(path: Path, *, verbose: bool) -> dict:
    """A checkpoint of another layout, by its names and shapes alone: what it is, its config, its keys by rule.

    Args:
        verbose: build its network, and hold every key against it.
    """
    from latent_codec.conversion.checkpoints import open_entries
    from latent_codec.conversion.foreign import read_foreign
    from latent_codec.conversion.renaming import ConversionError
    from latent_codec.conversion.settings import SettingsNeededError

    opened = open_entries(path)
    facts = {
        "kind": "checkpoint",
        "tensors": len(opened),
        "parameters": sum(map(math.prod, opened.shapes.values())),
        "dtypes": sorted(set(opened.dtype_names.values())),
        "wrapper": opened.wrapper,
    }
    problems = {}
    try:
        foreign = read_foreign(path)
        keys = foreign.keys.counts() if verbose else foreign.count_keys_by_name()
        if verbose:
            problems = {
                "missing": foreign.keys.missing,
                "unexpected": foreign.keys.unexpected,
                "misshapen": foreign.keys.misshapen,
            }
    except ConversionError as error:
        prefixes = sorted({key.partition(".")[0] for key in opened})
        title = error.title if isinstance(error, SettingsNeededError) else "unknown"
        return facts | {"format": title, "reason": str(error), "prefixes": prefixes}
    published = foreign.format.published_scales(foreign.network.config)
    config = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in foreign.network.config.items()
    }
    return facts | {
        "format": foreign.format.title,
        "prefix": foreign.prefix or None,
        "class": foreign.network.class_name,
        "config": config,
        "settings_known_by": foreign.settings,
        "keys": keys,
        **{name: list(found) for name, found in problems.items() if found},
        "scaling_factor": foreign.scale and foreign.scale.scaling_factor,
        "shift_factor": foreign.scale and foreign.scale.shift_factor,
        "scale_known_by": foreign.scale.rule
        if foreign.scale
        else "nothing in the file; say it when converting"
        + (f" (published: {published})" if published else ""),
    }


def _audit_hosts(args: argparse.Namespace) -> None:
    from latent_codec import LatentCodec
    from latent_codec.evaluation.host_audit import audit_hosts

    with showing(f"opening {args.thing}"):
        codec = LatentCodec.from_pretrained(args.thing)
    with showing(f"auditing {args.thing}"):
        audits = audit_hosts(codec)
    if args.json:
        hosts = [audit.to_dict() for audit in audits]
        print(json.dumps({"codec": codec.name, "fingerprint": codec.fingerprint, "hosts": hosts}))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("host", "verdict"):
        table.add_column(heading)
    for audit in audits:
        table.add_row(audit.host, audit.verdict)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{codec.name}, {type(codec.autoencoder).__name__}")
    console.print(table)
    for audit in audits:
        if audit.reasons:
            console.print(f"{audit.host}: {audit.verdict}")
        for reason in audit.reasons:
            console.print(f"  - {reason}")
        if audit.remedy:
            console.print(f"  what helps: {audit.remedy}")


def _audit_drop_in(args: argparse.Namespace) -> None:
    from latent_codec import LatentCodec
    from latent_codec.evaluation.drop_in_audit import audit_drop_in

    device = device_of(args)
    with showing(f"opening {args.thing} and {args.against}"):
        codec, reference = (
            LatentCodec.from_pretrained(each, device=device) for each in (args.thing, args.against)
        )
    audit = audit_drop_in(codec, reference, _images(args, codec.channels))
    if args.json:
        print(json.dumps(audit.to_dict() | {"images": args.images}, allow_nan=False))
        return
    count = "1 image" if audit.num_images == 1 else f"{audit.num_images} images"
    where = f"{count} of {args.images}" if args.images else "the sample photograph"
    _print_drop_in(audit, where)


def _images(args: argparse.Namespace, channels: int) -> Iterator:
    """Images in [-1, 1], cut to at most 512 px a side."""
    from latent_codec.cli.roundtrip import SAMPLE_SIZE, _sample_photograph
    from latent_codec.images.sources import open_source, spread
    from latent_codec.images.tensors import center_crop

    source = open_source(_sample_photograph() if args.images is None else args.images)
    for index in with_progress(spread(len(source), args.num), "comparing"):
        image = source.image(index, channels)
        yield center_crop(image, tuple(min(side, SAMPLE_SIZE) for side in image.shape[1:]))


def _print_drop_in(audit, where: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{audit.codec} against {audit.reference}: {audit.verdict}.")
    for side in ("encoder", "decoder"):
        weights = getattr(audit, side)
        names = [*weights.differing, *weights.missing]
        console.print(
            f"{side}: {weights.num_equal} of {weights.num_tensors} tensors equal to the bit"
            + (f"; not {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "")
        )
    for difference in audit.config_differences:
        console.print(f"config: {difference}")
    for key, value in audit.space.to_config().items():
        other = audit.reference_space.to_config()[key]
        if value != other:
            console.print(f"{key}: {_for_people(value)} against {_for_people(other)}")

    latents = Table(box=box.SIMPLE)
    for heading in ("latent channel", "mean", "theirs", "difference", "std", "theirs", "correlation"):
        latents.add_column(heading, justify="right")
    for channel, each in enumerate(audit.channels):
        figures = each.mean, each.reference_mean, each.mean_difference, each.std, each.reference_std
        correlation = "-" if each.correlation is None else f"{each.correlation:.4f}"
        latents.add_row(str(channel), *(f"{figure:.4f}" for figure in figures), correlation)
    console.print(latents)
    psnr = Table(box=box.SIMPLE)
    for heading in ("PSNR, dB", "its decoder", "their decoder"):
        psnr.add_column(heading, justify="right")
    psnr.add_row("its latents", f"{audit.psnr:.2f}", f"{audit.psnr_by_reference:.2f}")
    psnr.add_row("their latents", f"{audit.psnr_of_reference_by_codec:.2f}", f"{audit.psnr_of_reference:.2f}")
    console.print(psnr)
    console.print(f"Latents drift by {audit.drift:.3g} of their spread, on {where}.")


def _for_people(value) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, dict):
        return "".join(f"\n  {_spaced(key)}  {_for_people(each)}" for key, each in value.items())
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  {_image(each) if 'size' in each else _pairs(each)}" for each in value)
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " + ".join(map(by, value))
    if isinstance(value, list):
        return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in value)
    return f"{value:,}" if type(value) is int else str(value)


def _image(facts: dict) -> str:
    shapes = " + ".join(map(by, facts.get("grids") or [facts["shape"]]))
    label = f", label {facts['label']}" if "label" in facts else ""
    return f"{facts['name']}: {by(facts['size'])} -> {shapes}{label}"


def _pairs(facts: dict) -> str:
    return ", ".join(f"{_spaced(key)} {_for_people(value)}" for key, value in facts.items())


def _spaced(key: str) -> str:
    """A name's underscores as spaces; what is no name stays."""
    return key.replace("_", " ") if key.isidentifier() else key
