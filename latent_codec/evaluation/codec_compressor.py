"""A codec among the compressors that are measured against each other."""

from PIL import Image

from latent_codec.bitstream import decompress, prepare
from latent_codec.bitstream.container import SUFFIX
from latent_codec.bitstream.entropy_model import EntropyModel
from latent_codec.codec import LatentCodec


class CodecCompressor:
    """A codec as a `Compressor`, by its compressed files.

    Args:
        entropy_model: fitted to it; None where indices have none.
    """

    def __init__(self, codec: LatentCodec, entropy_model: EntropyModel | None):
        self.suffix = SUFFIX
        self.codec, self.entropy_model, self.name = codec, entropy_model, codec.name
        num_steps = 0 if entropy_model is None else entropy_model.num_step_sizes
        self.qualities = range(num_steps) if num_steps else [None]
        self._image, self._prepared = None, None

    def encode(self, image: Image.Image, quality: int | None) -> bytes:
        if image is not self._image:
            self._image = image
            self._prepared = prepare(self.codec, image, entropy_model=self.entropy_model)
        return self._prepared.compress(quality=quality)

    def decode(self, data: bytes) -> Image.Image:
        return decompress(self.codec, data, entropy_model=self.entropy_model)
