"""What surrounds a value on a grid says of it: small networks of integers, one for each pass over the grid.

A grid is coded from coarse to fine in five phases, each of which lies between the positions of those before:

    phase 0, every 4th row and column        0 4 2 4 0      Neighbours of a position are the nearest ones of earlier
    phase 1, the middles of its squares      4 3 4 3 4      phases, so that they surround it. Within a phase channels
    phase 2, the other even ones             2 4 1 4 2      follow each other in groups, and see the groups before.
    phase 3, odd row and odd column          4 3 4 3 4
    phase 4, the rest                        0 4 2 4 0

This is the order of interlaced images (PNG, ISO/IEC 15948, Adam7) on a quincunx, and context by passes instead of raster
scan (He et al., "Checkerboard Context Model", arXiv:2103.15306). Networks are trained with the rounding that they
run with (quantisation-aware training, Jacob et al., arXiv:1712.05877): weights and activations have 8 bits, a
layer's sums stay below 2^24, and what follows a sum is a shift. So float32, int32 and any order of summation give
the same numbers.
"""

import math
from functools import lru_cache

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.models.own_weights import OwnWeights
from latent_codec.torch_settings import ignoring_caller_settings

NUM_PHASES = 5
NUM_NEIGHBOURS = 16
NUM_SIBLINGS = 4
"""Neighbours of a position's own phase, which later groups of channels see."""
MARGIN = 8
"""Positions around a grid that neighbours may lie in."""
LIMIT = 127
"""Of weights and activations, either side."""
ONE = 32
"""The activation that stands for 1: a standard deviation of a channel, and a neighbour that is in the grid."""
MAX_SUM = 2**24
"""Float32 adds integers exactly up to here."""


def phase_of(row: Tensor, column: Tensor) -> Tensor:
    """The phase of positions, int64."""
    even = (row % 2 == 0) & (column % 2 == 0)
    fourth = (row % 4 == 0) & (column % 4 == 0)
    middle = (row % 4 == 2) & (column % 4 == 2)
    odd = (row % 2 == 1) & (column % 2 == 1)
    phases = torch.where(odd, 3, 4)
    return torch.where(fourth, 0, torch.where(middle, 1, torch.where(even, 2, phases)))


@lru_cache
def neighbour_offsets(phase: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, column) from a position of a phase to its neighbours of earlier phases, and to its siblings; nearest first."""
    reach = range(-MARGIN + 1, MARGIN)
    row, column = next(
        (y, x) for y in range(8, 12) for x in range(8, 12) if phase_of(*torch.tensor([y, x])) == phase
    )
    offsets = sorted(
        ((y, x) for y in reach for x in reach), key=lambda each: (each[0] ** 2 + each[1] ** 2, each)
    )
    phases = {each: int(phase_of(*torch.tensor([row + each[0], column + each[1]]))) for each in offsets}
    neighbours = [each for each in offsets if phases[each] < phase][:NUM_NEIGHBOURS]
    siblings = [each for each in offsets if phases[each] == phase and each != (0, 0)]
    return neighbours, siblings[:NUM_SIBLINGS]


@lru_cache(maxsize=64)
@ignoring_caller_settings()
def grid_places(height: int, width: int, phase: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the positions of a phase and their neighbours lie.

    Returns:
        int64 (n,): positions in the flattened grid, row by row. (K, n): neighbours, and (1 + S, n): the positions
        themselves and their siblings, both in the flattened grid with MARGIN around it.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = (each[phase_of(rows, columns) == phase] for each in (rows, columns))

    def places(offsets: list[tuple[int, int]]) -> Tensor:
        moved = torch.tensor(offsets, dtype=torch.int64).reshape(-1, 2, 1) + MARGIN
        return (rows + moved[:, 0]) * (width + 2 * MARGIN) + columns + moved[:, 1]

    neighbours, siblings = neighbour_offsets(phase)
    return rows * width + columns, places(neighbours), places([(0, 0), *siblings])


def with_margin(grids: Tensor) -> Tensor:
    """Integers (..., h, w) -> flattened with zeros around them, (..., (h + 2 MARGIN) (w + 2 MARGIN))."""
    return F.pad(grids, (MARGIN,) * 4).flatten(-2)


def inputs_of(
    inside: Tensor, features: Tensor, places: tuple[Tensor, Tensor, Tensor], num_before: int
) -> Tensor:
    """What the network of a phase and group sees.

    Args:
        inside: ONE within the grid and 0 in its margin, (P,) as `with_margin` gives it.
        features: -LIMIT to LIMIT, (F, P) or (B, F, P): of every position, channels one after another.
        places: as `grid_places` gives them.
        num_before: of the features, those that earlier groups of the same position have.

    Returns:
        (inputs, n) or (B, inputs, n).
    """
    _, neighbours, siblings = places
    batch = features.shape[:-2]
    parts = [inside[neighbours].expand(*batch, -1, -1), features[..., neighbours].flatten(-3, -2)]
    if num_before:
        parts.append(features[..., :num_before, :][..., siblings].flatten(-3, -2))
    return torch.cat(parts, dim=-2)


def num_inputs(phase: int, num_features: int, num_before: int) -> int:
    """Of a phase and group."""
    neighbours, siblings = neighbour_offsets(phase)
    return len(neighbours) * (1 + num_features) + (1 + len(siblings)) * num_before


class IntegerLinear(nn.Linear):
    """y = floor((W x + b) / 2^(s - e)), with weights of 8 bits and a shift s for each row.

    Until `freeze_shifts` is called nothing is rounded.

    Args:
        exponents: e of each output: how many bits finer than activations it is.
    """

    def __init__(self, inputs: int, exponents: list[int]):
        super().__init__(inputs, len(exponents))
        self.register_buffer("shifts", torch.full((len(exponents),), -1, dtype=torch.int64))
        self.register_buffer("exponents", torch.tensor(exponents, device="cpu"), persistent=False)

    def reset_parameters(self) -> None:
        if self.in_features:
            super().reset_parameters()
        else:
            nn.init.zeros_(self.bias)

    @property
    def is_frozen(self) -> bool:
        return bool(self.shifts[0] >= 0)

    @torch.no_grad()
    def freeze_shifts(self) -> None:
        """Choose the finest weights of 8 bits for each row, and round from now on."""
        largest = self.weight.abs().amax(1) if self.in_features else torch.zeros_like(self.bias)
        shifts = torch.floor(torch.log2(LIMIT / largest.clamp_min(2.0**-6))).to(torch.int64)
        self.shifts.copy_(torch.maximum(shifts, self.exponents.clamp_min(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Integers (..., inputs, n) -> (..., outputs, n), whole once shifts are frozen."""
        weight, bias, by = self.whole()
        return self.shifted(torch.matmul(weight, x) + bias[:, None], by[:, None])

    def shifted(self, sums: Tensor, by: Tensor) -> Tensor:
        """sums / 2^by, rounded down once shifts are frozen."""
        y = sums * torch.exp2(-by.to(sums.dtype))
        return _floor(y) if self.is_frozen else y

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and biases, half a unit of the result included, times 2^shift, and what sums are shifted by."""
        shifts = self.shifts if self.is_frozen else torch.full_like(self.shifts, 7)
        by, scale = shifts - self.exponents, torch.exp2(shifts.float())
        weight, bias = self.weight * scale[:, None], self.bias * scale * ONE
        if self.is_frozen:
            weight = _round(weight.clamp(-LIMIT, LIMIT))
            bias = _round(bias + torch.exp2(by.float() - 1))
        return weight, bias, by


class IntegerMLP(nn.Module):
    """Hidden layers h = clamp(W x + b, 0, 127), and where there are outputs a last layer that sees the inputs, too.

    Args:
        exponents: of the outputs; None: the last hidden layer is the result.
    """

    def __init__(self, inputs: int, hidden: int, exponents: list[int] | None = None):
        super().__init__()
        layers = [IntegerLinear(inputs, [0] * hidden), IntegerLinear(hidden, [0] * hidden)]
        if exponents:
            layers.append(IntegerLinear(hidden + inputs, exponents))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Integers (..., inputs, n) -> (..., outputs, n), whole once shifts are frozen."""
        hidden = self.layers[0](x).clamp(0, LIMIT)
        hidden = self.layers[1](hidden).clamp(0, LIMIT)
        return self.layers[2](torch.cat([hidden, x], dim=-2)) if len(self.layers) > 2 else hidden


def freeze_shifts(context: nn.Module) -> None:
    """Round all layers of a network from now on."""
    for module in context.modules():
        if isinstance(module, IntegerLinear):
            module.freeze_shifts()


def is_frozen(context: nn.Module) -> bool:
    return all(module.is_frozen for module in context.modules() if isinstance(module, IntegerLinear))


def _round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def _floor(x: Tensor) -> Tensor:
    return x + (torch.floor(x) - x).detach()


def channel_groups(num_channels: int, size: int) -> list[tuple[int, int, int]]:
    """Phase, first channel and number of channels of each pass over latents; all channels together in phase 0."""
    firsts = range(0, num_channels, size)
    later = [
        (phase, first, min(size, num_channels - first)) for phase in range(1, NUM_PHASES) for first in firsts
    ]
    return [(0, 0, num_channels), *later]


class LatentContext(OwnWeights, ModelMixin, ConfigMixin):
    """Where the quantised latents of a codec are expected, and how surely: one model for all step sizes.

        levels of earlier passes --steps, units--> 8-bit features --network of the pass--> mean and log2 deviation

    A value is a mixture of Gaussians around that mean, whose shape all passes share.

    Args:
        units: of each channel's features, in the latents' unit: about the standard deviation. Values beyond LIMIT / ONE = 4
            of them are clipped where they are neighbours.
        hidden: width of the networks.
        group: channels that are coded together.
        num_components: of the mixture.
        coarsest: step of each channel at steps index 0, in the latents' unit.
        num_steps: step sizes, each 2^(1 / STEPS_PER_OCTAVE) finer than the one before.
    """

    MEAN_EXPONENT, DEVIATION_EXPONENT = 3, -1
    STEPS_PER_OCTAVE = 16

    @register_to_config
    def __init__(
        self,
        units: list[float],
        coarsest: list[float],
        num_steps: int = 101,
        hidden: int = 64,
        group: int = 1,
        num_components: int = 3,
    ):
        super().__init__()
        if len(units) != len(coarsest):
            raise ValueError(
                f"{len(units)} units and {len(coarsest)} steps came; give one of each per channel."
            )
        self.networks = nn.ModuleList()
        for phase, first, count in channel_groups(len(units), group):
            inputs = num_inputs(phase, len(units), first) if phase else 0
            exponents = [self.MEAN_EXPONENT] * count + [self.DEVIATION_EXPONENT] * count
            network = IntegerMLP(inputs, hidden, exponents)
            with torch.no_grad():
                network.layers[2].bias[count:] = 4.0  # a deviation of 2^4 = 16 of ONE = 32
            self.networks.append(network)
        self.component_weights = nn.Parameter(torch.zeros(num_components))
        self.component_scales = nn.Parameter(torch.linspace(-0.5, 1.0, num_components))

    @property
    def num_channels(self) -> int:
        return len(self.config.units)

    def steps(self) -> Tensor:
        """float32 (num_steps, C)."""
        octaves = torch.arange(self.config.num_steps, dtype=torch.float64) / self.STEPS_PER_OCTAVE
        return (
            torch.tensor(self.config.coarsest, dtype=torch.float64) * torch.exp2(-octaves)[:, None]
        ).float()

    def forward(self, levels: Tensor, steps: Tensor) -> Tensor:
        """Bits of levels (B, C, h, w) at steps (B, C): (B, C)."""
        units = torch.tensor(self.config.units, device=levels.device) / ONE
        ratios = (steps / units)[..., None, None]
        features = with_margin((levels * ratios).round().clamp(-LIMIT, LIMIT))
        height, width = levels.shape[-2:]
        inside = with_margin(torch.full((height, width), float(ONE), device=levels.device))
        flat, ratios = levels.flatten(2), ratios[..., 0]
        bits = torch.zeros_like(steps)
        for (phase, first, count), network in zip(
            channel_groups(self.num_channels, self.config.group), self.networks
        ):
            places = tuple(each.to(levels.device) for each in grid_places(height, width, phase))
            if phase:
                x = inputs_of(inside, features, places, first)
            else:
                x = features.new_zeros(len(levels), 0, len(places[0]))
            channels = slice(first, first + count)
            found = network(x)
            mean = found[:, :count] / 2**self.MEAN_EXPONENT / ratios[:, channels]
            deviation = torch.exp2((found[:, count:] / 16).clamp(-4, 12)) / ratios[:, channels]
            bits[:, channels] += self.bits(flat[:, channels, places[0]] - mean, deviation).sum(-1)
        return bits

    def bits(self, distances: Tensor, deviations: Tensor) -> Tensor:
        """-log2 of the chance of intervals of 1 around `distances` from the mean."""
        weights = torch.softmax(self.component_weights, 0)
        chances = 0
        for weight, scale in zip(weights, self.component_scales):
            spread = deviations * torch.exp2(scale) * 2**0.5
            above, below = (distances.abs() - 0.5) / spread, (distances.abs() + 0.5) / spread
            chances = chances + weight / 2 * (torch.special.erfc(above) - torch.special.erfc(below))
        return -torch.log2(chances.clamp_min(2.0**-24))


class IndexContext(OwnWeights, ModelMixin, ConfigMixin):
    """How likely the indices of codebooks are: a binary tree over the codewords, with a chance at each fork.

        indices around, upper levels' too --embedding--> 8-bit features --network of the pass--> hidden h
        fork f on the way to a codeword: chance of its right side = sigmoid(w_f h + b_f)

    So every chance is a product of as many factors as an index has bits, each of them one of a few tables of two symbols
    (hierarchical softmax; Morin and Bengio, 2005).

    Args:
        codebook_sizes: of the levels, top first.
        embedding: features of a codeword.
        hidden: width of the networks.
        trees: codeword of each leaf, -1 where there is none, 2^depth for each level; None: as the codewords come.
    """

    @register_to_config
    def __init__(
        self,
        codebook_sizes: list[int],
        embedding: int = 16,
        hidden: int = 96,
        trees: list[list[int]] | None = None,
    ):
        super().__init__()
        self.embeddings = nn.ParameterList(
            nn.Parameter(torch.randn(size, embedding)) for size in codebook_sizes
        )
        self.networks, self.forks = nn.ModuleList(), nn.ModuleList()
        for level, size in enumerate(codebook_sizes):
            above = embedding * (level > 0)
            for phase in range(NUM_PHASES):
                inputs = num_inputs(phase, embedding + above, above) if phase or above else 0
                self.networks.append(IntegerMLP(inputs, hidden))
            tree = tree_of(size, trees and trees[level])
            self.register_buffer(f"codes_{level}", _inverse(tree, size), persistent=False)
            self.forks.append(IntegerLinear(hidden, [0] * (len(tree) - 1)))

    @torch.no_grad()
    def start_from(self, level: int, codewords: Tensor, counts: Tensor) -> None:
        """Let codewords be their own features, and forks begin with how often either side was seen.

        Args:
            codewords: (K, D), of variance 1.
            counts: (K,).
        """
        embedding = self.embeddings[level]
        width = min(embedding.shape[1], codewords.shape[1])
        embedding[:, :width] = codewords[:, :width]
        tree = self.tree(level)
        seen = torch.where(tree >= 0, counts[tree] + 0.5, 0.0)
        logits = []
        while len(seen) > 1:
            left, right = seen.view(-1, 2).unbind(1)
            logits.insert(0, torch.log(right / left).clamp(-8, 8).nan_to_num())
            seen = left + right
        self.forks[level].bias.copy_(torch.cat(logits))

    def tree(self, level: int) -> Tensor:
        """Codeword of each leaf, int64 (2^depth,); -1 where there is none."""
        trees = self.config.trees
        return tree_of(self.config.codebook_sizes[level], trees and trees[level])

    def whole_embedding(self, level: int) -> Tensor:
        """(K, E), -LIMIT to LIMIT; whole once shifts are frozen."""
        found = (self.embeddings[level] * ONE).clamp(-LIMIT, LIMIT)
        return _round(found) if self.forks[level].is_frozen else found

    def forward(self, grids: list[Tensor]) -> Tensor:
        """Bits of grids of indices, (B, h, w) for each level: (B, levels)."""
        bits = []
        for level, grid in enumerate(grids):
            height, width = grid.shape[-2:]
            features, above = self._features(level, grid), 0
            if level:
                scale = height // grids[level - 1].shape[-2]
                upper = self._features(level - 1, grids[level - 1])
                upper = upper.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
                features, above = torch.cat([upper, features], dim=1), upper.shape[1]
            features = with_margin(features)
            inside = with_margin(torch.full((height, width), float(ONE), device=grid.device))
            hidden, coded = [], []
            for phase in range(NUM_PHASES):
                places = tuple(each.to(grid.device) for each in grid_places(height, width, phase))
                if phase or above:
                    x = inputs_of(inside, features, places, above)
                else:
                    x = features.new_zeros(len(grid), 0, len(places[0]))
                hidden.append(self.networks[level * NUM_PHASES + phase](x))
                coded.append(grid.flatten(1)[:, places[0]])
            bits.append(self._bits(level, torch.cat(hidden, -1).movedim(1, 2), torch.cat(coded, -1)))
        return torch.stack(bits, 1)

    def _bits(self, level: int, hidden: Tensor, indices: Tensor) -> Tensor:
        """Of indices (B, n) under hidden (B, n, H), (B,): at each of the forks on the way."""
        forks, codes = self.forks[level], getattr(self, f"codes_{level}")[indices]
        weight, bias, by = forks.whole()
        depth = (forks.out_features + 1).bit_length() - 1
        total = 0
        for bit in reversed(range(depth)):
            fork = (1 << depth - 1 - bit) - 1 + (codes >> bit + 1)
            sums = (weight[fork] * hidden).sum(-1) + bias[fork]
            logits = forks.shifted(sums, by[fork]) / ONE
            right = (codes >> bit & 1).to(logits.dtype)
            total = total + F.binary_cross_entropy_with_logits(logits, right, reduction="none").sum(1)
        return total / math.log(2)

    def _features(self, level: int, grid: Tensor) -> Tensor:
        """(B, E, h, w)."""
        return self.whole_embedding(level)[grid].movedim(-1, 1)


def tree_of(size: int, tree: list[int] | None) -> Tensor:
    """The leaves of a tree over `size` codewords, int64 (2^depth,); None: in their order.

    Raises:
        ValueError: if not every codeword has a leaf.
    """
    depth = (size - 1).bit_length()
    if size < 2:
        raise ValueError("a codebook of one codeword needs no entropy model: it says nothing.")
    if tree is None:
        tree = [*range(size), *[-1] * (2**depth - size)]
    if len(tree) != 2**depth or sorted(tree)[-size:] != list(range(size)):
        raise ValueError(
            f"a tree of {len(tree)} leaves came; {size} codewords need {2**depth}, one for each of them."
        )
    return torch.tensor(tree, device="cpu")


def _inverse(tree: Tensor, size: int) -> Tensor:
    """The leaf of each codeword."""
    codes = torch.empty(size, dtype=torch.int64, device="cpu")
    leaves = (tree >= 0).nonzero()[:, 0]
    codes[tree[leaves]] = leaves
    return codes


def codeword_tree(codewords: Tensor) -> list[int]:
    """A tree whose forks halve the codewords (K, D) along their principal axis: alike codewords lie in one branch."""
    depth = (len(codewords) - 1).bit_length()
    groups = [torch.arange(len(codewords))]
    for _ in range(depth):
        halves = []
        for group in groups:
            vectors = codewords[group].double() - codewords[group].double().mean(0)
            axis = torch.linalg.svd(vectors, full_matrices=False).Vh[0] if len(group) > 2 else vectors.sum(0)
            order = group[torch.argsort(vectors @ axis, stable=True)]
            middle = (len(order) + 1) // 2
            halves += [order[:middle], order[middle:]]
        groups = halves
    return [int(group[0]) if len(group) else -1 for group in groups]
