"""`latent-codec info`. Libraries are loaded only for things that need them: most answers need neither torch nor diffusers."""

import argparse
import math
import sys
from importlib import import_module
from pathlib import Path

from latent_codec.cli.compressed_files import is_compressed_file
from latent_codec.cli.messages import one_line
from latent_codec.cli.progress import showing
from latent_codec.cli.work.compressed_files import describe_compressed_file
from latent_codec.cli.work.printing import for_people, print_json
from latent_codec.components.codec_folders import ASSETS, SHIPPED_PIPELINES, is_foreign_file
from latent_codec.components.weight_files import FEATURES, LATENTS, metadata_of, read_config_file
from latent_codec.latents.locations import may_be_data_set


def run(args: argparse.Namespace) -> int:
    if args.audit or args.against is not None:
        audits = import_module("latent_codec.cli.work.audits")
        (audits.audit_hosts if args.audit else audits.audit_drop_in)(args)
        return 0
    with showing(f"reading {args.thing}"):
        facts = describe(args)
    if args.json:
        print_json(facts)
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key.replace('_', ' '):{width}}  {for_people(value)}")
        if facts["kind"] == "codec" and facts["pipeline"] is None:
            print("Its pipelines may see other latents: --for-pipeline names one.")
    if damage := facts.get("damage"):
        print(f"latent-codec info: {args.thing}: {damage}", file=sys.stderr)
        return 2
    return 0


def describe(args: argparse.Namespace) -> dict:
    """What `args.thing` is, as JSON-ready facts.

    Raises:
        ValueError: if it is nothing that is known here.
        OSError: if it cannot be read.
    """
    from latent_codec.bitstream.entropy_model import FORMAT as ENTROPY_MODEL
    from latent_codec.components.codec_facts import facts_of, read_facts

    if may_be_data_set(args.thing):
        from latent_codec.cli.work.data_sets import describe_data_set

        return describe_data_set(args)
    thing, pipeline, verbose = args.thing, args.for_pipeline, args.verbose
    path = ASSETS / thing if thing in SHIPPED_PIPELINES else Path(thing)
    if is_compressed_file(path):
        return describe_compressed_file(path, args)
    format_ = metadata_of(path).get("format")
    if format_ == LATENTS:
        return _describe_latent_file(path)
    if format_ == FEATURES:
        from latent_codec.analysis.features import load_features

        return {"kind": "features"} | load_features(path).to_dict()
    if format_ == ENTROPY_MODEL:
        return _describe_entropy_model(path)
    if is_foreign_file(path):
        facts = None if verbose else read_facts(path, pipeline)
        return facts.describe() if facts is not None else _describe_checkpoint(path, verbose=verbose)
    if _class_name(path / "model_index.json").endswith("PriorPipeline"):
        return _describe_pipeline(path)
    if any(
        _class_name(folder / "config.json") in ("PixelCNN", "PixelSNAIL") for folder in (path, path / "prior")
    ):
        from latent_codec.components.prior_folders import load_prior

        return {"kind": "prior", "name": path.resolve().name} | _prior_facts(load_prior(path))
    for folder in (path, path / "translator"):
        if _class_name(folder / "config.json") == "LatentTranslator":
            return {"kind": "translator", "name": path.resolve().name} | _translator_facts(folder)
    facts = read_facts(thing, pipeline)
    if facts is None:
        from latent_codec import LatentCodec

        facts = facts_of(LatentCodec.from_pretrained(thing, pipeline=pipeline))
    return facts.describe()


def _class_name(config: Path) -> str:
    """The class that a diffusers config names; empty if there is none."""
    try:
        return read_config_file(config)["_class_name"]
    except (OSError, ValueError):
        return ""


def _describe_pipeline(folder: Path) -> dict:
    """Its parts by their names, top prior first."""
    from latent_codec import LatentCodec
    from latent_codec.components.codec_facts import facts_of
    from latent_codec.pipelines.folders import load_pipeline

    pipe = load_pipeline(folder)
    facts = {
        "kind": "pipeline",
        "name": folder.resolve().name,
        "class": type(pipe).__name__,
        "class_names": pipe.config.class_names,
    }
    facts |= {name: _prior_facts(prior) for name, prior in pipe.priors.items()}
    if pipe.vae is not None:
        codec = facts_of(LatentCodec(pipe.vae, pipeline=pipe.config.get("for_pipeline"))).describe()
        facts["vae"] = {key: value for key, value in codec.items() if key not in ("kind", "name")}
    if pipe.classifier is not None:
        facts["classifier"] = {"class": type(pipe.classifier).__name__}
    return facts


def _translator_facts(folder: Path) -> dict:
    from latent_codec import LatentTranslator
    from latent_codec.components.loading import open_component

    translator = open_component(folder, "translator", [LatentTranslator])
    facts = {"parameters": translator.num_parameters(), "upscale": translator.config.upscale}
    for end, codec in (("source", translator.source), ("target", translator.target)):
        facts |= {
            end: codec.name,
            f"{end}_channels": codec.latent_space.channels,
            f"{end}_downsampling_factor": codec.latent_space.downsampling_factor,
            f"{end}_pipeline": codec.pipeline,
            f"{end}_space_fingerprint": codec.space_fingerprint,
            f"{end}_fingerprint": codec.fingerprint,
        }
    return facts


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
    values = [[latents] for latents in found.latents] if found.latents else found.indices
    return {
        "kind": "latents" if found.latents else "indices",
        "codec": found.codec_name,
        "pipeline": found.pipeline,
        "space_fingerprint": found.space_fingerprint,
        "fingerprint": found.fingerprint,
        "dtype": str(values[0][0].dtype).removeprefix("torch."),
        "labelled": sum(label is not None for label in found.labels),
        "images": [
            {"name": name, "size": list(size)}
            | (
                {"shape": list(levels[0].shape[1:])}
                if found.indices is None
                else {"grids": [list(each.shape[1:]) for each in levels]}
            )
            | ({} if label is None else {"label": label})
            for name, size, levels, label in zip(found.names, found.sizes, values, found.labels)
        ],
    }


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
    """A checkpoint of another layout, by its names and shapes only: what it is, its config, its keys by rule.

    Args:
        verbose: build its network, and compare every key with it.
    """
    from latent_codec.cli import convert
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
    problems = ("missing", "unexpected", "misshapen") if verbose else ()
    try:
        foreign = read_foreign(path)
        keys = foreign.keys.counts() if verbose else foreign.count_keys_by_name()
    except ConversionError as error:
        prefixes = sorted({key.partition(".")[0] for key in opened})
        title = error.title if isinstance(error, SettingsNeededError) else "unknown"
        converting = argparse.ArgumentParser()  # whose flags give what is missing
        convert.add_arguments(converting)
        return facts | {"format": title, "reason": one_line(error, converting), "prefixes": prefixes}
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
        **{name: list(found) for name in problems if (found := getattr(foreign.keys, name))},
        "scaling_factor": foreign.scale and foreign.scale.scaling_factor,
        "shift_factor": foreign.scale and foreign.scale.shift_factor,
        "scale_known_by": foreign.scale.rule
        if foreign.scale
        else "nothing in the file; say it when converting"
        + (f" (published: {published})" if published else ""),
    }
