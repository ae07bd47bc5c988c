"""Context models of quantized latents and codebook indices: small networks of integers, one for each pass over a grid.

A grid is coded from coarse to fine in five phases, each between the positions of the earlier ones:

    phase 0, every 4th row and column        0 4 2 4 0      The causal context of a position: its nearest neighbors of
    phase 1, the middles of its squares      4 3 4 3 4      earlier phases, on all sides. Within a phase channels follow
    phase 2, the other even ones             2 4 1 4 2      each other in groups, and see the groups before.
    phase 3, odd row and odd column          4 3 4 3 4
    phase 4, the rest                        0 4 2 4 0

This is the order of interlaced images (PNG, ISO/IEC 15948, Adam7) on a quincunx, and context by passes instead of raster
scan (He et al., "Checkerboard Context Model", arXiv:2103.15306). Training and coding share the passes (`latent_passes`,
`index_passes`) and their inputs (`GridContext`).

Networks are trained with the rounding that they run with (quantization-aware training, Jacob et al., arXiv:1712.05877):
weights and activations have 8 bits, a layer's sums stay below 2^24, and a shift follows each sum. So float32, int32
and any order of summation give the same numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec import deprecated
from latent_codec.models.own_weights import OwnWeights
from latent_codec.torch_settings import ignoring_caller_settings

NUM_PHASES = 5
_PHASES = ((0, 4, 2, 4), (4, 3, 4, 3), (2, 4, 1, 4), (4, 3, 4, 3))
"""By row and column, modulo 4."""
NUM_NEIGHBORS = 16
NUM_SIBLINGS = 4
"""Of a position's own phase, in which later groups of channels see the earlier ones."""
MARGIN = 8
"""Positions around a grid that neighbors reach."""
LIMIT = 127
"""Largest absolute value of weights and activations."""
ONE = 32
"""The activation for 1: a standard deviation of a channel, or a neighbor in the grid."""
MAX_SUM = 2**24
"""Float32 adds smaller integers exactly."""


def phase_of(row: Tensor, column: Tensor) -> Tensor:
    """The phase of positions, int64."""
    return torch.tensor(_PHASES, device=row.device)[row % 4, column % 4]


@lru_cache
def neighbor_offsets(phase: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, column) from a position of a phase to its neighbors of earlier phases, and to its siblings; nearest first."""
    reach = range(-MARGIN + 1, MARGIN)
    row, column = next((y, x) for y in range(4) for x in range(4) if _PHASES[y][x] == phase)
    offsets = sorted(
        ((y, x) for y in reach for x in reach), key=lambda each: (each[0] ** 2 + each[1] ** 2, each)
    )
    phases = {(y, x): _PHASES[(row + y) % 4][(column + x) % 4] for y, x in offsets}
    neighbors = [each for each in offsets if phases[each] < phase][:NUM_NEIGHBORS]
    siblings = [each for each in offsets if phases[each] == phase and each != (0, 0)]
    return neighbors, siblings[:NUM_SIBLINGS]


@lru_cache(maxsize=64)
@ignoring_caller_settings()
def grid_places(height: int, width: int, phase: int, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """The places of a phase's positions, row by row, and of their neighbors in the flattened grid.

    Returns:
        int64 (n,): the positions. (K, n): neighbors, and (1 + S, n): the positions themselves and their siblings, both in
        the flattened grid with MARGIN around it.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = (each[phase_of(rows, columns) == phase] for each in (rows, columns))

    def places(offsets: list[tuple[int, int]]) -> Tensor:
        moved = torch.tensor(offsets, dtype=torch.int64).reshape(-1, 2, 1) + MARGIN
        return (rows + moved[:, 0]) * (width + 2 * MARGIN) + columns + moved[:, 1]

    neighbors, siblings = neighbor_offsets(phase)
    found = rows * width + columns, places(neighbors), places([(0, 0), *siblings])
    return tuple(each.to(device) for each in found)


def with_margin(features: Tensor, upper: Tensor | None = None) -> Tensor:
    """Pad features (..., F, h, w) with zeros and flatten them: (..., F, (h + 2 MARGIN) (w + 2 MARGIN)).

    Args:
        upper: those of the upper level, (..., F', h', w'), which go first, at the positions that they cover.
    """
    if upper is not None:
        scale = features.shape[-2] // upper.shape[-2]
        upper = upper.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
        features = torch.cat([upper, features], dim=-3)
    return F.pad(features, (MARGIN,) * 4).flatten(-2)


@dataclass(frozen=True)
class ContextPass:
    """The part of one network: some channels at the positions of one phase of one level."""

    level: int
    phase: int
    channels: slice
    num_features: int
    """Of every position, in the network's inputs."""
    num_before: int
    """Of them, those known before the pass at its own positions and their siblings; they are the first."""

    @property
    def num_channels(self) -> int:
        return self.channels.stop - self.channels.start

    @property
    def num_inputs(self) -> int:
        neighbors, siblings = neighbor_offsets(self.phase)
        return len(neighbors) * (1 + self.num_features) + (1 + len(siblings)) * self.num_before


def latent_passes(num_channels: int, group: int) -> list[ContextPass]:
    """Passes over latents, in coding order: all channels in phase 0, groups of them in later phases."""
    firsts = range(0, num_channels, group)
    slices = [slice(first, min(first + group, num_channels)) for first in firsts]
    later = [
        ContextPass(0, phase, channels, num_channels, channels.start)
        for phase in range(1, NUM_PHASES)
        for channels in slices
    ]
    return [ContextPass(0, 0, slice(0, num_channels), num_channels, 0), *later]


def index_passes(num_levels: int, embedding: int) -> list[ContextPass]:
    """Passes over indices, in coding order; a lower level's network sees the upper level's features first."""
    return [
        ContextPass(level, phase, slice(0, 1), embedding + above, above)
        for level, above in enumerate([0, *[embedding] * (num_levels - 1)])
        for phase in range(NUM_PHASES)
    ]


class GridContext:
    """The causal context of the positions of one grid."""

    def __init__(self, height: int, width: int, *, dtype=torch.int32, device="cpu"):
        self._inside = with_margin(torch.full((1, height, width), ONE, dtype=dtype, device=device))[0]
        self._places = [grid_places(height, width, phase, device) for phase in range(NUM_PHASES)]

    def positions(self, each: ContextPass) -> Tensor:
        """The positions of a pass in the flattened grid, int64 (n,)."""
        return self._places[each.phase][0]

    def inputs(self, each: ContextPass, features: Tensor) -> Tensor:
        """The inputs of a pass's network: neighbors in the grid, their features, and features known before.

        Args:
            features: -LIMIT to LIMIT, (F, P) or (B, F, P), as from `with_margin`.

        Returns:
            (num_inputs, n) or (B, num_inputs, n).
        """
        _, neighbors, siblings = self._places[each.phase]
        parts = [
            self._inside[neighbors].expand(*features.shape[:-2], -1, -1),
            features[..., neighbors].flatten(-3, -2),
        ]
        if each.num_before:
            parts.append(features[..., : each.num_before, :][..., siblings].flatten(-3, -2))
        return torch.cat(parts, dim=-2)


def fork_of(leaves, bit: int, depth: int):
    """The fork that decides binary digit `bit` of leaves, whose higher digits are known, in a tree of this depth."""
    return (1 << depth - 1 - bit) - 1 + (leaves >> bit + 1)


class IntegerLinear(nn.Linear):
    """y = floor((W x + b) / 2^(s - e)), with weights of 8 bits and a shift s for each row.

    Until `freeze_shifts` is called nothing is rounded.

    Args:
        exponents: e of each output, which is e bits finer than activations.
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
    def is_frozen(self) -> Tensor:
        """Whether `freeze_shifts` was called, as a bool on the device, for which a training step does not wait."""
        return self.shifts[0] >= 0

    @torch.no_grad()
    def freeze_shifts(self) -> None:
        """Choose the finest weights of 8 bits for each row, and round from now on."""
        largest = self.weight.abs().amax(1) if self.in_features else torch.zeros_like(self.bias)
        shifts = torch.floor(torch.log2(LIMIT / largest.clamp_min(2.0**-6))).to(torch.int64)
        self.shifts.copy_(torch.maximum(shifts, self.exponents.clamp_min(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Integers (..., inputs, n) -> (..., outputs, n); integers once shifts are frozen."""
        weight, bias, by = self.integers()
        return self.shifted(torch.matmul(weight, x) + bias[:, None], by[:, None])

    def shifted(self, sums: Tensor, by: Tensor) -> Tensor:
        """sums / 2^by, rounded down once shifts are frozen."""
        return rounded_if(self.is_frozen, torch.floor, sums * torch.exp2(-by.to(sums.dtype)))

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and biases, half a unit of the result included, times 2^shift, and the shifts of sums; rounded once frozen."""
        is_frozen = self.is_frozen
        shifts = torch.where(is_frozen, self.shifts, 7)
        by, scale = shifts - self.exponents, torch.exp2(shifts.float())
        weight, bias = self.weight * scale[:, None], self.bias * scale * ONE
        weight = torch.where(is_frozen, weight.clamp(-LIMIT, LIMIT), weight)
        bias = bias + torch.exp2(by.float() - 1) * is_frozen
        return rounded_if(is_frozen, torch.round, weight), rounded_if(is_frozen, torch.round, bias), by


class IntegerMLP(nn.Module):
    """Two hidden layers h = clamp(W x + b, 0, 127) and, for outputs, a last layer that sees the inputs, too.

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
        """Integers (..., inputs, n) -> (..., outputs, n); integers once shifts are frozen."""
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


def rounded_if(condition: Tensor, rounding: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`rounding(x)` where a scalar bool is True, else `x`; both with the gradient of `x`."""
    return x + ((rounding(x) - x) * condition).detach()


class LatentContext(OwnWeights, ModelMixin, ConfigMixin):
    """A context model of a codec's quantized latents at all step sizes: the mean and deviation of each.

        quantized latents of earlier passes --step size, units--> 8-bit features --network of the pass--> mean, log2 deviation

    The distribution is a mixture of Gaussians around that mean, whose shape all passes share.

    Args:
        units: of each channel's features, in the latents' unit: about the standard deviation. Features of latents beyond
            LIMIT / ONE = 4 of them are clipped.
        hidden: width of the networks.
        group: channels that are coded together.
        num_components: of the mixture.
        coarsest: step size of each channel at quality 0, in the latents' unit.
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
            raise ValueError(f"expected {len(units)} coarsest step sizes, one per unit, got {len(coarsest)}")
        self.register_buffer("feature_units", torch.empty(len(units), device="cpu"), persistent=False)
        self.scale_to(units, coarsest)
        self.passes = latent_passes(len(units), group)
        self.networks = nn.ModuleList()
        for each in self.passes:
            count = each.num_channels
            exponents = [self.MEAN_EXPONENT] * count + [self.DEVIATION_EXPONENT] * count
            network = IntegerMLP(each.num_inputs, hidden, exponents)
            with torch.no_grad():
                network.layers[2].bias[count:] = 4.0  # a deviation of 2^4 = 16 of ONE = 32
            self.networks.append(network)
        self.component_weights = nn.Parameter(torch.zeros(num_components))
        self.component_scales = nn.Parameter(torch.linspace(-0.5, 1.0, num_components))

    def scale_to(self, units: list[float], coarsest: list[float]) -> None:
        """Set the units of features and the coarsest step sizes to those measured of a codec."""
        self.register_to_config(units=units, coarsest=coarsest)
        self.feature_units.copy_(torch.tensor(units, device="cpu") / ONE)

    @property
    def num_channels(self) -> int:
        return len(self.config.units)

    steps = deprecated.attribute("steps", "step_sizes")

    def step_sizes(self) -> Tensor:
        """float32 (num_steps, C)."""
        octaves = torch.arange(self.config.num_steps, dtype=torch.float64) / self.STEPS_PER_OCTAVE
        coarsest = torch.tensor(self.config.coarsest, dtype=torch.float64)
        return (coarsest * torch.exp2(-octaves)[:, None]).float()

    def forward(self, quantized: Tensor, step_sizes: Tensor) -> Tensor:
        """Code length in bits of quantized latents (B, C, h, w) at step sizes (B, C): (B, C)."""
        ratios = (step_sizes / self.feature_units)[..., None]
        features = with_margin((quantized * ratios[..., None]).round().clamp(-LIMIT, LIMIT))
        context = GridContext(*quantized.shape[-2:], dtype=features.dtype, device=features.device)
        quantized, bits = quantized.flatten(2), torch.zeros_like(step_sizes)
        for each, network in zip(self.passes, self.networks):
            outputs = network(context.inputs(each, features))
            means, deviations = outputs[:, : each.num_channels], outputs[:, each.num_channels :]
            means = means / 2**self.MEAN_EXPONENT / ratios[:, each.channels]
            deviations = torch.exp2((deviations / 16).clamp(-4, 12)) / ratios[:, each.channels]
            symbols = quantized[:, each.channels, context.positions(each)]
            bits[:, each.channels] += self.bits(symbols - means, deviations).sum(-1)
        return bits

    def bits(self, distances: Tensor, deviations: Tensor) -> Tensor:
        """-log2 of the probability of intervals of 1 around `distances` from the mean."""
        weights = torch.softmax(self.component_weights, 0)
        probabilities = 0
        for weight, scale in zip(weights, self.component_scales):
            spread = deviations * torch.exp2(scale) * 2**0.5
            above, below = (distances.abs() - 0.5) / spread, (distances.abs() + 0.5) / spread
            mass = torch.special.erfc(above) - torch.special.erfc(below)
            probabilities = probabilities + weight / 2 * mass
        return -torch.log2(probabilities.clamp_min(2.0**-24))


class IndexContext(OwnWeights, ModelMixin, ConfigMixin):
    """A context model of codebook indices: a binary tree over the codewords, with a probability at each fork.

        decoded indices, upper levels' too --embedding--> 8-bit features --network of the pass--> hidden h
        fork f on the way to a codeword: P(right side) = sigmoid(w_f h + b_f)

    So each probability is a product of one factor for each bit of an index, taken from a few tables of two symbols
    (hierarchical softmax; Morin and Bengio, 2005).

    Args:
        codebook_sizes: of the levels, top first.
        embedding: features of a codeword.
        hidden: width of the networks.
        trees: codeword of each leaf, -1 where there is none, 2^depth for each level; None: codewords in their order.
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
        self.passes = index_passes(len(codebook_sizes), embedding)
        self.networks, self.forks = nn.ModuleList(), nn.ModuleList()
        for level, size in enumerate(codebook_sizes):
            passes = [each for each in self.passes if each.level == level]
            self.networks.extend(IntegerMLP(each.num_inputs, hidden) for each in passes)
            tree = tree_of(size, trees and trees[level])
            leaves = torch.where(tree < 0, size, tree).argsort(stable=True)[:size]  # of each codeword
            self.register_buffer(f"leaves_{level}", leaves, persistent=False)
            self.forks.append(IntegerLinear(hidden, [0] * (len(tree) - 1)))

    @torch.no_grad()
    def start_from(self, level: int, codewords: Tensor, counts: Tensor) -> None:
        """Initialize features with the codewords (K, D), of variance 1, and forks with the counts (K,) of either side."""
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

    def integer_embedding(self, level: int) -> Tensor:
        """(K, E), -LIMIT to LIMIT; rounded once shifts are frozen."""
        found = (self.embeddings[level] * ONE).clamp(-LIMIT, LIMIT)
        return rounded_if(self.forks[level].is_frozen, torch.round, found)

    def forward(self, indices: list[Tensor]) -> Tensor:
        """Code length in bits of indices, (B, h, w) for each level: (B, levels)."""
        bits, upper = [], None
        for level, grid in enumerate(indices):
            features = self.integer_embedding(level)[grid].movedim(-1, 1)
            context = GridContext(*grid.shape[-2:], dtype=features.dtype, device=grid.device)
            padded, upper = with_margin(features, upper), features
            hidden, coded = [], []
            for each, network in zip(self.passes, self.networks):
                if each.level == level:
                    hidden.append(network(context.inputs(each, padded)))
                    coded.append(grid.flatten(1)[:, context.positions(each)])
            bits.append(self._bits(level, torch.cat(hidden, -1).movedim(1, 2), torch.cat(coded, -1)))
        return torch.stack(bits, 1)

    def _bits(self, level: int, hidden: Tensor, indices: Tensor) -> Tensor:
        """Code length of indices (B, n) under hidden (B, n, H), (B,): summed over the forks on the way to them."""
        forks, leaves = self.forks[level], getattr(self, f"leaves_{level}")[indices]
        weight, bias, by = forks.integers()
        depth = (forks.out_features + 1).bit_length() - 1
        total = 0
        for bit in reversed(range(depth)):
            fork = fork_of(leaves, bit, depth)
            sums = (weight[fork] * hidden).sum(-1) + bias[fork]
            logits = forks.shifted(sums, by[fork]) / ONE
            right = (leaves >> bit & 1).to(logits.dtype)
            total = total + F.binary_cross_entropy_with_logits(logits, right, reduction="none").sum(1)
        return total / math.log(2)


def tree_of(size: int, tree: list[int] | None) -> Tensor:
    """The leaves of a tree over `size` codewords, int64 (2^depth,); of None in their order.

    Raises:
        ValueError: if not every codeword has a leaf.
    """
    depth = (size - 1).bit_length()
    if size < 2:
        raise ValueError("expected a codebook of at least 2 codewords, got one, whose indices need no bits")
    if tree is None:
        tree = [*range(size), *[-1] * (2**depth - size)]
    if len(tree) != 2**depth or sorted(tree)[-size:] != list(range(size)):
        raise ValueError(f"expected {2**depth} leaves with {size} codewords, each once, got {len(tree)}")
    return torch.tensor(tree, device="cpu")


def codeword_tree(codewords: Tensor) -> list[int]:
    """Build a tree whose forks halve the codewords (K, D) along their principal axis: similar ones share a branch."""
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
