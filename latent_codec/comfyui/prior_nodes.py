"""The node that samples images from a prior."""

from latent_codec.comfyui import model_files
from latent_codec.comfyui.inputs import CATEGORY, node_input, number_input, number_or_none


class PriorSampler:
    """Draw images from a prior over a codec's indices, over its quantized latents, or over pixels."""

    TITLE = "Prior Sampler"
    DESCRIPTION = (
        "Draws images from a PixelCNN or PixelSNAIL over a codec's indices, position by position, shown as they grow. An image "
        "follows only from the seed, its label and its number."
    )
    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "labels")
    OUTPUT_TOOLTIPS = (
        "The images, those of one label after the other.",
        "The label of each image, a line each.",
    )

    def __init__(self):
        self._opened = None

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pipeline": node_input(
                    model_files.pipeline_names(),
                    "The shipped pipeline, or one in models/latent_codecs, as `latent-codec pipeline` writes them.",
                ),
                "label": node_input(
                    "STRING",
                    "Classes by name or number, with commas between them. Empty: every class, or none where the prior "
                    "has no classes.",
                    default="",
                ),
                "num_images": number_input("Images of every label.", default=4, between=(1, 256)),
                "seed": number_input(
                    "Seed of the random number generator.",
                    default=0,
                    between=(0, 2**63 - 1),
                    control_after_generate=True,
                ),
                "temperature": number_input(
                    "Divides the logits; 0: the most probable index at every position.",
                    default=1.0,
                    between=(0.0, 10.0),
                ),
                "top_k": number_input(
                    "Sample among the most probable K indices. 0: among all.", default=0, between=(0, 65536)
                ),
                "top_p": number_input(
                    "Sample among the most probable indices that together have this probability. 1: among all.",
                    default=1.0,
                    between=(0.01, 1.0),
                ),
                "keep": number_input(
                    "Keep this share of a label's images, those that the pipeline's classifier finds most probable. "
                    "1: all of them, in the order drawn.",
                    default=1.0,
                    between=(0.01, 1.0),
                ),
            },
            "optional": {
                side: number_input(
                    f"{side.capitalize()} of the images in pixels. 0: as in the prior's training.",
                    default=0,
                    between=(0, 4096),
                )
                for side in ("height", "width")
            },
        }

    @classmethod
    def IS_CHANGED(cls, pipeline: str, **settings) -> str:
        return model_files.stamp(model_files.find_pipeline_folder(pipeline))

    def sample(
        self,
        pipeline: str,
        label: str = "",
        num_images: int = 4,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        keep: float = 1.0,
        height: int = 0,
        width: int = 0,
    ) -> tuple:
        from latent_codec.comfyui.images import to_pixels
        from latent_codec.comfyui.prior_sampling import Growing
        from latent_codec.pipelines.sampling import labelled_generators, labels_by_number

        pipe = self._open(pipeline)
        given = [each.strip() for each in label.split(",") if each.strip()]
        labels = labels_by_number(pipe, given or None)
        drawn = pipe(
            labels,
            num_images,
            height=number_or_none(height, 0),
            width=number_or_none(width, 0),
            temperature=temperature,
            top_k=number_or_none(top_k, 0),
            top_p=number_or_none(top_p, 1.0),
            keep=number_or_none(keep, 1.0),
            generator=labelled_generators(seed, labels, num_images),
            output_type="pt",
            callback=Growing(pipe),
        )
        names = pipe.config.class_names
        found = [names[each] if names else str(each) for each in drawn.class_labels or []]
        return to_pixels(drawn.images), "\n".join(found)

    def _open(self, name: str):
        """The pipeline on ComfyUI's device, kept from one run of this node to the next."""
        from comfy.model_management import get_torch_device

        from latent_codec.pipelines.folders import load_pipeline

        folder = model_files.find_pipeline_folder(name)
        which = (folder, model_files.stamp(folder))
        if self._opened is None or self._opened[0] != which:
            pipe = load_pipeline(folder, device=get_torch_device())
            pipe.set_progress_bar_config(disable=True)
            self._opened = which, pipe
        return self._opened[1]
