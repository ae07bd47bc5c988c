"""The training configuration: typed sections, read from TOML presets, checked when built."""

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from latent_codec import deprecated
from latent_codec.errors import SettingError
from latent_codec.families.pipeline_spaces import find_pipeline
from latent_codec.files import check_is_file
from latent_codec.training.kinds import TrainingKind, kind_of, kinds_that_read
from latent_codec.training.settings import (
    Section,
    check_keys,
    dump_toml,
    in_steps,
    limited,
    near_match,
)

__all__ = ["TrainingConfig", "dump_toml", "load_config", "preset_names", "preset_notes"]

ACTIVATION_LIMIT = 65504.0  # the largest float16


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which network is trained: a new one from `arguments`, or a `pretrained` one."""

    class_name: str = "AutoencoderKL"
    """What a new one is: an autoencoder, diffusers' or one of ours (a codebook, a hierarchy); a prior; a classifier; a decoder for
    previews; an entropy model of latents or of indices; or a translator of latents (models/)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its constructor's arguments. What codec and data decide may be left out: a prior's codebook size, say."""
    pretrained: str | None = None
    """A codec's name or folder to start from instead, or that of a prior or classifier; `arguments` must then be empty."""
    initialization: Literal["random", "linear", "even"] = "random"
    """`linear`: start as the principal components of the data's 8x8 blocks. `even`: at random, but with equal variance at
    every depth, which deep and narrow networks need (models/initialization.py). `random`: as torch has it."""
    anchor: float = limited(8.0, above=0)
    """Of the linear start: larger lets neighboring blocks influence one another less, smaller keeps more digits in
    bfloat16."""
    train: Literal["all", "decoder"] = "all"
    """`decoder` leaves encoder, quant_conv and codebook unchanged to the bit, so that existing latents stay valid; it
    takes pretrained codecs of every family, `all` those of the classes that `class_name` may name."""
    width: float = limited(1.0, above=0, most=1)
    """Of a new decoder for the pretrained codec's latents, as a share of the channels of its own, per resolution."""
    widths: list | None = None
    """Channels of that decoder per resolution, finest first, instead of `width`; most time is spent at the finest."""
    layers_per_block: int | None = limited(None, least=0)
    """Of that decoder, which has one residual block more per resolution; None: as its own."""
    upscale: int = limited(1, least=1, most=8)
    """How many times as large as the encoded image that decoder's is, per side; crops are shrunk by it before they are encoded."""
    teacher: str | None = None
    """Name or folder of the codec whose decoder a TinyDecoder learns to imitate, or whose values an entropy model learns."""
    pipeline: str | None = None
    """The class name of the pipeline of diffusers whose latents the codec's are, of the codec that is trained or learned
    from; None: as its folder says, or the usual ones of its class."""

    def __post_init__(self):
        super().__post_init__()
        kind_of(self.class_name)
        if self.pipeline is not None:
            find_pipeline(self.pipeline)
        if self.pretrained and self.arguments:
            raise self.error("arguments", "none where model.pretrained names a network")
        if self.pretrained and self.initialization != "random":
            raise self.error("initialization", '"random": any other would overwrite the pretrained weights')
        if self.train == "decoder" and not self.pretrained and self.initialization != "linear":
            advice = 'name one as `model.pretrained`, or set `model.initialization="linear"` to keep the linear one'
            raise self.error("train", '"all" where there is no encoder to keep', advice=advice)
        for key in self._of_new_decoder:
            if not (self.train == "decoder" and self.pretrained):
                advice = 'set `model.train="decoder"` and name the codec as `model.pretrained`'
                raise self.error(key, "its default where no new decoder is trained", advice=advice)

    @property
    def has_new_decoder(self) -> bool:
        """Whether the pretrained codec gets another decoder."""
        return bool(self._of_new_decoder)

    @property
    def _of_new_decoder(self) -> list[str]:
        defaults = {"width": 1.0, "widths": None, "layers_per_block": None, "upscale": 1}
        return [key for key, default in defaults.items() if getattr(self, key) != default]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """How images become training crops."""

    height: int = limited(256, least=8)
    """Crop height in pixels."""
    width: int | None = limited(None, least=8)
    """Crop width in pixels; None: as the height."""
    scale: tuple[float, float] = limited((1.0, 1.0), above=0)
    """Range of the random resize before the crop, log-uniform; 1 is the file's own resolution."""
    pad_small: bool = False
    """Continue an image smaller than the crop beyond its last row and column, instead of enlarging it."""
    flip: bool = True
    """Mirror half of the crops left to right."""
    value_range: tuple[float, float] | None = None
    """Of gray images of more than 8 bits, DICOM and NIfTI: the values that become -1 and 1, others being clamped. None: all of
    16 bits; -1024 to 3071 HU of computed tomography; the smallest and largest value of every other volume."""
    axis: int = limited(2, least=0, most=2)
    """That the slices of volumes are counted along."""
    by_area: bool = False
    """Draw images in proportion to their area, instead of each once per epoch."""
    label: str | None = None
    """What of an image's label is its class, for priors and classifiers: "class" where the label is a number, else the
    name of one of its attributes. None: without classes, which a classifier needs."""
    held_out: float = limited(0.0, least=0, below=1)
    """Share of the images that a prior or classifier does not train on, and is measured on every `run.sample_every`
    steps. Codecs are measured by `latent-codec evaluate`."""
    binarize: bool = False
    """Turn every value into -1 or 1 at middle gray, for the Bernoulli likelihood."""
    cache_gigabytes: float = limited(2.0, least=0)
    """Memory, per process, for decoded images."""
    num_workers: int = limited(0, least=0)
    """Loader processes; 0 reads in the training process."""

    def __post_init__(self):
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise self.error("scale", "the smaller factor first")

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width or self.height


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """What is minimized. Every objective is a setting of the same network (training/losses.py)."""

    reconstruction: Literal["l1", "mse", "gaussian", "bernoulli"] = "mse"
    """`l1`, `mse`: mean error. `gaussian`, `bernoulli`: negative log-likelihood, nats per dimension."""
    target: Literal["image", "decode"] = "image"
    """What a reconstruction is compared with. `decode`: what the pretrained codec's own decoder makes of the same latents
    (distillation, arXiv:1503.02531), where only a decoder is trained."""
    gaussian_std: float | None = limited(None, above=0)
    """Standard deviation of the Gaussian likelihood, in units of [-1, 1]; None: learned, one for all pixels."""
    posterior: Literal["mean", "sample"] = "sample"
    """Decode the posterior's mean (an autoencoder) or a sample of it (a variational one)."""
    kl_weight: float = limited(0.0, least=0)
    """Weight of the KL divergence in nats per image dimension: beta of the beta-VAE; 1 gives the ELBO."""
    input_noise: float = limited(0.0, least=0)
    """Denoising: standard deviation of Gaussian noise on the input, in units of [-1, 1]."""
    dropped_pixels: float = limited(0.0, least=0, below=1)
    """Denoising: share of the input's patches set to middle gray, 0 to 1."""
    dropped_patch: int = limited(1, least=1)
    """Side of those patches in pixels."""
    level_dropout: float = limited(0.0, least=0, most=1)
    """Of HierarchicalVQ: share of the crops that are decoded from some of their upper levels only, the lower ones at their
    mean codeword. Without it a bottom level that can carry everything leaves nothing to those above."""
    lpips_weight: float = limited(0.0, least=0)
    """Weight of LPIPS (arXiv:1801.03924)."""
    lpips_net: Literal["squeeze", "alex", "vgg"] = "squeeze"
    """LPIPS' backbone; its weights must be in torch's cache."""
    lpips_start: int | float = in_steps(0)
    """First step with LPIPS; below 1 a share of run.steps."""
    color_weight: float = limited(0.0, least=0)
    """Weight of the squared error of hue, a* and b* of CIE 1976 in means of 8x8 px, in units of 100."""
    gan_weight: float = limited(0.0, least=0)
    """Weight of the PatchGAN hinge loss, times the adaptive weight."""
    gan_start: int | float = in_steps(0)
    """First step of the discriminator; below 1 a share of run.steps."""
    gan_ramp: int | float = in_steps(1000, least=1)
    """Steps over which the generator's adversarial loss grows from 0, once the discriminator trains; below 1 a share of
    run.steps."""
    gan_max_adaptive_weight: float = limited(10.0, least=0)
    """Cap of the adaptive weight (VQGAN's equation 7, arXiv:2012.09841), which is unbounded as published."""
    discriminator_width: int = limited(64, least=1)
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = limited(3, least=1)
    """Its stride-2 layers; 3 judges patches of 70 px."""
    equivariance_weight: float = limited(0.0, least=0)
    """Weight of the equivariance term: latents that are turned by quarters and shrunk decode to the image turned and shrunk as
    they are (EQ-VAE, arXiv:2502.09509, equation 4). A diffusion model trains faster on such latents."""
    equivariance_scale: float = limited(0.5, above=0, most=1)
    """The smallest share of its side that a grid is shrunk to, as it is in three draws of five; 1: it is only turned."""
    spectrum_weight: float = limited(0.0, least=0)
    """Weight of the distance between the latents' power spectrum and the image's (training/losses.py)."""
    reference: str | None = None
    """Name or folder of a codec of the same channels and factor whose latents these stay near, so that its denoisers go on
    working."""
    reference_weight: float = limited(0.0, least=0)
    """Weight of the mean squared difference from the reference's latents, scaled as its denoisers see them."""
    rate_weight: float = limited(0.0, least=0)
    """Weight of the code length in bits per pixel, against distortion at the coarsest step sizes of the context model: latents are
    quantized in training as compressed files quantize them, at step sizes drawn for each micro-batch. About 4 / latent channels
    of a codec of factor 8."""
    rate_start: int | float = in_steps(0)
    """First step at which the code length counts and latents are quantized, below 1 a share of run.steps; until then the context model
    learns from a codec that does not feel it."""
    rate_qualities: tuple[int, int] = limited((0, 100), least=0, most=100)
    """Lowest and highest quality that those step sizes are drawn from; 16 are an octave."""
    context: str | None = None
    """Run folder of `latent-codec fit-entropy`, or its entropy/: the context model of latents that is trained with the codec; None:
    a new one, whose step sizes are measured before the first step."""
    activation_weight: float = limited(0.0, least=0)
    """Weight of the penalty on activations beyond `activation_limit`, which keeps float16 finite."""
    activation_limit: float = limited(ACTIVATION_LIMIT / 8, above=0)
    """Where the penalty begins."""

    def __post_init__(self):
        super().__post_init__()
        if self.posterior == "mean" and self.kl_weight:
            expected = "0 where the posterior's mean is decoded, which has no divergence"
            raise self.error("kl_weight", expected, advice='`objective.posterior="sample"` has one')

        if bool(self.reference) != bool(self.reference_weight):
            expected = "above 0 with a reference, and 0 without one"
            raise self.error("reference_weight", expected, advice="name the codec as `reference`")
        if self.context and not self.rate_weight:
            raise self.error("rate_weight", "above 0 with a context model")
        if self.rate_qualities[0] > self.rate_qualities[1]:
            raise self.error("rate_qualities", "the lower quality first")
        if self.rate_weight and self.posterior == "sample":
            expected = '"mean" where latents are quantized, which is all the noise that they have'
            raise self.error("posterior", expected)

    @property
    def is_likelihood(self) -> bool:
        return self.reconstruction in ("gaussian", "bernoulli")


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(Section):
    """How codewords are found and kept alive, for autoencoders that have some (models/quantizers.py)."""

    kind: Literal["vq", "gumbel", "fsq", "lfq", "lfq-successive", "bsq"] | None = None
    """Of a new network. `vq`: a learned codebook. `gumbel` (arXiv:1611.01144), of AutoencoderVQ: one whose codewords a layer
    chooses, drawn at a falling temperature, learned by gradient and never restarted. `fsq` (arXiv:2309.15505), `lfq` (arXiv:2310.05737), `bsq`
    (arXiv:2406.07548): the points of a fixed grid, which decide how long a codeword is; of learning only `start_step` is
    read (models/grid_quantizer.py). `lfq-successive`: `lfq` whose bits are found one after the other, each by the side of those
    before it. None: as the model's arguments have it."""
    values_per_channel: tuple[int, ...] | None = limited(None, least=2)
    """Of `fsq`: how many values each channel of a codeword takes, [8, 5, 5, 5] for 1,000 codewords; None: what stands in for
    the model's codebook size."""
    entropy_weight: float | None = limited(None, least=0)
    """Of `fsq`, `bsq` and both `lfq`: weight of the term that keeps all codewords in use; None: 0.01 of fsq, which has none as
    published, 0.02 of the others."""
    final_temperature: float = limited(1 / 16, above=0)
    """Of `gumbel`: the temperature falls from 1 to this one, half a cosine from `start_step` to the end (1/16:
    arXiv:2102.12092, appendix A.2)."""
    learning: Literal["ema", "gradient"] = "ema"
    """`ema`: a codeword is the moving average of the latents that chose it. `gradient`: the codebook loss moves it."""
    decay: float = limited(0.99, least=0, below=1)
    """Of the moving averages, per step."""
    start_step: int | float = in_steps(0)
    """Steps, or below 1 the share of run.steps, that the network trains without quantization, as a plain autoencoder,
    before its codebook begins. Levels that hardly matter yet, such as HierarchicalVQ's upper ones, would otherwise be
    quantized away."""
    kmeans_crops: int = limited(512, least=0)
    """Crops whose latents the codebook starts from, by k-means; 0: it starts at random."""
    restart_below: float = limited(0.03, least=0, below=1)
    """A codeword used less than this share of the mean moves to a live latent; 0: never."""
    weight: float = limited(1.0, least=0)
    """Of the codebook and commitment terms together; their ratio, beta, is the model's."""

    def __post_init__(self):
        super().__post_init__()
        if self.values_per_channel is not None and self.kind != "fsq":
            raise self.error("values_per_channel", 'none but for `codebook.kind="fsq"`')


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig(Section):
    """How the groups of a HierarchicalKL learn to share an image (NVAE, arXiv:2007.03898)."""

    kl_weight: float = limited(1.0, above=0)
    """Weight of the KL divergence in the end; 1 gives the ELBO."""
    kl_warmup: int | float = in_steps(0)
    """Steps, or below 1 the share of run.steps, over which that weight grows from 0."""
    kl_balancing: bool = True
    """Until then, weight each group's divergence in proportion to what it is per value, so that groups that say little cost
    little, and none is left unused (appendix A)."""
    spectral_weight: float = limited(0.01, least=0)
    """Weight of the sum of the convolutions' largest singular values, which keeps divergences of deep hierarchies bounded
    (section 3.2), next to the nats of an image."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig(Section):
    """What a prior learns (models/autoregressive.py)."""

    codec: str | None = None
    """Name or folder of the codec whose indices or latents it learns; None for pixels."""
    level: int = limited(0, least=0)
    """Which of the codec's levels, 0 the top; those above it are the condition."""


@dataclass(frozen=True, kw_only=True)
class TranslatorConfig(Section):
    """Between which codecs a LatentTranslator translates, and what it learns from (models/latent_translator.py)."""

    codec: str | None = None
    """Name or folder of the codec whose latents it is given."""
    target: str | None = None
    """Name or folder of the codec whose latents it gives: those of the same image, or of one `upscale` times as large."""
    upscale: int = limited(1, least=1)
    """2: from latents of the image at half its size to those of the image, so that it enlarges."""
    reuse_layers: bool = False
    """Begin with copies of the layers of both codecs that work on the latents' own grid: the decoder's first and the encoder's last,
    where the codec's family tells them apart."""
    lesson: Literal["reconstruction", "original"] = "reconstruction"
    """Of which image the target's latents are learned: the crop's reconstruction by the source, which is a function of the latents
    given, or the crop, of which they cannot tell all. A translator that enlarges always learns from the crop."""
    crops: int | None = limited(None, least=1)
    """Crops that are encoded once, and kept in memory, to learn from in every epoch; None: new ones in every step."""
    linear_crops: int = limited(128, least=1)
    """Crops that the linear map and the network's last layer are fitted to, in closed form."""
    image_weight: float = limited(0.0, least=0)
    """Weight of the mean squared error of the image that the target decodes, against its image of the latents learned, next to the
    error of the latents; it takes several times as long."""
    image_side: int | None = limited(None, least=1)
    """Side, in latents, of the window that is decoded for it, another one in every step; None: all of the crop."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """What the gradient does to the weights; the learning rate is a pure function of the step."""

    kind: Literal["adamw", "soap"] = "adamw"
    """`adamw` (arXiv:1711.05101), or `soap` (arXiv:2409.11321): Adam in the axes along which gradients vary, found anew every ten
    steps for each side of a weight. A step takes a quarter longer on a small codec, and does several steps' work."""
    learning_rate: float = limited(1e-4, above=0)
    """Peak."""
    encoder_factor: float = limited(1.0, least=0)
    """The encoder's rate as a share of the decoder's: below 1 where latents should hardly move, because their
    codebook is fitted to them by k-means."""
    warmup_steps: int | float = in_steps(100)
    """Steps of linear growth from 0; below 1 a share of run.steps."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course from the peak to `final_fraction` of it at the last step."""
    final_fraction: float = limited(0.01, least=0, most=1)
    """Last learning rate, as a fraction of the peak."""
    betas: tuple[float, float] = limited((0.9, 0.99), least=0, below=1)
    weight_decay: float = limited(0.0, least=0)
    fan_in_reference: int | None = limited(None, least=1)
    """A weight whose outputs sum more inputs than this learns slower by reference / fan-in: Adam's step has the same
    size in every weight, so that a wide layer's output moves by as much as its inputs are many (muP, arXiv:2203.03466,
    table 3). None: one rate for all."""
    clip_norm: float | None = limited(1.0, above=0)
    """Largest gradient norm; None: unclipped."""
    batch_size: int = limited(4, least=1)
    """Images per process and micro-batch."""
    accumulation: int = limited(1, least=1)
    """Micro-batches per step."""
    ema_decay: float = limited(0.999, least=0, below=1)
    """Of the moving average of the weights, which is what ships; 0 switches it off."""
    discriminator_learning_rate: float | None = limited(None, above=0)
    """None: as the autoencoder's."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Length, precision and what is written on the way."""

    steps: int = limited(10_000, least=1)
    seed: int = limited(0, least=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the arithmetic; the weights stay float32. `auto`: bf16 on a GPU (CUDA) or CPU (x86 with AVX512-BF16 or AMX, recognized
    on Linux) that computes in it, else fp32. fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, a fraction of the memory."""
    log_every: int | None = limited(None, least=1)
    """Steps between two lines of metrics.jsonl; None: 50, and in a run of less than 1,000 steps a twentieth of it, 5 at least."""
    sample_every: int = limited(1000, least=1)
    """Steps between two images in samples/, and two measurements on held-out images."""
    checkpoint_every: int = limited(1000, least=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = limited(2, least=1)
    """How many of the newest checkpoints stay."""
    calibration_images: int = limited(256, least=0)
    """Images that scale, shift and half-precision safety are measured on at the end, fewer (at least 8) after a run so
    short that this would take over a tenth of it; 0: not measured."""
    codec_dtype: Literal["float32", "float16"] = "float32"
    """How the finished network's weights are stored: float16 halves the file; any precision can load it."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        for section in fields(self):
            for key in getattr(self, section.name).changed():
                setting = f"{section.name}.{key}"
                reading = kinds_that_read(setting)
                if reading is not None and self.kind not in reading:
                    allowed = " and ".join(
                        f"{kind.name} ({', '.join(kind.model_classes)})" for kind in reading
                    )
                    expected = (
                        f"none for {self.model.class_name}: only these kinds of training read it: {allowed}"
                    )
                    raise self.error(setting, expected)

    @property
    def kind(self) -> TrainingKind:
        """What is trained."""
        return kind_of(self.model.class_name)

    @property
    def codec(self) -> str | None:
        """Name or folder of the codec to start from or to learn from."""
        section, _, key = (self.kind.codec or "").partition(".")
        return getattr(getattr(self, section), key) if section else None

    def error(self, setting: str, expected: str, *, advice: str = "") -> SettingError:
        """The error of a setting, `section.key`, that does not fit."""
        section, _, key = setting.partition(".")
        return getattr(self, section).error(key, expected, advice=advice)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "TrainingConfig":
        """Build from nested tables, naming the near match of an unknown key and the allowed values of a wrong one."""
        table = deprecated.rename_settings(table)
        check_keys(table, _SECTIONS, "section")
        return cls(**{name: _SECTIONS[name].from_table(values) for name, values in table.items()})

    def to_dict(self) -> dict[str, Any]:
        """Nested tables without the Nones, which TOML does not have."""
        return {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in dataclasses.asdict(self).items()
        }


_SECTIONS: dict[str, type[Section]] = {section.name: section.type for section in fields(TrainingConfig)}
IN_STEPS = {
    name: [each.name for each in fields(section) if each.metadata.get("in_steps")]
    for name, section in _SECTIONS.items()
    if any(each.metadata.get("in_steps") for each in fields(section))
}
"""By section: the settings that depend on the length of a run."""


_PRESETS = files("latent_codec") / "presets"


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        path.name.removesuffix(".toml") for path in _PRESETS.iterdir() if path.name.endswith(".toml")
    )


class PresetNotes(NamedTuple):
    """The [preset] table of a shipped preset."""

    summary: str
    """What it trains."""
    duration: str


def preset_notes(name: str) -> PresetNotes:
    """What a shipped preset trains, and how long that takes."""
    return PresetNotes(**_read_preset(name)["preset"])


def load_config(
    preset: str,
    overrides: Sequence[str] = (),
    codec: str | None = None,
    pipeline: str | None = None,
    reference: str | None = None,
    target: str | None = None,
) -> TrainingConfig:
    """Read a preset by name, or a TOML file by path, and apply `section.key=value` overrides.

    What the file gives in steps (`IN_STEPS`) becomes a share of the file's `run.steps`, so that it fits a run of another length;
    an override in steps stays one.

    Args:
        preset: a shipped preset's name, or the path of a .toml file.
        overrides: each `section.key=value`, the value in TOML; a bare word counts as a string. `model.pretrained` takes
            the place of the file's `model.arguments`.
        codec: the codec to start or to learn from, for the setting that the kind of training has for it.
        pipeline: for `model.pipeline`.
        reference: for `objective.reference`.
        target: for `translator.target`.

    Raises:
        ValueError: for an unknown preset, section, key or value, naming what is allowed.
    """
    table = deprecated.rename_settings(_read_preset(preset))
    table.pop("preset", None)
    paths = [override.partition("=")[0].strip() for override in overrides]
    if "model.pretrained" in paths and isinstance(table.get("model"), dict):
        table["model"].pop("arguments", None)  # of the network that the preset would build instead
    run, overridden = table.get("run"), set()
    num_steps = run.get("steps", RunConfig.steps) if isinstance(run, dict) else RunConfig.steps
    for override in overrides:
        path, equals, value = override.partition("=")
        keys = path.strip().split(".")
        overridden.add(path.strip())
        if not equals or len(keys) < 2:
            raise ValueError(f"override {override!r}: expected section.key=value, such as run.steps=500.")
        _set(table, keys, _parse_value(value.strip()))
    if codec is not None:
        _set_codec(table, codec, preset)
    if pipeline is not None:
        _set(table, ["model", "pipeline"], pipeline)
    if reference is not None:
        _set(table, ["objective", "reference"], reference)
    if target is not None:
        _set(table, ["translator", "target"], target)
    for setting, share in _given_in_steps(table, num_steps).items():
        if setting not in overridden:
            _set(table, setting.split("."), share)
    return TrainingConfig.from_dict(table)


def _read_preset(preset: str) -> dict[str, Any]:
    if preset.endswith(".toml") or "/" in preset:
        check_is_file(preset)
        text = Path(preset).read_bytes()
    else:
        names = preset_names()
        if preset not in names:
            raise ValueError(
                f"no preset {preset!r}{near_match(preset, names)}. There are: {', '.join(names)}."
            )
        text = (_PRESETS / f"{preset}.toml").read_bytes()
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{preset} is not valid TOML: {error}") from error


def _given_in_steps(table: dict[str, Any], num_steps: Any) -> dict[str, float]:
    """The settings of `IN_STEPS` that a file gives in steps, or leaves at the optimizer's defaults, as shares of its `num_steps`."""
    defaults = TrainingConfig().to_dict()
    given = {name: values if isinstance(values, dict) else {} for name, values in table.items()}
    given["optimizer"] = defaults["optimizer"] | given.get("optimizer", {})
    if given.get("objective", {}).get("gan_weight"):
        given["objective"] = {"gan_ramp": defaults["objective"]["gan_ramp"]} | given["objective"]
    return {
        f"{section}.{name}": given[section][name] / num_steps
        for section, names in IN_STEPS.items()
        for name in names
        if type(given.get(section, {}).get(name)) is type(num_steps) is int
        and 0 < given[section][name] < num_steps
    }


def _set_codec(table: dict[str, Any], codec: str, preset: str) -> None:
    """Put the codec where the kind of training reads it."""
    model = table.get("model", {})
    model = model if isinstance(model, dict) else {}
    kind = kind_of(str(model.get("class_name", ModelConfig.class_name)))
    if kind.codec is None:
        raise SettingError("codec", f"none for a {kind.name}, which learns from images", codec)
    if kind.codec == "model.pretrained" and model.get("arguments"):
        expected = f"none: {preset} builds a network of its own (model.arguments)"
        advice = "leave `codec` out, or take a preset that starts from a codec, such as finetune-decoder"
        raise SettingError("codec", expected, codec, advice=advice)
    _set(table, kind.codec.split("."), codec)


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
