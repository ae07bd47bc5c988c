"""Say what a thing is: a codec, a prior, a pipeline of both, a checkpoint file or a latent file.

latent-codec info                           the shipped codec
latent-codec info runs/mine                 a run, a diffusers folder, a pipeline, an id on the hub
latent-codec info runs/joined               a pipeline over priors, and what is in it
latent-codec info latents/cat.safetensors   a latent file: whose latents, which pictures and labels
"""

import argparse
import json
from pathlib import Path

from latent_codec.cli.arguments import add_json_argument, by


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "thing", nargs="?", default="default", metavar="THING", help="a codec, prior, pipeline or file"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    facts = describe(args.thing)
    if args.json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):{width}}  {_for_people(value)}")


def describe(thing: str) -> dict:
    """What `thing` is, as JSON-ready facts.

    Raises:
        ValueError: if it is nothing that is known here.
        OSError: if it cannot be read.
    """
    from latent_codec import LatentCodec
    from latent_codec.latent_files import is_latent_file

    path = Path(thing)
    if path.is_file() and is_latent_file(path):
        return _describe_latent_file(path)
    if path.suffix == ".safetensors" and path.is_file() and not (path.parent / "config.json").is_file():
        return _describe_checkpoint(path)
    if _class_name(path / "model_index.json").endswith("PriorPipeline"):
        return _describe_pipeline(path)
    if any(
        _class_name(folder / "config.json") in ("PixelCNN", "PixelSNAIL") for folder in (path, path / "prior")
    ):
        return _describe_prior(path)
    return _describe_codec(LatentCodec.from_pretrained(thing))


def _class_name(config: Path) -> str:
    """The class that a diffusers config names; empty if there is none."""
    try:
        return str(json.loads(config.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _describe_pipeline(folder: Path) -> dict:
    """Its parts by their names, top prior first."""
    from latent_codec import LatentCodec
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
        codec = _describe_codec(LatentCodec(pipe.vae))
        facts["vae"] = {key: value for key, value in codec.items() if key not in ("kind", "name")}
    if pipe.classifier is not None:
        facts["classifier"] = {"class": type(pipe.classifier).__name__}
    return facts


def _describe_prior(path: Path) -> dict:
    from latent_codec.prior_folders import load_prior

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


def _describe_codec(codec) -> dict:
    space, config = codec.space, codec.autoencoder.config
    codebooks = _describe_codebooks(codec) if codec.is_discrete else {}
    return {
        "kind": "codec",
        "name": codec.name,
        "class": type(codec.autoencoder).__name__,
        "parameters": codec.num_parameters,
        "picture_channels": codec.channels,
        "latent_channels": space.channels,
        "downsampling_factor": space.downsampling_factor,
        **codebooks,
        **space.to_config(),
        "force_upcast": bool(config.get("force_upcast")),
        "space_fingerprint": codec.space_fingerprint,
        "fingerprint": codec.fingerprint,
    }


def _describe_codebooks(codec) -> dict:
    """Of each level, top first; grids and bits of a square picture of `sample_size`, 256 where the config has none."""
    from latent_codec.evaluation.codes import fixed_length_bits_per_pixel, grid_shapes

    sizes, side = codec.codebook_sizes, codec.autoencoder.config.get("sample_size") or 256
    dim = codec.space.channels // len(sizes)  # latents have all levels' codewords side by side
    return {
        "codebook_sizes": sizes,
        "codeword_dims": [dim] * len(sizes),
        "sample_size": side,
        "grids": [list(shape) for shape in grid_shapes(codec, side, side)],
        "bits_per_pixel_at_fixed_length": round(fixed_length_bits_per_pixel(codec, side, side), 6),
    }


def _describe_latent_file(path: Path) -> dict:
    from latent_codec.latent_files import load_latents

    found = load_latents(path)
    codes = [[latents] for latents in found.latents] if found.latents else found.indices
    return {
        "kind": "latents" if found.latents else "indices",
        "codec": found.codec_name,
        "space_fingerprint": found.space_fingerprint,
        "fingerprint": found.fingerprint,
        "dtype": str(codes[0][0].dtype).removeprefix("torch."),
        "labelled": sum(label is not None for label in found.labels),
        "pictures": [
            {"name": name, "size": list(size)}
            | _shapes(levels, found.indices is not None)
            | ({} if label is None else {"label": label})
            for name, size, levels, label in zip(found.names, found.sizes, codes, found.labels)
        ],
    }


def _shapes(levels: list, are_indices: bool) -> dict:
    """`shape` of a picture's latents, or `grids`, of each level, of its indices."""
    shapes = [list(each.shape[1:]) for each in levels]
    return {"grids": shapes} if are_indices else {"shape": shapes[0]}


def _describe_checkpoint(path: Path) -> dict:
    """A safetensors file of unknown making, by its header alone."""
    import math

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            keys = list(stored.keys())
            slices = [stored.get_slice(key) for key in keys]
            parameters = sum(math.prod(each.get_shape()) for each in slices)
            dtypes = sorted({each.get_dtype() for each in slices})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return {
        "kind": "checkpoint",
        "class": "unknown: there is no config.json beside it",
        "tensors": len(keys),
        "parameters": parameters,
        "dtypes": dtypes,
        "prefixes": sorted({key.partition(".")[0] for key in keys}),
    }


def _for_people(value) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {key.replace('_', ' ')}  {_for_people(each)}" for key, each in value.items())
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(
            f"\n  {each['name']}: {by(each['size'])} -> {' + '.join(map(by, each.get('grids') or [each['shape']]))}"
            + (f", label {each['label']}" if "label" in each else "")
            for each in value
        )
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " + ".join(map(by, value))
    if isinstance(value, list):
        return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in value)
    if value is None:
        return "-"
    return f"{value:,}" if type(value) is int else str(value)
