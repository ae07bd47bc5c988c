"""Families of autoencoders: which class belongs to which, and which classes are not supported, and why.

Adding a family is adding a file next to this one and a row to FAMILIES.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latent_codec.families.asymmetric_kl import AsymmetricKL
from latent_codec.families.consistency_decoder import ConsistencyDecoder
from latent_codec.families.dc import DC
from latent_codec.families.family import Encoded, Family, Level, Trainable
from latent_codec.families.flux2 import Flux2
from latent_codec.families.hierarchical_kl import HierarchicalGaussian
from latent_codec.families.hierarchical_vq import Hierarchical, MultiScale
from latent_codec.families.hunyuan_image import HunyuanImage
from latent_codec.families.kl import KL
from latent_codec.families.kl_other_decoder import KLOtherDecoder
from latent_codec.families.kvae import KVAE
from latent_codec.families.latent_space import LatentSpace
from latent_codec.families.paella import Paella
from latent_codec.families.rae import RAE
from latent_codec.families.temporal_decoder import TemporalDecoder
from latent_codec.families.tiny import Tiny, TinyGN
from latent_codec.families.tiny_video import TinyVideo
from latent_codec.families.video import LTX, CogVideoX, Cosmos, HunyuanVideo, HunyuanVideo15, KVAEVideo, Mochi
from latent_codec.families.vq import VQ, OwnVQ
from latent_codec.families.wan import QwenImage, Wan

if TYPE_CHECKING:  # what a config says is read without torch
    from torch import nn

__all__ = ["FAMILIES", "Encoded", "Family", "LatentSpace", "Level", "Trainable", "family_class", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    "AsymmetricAutoencoderKL": AsymmetricKL,
    "AutoencoderDC": DC,
    "AutoencoderKL": KL,
    "AutoencoderKLCogVideoX": CogVideoX,
    "AutoencoderKLCosmos": Cosmos,
    "AutoencoderKLFlux2": Flux2,
    "AutoencoderKLHunyuanImage": HunyuanImage,
    "AutoencoderKLHunyuanImageRefiner": HunyuanVideo,
    "AutoencoderKLHunyuanVideo": HunyuanVideo,
    "AutoencoderKLHunyuanVideo15": HunyuanVideo15,
    "AutoencoderKLKVAE": KVAE,
    "AutoencoderKLKVAEVideo": KVAEVideo,
    "AutoencoderKLLTXVideo": LTX,
    "AutoencoderKLMagvit": CogVideoX,
    "AutoencoderKLMochi": Mochi,
    "AutoencoderKLOtherDecoder": KLOtherDecoder,
    "AutoencoderKLQwenImage": QwenImage,
    "AutoencoderKLQwenImage21": Wan,
    "AutoencoderKLTemporalDecoder": TemporalDecoder,
    "AutoencoderKLWan": Wan,
    "AutoencoderRAE": RAE,
    "AutoencoderTiny": Tiny,
    "AutoencoderTinyGN": TinyGN,
    "AutoencoderTinyVideo": TinyVideo,
    "AutoencoderVQ": OwnVQ,
    "ConsistencyDecoderVAE": ConsistencyDecoder,
    "HierarchicalKL": HierarchicalGaussian,
    "HierarchicalVQ": Hierarchical,
    "MultiScaleVQ": MultiScale,
    "PaellaVQModel": Paella,
    "VQModel": VQ,
}

MODULES = {
    "AutoencoderKLOtherDecoder": "latent_codec.models.autoencoder_kl_other_decoder",
    "AutoencoderTinyGN": "latent_codec.models.autoencoder_tiny_gn",
    "AutoencoderTinyVideo": "latent_codec.models.autoencoder_tiny_video",
    "AutoencoderVQ": "latent_codec.models.autoencoder_vq",
    "HierarchicalKL": "latent_codec.models.hierarchical_kl",
    "HierarchicalVQ": "latent_codec.models.hierarchical_vq",
    "MultiScaleVQ": "latent_codec.models.multi_scale_vq",
    "PaellaVQModel": "diffusers.pipelines.deprecated.wuerstchen",
}
"""Of classes that `diffusers` itself does not offer."""

_VIDEO = "it works on video: tensors of five dimensions, with time"
_AUDIO = "it works on sound, not on images"

REFUSED = {
    "AutoencoderKLAllegro": _VIDEO,
    "AutoencoderKLKVAEAudio": _AUDIO,
    "AutoencoderKLLTX2Audio": _AUDIO,
    "AutoencoderKLLTX2Video": _VIDEO,
    "AutoencoderKLMiniMaxH3": _VIDEO,
    "AutoencoderKLMiniMaxH3Audio": _AUDIO,
    "AutoencoderOobleck": _AUDIO,
    "AutoencoderSAME": _AUDIO,
    "AutoencoderVidTok": _VIDEO,
    "Cosmos3AVAEAudioTokenizer": _AUDIO,
    "Kandinsky6SRVAE": _VIDEO,
    "LTX2VideoDiffusionDecoderModel": "it is a video decoder without an encoder",
    "LongCatAudioDiTVae": _AUDIO,
    "MMAudioVAE": _AUDIO,
    "MMAudioVocoder": _AUDIO,
    "MiniMaxMusic3Vocoder": _AUDIO,
    "RFD4ProteinaAutoencoder": "it works on protein structures, not on images",
}


def class_name_of(autoencoder: type | str) -> str:
    """The row of FAMILIES that `autoencoder`, a class or a class's name, is or derives from.

    Raises:
        ValueError: for every other class, with the reason.
    """
    names = [autoencoder] if isinstance(autoencoder, str) else [each.__name__ for each in autoencoder.__mro__]
    for name in names:
        if name in FAMILIES:
            return name
    reason = REFUSED.get(names[0], "it is not an autoencoder of images that is known here")
    raise ValueError(f"{names[0]} is not supported: {reason}. Supported classes: {', '.join(FAMILIES)}.")


def component_class(name: str) -> "type[nn.Module]":
    """Import our own class of that name, or diffusers', which takes seconds.

    Raises:
        ValueError: for a class that is not supported, or that the installed diffusers lacks.
    """
    name = class_name_of(name)
    module = import_module(MODULES.get(name, "diffusers"))
    if not hasattr(module, name):
        version = import_module("diffusers").__version__
        raise ValueError(f"{name} is not in diffusers {version}; diffusers 0.42 has it: upgrade diffusers")
    return getattr(module, name)


def family_class(autoencoder: type | str, config: Any) -> type[Family]:
    """The family of a class, or of its name, with this config.

    Raises:
        ValueError: for a class that is not supported, with the reason.
    """
    return FAMILIES[class_name_of(autoencoder)].of(config)


def family_of(autoencoder) -> Family:
    """An autoencoder (a model) as one of its family.

    Raises:
        ValueError: for a class that is not supported, with the reason.
    """
    from latent_codec.torch_settings import uncompiled

    return family_class(type(uncompiled(autoencoder)), autoencoder.config)(autoencoder)
