"""Indices of a discrete codec: how much of its codebooks images use, what they cost in bits, and what they look like.

    images --encode_indices--> index maps --CodeMeter--> CodeStatistics
                                   |
    codebook --codeword_tiles--> tiles --index_map--> image of the indices
                                   +---codebook_image--> image of the codewords

Levels are in the order of `LatentCodec.encode_indices`, top first.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction

import torch
from PIL import Image
from torch import Tensor

from latent_codec.codec import LatentCodec
from latent_codec.components import codec_facts
from latent_codec.evaluation.meters import Batch
from latent_codec.files import plain
from latent_codec.images.tensors import enlarged, to_uint8
from latent_codec.previews.full import rgb
from latent_codec.torch_settings import ignoring_caller_settings

NEIGHBORHOOD = 5
"""A codeword is shown amid equal ones on a grid of at least this side, because decoders see beyond a position.

On an f8 VQGAN's decoder, tiles differ from those amid 33 x 33 equal codewords by 31 of 255 levels in the mean
where the grid's side is 1, 7 where it is 3, 3 where it is 5 and 1.3 where it is 9, at three times the work.
"""

DECODE_PIXELS = 512 * 512
"""Codewords are decoded in batches of at most this many pixels, whatever the size of the codebook."""

IMAGE_SIDE = 768
"""Images of small codebooks are enlarged by a whole factor up to about this side."""

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601)."""


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """How images use the codebook of one level.

    With shares p of the codewords among all indices, entropy = -sum p log2 p and perplexity = 2^entropy, which
    is exp of the entropy in nats. Both are of order 0: the code length per index under a static model.
    """

    codebook_size: int
    first_grid: tuple[int, int]
    """Height and width of the first image's index map."""
    num_indices: int
    used_codes: int
    dead_codes: int
    """Codewords that none of these images uses."""
    perplexity: float
    """1 (only one codeword) to codebook_size (all alike)."""
    entropy: float
    """Bits per index."""
    bits_per_pixel: float
    """Entropy times indices, per pixel of the images without padding."""
    fixed_length_bits_per_pixel: float
    """The same with log2(codebook_size) bits for every index."""
    counts: list[int]
    """How often each codeword is used, (codebook_size,)."""


@dataclass(frozen=True, kw_only=True)
class CodeStatistics:
    """How images use a codec's codebooks: an entry per level, and what all levels cost together."""

    levels: list[CodeUsage]
    first_size: tuple[int, int]
    """Height and width of the first image."""
    num_pixels: int
    bits_per_pixel: float
    """Of order 0, summed over the levels."""
    fixed_length_bits_per_pixel: float
    note: str = ""
    """What to know before these figures are compared with others."""

    def to_dict(self) -> dict:
        """Plain data for JSON, without the counts."""
        found = asdict(self)
        for level in found["levels"]:
            del level["counts"]
        return plain(found)


class CodeMeter:
    """Gathers CodeStatistics one batch at a time, of images that may differ in size.

    Counts are added up, so that a larger image weighs more. Padding adds indices, which must be stored like
    all others, but no pixels.
    """

    def __init__(self, codec: LatentCodec):
        self.counts = [torch.zeros(size, dtype=torch.int64) for size in codec.codebook_sizes]
        self.first_grids: list[tuple[int, int]] = []
        self.first_size: tuple[int, int] | None = None
        self.num_pixels = 0
        self.from_codewords = codec.indices_suffice

    def add(self, batch: Batch) -> None:
        """Count in the indices."""
        index_maps, size = batch.encoding.indices, tuple(batch.originals.shape[2:])
        for counts, indices in zip(self.counts, index_maps, strict=True):
            counts += torch.bincount(indices.flatten(), minlength=len(counts)).cpu()
        if not self.num_pixels:
            self.first_size, self.first_grids = size, [tuple(indices.shape[1:]) for indices in index_maps]
        self.num_pixels += len(batch.originals) * math.prod(size)

    def result(self) -> CodeStatistics:
        """
        Raises:
            ValueError: if nothing was counted.
        """
        if not self.num_pixels:
            raise ValueError("no indices were counted; add those of an image first")
        levels = [
            code_usage(counts, first_grid, self.num_pixels)
            for counts, first_grid in zip(self.counts, self.first_grids)
        ]
        notes = []
        if not self.from_codewords:
            notes.append("images were decoded from latents that were not snapped to the codebook")
        if any(level.num_indices < 10 * level.codebook_size for level in levels):
            notes.append("fewer than 10 indices per codeword: more images would show more use and entropy")
        return CodeStatistics(
            levels=levels,
            first_size=self.first_size,
            num_pixels=self.num_pixels,
            bits_per_pixel=sum(level.bits_per_pixel for level in levels),
            fixed_length_bits_per_pixel=sum(level.fixed_length_bits_per_pixel for level in levels),
            note="; ".join(notes),
        )


def code_usage(counts: Tensor, first_grid: tuple[int, int], num_pixels: int) -> CodeUsage:
    """The figures of one level, from how often each codeword was used, int64 (codebook_size,)."""
    num_indices, codebook_size = int(counts.sum()), len(counts)
    entropy = abs(float(torch.special.entr(counts.double() / num_indices).sum())) / math.log(2)
    used_codes = int((counts > 0).sum())
    return CodeUsage(
        codebook_size=codebook_size,
        first_grid=first_grid,
        num_indices=num_indices,
        used_codes=used_codes,
        dead_codes=codebook_size - used_codes,
        perplexity=2**entropy,
        entropy=entropy,
        bits_per_pixel=entropy * num_indices / num_pixels,
        fixed_length_bits_per_pixel=math.log2(codebook_size) * num_indices / num_pixels,
        counts=counts.tolist(),
    )


def grid_shapes(codec: LatentCodec, height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each level's index map, for an image of `height` by `width`, padded as the codec does it."""
    return codec_facts.grid_shapes([each.side for each in codec.levels], height, width)


def fixed_length_bits_per_pixel(codec: LatentCodec, height: int, width: int) -> float:
    """log2(codebook_size) bits for every index of every level, per pixel of a `height` by `width` image."""
    shapes = grid_shapes(codec, height, width)
    return codec_facts.fixed_length_bits(shapes, codec.codebook_sizes) / (height * width)


@ignoring_caller_settings()
def codeword_tiles(
    codec: LatentCodec, level: int = 0, *, on_progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """What each codeword of a level paints where all around it are the same: one position of a constant index map.

    The other levels of a HierarchicalVQ stay at their mean codewords.

    Args:
        on_progress: called with (codewords done, codewords in all).

    Returns:
        RGB, uint8 (codebook_size, 3, side, side), on the CPU; alpha is composed over white. `side` is the level's
        `codec.levels`, without its fraction.

    Raises:
        ValueError: if the codec has no such level.
    """
    num_levels = len(codec.codebook_sizes)
    if not 0 <= level < num_levels:
        has = f"levels 0 to {num_levels - 1}" if num_levels else "no codebook"
        raise ValueError(f"level is {level}; {codec.name} has {has}.")
    codebook_size, sides = codec.codebook_sizes[level], [each.side for each in codec.levels]
    image_side = sides[0] * -(-NEIGHBORHOOD * sides[level] // sides[0])
    first, side = int(image_side // sides[level] // 2 * sides[level]), int(sides[level])
    tiles = []
    for indices in torch.arange(codebook_size).split(max(DECODE_PIXELS // image_side**2, 1)):
        images = _decode_constant(codec, level, indices, image_side)
        middle = images[:, :, first : first + side, first : first + side]
        tiles.append(to_uint8(rgb(middle)).cpu())
        if on_progress:
            on_progress(int(indices[-1]) + 1, codebook_size)
    return torch.cat(tiles)


def mean_colors(tiles: Tensor) -> Tensor:
    """The mean color of each tile, uint8 (codebook_size, 3)."""
    return tiles.float().mean((2, 3)).round().to(torch.uint8)


def false_colors(codebook_size: int) -> Tensor:
    """A color for every index, the same for the same index everywhere, uint8 (codebook_size, 3).

    The first points of the R3 sequence, which keep far apart in the cube of colors (Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018): x_n = n (1/g, 1/g^2, 1/g^3) mod 1 with g^4 = g + 1.
    """
    g = 1.2207440846057596
    steps = torch.tensor([g**-1, g**-2, g**-3], dtype=torch.float64)
    points = (torch.arange(1, codebook_size + 1).unsqueeze(1) * steps) % 1
    return (points * 256).floor().to(torch.uint8)


def codebook_image(
    codec: LatentCodec, *, level: int = 0, counts: list[int] | None = None, tiles: Tensor | None = None
) -> Image.Image:
    """All codewords of a level, one tile each, in about a square.

    Rows go from dark to light by the tiles' mean luma, and within a row by hue. With `counts`, those
    never used come last, below an empty stripe as high as a tile.

    Args:
        counts: how often each is used (CodeUsage.counts).
        tiles: of `codeword_tiles`, where they are there already.

    Raises:
        ValueError: if the codec has no such level, or counts or tiles are not those of its codebook.
    """
    tiles = codeword_tiles(codec, level) if tiles is None else tiles
    counts = [1] * len(tiles) if counts is None else counts
    if not len(counts) == len(tiles) == codec.codebook_sizes[level]:
        raise ValueError(
            f"expected {codec.codebook_sizes[level]} counts and tiles, as level {level} has codewords, got {len(counts)} and {len(tiles)}"
        )
    is_used = torch.tensor(counts) > 0
    columns = math.isqrt(len(tiles) - 1) + 1
    colors = mean_colors(tiles)
    parts = [
        _tiled(tiles[chosen[_order(colors[chosen], columns)]], columns)
        for chosen in (is_used.nonzero().flatten(), (~is_used).nonzero().flatten())
        if len(chosen)
    ]
    stripe = torch.full((3, tiles.shape[2], parts[0].shape[2]), 255, dtype=torch.uint8)
    sheet = torch.cat([parts[0], stripe, parts[1]], 1) if len(parts) == 2 else parts[0]
    return enlarged(_to_image(sheet), IMAGE_SIDE // max(sheet.shape[1:]))


def index_map(
    indices: Tensor,
    *,
    side: int | Fraction,
    size: tuple[int, int] | None = None,
    colors: Tensor | None = None,
) -> Image.Image:
    """An index map as an image: a square of one color for each index.

    Args:
        indices: int64 (h, w).
        side: of a square in pixels: the level's `side` gives the coded image's size.
        size: (height, width) to crop to, the coded image's; None keeps the padding.
        colors: of the indices, uint8 (codebook_size, 3): `mean_colors` of the codewords' tiles, for instance.
            None means `false_colors`, which tell indices apart and say nothing of what they paint.

    Raises:
        ValueError: for indices of another shape, or indices without a color.
    """
    if indices.ndim != 2 or not indices.numel():
        raise ValueError(f"expected an index map (h, w), no side 0, got shape {tuple(indices.shape)}")
    indices = indices.cpu()
    colors = false_colors(int(indices.max()) + 1) if colors is None else colors
    if not 0 <= indices.min() <= indices.max() < len(colors):
        raise ValueError(
            f"indices run from {int(indices.min())} to {int(indices.max())}; there are {len(colors)} colors."
        )
    image = _to_image(colors[indices].permute(2, 0, 1))
    image = image.resize((int(image.width * side), int(image.height * side)), Image.Resampling.NEAREST)
    height, width = size or (image.height, image.width)
    return image.crop((0, 0, width, height))


def _decode_constant(codec: LatentCodec, level: int, indices: Tensor, side: int) -> Tensor:
    """Square images, (N, C, side, side) in [-1, 1], each of one of the indices everywhere on its level."""
    shapes = grid_shapes(codec, side, side)
    maps = [torch.zeros(len(indices), *shape, dtype=torch.int64) for shape in shapes]
    maps[level] = indices.cpu().view(-1, 1, 1).expand(-1, *shapes[level])
    known = [torch.full(each.shape, number == level) for number, each in enumerate(maps)]
    return codec.decode_indices(maps, known=known, output_type="pt")


def _order(colors: Tensor, columns: int) -> Tensor:
    """Places of `colors`, (N, 3), row by row: rows from dark to light, within a row by hue."""
    red, green, blue = colors.double().unbind(1)
    luma = colors.double() @ torch.tensor(LUMA, dtype=torch.float64)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    rows = luma.argsort(stable=True).split(columns)
    return torch.cat([row[hue[row].argsort(stable=True)] for row in rows])


def _tiled(tiles: Tensor, columns: int) -> Tensor:
    """Tiles (N, 3, side, side) row by row on white, a pixel apart -> (3, H, W)."""
    num_rows, side = -(-len(tiles) // columns), tiles.shape[2]
    cells = torch.full((num_rows * columns, 3, side + 1, side + 1), 255, dtype=torch.uint8)
    cells[: len(tiles), :, :side, :side] = tiles
    cells = cells.view(num_rows, columns, 3, side + 1, side + 1)
    return cells.permute(2, 0, 3, 1, 4).reshape(3, num_rows * (side + 1), -1)[:, :-1, :-1]


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
