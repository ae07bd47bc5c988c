"""Nodes that fit previews and show them while a model samples."""

from latent_codec.comfyui.inputs import CATEGORY, PREVIEW, codec_vae, node_input, number_input

KINDS = ("auto", "linear", "tiny", "full")


class FitPreview:
    """Fit a linear preview to a codec."""

    TITLE = "Fit Preview"
    DESCRIPTION = (
        "Fits a linear map from a codec's latents to colors, in seconds, for Preview with Codec. It lasts as long as the "
        "workflow; `latent-codec fit-preview` writes one into the codec's folder."
    )
    CATEGORY = CATEGORY
    FUNCTION = "fit"
    RETURN_TYPES = (PREVIEW, "STRING")
    RETURN_NAMES = ("preview", "report")
    OUTPUT_TOOLTIPS = (
        "For Preview with Codec.",
        "What it was fitted to, and how well it agrees with the codec.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"vae": node_input("VAE", "From Load Latent Codec.")},
            "optional": {
                "images": node_input(
                    "IMAGE",
                    "Images to fit to, of the kind that will be drawn; of 8 or more some are held out to measure the "
                    "fit. Not connected: random latents.",
                )
            },
        }

    def fit(self, vae, images=None) -> tuple:
        from comfy.utils import ProgressBar

        from latent_codec.comfyui.images import PixelSource
        from latent_codec.previews import LatentPreviewer
        from latent_codec.previews.fitting import fit_linear

        codec = codec_vae(vae).codec()
        source = None if images is None else PixelSource(images)
        found = fit_linear(
            codec, source, on_progress=lambda done, total: ProgressBar(total).update_absolute(done)
        )
        previewer = LatentPreviewer.linear(
            found.weight, found.bias, space=codec.latent_space, palette=found.palette
        )
        fitted_to = f"{found.num_images} images" if found.num_images else "random latents"
        report = f"{codec.name}: linear preview fitted to {fitted_to} in {found.seconds:.1f} s"
        if found.correlation is not None:
            report += f"; correlation {found.correlation:.3f} with the codec's own images, on held-out ones"
        return previewer, report


class PreviewWithCodec:
    """Show what a model draws, while it draws."""

    TITLE = "Preview with Codec"
    DESCRIPTION = (
        "Shows what the model is about to draw after each step of a sampler, in the colors of its codec, whatever ComfyUI's "
        "preview method is. What is sampled stays the same to the bit."
    )
    CATEGORY = CATEGORY
    FUNCTION = "attach"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model, for KSampler and the other samplers.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": node_input("MODEL", "The model that will be sampled."),
                "vae": node_input("VAE", "From Load Latent Codec: the codec whose latents the model draws."),
                "kind": node_input(
                    list(KINDS),
                    "linear: a pixel per latent, at once. tiny: a small decoder. full: the codec's own decoder, one "
                    "decoding per preview. auto: the connected preview, or the best one in the codec's folder, or a linear one "
                    "fitted now.",
                    default="auto",
                ),
                "every": number_input(
                    "Show each so-many-th step; the last is always shown.", default=1, between=(1, 1000)
                ),
            },
            "optional": {"preview": node_input(PREVIEW, "From Fit Preview, for auto.")},
        }

    def attach(self, model, vae, kind: str = "auto", every: int = 1, preview=None) -> tuple:
        from latent_codec.comfyui.previews import SamplingPreview, with_preview

        codec_vae(vae)
        codec = vae.first_stage_model.codec
        latent_format = model.get_model_object("latent_format")
        if latent_format.latent_channels != codec.latent_space.channels:
            raise ValueError(
                f"expected a codec of {latent_format.latent_channels} latent channels, as the model has, got {codec.name} with "
                f"{codec.latent_space.channels}; load the codec that the model was trained with"
            )
        if preview is not None and preview.space != codec.latent_space:
            raise ValueError(
                f"expected a preview fitted to {codec.name}, got one of other latents; fit one to it"
            )
        previewer = self._previewer(vae, kind, preview)
        sampling = SamplingPreview(previewer, codec, latent_format, every)
        return (with_preview(model, sampling, vae.patcher if previewer.kind == "full" else None),)

    def _previewer(self, vae, kind: str, preview):
        from latent_preview import MAX_PREVIEW_RESOLUTION

        from latent_codec.errors import SettingError
        from latent_codec.previews import LatentPreviewer

        codec = vae.first_stage_model.codec
        if kind == "full":
            factor = codec.latent_space.downsampling_factor
            return LatentPreviewer.full(codec, max_side=max(MAX_PREVIEW_RESOLUTION, factor))
        if kind != "auto":
            return LatentPreviewer.from_codec(codec, kind=kind)
        if preview is not None:
            return preview
        try:
            return LatentPreviewer.from_codec(codec)
        except SettingError:  # there is none
            return FitPreview().fit(vae)[0]
