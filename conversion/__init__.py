"""Conversion of foreign checkpoints to and from diffusers components."""
