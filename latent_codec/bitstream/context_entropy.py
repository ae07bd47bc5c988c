"""Tables chosen by what surrounds a value, in whole numbers: see models/context_network.py for the order of passes.

values so far --multiply, shift--> 8-bit features --network--> mean and deviation --steps--> table and offset    latents
indices so far --embedding-------> 8-bit features --network--> the highest of its outputs: the table             indices
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from latent_codec.bitstream.context_tables import DEVIATIONS_PER_OCTAVE, FRACTIONS, SMALLEST, mixture_tables
from latent_codec.bitstream.entropy_model import Pass, Prediction, Shape
from latent_codec.bitstream.stored_entropy import StoredEntropy
from latent_codec.bitstream.tables import Tables, cumulative_tables
from latent_codec.bitstream.whole_numbers import KERNELS, WholeNumberNetwork
from latent_codec.codec import LatentCodec
from latent_codec.models.context_network import (
    LIMIT,
    NUM_PHASES,
    ONE,
    IndexContext,
    LatentContext,
    grid_places,
    inputs_of,
    num_inputs,
    with_margin,
)

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
    networks: tuple[WholeNumberNetwork, ...]
    """One for each pass, in the order of passes."""

    def on(self, device: str = "cpu", kernel: str = "float32") -> "ContextEntropy":
        """The same model, whose networks run on a device, by sums of "float32" or "int32" (slow): the results are the same.

        Raises:
            ValueError: for another kernel.
        """
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel}; allowed are {', '.join(KERNELS)}")
        return replace(self, networks=tuple(network.on(device, kernel) for network in self.networks))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = self.tables.arrays()
        for number, network in enumerate(self.networks):
            arrays |= network.arrays(f"networks.{number}")
        own = {field.name for field in fields(self)} - {field.name for field in fields(ContextEntropy)}
        return arrays | {name: getattr(self, name) for name in own}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], **names: str) -> "ContextEntropy":
        tables, networks = Tables.from_arrays(arrays), []
        while f"networks.{len(networks)}.0.weights" in arrays:
            networks.append(WholeNumberNetwork.from_arrays(arrays, f"networks.{len(networks)}"))
        own = [
            field.name
            for field in fields(cls)
            if field.name not in {each.name for each in fields(ContextEntropy)}
        ]
        found = {name: arrays.pop(name) for name in own}
        return cls(tables=tables, networks=tuple(networks), **found, **names)

    def _outputs(
        self, number: int, features: Tensor, shape: Shape, phase: int, num_before: int
    ) -> np.ndarray:
        """Of network `number`, int64 (outputs, n); features (F, h, w)."""
        places = grid_places(*shape[1:], phase)
        if phase == 0 and not num_before:
            x = torch.zeros(0, len(places[0]))
        else:
            inside = with_margin(torch.full(shape[1:], ONE))
            x = inputs_of(inside, with_margin(features), places, num_before)
        return self.networks[number](x).cpu().numpy()


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
        for field in fields(LatentContextEntropy)[len(fields(ContextEntropy)) :]:
            array, dtype = getattr(self, field.name), types.get(field.name, np.int32)
            if (
                array.dtype != dtype
                or array.ndim != 1 + (field.name in per_step)
                or not np.isfinite(array).all()
            ):
                raise ValueError(
                    f"{field.name} are {array.dtype} of shape {array.shape}; expected finite {np.dtype(dtype)}"
                )
            if field.name in per_step and array.shape != self.steps.shape:
                raise ValueError(f"{field.name} have shape {array.shape}, and steps {self.steps.shape}")
        if (self.steps <= 0).any() or self.shifts.shape != self.tables.starts.shape:
            raise ValueError("a step is not above 0, or shifts are not those of the tables")
        last = self.firsts + (FRACTIONS - 1 >> np.clip(self.drops, 0, 30))
        if not len(self.firsts) == len(self.drops) > 0 or (self.drops < 0).any() or (self.firsts < 0).any():
            raise ValueError("firsts and drops are not one for each deviation")
        if last.max() >= len(self.tables):
            raise ValueError(f"{len(self.tables)} tables came, and deviations number them up to {last.max()}")
        for network, (phase, first, count) in zip(self.networks, self._passes, strict=True):
            wanted = num_inputs(phase, self.num_channels, first) if phase else 0
            if (network.inputs, network.outputs) != (wanted, 2 * count):
                raise ValueError(f"a network has {network.inputs} inputs; its place in the grid has {wanted}")

    @property
    def num_channels(self) -> int:
        return self.steps.shape[1]

    @property
    def num_steps(self) -> int:
        """Step sizes to choose from."""
        return len(self.steps)

    @property
    def _passes(self) -> list[tuple[int, int, int]]:
        """Phase, first channel and number of channels of each network."""
        channels = self.num_channels
        if len(self.networks) < 2 or not 0 < self.networks[1].outputs // 2 <= channels:
            raise ValueError(f"{len(self.networks)} networks are not enough for {channels} channels")
        group = self.networks[1].outputs // 2
        firsts = range(0, channels, group)
        later = [
            (phase, first, min(group, channels - first)) for phase in range(1, NUM_PHASES) for first in firsts
        ]
        return [(0, 0, channels), *later]

    def passes(self, shapes: Sequence[Shape]) -> list[Pass]:
        if len(shapes) != 1 or shapes[0][0] != self.num_channels:
            raise ValueError(f"this entropy model is not for values of shapes {list(shapes)}")
        _, height, width = shapes[0]
        found = []
        for phase, first, count in self._passes:
            positions = grid_places(height, width, phase)[0].numpy()
            channels = np.arange(first, first + count)[:, None] * (height * width)
            found.append(Pass(0, (channels + positions).reshape(-1), LAYER_OF_PHASE[phase]))
        return found

    def predict(
        self, passes: Sequence[Pass], number: int, values: Sequence[np.ndarray], steps_index: int
    ) -> Prediction:
        phase, first, count = self._passes[number]
        multipliers = self.feature_multipliers[steps_index].astype(np.int64)[:, None, None]
        features = _scaled(values[0], multipliers).clip(-LIMIT, LIMIT)
        outputs = self._outputs(number, torch.from_numpy(features), values[0].shape, phase, first)
        channels = slice(first, first + count)
        means = _scaled(
            outputs[:count], self.mean_multipliers[steps_index, channels].astype(np.int64)[:, None]
        )
        offsets = means + FRACTIONS // 2 >> 4
        fractions = means + FRACTIONS // 2 - FRACTIONS * offsets
        deviations = outputs[count:] + self.deviation_offsets[steps_index, channels, None] >> 1
        deviations = deviations.clip(0, len(self.firsts) - 1)
        numbers = self.firsts[deviations] + (fractions >> self.drops[deviations])
        return Prediction(numbers.reshape(-1).astype(np.int64), offsets.reshape(-1))

    @classmethod
    def export(cls, context: LatentContext, codec: LatentCodec, rate_weight: float) -> "LatentContextEntropy":
        """What a trained network says, as whole numbers.

        Args:
            rate_weight: that files will be quantised with, as a rule.
        """
        with torch.no_grad():
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
            networks=tuple(map(WholeNumberNetwork.from_mlp, context.networks)),
            steps=steps,
            shifts=found.shifts,
            firsts=found.firsts,
            drops=found.drops,
            feature_multipliers=np.round(per_unit * 2**PRECISION).astype(np.int32),
            mean_multipliers=np.round(means * 2**PRECISION).astype(np.int32),
            deviation_offsets=np.round(deviations).astype(np.int32),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexContextEntropy(ContextEntropy):
    """Of indices: one of a level's tables for each (models/context_network.py, IndexContext)."""

    kind = "index context"

    embeddings: np.ndarray
    """int8 (codewords of all levels, E): each codeword's features."""
    num_codewords: np.ndarray
    """int32: of each level."""
    first_tables: np.ndarray
    """int32: of each level; its last network's outputs are as many tables."""

    def __post_init__(self):
        if self.embeddings.dtype != np.int8 or self.embeddings.ndim != 2 or (self.embeddings < -LIMIT).any():
            raise ValueError(
                f"embeddings are {self.embeddings.dtype} of shape {self.embeddings.shape}; expected int8 (K, E)"
            )
        for name in ("num_codewords", "first_tables"):
            array = getattr(self, name)
            if (
                array.dtype != np.int32
                or array.ndim != 1
                or len(array) != len(self.num_codewords)
                or (array < 0).any()
            ):
                raise ValueError(
                    f"{name} are {array.dtype} of shape {array.shape}; expected int32, one for each level"
                )
        if self.num_codewords.sum(dtype=np.int64) != len(self.embeddings):
            raise ValueError(
                f"{len(self.embeddings)} embeddings came for {self.num_codewords.tolist()} codewords"
            )
        if len(self.networks) != NUM_PHASES * len(self.num_codewords):
            raise ValueError(f"{len(self.networks)} networks came for {len(self.num_codewords)} levels")
        for number, network in enumerate(self.networks):
            level, phase = divmod(number, NUM_PHASES)
            wanted = self._num_inputs(level, phase)
            tables = slice(self.first_tables[level], self.first_tables[level] + network.outputs)
            if network.inputs != wanted or tables.stop > len(self.tables):
                raise ValueError(
                    f"a network has {network.inputs} inputs; its place in the grids has {wanted}"
                )
            sizes, minimums = self.tables.sizes[tables], self.tables.minimums[tables]
            if (
                (sizes != self.num_codewords[level]).any()
                or minimums.any()
                or self.tables.escapes[tables].any()
            ):
                raise ValueError(
                    f"tables of level {level} are not over its {self.num_codewords[level]} codewords"
                )

    def _num_inputs(self, level: int, phase: int) -> int:
        size = self.embeddings.shape[1]
        above = size * (level > 0)
        return num_inputs(phase, size + above, above) if phase or above else 0

    def passes(self, shapes: Sequence[Shape]) -> list[Pass]:
        if len(shapes) > len(self.num_codewords) or any(shape[0] != 1 for shape in shapes):
            raise ValueError(f"this entropy model is not for values of shapes {list(shapes)}")
        layers = LAYER_OF_PHASE if len(shapes) == 1 and len(self.num_codewords) == 1 else None
        return [
            Pass(level, grid_places(*shape[1:], phase)[0].numpy(), layers[phase] if layers else level)
            for level, shape in enumerate(shapes)
            for phase in range(NUM_PHASES)
        ]

    def predict(
        self, passes: Sequence[Pass], number: int, values: Sequence[np.ndarray], steps_index: int
    ) -> Prediction:
        level, phase = divmod(number, NUM_PHASES)
        shape = values[level].shape
        features = self._features(level, values[level][0])
        above = 0
        if level:
            scale = shape[1] // values[level - 1].shape[1]
            upper = self._features(level - 1, values[level - 1][0])
            upper = upper.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            features, above = torch.cat([upper, features]), len(upper)
        outputs = self._outputs(number, features, shape, phase, above)
        numbers = self.first_tables[level] + outputs.argmax(0)
        return Prediction(numbers.astype(np.int64), np.zeros(len(numbers), np.int64))

    def _features(self, level: int, indices: np.ndarray) -> Tensor:
        """int64 (E, h, w)."""
        first = int(self.num_codewords[:level].sum())
        return torch.from_numpy(self.embeddings[first + indices].astype(np.int64)).movedim(-1, 0)

    @classmethod
    def export(cls, context: IndexContext, codec: LatentCodec) -> "IndexContextEntropy":
        """What a trained network says, as whole numbers."""
        starts, firsts = [], []
        with torch.no_grad():
            for level in range(len(context.config.codebook_sizes)):
                firsts.append(len(starts))
                starts += list(
                    cumulative_tables(torch.softmax(context.table_logits(level).double(), -1).cpu().numpy())
                )
            embeddings = torch.cat([context.whole_embedding(level) for level in range(len(firsts))])
        return cls(
            tables=Tables.concatenate(starts, [0] * len(starts), escapes=False),
            space_fingerprint=codec.space_fingerprint,
            codec_name=codec.name,
            networks=tuple(map(WholeNumberNetwork.from_mlp, context.networks)),
            embeddings=embeddings.cpu().numpy().astype(np.int8),
            num_codewords=np.array(context.config.codebook_sizes, np.int32),
            first_tables=np.array(firsts, np.int32),
        )


def _scaled(values: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """values multipliers / 2^PRECISION, rounded to the nearest, halves up."""
    return values * multipliers + (1 << PRECISION - 1) >> PRECISION
