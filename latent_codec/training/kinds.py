"""What can be trained: one table of `TrainingKind`s.

A new kind of training is one file, which builds its network, has its Task (training/task.py) and may finish it in its own
way, and one row of KINDS. The files are imported when they are needed: a configuration is checked without torch.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal

from latent_codec.errors import SettingError
from latent_codec.training.settings import near_match

_HERE = "latent_codec.training"


@dataclass(frozen=True, kw_only=True)
class TrainingKind:
    """One kind of training. `build`, `task` and `finish` are named as "module:name".

    build(config, source, codec) -> network, new or pretrained
    task: a subclass of Task
    finish(config, network, source, run, *, data_name, on_progress, unfinished_at) -> the folder that it wrote
    """

    name: str
    """Also that of its folder in the run folder, but where `folder` names another."""
    model_classes: tuple[str, ...]
    """What `model.class_name` may be."""
    sections: frozenset[str]
    """The sections (`objective`) and settings (`data.label`) that it reads, of those that not every kind reads."""
    build: str
    task: str
    finish: str = f"{_HERE}.finish:finish_network"
    folder: str | None = None
    """"codec" where a run folder opens as a codec; None: the name."""
    codec: str | None = None
    """The setting that names the codec to start from (`model.pretrained`) or to learn from; None: it has none."""
    takes_any_class: bool = False
    """Whether a network that exists already may be of other classes, which `task.check` refuses where it must."""
    codec_optional: bool = False
    """Whether a pretrained network may have none to learn from."""
    learns_codes: bool = False
    """Whether it trains on the codec's latents or indices, not on images."""
    streams: bool = False
    """Whether it trains on a stream, too."""

    def __post_init__(self):
        object.__setattr__(self, "folder", self.folder or self.name)

    def load(self, part: Literal["build", "task", "finish"]) -> Any:
        """Import what a field names."""
        return resolve_name(getattr(self, part))


KINDS = {
    kind.name: kind
    for kind in (
        TrainingKind(
            name="codec",
            model_classes=("AutoencoderKL", "AutoencoderVQ", "HierarchicalVQ", "MultiScaleVQ"),
            sections=frozenset(
                {
                    *("objective", "codebook", "model.initialization", "model.train", "model.pipeline"),
                    *("model.width", "model.widths", "model.layers_per_block", "model.upscale"),
                }
            ),
            build=f"{_HERE}.build:build_autoencoder",
            task=f"{_HERE}.autoencoder_task:AutoencoderTask",
            finish=f"{_HERE}.finish_codec:finish_codec",
            codec="model.pretrained",
            takes_any_class=True,
            streams=True,
        ),
        TrainingKind(
            name="hierarchical",
            model_classes=("HierarchicalKL",),
            sections=frozenset({"hierarchy", "data.held_out", "model.pipeline"}),
            build=f"{_HERE}.hierarchical_kl_task:build_hierarchical_kl",
            task=f"{_HERE}.hierarchical_kl_task:HierarchicalKLTask",
            finish=f"{_HERE}.finish_codec:finish_codec",
            folder="codec",
            codec="model.pretrained",
        ),
        TrainingKind(
            name="prior",
            model_classes=("PixelCNN", "PixelSNAIL"),
            sections=frozenset({"prior", "data.label", "data.held_out", "model.pipeline"}),
            build=f"{_HERE}.prior_task:build_prior",
            task=f"{_HERE}.prior_task:PriorTask",
            codec="prior.codec",
            codec_optional=True,
            learns_codes=True,
        ),
        TrainingKind(
            name="classifier",
            model_classes=("ImageClassifier",),
            sections=frozenset({"data.label", "data.held_out"}),
            build=f"{_HERE}.classifier_task:build_classifier",
            task=f"{_HERE}.classifier_task:ClassifierTask",
        ),
        TrainingKind(
            name="preview",
            model_classes=("TinyDecoder",),
            sections=frozenset({"model.teacher", "model.pipeline"}),
            build=f"{_HERE}.tiny_decoder_task:build_tiny_decoder",
            task=f"{_HERE}.tiny_decoder_task:TinyDecoderTask",
            codec="model.teacher",
        ),
        TrainingKind(
            name="entropy",
            model_classes=("LatentContext", "IndexContext"),
            sections=frozenset({"model.teacher", "data.held_out", "model.pipeline"}),
            build=f"{_HERE}.entropy_task:build_context",
            task=f"{_HERE}.entropy_task:EntropyTask",
            codec="model.teacher",
            learns_codes=True,
        ),
        TrainingKind(
            name="translator",
            model_classes=("LatentTranslator",),
            sections=frozenset({"translator", "model.pipeline"}),
            build=f"{_HERE}.translator_task:build_translator",
            task=f"{_HERE}.translator_task:TranslatorTask",
            codec="translator.codec",
        ),
    )
}


def kind_of(class_name: str) -> TrainingKind:
    """The kind that trains a class of networks.

    Raises:
        SettingError: if none does.
    """
    kinds = {name: kind for kind in KINDS.values() for name in kind.model_classes}
    if class_name not in kinds:
        expected = f"one of {', '.join(kinds)}{near_match(str(class_name), kinds)}"
        raise SettingError("model.class_name", expected, class_name)
    return kinds[class_name]


def kinds_that_read(setting: str) -> list[TrainingKind] | None:
    """The kinds that read `section.key`; None where all do."""
    names = {setting, setting.partition(".")[0]}
    reading = [kind for kind in KINDS.values() if kind.sections & names]
    return reading or None
