"""Nodes for ComfyUI: any codec as its VAE, live previews while it samples, compressed files, priors, comparisons.

`latent-codec comfyui install PATH` writes a file into ComfyUI's `custom_nodes/` that imports `nodes`. Modules here import without
ComfyUI; what its own modules are needed for is imported where it is used.
"""
