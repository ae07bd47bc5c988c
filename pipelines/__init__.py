"""Diffusers pipelines and callbacks of this project."""
