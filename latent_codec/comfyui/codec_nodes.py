"""Nodes that open codecs, encode alpha, and compare codecs."""

from latent_codec.comfyui import model_files
from latent_codec.comfyui.inputs import CATEGORY, codec_vae, node_input

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_COMPARED = 6


class LoadLatentCodec:
    """Open a codec as a VAE."""

    TITLE = "Load Latent Codec"
    DESCRIPTION = (
        "Opens any codec that latent-codec knows (KL, VQ, hierarchical VQ, TAESD, TAEF2, diffusers folders, foreign "
        "checkpoints) as a VAE for VAE Encode, VAE Decode and their tiled forms. Tiles give what the whole image gives, "
        "where the codec's class has such tiles."
    )
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("For ComfyUI's VAE nodes and for the other nodes of latent codec.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "codec": node_input(
                    model_files.codec_names(),
                    "A codec that comes with latent-codec, or one in models/latent_codecs, models/vae, "
                    "models/vae_approx or models/diffusers.",
                )
            },
            "optional": {
                "path": node_input(
                    "STRING",
                    "Instead of the list: a folder, a weight file, or an id on the Hugging Face hub.",
                    default="",
                ),
                "dtype": node_input(
                    list(DTYPES),
                    "Precision to compute in. auto: as ComfyUI computes its VAEs; float32 for codecs with a codebook.",
                    default="auto",
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, codec: str, path: str = "", dtype: str = "auto") -> str:
        return model_files.stamp(path.strip() or codec)

    def load(self, codec: str, path: str = "", dtype: str = "auto") -> tuple:
        from latent_codec.codec import LatentCodec
        from latent_codec.comfyui.codec_vae import CodecVAE

        opened = LatentCodec.from_pretrained(model_files.find_codec(path.strip() or codec))
        return (CodecVAE(opened, dtype),)


class EncodeWithAlpha:
    """VAE Encode for images with alpha, which ComfyUI's own node leaves out."""

    TITLE = "VAE Encode with Alpha"
    DESCRIPTION = (
        "Encodes images with their alpha channel, through a codec of four channels. ComfyUI's VAE Encode takes the color "
        "only. Join Image with Alpha makes such images of an image and a mask."
    )
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latents, as VAE Encode gives them.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pixels": node_input("IMAGE", "Images with four channels; others are taken as opaque."),
                "vae": node_input("VAE", "From Load Latent Codec, of a codec with alpha."),
            }
        }

    def encode(self, pixels, vae) -> tuple[dict]:
        codec_vae(vae)
        return ({"samples": vae.encode(pixels)},)


class CompareCodecs:
    """A sheet of images and what several codecs make of them."""

    TITLE = "Compare Codecs"
    DESCRIPTION = (
        "Sends images through several codecs and back, and lays out originals and reconstructions in a grid with each "
        "codec's PSNR. Takes any VAE, ComfyUI's own, too."
    )
    CATEGORY = CATEGORY
    FUNCTION = "compare"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("grid", "report")
    OUTPUT_TOOLTIPS = ("A row for each image, a column for each codec.", "The mean PSNR of each codec.")

    @classmethod
    def INPUT_TYPES(cls):
        others = {
            f"vae_{number}": node_input("VAE", "Another codec to compare, or any VAE.")
            for number in range(2, MOST_COMPARED + 1)
        }
        return {
            "required": {
                "images": node_input("IMAGE", "Images to send through each codec."),
                "vae_1": node_input("VAE", "A codec from Load Latent Codec, or any VAE."),
                "differences": node_input(
                    "BOOLEAN",
                    "Add a row under each image: reconstruction minus original, where gray means equal.",
                    default=False,
                ),
            },
            "optional": others,
        }

    def compare(self, images, vae_1, differences: bool = False, **others) -> tuple:
        from latent_codec.comfyui.comparison import compare_vaes

        vaes = [vae_1, *(others[name] for name in sorted(others))]
        return compare_vaes(images, vaes, differences)
