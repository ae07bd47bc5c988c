"""Networks of entropy models in integer arithmetic: the same results on every machine and by every kernel.

Weights and activations have 8 bits and a layer's sums stay below 2^24, which every layer checks: float32 holds such numbers
exactly, so that no order of summation and no matrix kernel can change a result. There are only matrix products, no
convolutions, which a library might compute by another algorithm (Winograd, FFT) with other roundings.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latent_codec.bitstream.checks import check, check_array
from latent_codec.models.context_network import LIMIT, MAX_SUM, IntegerLinear, IntegerMLP
from latent_codec.torch_settings import ignoring_caller_settings

KERNELS = {"float32": torch.float32, "int32": torch.int32}


class Arithmetic(NamedTuple):
    """Device and dtype of sums, float32 or int32, which is slow; they change no result."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A trained IntegerLinear.

    Raises:
        ValueError: for arrays that do not fit each other, or whose sums could reach 2^24.
    """

    weights: np.ndarray
    """int8 (outputs, inputs)."""
    biases: np.ndarray
    """int32 (outputs,)."""
    shifts: np.ndarray
    """int8 (outputs,): of each sum to the right, rounding down."""

    def __post_init__(self):
        check_array(self.weights, "weights", np.int8, (None, None))
        check(len(self.weights) > 0, "at least one row of weights", "none")
        check_array(self.biases, "biases", np.int32, (len(self.weights),))
        check_array(self.shifts, "shifts", np.int8, (len(self.weights),))
        sums = np.abs(self.weights.astype(np.int64)).sum(1) * LIMIT + np.abs(self.biases.astype(np.int64))
        check(sums.max() < MAX_SUM, f"sums of a layer below {MAX_SUM}", f"weights for up to {sums.max()}")
        lowest, highest = self.shifts.min(), self.shifts.max()
        check(lowest >= 0 and highest <= 30, "shifts of 0 to 30", f"{lowest} to {highest}")

    @property
    def inputs(self) -> int:
        return self.weights.shape[1]

    @property
    def outputs(self) -> int:
        return len(self.weights)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: IntegerLinear) -> "IntegerLayer":
        """Export a trained layer, whose shifts have to be frozen."""
        is_frozen, advice = bool(linear.is_frozen), "train it on until it is rounded"
        check(is_frozen, "a network with frozen shifts", f"one in float; {advice}")
        weights, biases, shifts = (each.cpu().numpy() for each in linear.integers())
        return cls(weights.astype(np.int8), biases.astype(np.int32), shifts.astype(np.int8))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str) -> "IntegerLayer":
        """The inverse of `arrays`, which are taken out; KeyError for a missing one."""
        return cls(*(arrays.pop(f"{name}.{kind}") for kind in ("weights", "biases", "shifts")))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """By the names in an entropy model's file."""
        return {f"{name}.{kind}": getattr(self, kind) for kind in ("weights", "biases", "shifts")}

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Integers (inputs, n) -> (outputs, n)."""
        weights, biases, shifts = self._tensors(arithmetic)
        sums = biases[:, None].expand(-1, x.shape[1])
        return _shifted(torch.addmm(sums, weights, x) if self.inputs else sums, shifts[:, None])

    def rows(self, rows: np.ndarray, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Compute one output for each column of (inputs, n), (n,): that of row `rows[i]`, int64 (n,)."""
        weights, biases, shifts = self._tensors(arithmetic)
        rows = torch.from_numpy(rows).to(x.device)
        sums = (weights[rows] * x.T).sum(1, dtype=x.dtype) + biases[rows]
        return _shifted(sums, shifts[rows])

    def _tensors(self, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, biases and shifts; in float32 shifts are powers of 2, exact on every machine."""
        if arithmetic not in self._cache:
            shifts = self.shifts if arithmetic.dtype == torch.int32 else np.ldexp(1.0, -self.shifts)
            arrays = self.weights, self.biases, shifts
            self._cache[arithmetic] = tuple(torch.from_numpy(each).to(*arithmetic) for each in arrays)
        return self._cache[arithmetic]

    @cached_property
    def _cache(self) -> dict[Arithmetic, tuple[Tensor, Tensor, Tensor]]:
        return {}


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A trained IntegerMLP: two hidden layers and, if there is a third, outputs that see the inputs, too.

    Raises:
        ValueError: for layers that do not fit each other.
    """

    layers: tuple[IntegerLayer, ...]

    def __post_init__(self):
        fits = len(self.layers) in (2, 3) and self.layers[1].inputs == self.layers[0].outputs
        check(fits, "2 or 3 layers that fit each other", len(self.layers))
        if len(self.layers) == 3:
            expected, got = self.layers[1].outputs + self.inputs, self.layers[2].inputs
            check(got == expected, f"a last layer of {expected} inputs, hidden layer and inputs", got)

    @property
    def inputs(self) -> int:
        return self.layers[0].inputs

    @property
    def outputs(self) -> int:
        return self.layers[-1].outputs

    @classmethod
    def from_mlp(cls, mlp: IntegerMLP) -> "IntegerNetwork":
        """Export a trained network; errors are those of its layers."""
        return cls(tuple(map(IntegerLayer.from_linear, mlp.layers)))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str) -> "IntegerNetwork":
        """The inverse of `arrays`, which are taken out; errors are those of its layers."""
        layers = []
        while f"{name}.{len(layers)}.weights" in arrays:
            layers.append(IntegerLayer.from_arrays(arrays, f"{name}.{len(layers)}"))
        return cls(tuple(layers))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """By the names in an entropy model's file."""
        return {
            key: array
            for index, layer in enumerate(self.layers)
            for key, array in layer.arrays(f"{name}.{index}").items()
        }

    @ignoring_caller_settings()
    def __call__(self, inputs: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Integers (inputs, n), -127 to 127, in any dtype -> (outputs, n)."""
        x = inputs.to(*arithmetic)
        hidden = self.layers[0](x, arithmetic).clamp(0, LIMIT)
        hidden = self.layers[1](hidden, arithmetic).clamp(0, LIMIT)
        return self.layers[2](torch.cat([hidden, x]), arithmetic) if len(self.layers) > 2 else hidden


def _shifted(sums: Tensor, shifts: Tensor) -> Tensor:
    return sums >> shifts if sums.dtype == torch.int32 else torch.floor(sums * shifts)
