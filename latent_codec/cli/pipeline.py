"""Join a codec and its priors to a pipeline, which draws images.

  latent-codec pipeline --codec runs/mine --prior runs/prior --out runs/joined
  latent-codec pipeline --codec runs/levels --prior runs/top runs/bottom --out runs/joined
  latent-codec pipeline --prior runs/pixels --out runs/joined                 a prior over pixels has no codec
  latent-codec pipeline --codec runs/mine --prior runs/prior --classifier runs/judge \\
      --class-names shirt,shoe,bag --dtype float16 --out runs/joined

A codec of several levels takes one prior for each, top level first. The classifier is for rejection sampling
(`latent-codec sample --keep`). What does not fit together is refused.

DIR is a diffusers pipeline with a model card, for

  latent-codec sample runs/joined
  latent-codec evaluate photos/ --prior runs/joined
  PriorPipeline.from_pretrained("runs/joined")      or HierarchicalPriorPipeline, as is printed
"""

import argparse
from pathlib import Path

from latent_codec.cli.arguments import add_subfolder_argument, by

COMPONENTS = {
    1: ("prior",),
    2: ("top_prior", "bottom_prior"),
    3: ("top_prior", "middle_prior", "bottom_prior"),
}
"""What pipelines call their priors, by the number of levels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec",
        metavar="NAME_OR_PATH",
        help="the codec that the priors learnt; none for a prior over pixels",
    )
    add_subfolder_argument(parser)
    parser.add_argument(
        "--prior",
        nargs="+",
        required=True,
        metavar="P",
        help="run or prior folders, one for each level of the codec, top first",
    )
    parser.add_argument("--classifier", metavar="K", help="run or model folder of an ImageClassifier")
    parser.add_argument(
        "--class-names",
        metavar="A,B,...",
        help="one for each class, in the order of labels (default: the classifier's, if it has names)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="how weights are stored; float16 halves the files, and any precision loads them (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pipeline goes")


def run(args: argparse.Namespace) -> None:
    names = COMPONENTS.get(len(args.prior))
    if names is None:
        raise ValueError(
            f"{len(args.prior)} priors came; give 1 to {max(COMPONENTS)}, one for each level of the codec"
        )
    if args.codec is None and len(names) > 1:
        raise ValueError(
            f"{len(names)} priors are of a codec's levels, and no codec came; give it by --codec"
        )
    _check_folder(args.out)

    import torch

    from latent_codec import ImageClassifier, LatentCodec
    from latent_codec.components.loading import find_component, open_component
    from latent_codec.components.prior_folders import load_prior
    from latent_codec.pipelines import HierarchicalPriorPipeline, PriorPipeline

    codec = None if args.codec is None else LatentCodec.from_pretrained(args.codec)
    priors = {name: load_prior(path) for name, path in zip(names, args.prior)}
    classifier = None
    if args.classifier is not None:
        classifier = open_component(args.classifier, "classifier", [ImageClassifier])
    class_names = args.class_names.split(",") if args.class_names else None
    if class_names is None and classifier is not None and classifier.config.class_names:
        class_names = list(classifier.config.class_names)
    pipe = (PriorPipeline if len(names) == 1 else HierarchicalPriorPipeline)(
        vae=None if codec is None else codec.autoencoder,
        **priors,
        classifier=classifier,
        class_names=class_names,
    )
    _round(getattr(torch, args.dtype), codec, priors, classifier)
    cards = {name: _card_of_prior(path) for name, path in zip(names, args.prior)}
    if codec is not None:
        cards = {"vae": _card_of_codec(args.codec)} | cards
    if classifier is not None:
        cards["classifier"] = find_component(args.classifier, "classifier", [ImageClassifier]) / "README.md"
    _save(pipe, cards, args)
    print(f"{type(pipe).__name__} of {', '.join(cards)}")
    print(args.out)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save the pipeline in")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds other files and no pipeline; give a new or empty folder")


def _round(dtype, codec, priors: dict, classifier) -> None:
    """Bring all weights to the precision that they are stored in.

    That changes a float32 codec's fingerprint and no meaning of an index, so that its priors follow it.
    """
    import torch

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


def _save(pipe, cards: dict[str, Path], args: argparse.Namespace) -> None:
    """Write the pipeline whole or not at all, with a model card, and the parts' own cards beside their weights."""
    import json
    import shutil

    from latent_codec.components.weight_files import FORMER_WEIGHTS
    from latent_codec.files import replacing

    former = ("*/config.json", "*/README.md", *(f"*/{pattern}" for pattern in FORMER_WEIGHTS))
    with replacing(args.out, superseded=former) as folder:
        pipe.save_pretrained(folder)
        for config in folder.rglob("*.json"):
            entries = json.loads(config.read_text())
            entries.pop("_name_or_path", None)  # where it was opened on this machine is nobody's business
            config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
        for name, card in cards.items():
            if card.is_file():
                shutil.copyfile(card, folder / name / "README.md")
        name = args.out.resolve().name
        (folder / "README.md").write_text(
            _model_card(name, pipe, folder, list(cards), args.dtype), encoding="utf-8"
        )


def _card_of_codec(name: str) -> Path:
    from latent_codec.components.codec_folders import find_weights

    return find_weights(name, None).parent / "README.md"


def _card_of_prior(path: str) -> Path:
    from latent_codec.components.prior_folders import find_prior

    return find_prior(path) / "README.md"


def _model_card(name: str, pipe, folder: Path, parts: list[str], dtype: str) -> str:
    """The pipeline's README.md: what is inside, how to load it, and what the parts' own cards say of their training."""
    import json

    import latent_codec

    kind, class_names = type(pipe).__name__, pipe.config.class_names
    rows = [
        f"| [`{part}`]({part}) | {type(getattr(pipe, part)).__name__} | {_num_parameters(getattr(pipe, part)):,} | "
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

A {kind}, joined by latent-codec {latent_codec.__version__}: it draws images. Weights are stored in {dtype}.

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
        return "It came without a model card.\n"
    text = card.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    lines = text.strip().splitlines()
    if lines and lines[0].startswith("# "):
        del lines[0]
    end = next((place for place, line in enumerate(lines) if line.startswith("#")), len(lines))
    facts = "\n".join(lines[:end]).strip()
    return f"{facts}\n\nThe rest is in [its own card]({part}/README.md).\n"


def _num_parameters(part) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _described(pipe, part: str) -> str:
    """A part in a few words."""
    from latent_codec import LatentCodec

    component = getattr(pipe, part)
    if part == "classifier":
        return f"{component.config.num_classes} classes"
    if part != "vae":
        return describe_prior(component)
    codec = LatentCodec(component)
    if codec.is_discrete:
        holds = f"codebooks of {' and '.join(map(str, codec.codebook_sizes))}"
    else:
        holds = f"{codec.latent_space.channels} latent channels, {codec.latent_space.downsampling_factor}x smaller"
    return f"{holds}, space fingerprint {codec.space_fingerprint}"


def describe_prior(prior) -> str:
    """A prior in a few words: what it is over, of which size, and given what."""
    config = prior.config
    kind = config.get("data", "codes")
    size = "" if config.sample_size is None else f"{by(config.sample_size)} "
    words = [
        {
            "codes": f"{size}codes of {prior.num_values}",
            "pixels": f"{size}pixels of {prior.data_channels} channel(s)",
            "latents": f"{size}latents of {prior.data_channels} channels in {prior.num_values} levels",
        }[kind]
    ]
    if config.num_classes is not None:
        words.append(f"{config.num_classes} classes")
    if prior.condition_network is not None:
        words.append(f"given {prior.condition_network.expected}")
    return ", ".join(words)
