"""Measuring a codec: fidelity, latents, speed."""
