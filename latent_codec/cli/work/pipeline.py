"""`latent-codec pipeline`."""

import argparse
import json
import shutil
from pathlib import Path

import torch

from latent_codec import ImageClassifier, LatentCodec, __version__
from latent_codec.cli.pipeline import COMPONENTS
from latent_codec.cli.work.printing import by
from latent_codec.components.codec_folders import ORIGIN, find_weights
from latent_codec.components.loading import find_component, open_component
from latent_codec.components.prior_folders import find_prior, load_prior
from latent_codec.components.weight_files import FORMER_WEIGHTS
from latent_codec.files import replacing
from latent_codec.pipelines import HierarchicalPriorPipeline, PriorPipeline


def run(args: argparse.Namespace) -> None:
    names = COMPONENTS[len(args.prior)]
    codec = args.codec and LatentCodec.from_pretrained(args.codec, pipeline=args.for_pipeline)
    priors = {name: load_prior(path) for name, path in zip(names, args.prior)}
    classifier = args.classifier and open_component(args.classifier, "classifier", [ImageClassifier])
    class_names = args.class_names.split(",") if args.class_names else None
    if class_names is None and classifier is not None and classifier.config.class_names:
        class_names = list(classifier.config.class_names)
    parts = {
        "vae": None if codec is None else codec.autoencoder,
        **priors,
        "classifier": classifier,
        "class_names": class_names,
    }
    if len(names) == 1:
        pipe = PriorPipeline(**parts, for_pipeline=None if codec is None else codec.pipeline)
    else:
        pipe = HierarchicalPriorPipeline(**parts)
    _round(getattr(torch, args.dtype), codec, priors, classifier)
    folders = {} if codec is None else {"vae": find_weights(args.codec).parent}
    folders |= {name: find_prior(path) for name, path in zip(names, args.prior)}
    if classifier is not None:
        folders["classifier"] = find_component(args.classifier, "classifier", [ImageClassifier])
    _save(pipe, folders, args)
    print(f"{type(pipe).__name__} of {', '.join(folders)}")
    print(args.out)


def _round(dtype, codec, priors: dict, classifier) -> None:
    """Bring all weights to the precision that they are stored in.

    That changes a float32 codec's fingerprint and no meaning of an index, so that its priors follow it.
    """

    before = None if codec is None else codec.space_fingerprint
    parts = [*priors.values(), classifier, None if codec is None else codec.autoencoder]
    for part in filter(None, parts):
        torch.nn.Module.to(part, dtype=dtype)
    if codec is None:
        return
    codec.weights_changed()
    for prior in priors.values():
        if prior.config.space_fingerprint == before:
            prior.register_to_config(space_fingerprint=codec.space_fingerprint)


def _save(pipe, folders: dict[str, Path], args: argparse.Namespace) -> None:
    """Write the pipeline whole or not at all, with a model card, and its parts' own cards from their `folders`."""
    former = ("*/config.json", "*/README.md", f"*/{ORIGIN}", *(f"*/{pattern}" for pattern in FORMER_WEIGHTS))
    with replacing(args.out, superseded=former) as folder:
        pipe.save_pretrained(folder)
        for config in folder.rglob("*.json"):
            entries = json.loads(config.read_text())
            entries.pop("_name_or_path", None)  # where it was opened on this machine is private
            config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
        for name, former_folder in folders.items():
            for companion in filter(Path.is_file, (former_folder / "README.md", former_folder / ORIGIN)):
                shutil.copyfile(companion, folder / name / companion.name)
        card = _model_card(args.out.resolve().name, pipe, folder, list(folders), args.dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _model_card(name: str, pipe, folder: Path, parts: list[str], dtype: str) -> str:
    """The pipeline's README.md: what is inside, how to load it, and what the parts' own cards say of their training."""

    kind, class_names = type(pipe).__name__, pipe.config.class_names
    rows = [
        f"| [`{part}`]({part}) | {type(getattr(pipe, part)).__name__} | {getattr(pipe, part).num_parameters():,} | "
        f"{_described(pipe, part)} |"
        for part in parts
    ]
    classes = "" if class_names is None else f"\nClasses, in the order of labels: {', '.join(class_names)}.\n"
    has_classes = any(
        getattr(pipe, part).config.get("num_classes") for part in parts if part.endswith("prior")
    )
    label = "" if not has_classes else f"class_labels={json.dumps(class_names[0] if class_names else 0)}, "
    sections = [f"## {part}\n\n{_training_facts(folder / part / 'README.md', part)}" for part in parts]
    return f"""---
library_name: diffusers
tags: [prior, latent-codec]
---

# {name}

A {kind}, joined by latent-codec {__version__}: it generates images. Weights are stored in {dtype}.

| part | class | parameters | |
|---|---|---|---|
{chr(10).join(rows)}
{classes}
## How to load it

```python
from latent_codec.pipelines import {kind}

pipe = {kind}.from_pretrained("{name}")
images = pipe({label}num_images=16).images
```

On the command line: `latent-codec sample {name}`.

{chr(10).join(sections)}"""


def _training_facts(card: Path, part: str) -> str:
    """A part's card between its title and its next heading."""
    if not card.is_file():
        return "It has no model card of its own.\n"
    text = card.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    lines = text.strip().splitlines()
    if lines and lines[0].startswith("# "):
        del lines[0]
    end = next((place for place, line in enumerate(lines) if line.startswith("#")), len(lines))
    facts = "\n".join(lines[:end]).strip()
    return f"{facts}\n\nThe rest is in [its own card]({part}/README.md).\n"


def _described(pipe, part: str) -> str:
    """A part in a few words."""
    component = getattr(pipe, part)
    if part == "classifier":
        return f"{component.config.num_classes} classes"
    if part != "vae":
        return _described_prior(component)
    codec = LatentCodec(component, pipeline=pipe.config.get("for_pipeline"))
    if codec.is_discrete:
        holds = f"codebooks of {' and '.join(map(str, codec.codebook_sizes))}"
    else:
        holds = f"{codec.latent_space.channels} latent channels, {codec.latent_space.downsampling_factor}x smaller"
    return f"{holds}, space fingerprint {codec.space_fingerprint}"


def _described_prior(prior) -> str:
    """A prior in a few words: what it is over, of which size, and given what."""
    config = prior.config
    over = {
        "codes": f"codes of {prior.num_values}",
        "pixels": f"pixels of {prior.data_channels} channel(s)",
        "latents": f"latents of {prior.data_channels} channels in {prior.num_values} levels",
    }[config.get("data", "codes")]
    words = [over if config.sample_size is None else f"{by(config.sample_size)} {over}"]
    if config.num_classes is not None:
        words.append(f"{config.num_classes} classes")
    if prior.condition_network is not None:
        words.append(f"given {prior.condition_network.expected}")
    return ", ".join(words)
