"""Diffusers pipelines and callbacks of this project; each is loaded when first used."""

from importlib import import_module

_EXPORTS = {
    "AnimatedWebP": "latent_codec.pipelines.preview_sinks",
    "HierarchicalPriorPipeline": "latent_codec.pipelines.hierarchical_prior_pipeline",
    "LatentPreviewCallback": "latent_codec.pipelines.latent_preview_callback",
    "PngFolder": "latent_codec.pipelines.preview_sinks",
    "PriorPipeline": "latent_codec.pipelines.prior_pipeline",
    "PriorPipelineOutput": "latent_codec.pipelines.prior_pipeline",
    "TranslatedVAE": "latent_codec.pipelines.translated_vae",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'latent_codec.pipelines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
