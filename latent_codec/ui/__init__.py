"""The page: `latent-codec ui`.

What the tabs do are plain functions on tensors and PIL images (round_trip, equal_bytes, compressed, latents, completion,
watching); `tabs/` lays each of them out with Gradio, `page.py` joins the tabs and `serving.py` serves them, to loopback unless told.
"""
