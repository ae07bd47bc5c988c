"""Latent files of one codec -> those of another, by a LatentTranslator."""

from pathlib import Path

from latent_codec.files import replacing
from latent_codec.latents.latent_files import LatentFile, latent_file
from latent_codec.models.latent_translator import LatentTranslator


def write_translated(path: Path, found: LatentFile, translator: LatentTranslator) -> None:
    """Write the target's latents of the images whose latents of the source `found` holds.

    Names, labels and captions stay; sizes too, unless the translator enlarges.

    Raises:
        ValueError: for latents of another codec, naming both, indices, or latents that do not fit.
        OSError: if it cannot be written; then `path` is as it was.
    """
    if found.space_fingerprint != translator.source.space_fingerprint:
        raise ValueError(
            f"{found.path.name} holds {found.kind} of {found.codec_name} (space {found.space_fingerprint}), and this translator "
            f"takes latents of {translator.source}; train one for {found.codec_name}"
        )
    if found.latents is None:
        raise ValueError(
            f"{found.path.name}: expected latents, got indices of {found.codec_name}; encode the images' latents"
        )
    if path.resolve() == found.path.resolve():
        raise ValueError(
            f"{path} would replace the latents that are translated; give another folder for the result"
        )
    upscale = translator.config.upscale
    sizes = [(height * upscale, width * upscale) for height, width in found.sizes]
    translated = []
    for latents, size in zip(found.latents, sizes):
        rows, columns = translator.target.latent_shape(size)
        translated.append(translator.translate(latents)[0, :, :rows, :columns])
    content = latent_file(
        translated,
        codec=translator.target,
        names=found.names,
        sizes=sizes,
        labels=found.labels,
        captions=found.captions,
    )
    with replacing(path) as written:
        written.write_bytes(content)
