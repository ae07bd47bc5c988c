"""Previews: latents and indices as images, in a fraction of the time that the codec's decoder takes."""

from latent_codec.previews.previewer import LatentPreviewer

__all__ = ["LatentPreviewer"]
