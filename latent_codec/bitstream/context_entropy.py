"""Tables chosen by what surrounds a value, in integers: see models/context_network.py for the order of passes.

values so far --multiply, shift--> 8-bit features --network--> mean and deviation --steps--> table and offset    latents
indices so far --embedding-------> 8-bit features --network, fork--> a chance: the table                         indices
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from latent_codec.bitstream.context_tables import DEVIATIONS_PER_OCTAVE, FRACTIONS, SMALLEST, mixture_tables
from latent_codec.bitstream.entropy_model import Pass, Prediction, Shape
from latent_codec.bitstream.integer_inference import Arithmetic, IntegerLayer, IntegerNetwork
from latent_codec.bitstream.stored_entropy import StoredEntropy
from latent_codec.bitstream.tables import Tables, cumulative_tables
from latent_codec.codec import LatentCodec
from latent_codec.models.context_network import (
    LIMIT,
    NUM_PHASES,
    ONE,
    IndexContext,
    LatentContext,
    channel_groups,
    grid_places,
    inputs_of,
    num_inputs,
    with_margin,
)
from latent_codec.torch_settings import ignoring_caller_settings

LARGEST_MULTIPLIER = 1 << 28
"""So that a product with a value, which is below 2^33, has 64 bits."""
LARGEST_LOGIT = 320
"""Of forks, times ONE: a chance of 2^-14.4."""
PRECISION = 16
"""Bits behind the point of multipliers."""
LAYER_OF_PHASE = (0, 1, 1, 2, 3)
"""Of a grid that is alone; with several levels each is a layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextEntropy(StoredEntropy):
    """What entropy models with context networks have in common.

    Raises:
        ValueError: for arrays that do not fit each other.
    """

    tables: Tables
    space_fingerprint: str
    codec_name: str
    """For messages."""
    networks: tuple[IntegerNetwork, ...]
    """One for each phase of each level, or for each phase and group of channels, in the order of passes."""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    """Of the networks; no part of what is stored."""

    def on(self, device: str = "cpu", kernel: str = "float32") -> "ContextEntropy":
        """The same model, whose networks run on a device, by sums of "float32" or "int32" (slow): the results are the same.

        Raises:
            ValueError: for another kernel.
        """
        return replace(self, arithmetic=Arithmetic(device, kernel))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = self.tables.arrays() | {name: getattr(self, name) for name in self._own_fields()}
        for number, network in enumerate(self.networks):
            arrays |= network.arrays(f"networks.{number}")
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], **names: str) -> "ContextEntropy":
        return cls(**cls._taken(arrays), **names)

    @classmethod
    def _taken(cls, arrays: dict[str, np.ndarray]) -> dict:
        """The fields that `arrays` hold, which are taken out."""
        tables, networks = Tables.from_arrays(arrays), []
        while f"networks.{len(networks)}.0.weights" in arrays:
            networks.append(IntegerNetwork.from_arrays(arrays, f"networks.{len(networks)}"))
        own = {name: arrays.pop(name) for name in cls._own_fields()}
        return {"tables": tables, "networks": tuple(networks), **own}

    @classmethod
    def _own_fields(cls) -> list[str]:
        """Names of the arrays that a subclass adds."""
        return [each.name for each in fields(cls) if each.type is np.ndarray or each.type == "np.ndarray"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentContextEntropy(ContextEntropy):
    """Of latents: a mean and a deviation for each value (models/context_network.py, LatentContext)."""

    kind = "latent context"

    steps: np.ndarray
    """float32 (num_steps, C), falling, in the latents' unit."""
    shifts: np.ndarray
    """float32, flat like `tables.starts`: what lies between a level and the mean of its latents, in steps."""
    firsts: np.ndarray
    """int32: the first table of each deviation."""
    drops: np.ndarray
    """int32: bits of the fraction that each deviation's tables do without."""
    feature_multipliers: np.ndarray
    """int32 (num_steps, C): features per level, times 2^16."""
    mean_multipliers: np.ndarray
    """int32 (num_steps, C): sixteenths of a level per output of the networks, times 2^16."""
    deviation_offsets: np.ndarray
    """int32 (num_steps, C): what is added to sixteenths of an octave, so that half of it is a deviation's number."""

    def __post_init__(self):
        per_step = ("steps", "feature_multipliers", "mean_multipliers", "deviation_offsets")
        types = {"steps": np.float32, "shifts": np.float32}
        for name in self._own_fields():
            array, dtype = getattr(self, name), types.get(name, np.int32)
            if array.dtype != dtype or array.ndim != 1 + (name in per_step) or not np.isfinite(array).all():
                raise ValueError(
                    f"{name} are {array.dtype} of shape {array.shape}; expected finite {np.dtype(dtype)}"
                )
            if name in per_step and array.shape != self.steps.shape:
                raise ValueError(f"{name} have shape {array.shape}, and steps {self.steps.shape}")
        if (self.steps <= 0).any() or self.shifts.shape != self.tables.starts.shape:
            raise ValueError("a step is not above 0, or shifts are not those of the tables")
        for name in ("feature_multipliers", "mean_multipliers"):
            array = getattr(self, name)
            if array.min() < 0 or array.max() > LARGEST_MULTIPLIER:
                raise ValueError(
                    f"{name} are {array.min()} to {array.max()}; allowed are 0 to {LARGEST_MULTIPLIER}"
                )
        last = self.firsts.astype(np.int64) + (FRACTIONS - 1 >> np.clip(self.drops, 0, 30))
        if not len(self.firsts) == len(self.drops) > 0 or (self.drops < 0).any() or (self.firsts < 0).any():
            raise ValueError("firsts and drops are not one for each deviation")
        if last.max() >= len(self.tables):
            raise ValueError(f"{len(self.tables)} tables came, and deviations number them up to {last.max()}")
        if len(self.networks) != len(self.groups):
            raise ValueError(f"{len(self.networks)} networks came for {len(self.groups)} passes")
        for network, (phase, first, count) in zip(self.networks, self.groups):
            wanted = num_inputs(phase, self.num_channels, first) if phase else 0
            if (network.inputs, network.outputs, len(network.layers)) != (wanted, 2 * count, 3):
                raise ValueError(f"a network has {network.inputs} inputs; its place in the grid has {wanted}")

    @property
    def num_channels(self) -> int:
        return self.steps.shape[1]

    @property
    def num_steps(self) -> int:
        """Step sizes to choose from."""
        return len(self.steps)

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Phase, first channel and number of channels of each network."""
        channels = self.num_channels
        if len(self.networks) < 2 or not 0 < self.networks[1].outputs // 2 <= channels:
            raise ValueError(f"{len(self.networks)} networks are not enough for {channels} channels")
        return channel_groups(channels, self.networks[1].outputs // 2)

    def predictor(self, shapes: Sequence[Shape], steps_index: int) -> "LatentPredictor":
        if len(shapes) != 1 or shapes[0][0] != self.num_channels:
            raise ValueError(f"this entropy model is not for values of shapes {list(shapes)}")
        return LatentPredictor(self, shapes[0], steps_index)

    @classmethod
    @ignoring_caller_settings()
    def export(cls, context: LatentContext, codec: LatentCodec, rate_weight: float) -> "LatentContextEntropy":
        """What a trained network says, as integers.

        Args:
            rate_weight: that files will be quantised with, as a rule.
        """
        weights = torch.softmax(context.component_weights.double(), 0).cpu().numpy()
        scales = torch.exp2(context.component_scales.double()).cpu().numpy()
        steps = context.steps().cpu().numpy()
        per_unit = steps.astype(np.float64) / (np.array(context.config.units) / ONE)
        found = mixture_tables(weights, scales, rate_weight)
        means = FRACTIONS / per_unit / 2**context.MEAN_EXPONENT
        per_octave = 2 * DEVIATIONS_PER_OCTAVE
        # Half a number is added, so that the shift rounds.
        deviations = -per_octave * (np.log2(per_unit) + SMALLEST) + 1
        return cls(
            tables=found.tables,
            space_fingerprint=codec.space_fingerprint,
            codec_name=codec.name,
            networks=tuple(map(IntegerNetwork.from_mlp, context.networks)),
            steps=steps,
            shifts=found.shifts,
            firsts=found.firsts,
            drops=found.drops,
            feature_multipliers=np.round(per_unit * 2**PRECISION).astype(np.int32),
            mean_multipliers=np.round(means * 2**PRECISION).astype(np.int32),
            deviation_offsets=np.round(deviations).astype(np.int32),
        )


class LatentPredictor:
    """Of one tile of latents."""

    @ignoring_caller_settings()
    def __init__(self, model: LatentContextEntropy, shape: Shape, steps_index: int):
        self._model, self._steps_index = model, steps_index
        self._inside = with_margin(torch.full(shape[1:], ONE))
        self._places = [grid_places(*shape[1:], phase) for phase in range(NUM_PHASES)]
        self.passes = []
        for phase, first, count in model.groups:
            channels = np.arange(first, first + count)[:, None] * (shape[1] * shape[2])
            positions = (channels + self._places[phase][0].numpy()).reshape(-1)
            self.passes.append(Pass(0, positions, LAYER_OF_PHASE[phase]))

    @ignoring_caller_settings()
    def predict(self, number: int, values: Sequence[np.ndarray]) -> Prediction:
        model, steps_index = self._model, self._steps_index
        phase, first, count = model.groups[number]
        places = self._places[phase]
        if phase:
            multipliers = model.feature_multipliers[steps_index].astype(np.int64)[:, None, None]
            features = _scaled(values[0], multipliers).clip(-LIMIT, LIMIT).astype(np.int32)
            x = inputs_of(self._inside, with_margin(torch.from_numpy(features)), places, first)
        else:
            x = torch.zeros(0, len(places[0]))
        outputs = model.networks[number](x, model.arithmetic).cpu().numpy().astype(np.int64)
        channels = slice(first, first + count)
        means = _scaled(
            outputs[:count], model.mean_multipliers[steps_index, channels].astype(np.int64)[:, None]
        )
        offsets = means + FRACTIONS // 2 >> 4
        fractions = means + FRACTIONS // 2 - FRACTIONS * offsets
        deviations = outputs[count:] + model.deviation_offsets[steps_index, channels, None] >> 1
        deviations = deviations.clip(0, len(model.firsts) - 1)
        numbers = model.firsts[deviations] + (fractions >> model.drops[deviations])
        return Prediction(numbers.reshape(-1).astype(np.int64), offsets.reshape(-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexContextEntropy(ContextEntropy):
    """Of indices: a tree over each level's codewords (models/context_network.py, IndexContext).

    Table t is for a fork whose right side has the chance sigmoid((t - LARGEST_LOGIT) / ONE).
    """

    kind = "index context"

    forks: tuple[IntegerLayer, ...]
    """One for each level, a row for each fork: fork f is followed by 2 f + 1 and 2 f + 2."""
    embeddings: np.ndarray
    """int8 (codewords of all levels, E): each codeword's features."""
    leaves: np.ndarray
    """int32: the codeword of each leaf, -1 where there is none; all levels' trees, one after another."""

    def __post_init__(self):
        if self.embeddings.dtype != np.int8 or self.embeddings.ndim != 2 or (self.embeddings < -LIMIT).any():
            raise ValueError(
                f"embeddings are {self.embeddings.dtype} of shape {self.embeddings.shape}; expected int8 (K, E)"
            )
        if self.leaves.dtype != np.int32 or self.leaves.ndim != 1:
            raise ValueError(
                f"leaves are {self.leaves.dtype} of shape {self.leaves.shape}; expected int32, flat"
            )
        if len(self.networks) != NUM_PHASES * len(self.forks) or not self.forks:
            raise ValueError(f"{len(self.networks)} networks came for {len(self.forks)} levels")
        if sum(forks.outputs + 1 for forks in self.forks) != len(self.leaves):
            raise ValueError(f"{len(self.leaves)} leaves do not belong to the forks that came")
        for tree in self.trees:
            present = np.sort(tree[tree >= 0])
            if len(tree) & len(tree) - 1 or not np.array_equal(present, np.arange(len(present))):
                raise ValueError("a tree's leaves are not the codewords, each once")
        if sum(self.codebook_sizes) != len(self.embeddings):
            raise ValueError(f"{len(self.embeddings)} embeddings came for {self.codebook_sizes} codewords")
        if (self.tables.sizes != 2).any() or self.tables.minimums.any() or self.tables.escapes.any():
            raise ValueError("tables are not of two symbols")
        if len(self.tables) % 2 == 0:
            raise ValueError(f"{len(self.tables)} tables came; there is one in the middle")
        for number, network in enumerate(self.networks):
            level, phase = divmod(number, NUM_PHASES)
            size = self.embeddings.shape[1]
            above = size * (level > 0)
            wanted = num_inputs(phase, size + above, above) if phase or above else 0
            if (network.inputs, network.outputs, len(network.layers)) != (
                wanted,
                self.forks[level].inputs,
                2,
            ):
                raise ValueError(
                    f"a network has {network.inputs} inputs; its place in the grids has {wanted}"
                )

    @cached_property
    def trees(self) -> list[np.ndarray]:
        """Of each level: the codeword of each leaf, -1 where there is none."""
        sizes = [forks.outputs + 1 for forks in self.forks]
        return np.split(self.leaves, np.cumsum(sizes)[:-1])

    @cached_property
    def depths(self) -> list[int]:
        """Of each level's tree: binary digits of a leaf's number."""
        return [(len(tree) - 1).bit_length() for tree in self.trees]

    @cached_property
    def codebook_sizes(self) -> list[int]:
        return [int((tree >= 0).sum()) for tree in self.trees]

    @cached_property
    def _leaf_of_codeword(self) -> list[np.ndarray]:
        found = []
        for tree, size in zip(self.trees, self.codebook_sizes):
            codes = np.empty(size, np.int64)
            codes[tree[tree >= 0]] = np.flatnonzero(tree >= 0)
            found.append(codes)
        return found

    @cached_property
    def leaf_features(self) -> list[Tensor]:
        """int32 (2^depth, E) of each level: the features of each leaf's codeword, 0 where there is none."""
        found, first = [], 0
        for tree, size in zip(self.trees, self.codebook_sizes):
            rows = np.where(tree[:, None] >= 0, self.embeddings[first + np.maximum(tree, 0)], 0)
            found.append(torch.from_numpy(rows.astype(np.int32)))
            first += size
        return found

    def codes(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        for level, (indices, size) in enumerate(zip(values, self.codebook_sizes)):
            if indices.size and not 0 <= indices.min() <= indices.max() < size:
                raise ValueError(f"an index of level {level} is not of its {size} codewords")
        return [codes[indices] for codes, indices in zip(self._leaf_of_codeword, values)]

    def values(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [tree[leaves].astype(np.int64) for tree, leaves in zip(self.trees, codes)]

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = super().arrays()
        for level, forks in enumerate(self.forks):
            arrays |= forks.arrays(f"forks.{level}")
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], **names: str) -> "IndexContextEntropy":
        forks = []
        while f"forks.{len(forks)}.weights" in arrays:
            forks.append(IntegerLayer.from_arrays(arrays, f"forks.{len(forks)}"))
        return cls(forks=tuple(forks), **cls._taken(arrays), **names)

    def predictor(self, shapes: Sequence[Shape], steps_index: int) -> "IndexPredictor":
        if len(shapes) > len(self.forks) or any(shape[0] != 1 for shape in shapes):
            raise ValueError(f"this entropy model is not for values of shapes {list(shapes)}")
        return IndexPredictor(self, shapes)

    @classmethod
    @ignoring_caller_settings()
    def export(cls, context: IndexContext, codec: LatentCodec) -> "IndexContextEntropy":
        """What a trained network says, as integers."""
        levels = range(len(context.config.codebook_sizes))
        chances = 1 / (1 + np.exp(-np.arange(-LARGEST_LOGIT, LARGEST_LOGIT + 1) / ONE))
        embeddings = torch.cat([context.whole_embedding(level) for level in levels])
        return cls(
            tables=Tables.concatenate(
                list(cumulative_tables(np.stack([1 - chances, chances], 1))),
                [0] * len(chances),
                escapes=False,
            ),
            space_fingerprint=codec.space_fingerprint,
            codec_name=codec.name,
            networks=tuple(map(IntegerNetwork.from_mlp, context.networks)),
            forks=tuple(map(IntegerLayer.from_linear, context.forks)),
            embeddings=embeddings.cpu().numpy().astype(np.int8),
            leaves=torch.cat([context.tree(level) for level in levels]).numpy().astype(np.int32),
        )


class IndexPredictor:
    """Of one tile of indices, whose codes are leaves of trees."""

    @ignoring_caller_settings()
    def __init__(self, model: IndexContextEntropy, shapes: Sequence[Shape]):
        self._model = model
        self._key, self._hidden = None, None
        is_alone = len(model.forks) == 1
        self.passes, self._phases = [], []
        for level, shape in enumerate(shapes):
            for phase in range(NUM_PHASES):
                positions = grid_places(*shape[1:], phase)[0].numpy()
                layer = LAYER_OF_PHASE[phase] if is_alone else level
                bits = reversed(range(model.depths[level]))
                passes = [Pass(level, positions, layer, bit) for bit in bits]
                self.passes += passes
                self._phases += [phase] * len(passes)

    @ignoring_caller_settings()
    def predict(self, number: int, values: Sequence[np.ndarray]) -> Prediction:
        model, each, phase = self._model, self.passes[number], self._phases[number]
        if self._key != (each.level, phase):
            self._key, self._hidden = (each.level, phase), self._hidden_layer(each.level, phase, values)
        depth = model.depths[each.level]
        prefixes = values[each.level].reshape(-1)[each.positions] >> each.bit + 1
        forks = (1 << depth - 1 - each.bit) - 1 + prefixes
        logits = model.forks[each.level].rows(forks, self._hidden, model.arithmetic)
        largest = len(model.tables) // 2
        numbers = logits.cpu().numpy().astype(np.int64).clip(-largest, largest) + largest
        return Prediction(numbers, np.zeros_like(numbers))

    def _hidden_layer(self, level: int, phase: int, values: Sequence[np.ndarray]) -> Tensor:
        model, (height, width) = self._model, values[level].shape[1:]
        places = grid_places(height, width, phase)
        if phase == 0 and level == 0:
            x = torch.zeros(0, len(places[0]))
        else:
            features, above = self._features(level, values[level][0]), 0
            if level:
                scale = height // values[level - 1].shape[1]
                upper = self._features(level - 1, values[level - 1][0])
                upper = upper.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
                features, above = torch.cat([upper, features]), len(upper)
            inside = with_margin(torch.full((height, width), ONE))
            x = inputs_of(inside, with_margin(features), places, above)
        return model.networks[level * NUM_PHASES + phase](x, model.arithmetic)

    def _features(self, level: int, leaves: np.ndarray) -> Tensor:
        """int32 (E, h, w)."""
        return self._model.leaf_features[level][torch.from_numpy(leaves)].movedim(-1, 0)


def _scaled(values: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """values multipliers / 2^PRECISION, rounded to the nearest, halves up."""
    return values * multipliers + (1 << PRECISION - 1) >> PRECISION
