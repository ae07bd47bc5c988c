"""The toolbox for the autoencoder side of latent diffusion.

Importing this package is cheap: torch and diffusers are loaded when one of the
names below is first used, so that the command line answers `--help` at once.

A pipeline that was saved with a model of ours inside can be reloaded after `import latent_codec` alone:
diffusers takes a component's class from `sys.modules` and imports nothing that a folder names, so the
modules of our models are there from the start, and run when diffusers asks for the class.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any

from latent_codec import deprecated

if TYPE_CHECKING:  # what _EXPORTS gives at run time
    from latent_codec.analysis.features import extract_features as extract_features
    from latent_codec.bitstream.compression import compress as compress
    from latent_codec.bitstream.compression import decompress as decompress
    from latent_codec.codec import LatentCodec as LatentCodec
    from latent_codec.converting import convert as convert
    from latent_codec.errors import SettingError as SettingError
    from latent_codec.evaluation.calibration import calibrate as calibrate
    from latent_codec.evaluation.reconstruction import evaluate as evaluate
    from latent_codec.families.latent_space import LatentSpace as LatentSpace
    from latent_codec.latents.data_set import LatentDataset as LatentDataset
    from latent_codec.models.autoencoder_kl_other_decoder import (
        AutoencoderKLOtherDecoder as AutoencoderKLOtherDecoder,
    )
    from latent_codec.models.autoencoder_tiny_gn import AutoencoderTinyGN as AutoencoderTinyGN
    from latent_codec.models.autoencoder_tiny_video import AutoencoderTinyVideo as AutoencoderTinyVideo
    from latent_codec.models.autoencoder_vq import AutoencoderVQ as AutoencoderVQ
    from latent_codec.models.classifier import ImageClassifier as ImageClassifier
    from latent_codec.models.hierarchical_kl import HierarchicalKL as HierarchicalKL
    from latent_codec.models.hierarchical_vq import HierarchicalVQ as HierarchicalVQ
    from latent_codec.models.latent_translator import LatentTranslator as LatentTranslator
    from latent_codec.models.multi_scale_vq import MultiScaleVQ as MultiScaleVQ
    from latent_codec.models.pixelcnn import PixelCNN as PixelCNN
    from latent_codec.models.pixelsnail import PixelSNAIL as PixelSNAIL
    from latent_codec.pipelines.hierarchical_prior_pipeline import (
        HierarchicalPriorPipeline as HierarchicalPriorPipeline,
    )
    from latent_codec.pipelines.latent_preview_callback import LatentPreviewCallback as LatentPreviewCallback
    from latent_codec.pipelines.prior_pipeline import PriorPipeline as PriorPipeline
    from latent_codec.pipelines.translated_vae import TranslatedVAE as TranslatedVAE
    from latent_codec.previews.previewer import LatentPreviewer as LatentPreviewer
    from latent_codec.training.run import train as train

__version__ = "0.2.0"

_EXPORTS = {
    "AutoencoderKLOtherDecoder": "latent_codec.models.autoencoder_kl_other_decoder",
    "AutoencoderTinyGN": "latent_codec.models.autoencoder_tiny_gn",
    "AutoencoderTinyVideo": "latent_codec.models.autoencoder_tiny_video",
    "AutoencoderVQ": "latent_codec.models.autoencoder_vq",
    "HierarchicalPriorPipeline": "latent_codec.pipelines.hierarchical_prior_pipeline",
    "HierarchicalKL": "latent_codec.models.hierarchical_kl",
    "HierarchicalVQ": "latent_codec.models.hierarchical_vq",
    "MultiScaleVQ": "latent_codec.models.multi_scale_vq",
    "ImageClassifier": "latent_codec.models.classifier",
    "LatentCodec": "latent_codec.codec",
    "LatentDataset": "latent_codec.latents.data_set",
    "LatentPreviewCallback": "latent_codec.pipelines.latent_preview_callback",
    "LatentPreviewer": "latent_codec.previews.previewer",
    "LatentSpace": "latent_codec.families.latent_space",
    "LatentTranslator": "latent_codec.models.latent_translator",
    "PixelCNN": "latent_codec.models.pixelcnn",
    "PixelSNAIL": "latent_codec.models.pixelsnail",
    "PriorPipeline": "latent_codec.pipelines.prior_pipeline",
    "SettingError": "latent_codec.errors",
    "TranslatedVAE": "latent_codec.pipelines.translated_vae",
    "calibrate": "latent_codec.evaluation.calibration",
    "compress": "latent_codec.bitstream.compression",
    "convert": "latent_codec.converting",
    "decompress": "latent_codec.bitstream.compression",
    "evaluate": "latent_codec.evaluation.reconstruction",
    "extract_features": "latent_codec.analysis.features",
    "train": "latent_codec.training.run",
}

_COMPONENTS = [module for module in _EXPORTS.values() if module.startswith("latent_codec.models.")]

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in deprecated.NAMES:
        return deprecated.find_name(__name__, name)
    raise AttributeError(f"module 'latent_codec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _DeferredModule(ModuleType):
    """A module whose file runs when one of its names is first asked for.

    Unlike one of `importlib.util.LazyLoader` it answers `__file__`, `__spec__` and their like without running:
    `inspect` reads those of every module there is, also in the middle of torch's own import, which cannot be
    started twice.
    """

    __spec__: Any  # there is one, with a loader
    _lock = RLock()

    def __getattr__(self, name: str) -> Any:
        is_metadata = name.startswith("__") and name != "__all__"  # which `import *` asks for
        with self._lock:
            if is_metadata or (type(self) is _DeferredModule and self.__spec__.loader_state == "running"):
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            if type(self) is _DeferredModule:
                self.__spec__.loader_state = "running"
                try:
                    self.__spec__.loader.exec_module(self)
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:
                    self.__spec__.loader_state = None
        return getattr(self, name)


def _defer(name: str) -> None:
    """Put the module `name` into `sys.modules` and its package, to run later."""
    module = module_from_spec(find_spec(name))  # type: ignore[arg-type]
    module.__class__ = _DeferredModule
    sys.modules[name] = module
    package, _, stem = name.rpartition(".")
    setattr(sys.modules[package], stem, module)


deprecated.install()
for _name in _COMPONENTS:
    if _name not in sys.modules:  # where this package is reloaded, its models stay
        _defer(_name)
