"""The networks of entropy models in integers: the same results on every machine, by every kernel.

Weights and activations have 8 bits and a layer's sums stay below 2^24, which is proved when a layer is made: float32 holds
every such number, so that no order of summation, fused or not, and no matrix kernel can change a result. There are only matrix
products, no convolution, which a library might compute by another algorithm (Winograd, FFT) with other roundings.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from latent_codec.models.context_network import LIMIT, MAX_SUM, IntegerLinear, IntegerMLP
from latent_codec.torch_settings import ignoring_caller_settings

KERNELS = {"float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True)
class Arithmetic:
    """Where and how sums are computed; it changes no result.

    Raises:
        ValueError: for another kernel.
    """

    device: str = "cpu"
    kernel: str = "float32"
    """Of the sums: "float32", or "int32", which is slow."""

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel}; allowed are {', '.join(KERNELS)}")

    def tensor(self, array: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(array).to(self.device, KERNELS[self.kernel])


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
    """int8 (outputs,): what each sum is divided by, as a power of 2, rounded down."""

    def __post_init__(self):
        types = self.weights.dtype, self.biases.dtype, self.shifts.dtype
        if types != (np.int8, np.int32, np.int8) or self.weights.ndim != 2:
            raise ValueError(f"a layer has weights, biases and shifts of {', '.join(map(str, types))}")
        if not self.biases.shape == self.shifts.shape == self.weights.shape[:1] or not len(self.biases):
            raise ValueError(
                f"a layer has {len(self.biases)} biases for weights of shape {self.weights.shape}"
            )
        sums = np.abs(self.weights.astype(np.int64)).sum(1) * LIMIT + np.abs(self.biases.astype(np.int64))
        if sums.max() >= MAX_SUM:
            raise ValueError(f"sums of a layer could reach {sums.max()}; they have to stay below {MAX_SUM}")
        if (self.shifts < 0).any() or (self.shifts > 30).any():
            raise ValueError(f"shifts are {self.shifts.min()} to {self.shifts.max()}; allowed are 0 to 30")

    @property
    def inputs(self) -> int:
        return self.weights.shape[1]

    @property
    def outputs(self) -> int:
        return len(self.weights)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: IntegerLinear) -> "IntegerLayer":
        """What a layer was trained to be.

        Raises:
            ValueError: if it is not rounded yet, or its sums could reach 2^24.
        """
        if not linear.is_frozen:
            raise ValueError("the network is not rounded yet; train it on beyond the point where it is")
        weights, biases, shifts = (each.cpu().numpy() for each in linear.whole())
        return cls(weights.astype(np.int8), biases.astype(np.int32), shifts.astype(np.int8))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str) -> "IntegerLayer":
        """The inverse of `arrays`, which are taken out.

        Raises:
            KeyError: for a missing array.
            ValueError: for arrays that are no layer.
        """
        return cls(*(arrays.pop(f"{name}.{kind}") for kind in ("weights", "biases", "shifts")))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """By the names in an entropy model's file."""
        return {f"{name}.{kind}": getattr(self, kind) for kind in ("weights", "biases", "shifts")}

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Integers (inputs, n) -> (outputs, n)."""
        weights, biases, _ = self._tensors(arithmetic)
        if not self.inputs:
            return self._shifted(biases[:, None].expand(-1, x.shape[1]), slice(None), arithmetic)
        sums = torch.addmm(biases[:, None], weights, x)
        return self._shifted(sums, slice(None), arithmetic)

    def rows(self, rows: np.ndarray, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """One output for each column of (inputs, n): that of row `rows[i]`, int64 (n,). Gives (n,)."""
        weights, biases, _ = self._tensors(arithmetic)
        rows = torch.from_numpy(rows).to(x.device)
        sums = (weights[rows] * x.T).sum(1, dtype=x.dtype) + biases[rows]
        return self._shifted(sums[:, None], rows, arithmetic)[:, 0]

    def _shifted(self, sums: Tensor, rows: slice | Tensor, arithmetic: Arithmetic) -> Tensor:
        shifts = self._tensors(arithmetic)[2][rows, None]
        return sums >> shifts if sums.dtype == torch.int32 else torch.floor(sums * shifts)

    def _tensors(self, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, biases and shifts; for sums in float32 powers of 2 instead of shifts, exact on every machine."""
        if arithmetic not in self._cache:
            shifts = self.shifts if arithmetic.kernel == "int32" else np.ldexp(1.0, -self.shifts)
            arrays = self.weights, self.biases, shifts
            self._cache[arithmetic] = tuple(map(arithmetic.tensor, arrays))
        return self._cache[arithmetic]

    @cached_property
    def _cache(self) -> dict[Arithmetic, tuple[Tensor, Tensor, Tensor]]:
        return {}


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A trained IntegerMLP: two hidden layers, and where there is a third the outputs, which see the inputs, too.

    Raises:
        ValueError: for layers that do not fit each other.
    """

    layers: tuple[IntegerLayer, ...]

    def __post_init__(self):
        if len(self.layers) not in (2, 3) or self.layers[1].inputs != self.layers[0].outputs:
            raise ValueError("the layers of a network do not fit each other")
        if len(self.layers) == 3 and self.layers[2].inputs != self.layers[1].outputs + self.inputs:
            raise ValueError("the last layer of a network does not fit those before")

    @property
    def inputs(self) -> int:
        return self.layers[0].inputs

    @property
    def outputs(self) -> int:
        return self.layers[-1].outputs

    @classmethod
    def from_mlp(cls, mlp: IntegerMLP) -> "IntegerNetwork":
        """What a network was trained to be; errors are those of its layers."""
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
        x = arithmetic.tensor(inputs)
        hidden = self.layers[0](x, arithmetic).clamp(0, LIMIT)
        hidden = self.layers[1](hidden, arithmetic).clamp(0, LIMIT)
        return self.layers[2](torch.cat([hidden, x]), arithmetic) if len(self.layers) > 2 else hidden
