"""Images as a codec that makes one vector of each was trained on them."""

from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.images.tensors import fit_square


def vector_side(codec: LatentCodec) -> int | None:
    """Side of the square images of which a codec makes one vector each, a 1x1 grid; None of codecs with larger grids.

    It is the side of its training images (`sample_size` in its config).
    """
    side = codec.autoencoder.config.get("sample_size")
    has_grid = codec.is_discrete or codec.family.groups
    is_one = not has_grid and isinstance(side, int) and 0 < side <= codec.family.side_multiple
    return side if is_one else None


def fit_image(image: Tensor, codec: LatentCodec, side: int | None = None) -> Tensor:
    """Resize an image (C, H, W) and cut it to a square, where a codec needs it.

    Args:
        side: of the square. None: the one that the codec's class takes, if it takes one only; of codecs that make one
            vector of an image (`vector_side`) at most the side of their training images, as `encode` continues
            smaller ones beyond their edges; other codecs take images of any size.
    """
    if side is None and codec.family.only_size is not None:
        side = codec.family.only_size[0]
    if side is None and (largest := vector_side(codec)) is not None:
        side = min(largest, *image.shape[-2:])
    return image if side is None else fit_square(image, side)
