"""Nodes for compressed files (.lcf)."""

from pathlib import Path

from latent_codec.comfyui.inputs import CATEGORY, codec_vae, node_input, number_input, number_or_none

SUFFIX = ".lcf"
PLACES = ("input", "output")


class SaveCompressed:
    """Compress images to .lcf files."""

    TITLE = "Save .lcf"
    DESCRIPTION = (
        "Compresses images to .lcf files in ComfyUI's output folder: quantized latents, or indices of a codec with a codebook. "
        "`latent-codec decompress` and Load .lcf open them."
    )
    CATEGORY = CATEGORY
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "report")
    OUTPUT_TOOLTIPS = ("What the files decode to.", "The name and size of each file, a line each.")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": node_input("IMAGE", "Images to compress, a file each, at any size."),
                "vae": node_input(
                    "VAE", "From Load Latent Codec; a continuous codec needs an entropy model in its folder."
                ),
                "filename_prefix": node_input(
                    "STRING", "What file names begin with, as in Save Image.", default="latent-codec"
                ),
                "quality": number_input(
                    "From 0, the smallest file, to 63 or what the entropy model has. -1: the default, or none for "
                    "codecs with a codebook.",
                    default=-1,
                    between=(-1, 255),
                ),
                "max_bytes": number_input(
                    "Largest size of a file, in place of a quality. 0: no limit.",
                    default=0,
                    between=(0, 2**31 - 1),
                ),
            }
        }

    def save(
        self, images, vae, filename_prefix: str = "latent-codec", quality: int = -1, max_bytes: int = 0
    ) -> dict:
        import folder_paths
        from comfy.utils import ProgressBar

        from latent_codec.bitstream import prepare
        from latent_codec.comfyui.images import to_images, to_pixels
        from latent_codec.files import replacing

        codec = codec_vae(vae).codec()
        height, width = images.shape[1:3]
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        files, lines, decoded = [], [], []
        bar = ProgressBar(len(images))
        for image in to_images(images):
            data, values = prepare(codec, image).compress_and_read(
                quality=number_or_none(quality, -1), target_bytes=number_or_none(max_bytes, 0)
            )
            file = f"{name}_{counter:05}_{SUFFIX}"
            with replacing(Path(folder, file)) as written:
                written.write_bytes(data)
            files.append({"filename": file, "subfolder": subfolder, "type": "output"})
            lines.append(
                f"{file}: {len(data):,} bytes, {8 * len(data) / (height * width):.3f} bits per pixel"
            )
            decoded.append(values.image(output_type="pt"))
            counter += 1
            bar.update(1)
        return {"ui": {"files": files}, "result": (to_pixels(decoded), "\n".join(lines))}


class LoadCompressed:
    """Open a .lcf file."""

    TITLE = "Load .lcf"
    DESCRIPTION = "Opens a compressed file from ComfyUI's input or output folder: its image, and its latents."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "LATENT")
    RETURN_NAMES = ("image", "latent")
    OUTPUT_TOOLTIPS = (
        "The image, in its own size.",
        "Its latents, of the image padded to what the codec needs.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "file": node_input(_files(), "A .lcf file in the input folder, or in the output folder."),
                "vae": node_input("VAE", "From Load Latent Codec: the codec that made the file."),
                "partial": node_input(
                    "BOOLEAN", "Decode what is whole of a file that is cut short or damaged.", default=False
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, file: str, vae=None, partial: bool = False) -> str:
        import folder_paths

        stat = Path(folder_paths.get_annotated_filepath(file)).stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"

    def load(self, file: str, vae, partial: bool = False) -> tuple:
        import folder_paths

        from latent_codec.bitstream import read
        from latent_codec.bitstream.compression import tile_for
        from latent_codec.bitstream.container import read_file
        from latent_codec.comfyui.images import to_pixels
        from latent_codec.comfyui.network import samples_of

        codec = codec_vae(vae).codec()
        decoded = read(codec, read_file(Path(folder_paths.get_annotated_filepath(file))), partial=partial)
        header = decoded.container.header
        image = decoded.image(output_type="pt", tile=tile_for(header))
        latents = decoded.latents()
        if header.is_indices:
            raw_latents = codec.family.latents_of_indices([each.to(codec.device) for each in latents])
            latents = codec.latent_space.normalize(raw_latents)
        samples = samples_of(latents, codec.latent_space)
        return to_pixels([image]), {"samples": samples.float().cpu()}


def _files() -> list[str]:
    """Compressed files in the input and output folders, as ComfyUI names them; none outside of ComfyUI."""
    try:
        import folder_paths
    except ModuleNotFoundError:
        return []
    found = []
    for place in PLACES:
        root = Path(folder_paths.get_directory_by_type(place))
        note = "" if place == "input" else f" [{place}]"
        found += sorted(f"{path.relative_to(root).as_posix()}{note}" for path in root.rglob(f"*{SUFFIX}"))
    return found
