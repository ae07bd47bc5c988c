"""The training configuration: typed sections, read from TOML presets, checked when built."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from latent_codec import deprecated
from latent_codec.files import check_is_file

ACTIVATION_LIMIT = 65504.0  # the largest float16
Steps = int | float
"""A number of steps; or, below 1 and with a decimal point, a share of `run.steps`, which `resolve` makes a number of."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_steps(value: Steps, name: str, least: int = 0) -> None:
    _require(value >= (0 if isinstance(value, float) else least), f"{name} is {value}; at least {least}.")
    _require(
        isinstance(value, int) or value < 1,
        f"{name} is {value}; expected an integer number of steps, or a share of run.steps below 1, such as 0.1.",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained: a new one from `arguments`, or a `pretrained` one."""

    class_name: Literal[
        "AutoencoderKL",
        "AutoencoderVQ",
        "HierarchicalVQ",
        "PixelCNN",
        "PixelSNAIL",
        "ImageClassifier",
        "TinyDecoder",
        "LatentContext",
        "IndexContext",
    ] = "AutoencoderKL"
    """What a new one is: an autoencoder, diffusers' or one with a codebook; a prior; a classifier; a decoder for
    previews; or an entropy model of latents or of indices (models/)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its constructor's arguments. What codec and data decide may be left out: a prior's codebook size, say."""
    pretrained: str | None = None
    """A codec's name or folder to start from instead, or that of a prior or classifier; `arguments` must then be empty."""
    initialization: Literal["random", "linear", "even"] = "random"
    """`linear`: start as the principal components of the data's 8x8 blocks. `even`: at random, but with equal variance at
    every depth, which deep and narrow networks need (models/initialization.py). `random`: as torch has it."""
    anchor: float = 8.0
    """Of the linear start: larger makes images more independent of their surroundings, smaller keeps more digits in
    bfloat16."""
    train: Literal["all", "decoder"] = "all"
    """`decoder` leaves encoder, quant_conv and codebook alone to the bit, so that existing latents stay valid."""
    teacher: str | None = None
    """Name or folder of the codec whose decoder a TinyDecoder learns to imitate, or whose values an entropy model learns."""

    def __post_init__(self):
        _require(
            not (self.pretrained and self.arguments),
            "model.pretrained and model.arguments exclude each other: give one of them.",
        )
        _require(
            bool(self.pretrained) or self.train == "all" or self.initialization == "linear",
            'model.train = "decoder" needs an encoder to keep: name one by model.pretrained, or `--codec`, or set '
            'model.initialization = "linear" to keep the linear one.',
        )
        _require(self.anchor > 0, f"model.anchor is {self.anchor}; above 0.")
        _require(
            not (self.pretrained and self.initialization != "random"),
            f'model.initialization = "{self.initialization}" would overwrite the pretrained weights: leave it "random".',
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images become training crops."""

    height: int = 256
    """Crop height in pixels."""
    width: int | None = None
    """Crop width in pixels; None: as the height."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random resize before the crop, log-uniform; 1 is the file's own resolution."""
    pad_small: bool = False
    """Continue an image smaller than the crop beyond its last row and column, instead of enlarging it."""
    flip: bool = True
    """Mirror half of the crops left to right."""
    by_area: bool = False
    """Draw images in proportion to their area, instead of each once per epoch."""
    label: str | None = None
    """What of an image's label is its class, for priors and classifiers: "class" where the label is a number, else the
    name of one of its attributes. None: without classes, which a classifier needs."""
    held_out: float = 0.0
    """Share of the images that a prior or classifier does not train on, and is measured on every `run.sample_every`
    steps. Codecs are measured by `latent-codec evaluate`."""
    binarize: bool = False
    """Turn every value into -1 or 1 at mid-grey, for the Bernoulli likelihood."""
    cache_gigabytes: float = 2.0
    """Memory, per process, for decoded images."""
    num_workers: int = 0
    """Loader processes; 0 reads in the training process."""

    def __post_init__(self):
        _require(self.height >= 8, f"data.height is {self.height}; at least 8.")
        _require(self.width is None or self.width >= 8, f"data.width is {self.width}; at least 8.")
        _require(0 < self.scale[0] <= self.scale[1], f"data.scale is {self.scale}; expected 0 < min <= max.")
        _require(0 <= self.held_out < 1, f"data.held_out is {self.held_out}; from 0 to below 1.")
        _require(self.cache_gigabytes >= 0, f"data.cache_gigabytes is {self.cache_gigabytes}; at least 0.")
        _require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; at least 0.")

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width or self.height


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised. Every objective is a setting of the same network (training/losses.py)."""

    reconstruction: Literal["l1", "mse", "gaussian", "bernoulli"] = "mse"
    """`l1`, `mse`: mean error. `gaussian`, `bernoulli`: negative log-likelihood, nats per dimension."""
    gaussian_std: float | None = None
    """Standard deviation of the Gaussian likelihood, in units of [-1, 1]; None: learned, one for all pixels."""
    posterior: Literal["mean", "sample"] = "sample"
    """Decode the posterior's mean (an autoencoder) or a sample of it (a variational one)."""
    kl_weight: float = 0.0
    """Weight of the KL divergence in nats per image dimension: beta of the beta-VAE; 1 gives the ELBO."""
    input_noise: float = 0.0
    """Denoising: standard deviation of Gaussian noise on the input, in units of [-1, 1]."""
    dropped_pixels: float = 0.0
    """Denoising: share of the input's patches set to mid-grey, 0 to 1."""
    dropped_patch: int = 1
    """Side of those patches in pixels."""
    level_dropout: float = 0.0
    """Of HierarchicalVQ: share of the crops that are decoded from some of their upper levels alone, the lower ones at their
    mean codeword. Without it a bottom level that can say everything leaves nothing to those above."""
    lpips_weight: float = 0.0
    """Weight of LPIPS (arXiv:1801.03924)."""
    lpips_net: Literal["squeeze", "alex", "vgg"] = "squeeze"
    """LPIPS' backbone; its weights must lie in torch's cache."""
    lpips_start: Steps = 0
    """First step with LPIPS; below 1 a share of run.steps."""
    gan_weight: float = 0.0
    """Weight of the PatchGAN hinge loss, times the adaptive weight."""
    gan_start: Steps = 0
    """First step of the discriminator; below 1 a share of run.steps."""
    gan_ramp: Steps = 1000
    """Steps over which the generator's adversarial loss grows from 0, once the discriminator trains; below 1 a share of
    run.steps."""
    gan_max_adaptive_weight: float = 10.0
    """Cap of the adaptive weight (VQGAN's equation 7, arXiv:2012.09841), which is unbounded as published."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Its stride-2 layers; 3 judges patches of 70 px."""
    activation_weight: float = 0.0
    """Weight of the penalty on activations beyond `activation_limit`, which keeps float16 finite."""
    activation_limit: float = ACTIVATION_LIMIT / 8
    """Where the penalty begins."""

    def __post_init__(self):
        for name in (
            "kl_weight",
            "input_noise",
            "lpips_weight",
            "gan_weight",
            "gan_max_adaptive_weight",
            "activation_weight",
        ):
            _require(getattr(self, name) >= 0, f"objective.{name} is {getattr(self, name)}; at least 0.")
        _require(
            0 <= self.dropped_pixels < 1,
            f"objective.dropped_pixels is {self.dropped_pixels}; from 0 to below 1.",
        )
        _require(
            0 <= self.level_dropout <= 1, f"objective.level_dropout is {self.level_dropout}; from 0 to 1."
        )
        _require(self.dropped_patch >= 1, f"objective.dropped_patch is {self.dropped_patch}; at least 1.")
        _require(
            self.gaussian_std is None or self.gaussian_std > 0,
            f"objective.gaussian_std is {self.gaussian_std}; above 0, or left out to learn it.",
        )
        _require(
            self.posterior == "sample" or self.kl_weight == 0,
            'objective.kl_weight needs objective.posterior = "sample": the mean alone has no divergence to pay.',
        )
        for name, least in (("lpips_start", 0), ("gan_start", 0), ("gan_ramp", 1)):
            _require_steps(getattr(self, name), f"objective.{name}", least)
        for name in ("discriminator_width", "discriminator_layers"):
            _require(getattr(self, name) >= 1, f"objective.{name} is {getattr(self, name)}; at least 1.")
        _require(
            self.activation_limit > 0, f"objective.activation_limit is {self.activation_limit}; above 0."
        )

    @property
    def is_likelihood(self) -> bool:
        return self.reconstruction in ("gaussian", "bernoulli")


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How codewords are found and kept alive, for autoencoders that have some (models/quantizers.py)."""

    learning: Literal["ema", "gradient"] = "ema"
    """`ema`: a codeword is the moving average of the latents that chose it. `gradient`: the codebook loss moves it."""
    decay: float = 0.99
    """Of the moving averages, per step."""
    start_step: Steps = 0
    """Steps, or below 1 the share of run.steps, that the network trains without quantization, as a plain autoencoder,
    before its codebook begins. Levels that
    hardly matter yet would otherwise be quantised away; HierarchicalVQ's upper ones are."""
    kmeans_crops: int = 512
    """Crops whose latents the codebook starts from, by k-means; 0: it starts at random."""
    restart_below: float = 0.03
    """A codeword used less than this share of the mean moves to a live latent; 0: never."""
    weight: float = 1.0
    """Of the codebook and commitment terms together; their ratio, beta, is the model's."""

    def __post_init__(self):
        _require(0 <= self.decay < 1, f"codebook.decay is {self.decay}; from 0 to below 1.")
        _require_steps(self.start_step, "codebook.start_step")
        _require(self.kmeans_crops >= 0, f"codebook.kmeans_crops is {self.kmeans_crops}; at least 0.")
        _require(
            0 <= self.restart_below < 1,
            f"codebook.restart_below is {self.restart_below}; from 0 to below 1.",
        )
        _require(self.weight >= 0, f"codebook.weight is {self.weight}; at least 0.")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """What a prior learns to continue (models/autoregressive.py)."""

    codec: str | None = None
    """Name or folder of the codec whose codes they are; None for pixels."""
    level: int = 0
    """Which of the codec's grids, 0 the top; those above it are the condition."""

    def __post_init__(self):
        _require(self.level >= 0, f"prior.level is {self.level}; 0 (the top) or more.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101); the learning rate is a pure function of the step."""

    learning_rate: float = 1e-4
    """Peak."""
    encoder_factor: float = 1.0
    """The encoder's rate as a share of the decoder's: below 1 where latents should hardly move, because a codebook from
    k-means lies under them."""
    warmup_steps: Steps = 100
    """Steps of linear growth from 0; below 1 a share of run.steps."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course from the peak to `final_fraction` of it at the last step."""
    final_fraction: float = 0.01
    """Last learning rate, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    fan_in_reference: int | None = None
    """A weight whose outputs sum more inputs than this learns slower by reference / fan-in: Adam's step has the same
    size in every weight, so that a wide layer's output moves by as much as its inputs are many (muP, arXiv:2203.03466,
    table 3). None: one rate for all."""
    clip_norm: float | None = 1.0
    """Largest gradient norm; None: unclipped."""
    batch_size: int = 4
    """Images per process and micro-batch."""
    accumulation: int = 1
    """Micro-batches per step."""
    ema_decay: float = 0.999
    """Of the moving average of the weights, which is what ships; 0 switches it off."""
    discriminator_learning_rate: float | None = None
    """None: as the autoencoder's."""

    def __post_init__(self):
        for name in ("learning_rate", "discriminator_learning_rate"):
            rate = getattr(self, name)
            _require(rate is None or rate > 0, f"optimizer.{name} is {rate}; above 0.")
        _require_steps(self.warmup_steps, "optimizer.warmup_steps")
        for name in ("weight_decay", "encoder_factor"):
            _require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}; at least 0.")
        _require(
            0 <= self.final_fraction <= 1,
            f"optimizer.final_fraction is {self.final_fraction}; from 0 to 1.",
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas are {self.betas}; from 0 to below 1.",
        )
        _require(
            self.fan_in_reference is None or self.fan_in_reference >= 1,
            f"optimizer.fan_in_reference is {self.fan_in_reference}; at least 1, or left out.",
        )
        _require(self.batch_size >= 1, f"optimizer.batch_size is {self.batch_size}; at least 1.")
        _require(self.accumulation >= 1, f"optimizer.accumulation is {self.accumulation}; at least 1.")
        _require(0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}; from 0 to below 1.")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm is {self.clip_norm}; above 0.",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, precision and what is written on the way."""

    steps: int = 10_000
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the arithmetic; the weights stay float32. `auto`: bf16 on a GPU (CUDA) or CPU (x86, told on Linux: AVX512-BF16 or
    AMX) that computes in it, else fp32. fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, a fraction of the memory."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    sample_every: int = 1000
    """Steps between two images in samples/, and two measurements on held-out images."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    calibration_images: int = 256
    """Images that scale, shift and half-precision safety are measured on at the end, fewer (at least 8) after a run so
    short that this would take over a tenth of it; 0: not measured."""
    codec_dtype: Literal["float32", "float16"] = "float32"
    """How the finished network's weights are stored: float16 halves the file; any precision can load it."""

    def __post_init__(self):
        for name in ("steps", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; at least 1.")
        for name in ("seed", "calibration_images"):
            _require(getattr(self, name) >= 0, f"run.{name} is {getattr(self, name)}; at least 0.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        kind = self.kind
        for name, kinds in _KINDS_OF_SECTION.items():
            changed = _changed(getattr(self, name))
            _require(
                kind in kinds or not changed,
                f"{name}.{changed[0] if changed else ''} is for {' and '.join(kinds)}; model.class_name is {self.model.class_name}, a {kind}.",
            )
        for name in ("label", "held_out"):
            _require(
                kind in ("prior", "classifier")
                or (kind, name) == ("entropy", "held_out")
                or not getattr(self.data, name),
                f"data.{name} is for priors and classifiers; model.class_name is {self.model.class_name}, a {kind}.",
            )
        for name in ("initialization", "train"):
            _require(
                kind == "codec" or name not in _changed(self.model),
                f"model.{name} is for codecs; model.class_name is {self.model.class_name}, a {kind}.",
            )
        _require(
            kind in ("preview", "entropy") or not self.model.teacher,
            f"model.teacher is for previews and entropy models; model.class_name is {self.model.class_name}, a {kind}.",
        )

    @property
    def kind(self) -> Literal["codec", "prior", "classifier", "preview", "entropy"]:
        """What is trained, and what its folder in the run folder is called."""
        return _KINDS.get(self.model.class_name, "codec")

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "TrainingConfig":
        """Build from nested tables, naming the near match of an unknown key and the allowed values of a wrong one."""
        table = deprecated.rename_settings(table)
        sections = {section.name: section.type for section in fields(cls)}
        _check_keys(table, sections, "section")
        return cls(**{name: _build(sections[name], values, name) for name, values in table.items()})

    def to_dict(self) -> dict[str, Any]:
        """Nested tables without the Nones, which TOML does not have."""
        return {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in dataclasses.asdict(self).items()
        }


_KINDS = {
    "PixelCNN": "prior",
    "PixelSNAIL": "prior",
    "ImageClassifier": "classifier",
    "TinyDecoder": "preview",
    "LatentContext": "entropy",
    "IndexContext": "entropy",
}
_KINDS_OF_SECTION = {"objective": ("codec",), "codebook": ("codec",), "prior": ("prior",)}
IN_STEPS = {
    "objective": ("lpips_start", "gan_start", "gan_ramp"),
    "codebook": ("start_step",),
    "optimizer": ("warmup_steps",),
}
"""By section: the settings that depend on the length of a run."""


def _changed(section) -> list[str]:
    """Names of the settings that are not their defaults."""
    default = type(section)()
    return [
        each.name for each in fields(section) if getattr(section, each.name) != getattr(default, each.name)
    ]


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        path.name.removesuffix(".toml") for path in _preset_folder().iterdir() if path.name.endswith(".toml")
    )


def preset_notes(name: str) -> tuple[str, str]:
    """What a shipped preset trains, and how long that takes: the first sentences on both in the comment that it opens with."""
    lines = (_preset_folder() / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    _, what, facts, *_ = "\n".join(line.removeprefix("#").strip() for line in lines).split("\n\n")
    duration = facts.partition("Expected:")[0].removeprefix("Duration:")
    return tuple(" ".join(text.split()).partition(". ")[0].rstrip(".") for text in (what, duration))


def load_config(preset: str, overrides: Sequence[str] = (), codec: str | None = None) -> TrainingConfig:
    """Read a preset by name, or a TOML file by path, and apply `section.key=value` overrides.

    What the file gives in steps (`IN_STEPS`) becomes a share of the file's `run.steps`, so that it fits a run of another length;
    an override in steps stays one.

    Args:
        preset: a shipped preset's name, or the path of a .toml file.
        overrides: each `section.key=value`, the value in TOML; a bare word counts as a string.
        codec: what a codec starts from (model.pretrained), whose codes a prior learns (prior.codec), or whose
            decoder a preview imitates, or whose values an entropy model learns (model.teacher).

    Raises:
        ValueError: for an unknown preset, section, key or value, naming what is allowed.
    """
    if preset.endswith(".toml") or "/" in preset:
        check_is_file(preset)
        text = Path(preset).read_bytes()
    else:
        names = preset_names()
        if preset not in names:
            raise ValueError(
                f"no preset {preset!r}{near_match(preset, names)}. There are: {', '.join(names)}."
            )
        text = (_preset_folder() / f"{preset}.toml").read_bytes()
    try:
        table = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{preset} is not valid TOML: {error}") from error
    num_steps, overridden = _num_steps(table), set()
    for override in overrides:
        path, equals, value = override.partition("=")
        keys = path.strip().split(".")
        overridden.add(path.strip())
        if not equals or len(keys) < 2:
            raise ValueError(f"--set {override}: expected section.key=value, such as run.steps=500.")
        _set(table, keys, _parse_value(value.strip()))
    if codec is not None:
        setting = _codec_setting(table)
        _require(
            setting != ["model", "pretrained"] or not table.get("model", {}).get("arguments"),
            f"--codec is {codec}, and {preset} builds a network of its own (model.arguments): leave --codec out, or take a "
            "preset that starts from a codec, such as finetune-decoder.",
        )
        _set(table, setting, codec)
    for section, name in _given_in_steps(table):
        steps = table.get(section, {}).get(name, _default(section, name))
        if f"{section}.{name}" not in overridden and type(steps) is int and 0 < steps < num_steps:
            _set(table, [section, name], steps / num_steps)
    return TrainingConfig.from_dict(table)


def _num_steps(table: dict[str, Any]) -> int:
    """`run.steps` of a file; 0 where it is no number."""
    run = table.get("run", {})
    steps = run.get("steps", _default("run", "steps")) if isinstance(run, dict) else 0
    return steps if type(steps) is int else 0


def _given_in_steps(table: dict[str, Any]) -> list[tuple[str, str]]:
    """Section and name of each setting of `IN_STEPS` that this configuration reads."""
    tables = {section: table.get(section, {} if section == "optimizer" else None) for section in IN_STEPS}
    return [
        (section, name)
        for section, names in IN_STEPS.items()
        for name in names
        if isinstance(tables[section], dict)
        and (name != "gan_ramp" or name in tables[section] or tables[section].get("gan_weight"))
    ]


def _default(section: str, name: str):
    sections = {each.name: each.type for each in fields(TrainingConfig)}
    return getattr(sections[section](), name)


def _codec_setting(table: dict[str, Any]) -> list[str]:
    """Which setting `--codec` stands for."""
    model = table.get("model", {})
    kind = _KINDS.get(model.get("class_name") if isinstance(model, dict) else None, "codec")
    _require(kind != "classifier", "a classifier is trained on images, without a codec: leave --codec out.")
    settings = {"prior": ["prior", "codec"], "preview": ["model", "teacher"], "entropy": ["model", "teacher"]}
    return settings.get(kind, ["model", "pretrained"])


def dump_toml(table: dict[str, Any]) -> str:
    """Write nested tables as TOML (tomllib only reads)."""
    lines = []
    for section, values in table.items():
        lines.append(f"[{section}]")
        nested = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if key not in nested]
        for key, inner in nested.items():
            lines += ["", f"[{section}.{key}]"]
            lines += [f"{name} = {_toml_value(value)}" for name, value in inner.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _preset_folder():
    return files("latent_codec") / "presets"


def _set(table: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"{'.'.join(keys[:depth])} is {table!r}, so {'.'.join(keys)} cannot be set.")
    table[keys[-1]] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # whose escapes TOML shares
    return repr(value)


def near_match(word: str, words: Iterable[str]) -> str:
    """ " (did you mean 'steps'?)", or nothing, to put behind an unknown word in a message."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _check_keys(table: dict, allowed: dict, what: str) -> None:
    for key in table:
        if key not in allowed:
            raise ValueError(
                f"unknown {what} {key!r}{near_match(key, allowed)}. Allowed: {', '.join(allowed)}."
            )


def _build(section: type, values: Any, name: str):
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}; expected a table [{name}].")
    kinds = {key.name: key.type for key in fields(section)}
    _check_keys(values, dict.fromkeys(kinds), f"key in [{name}]:")
    return section(**{key: _typed(value, kinds[key], f"{name}.{key}") for key, value in values.items()})


def _typed(value: Any, kind: Any, name: str) -> Any:
    """Check `value` against a field's annotation; integers pass as floats, lists as tuples."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, options))}.")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        return _typed(value, type(value) if type(value) in options else options[0], name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(options):
            raise ValueError(f"{name} is {value!r}; expected a list of {len(options)}.")
        return tuple(_typed(item, option, name) for item, option in zip(value, options))
    kind = origin or kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number.")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}; expected {kind.__name__}.")
    return value
