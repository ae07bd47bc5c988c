"""Compare: codecs, JPEG, WebP and AVIF at equal bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch import Tensor

from latent_codec.bitstream import sidecar
from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.evaluation.codec_compressor import CodecCompressor
from latent_codec.evaluation.image_formats import image_formats
from latent_codec.evaluation.rate_distortion import ImageTrials
from latent_codec.evaluation.rate_distortion_result import Trial
from latent_codec.images.tensors import to_pil

FORMATS = ("jpeg", "webp", "avif")


@dataclass(frozen=True, kw_only=True)
class Compressed:
    name: str
    image: Image.Image
    trial: Trial | None
    """Its bytes and figures; None of the original."""
    note: str = ""


def compare(
    codecs: Mapping[str, LatentCodec],
    formats: Sequence[str],
    image: Tensor,
    bits_per_pixel: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Compressed]:
    """The original, then each codec's and each format's largest file of at most so many bits per pixel, decoded.

    Args:
        codecs: by the names that they are to have.
        image: (3, H, W) in [-1, 1].

    Raises:
        SettingError: without a codec or format, or for a codec that has no entropy model.
        ValueError: for a format that this installation lacks.
    """
    compressors = [_compressor(name, codec) for name, codec in codecs.items()] + image_formats(formats)
    if not compressors:
        raise SettingError("codecs", "a codec or a format to compare", advice="tick one")
    bound = bits_per_pixel * image[0].numel() / 8
    found = [Compressed(name="original", image=to_pil(image), trial=None)]
    with TemporaryDirectory() as folder:
        trials = ImageTrials("image", 0, image, Path(folder) / "files")
        for done, compressor in enumerate(compressors):
            if on_progress is not None:
                on_progress(done, len(compressors))
            trial = trials.run_within("", compressor, bound)
            decoded = compressor.decode((Path(folder) / trial.file).read_bytes())
            note = ""
            if len(compressor.qualities) == 1:
                note = "it has one rate, its own"
            elif not trial.fits:
                note = "larger: its coarsest"
            found.append(Compressed(name=compressor.name, image=decoded, trial=trial, note=note))
    return found


def _compressor(name: str, codec: LatentCodec) -> CodecCompressor:
    model = sidecar(codec)
    if codec.channels != 3:
        raise ValueError(
            f"{codec.name} takes images of {codec.channels} channels; expected 3, as the formats have"
        )
    if model is None and not codec.indices_suffice:
        raise SettingError(
            "codecs",
            f"an entropy model in the folder of {codec.name}",
            advice="`latent-codec fit-entropy` fits one",
        )
    compressor = CodecCompressor(codec, model)
    compressor.name = name
    return compressor
