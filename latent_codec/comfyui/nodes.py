"""The node pack, as ComfyUI reads it: classes and their titles."""

from latent_codec.comfyui import model_files
from latent_codec.comfyui.codec_nodes import CompareCodecs, EncodeWithAlpha, LoadLatentCodec
from latent_codec.comfyui.file_nodes import LoadCompressed, SaveCompressed
from latent_codec.comfyui.preview_nodes import FitPreview, PreviewWithCodec
from latent_codec.comfyui.prior_nodes import PriorSampler

NODE_CLASS_MAPPINGS = {
    "LatentCodecLoad": LoadLatentCodec,
    "LatentCodecEncodeWithAlpha": EncodeWithAlpha,
    "LatentCodecFitPreview": FitPreview,
    "LatentCodecPreview": PreviewWithCodec,
    "LatentCodecSaveCompressed": SaveCompressed,
    "LatentCodecLoadCompressed": LoadCompressed,
    "LatentCodecPriorSampler": PriorSampler,
    "LatentCodecCompare": CompareCodecs,
}
"""Names as workflows store them: they stay."""
NODE_DISPLAY_NAME_MAPPINGS = {name: node.TITLE for name, node in NODE_CLASS_MAPPINGS.items()}

model_files.register()
