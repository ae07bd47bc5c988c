"""The networks of entropy models in whole numbers: the same results on every machine, by every kernel.

Weights and activations have 8 bits and a layer's sums stay below 2^24, which is proved when a network is made: float32 holds
every such number, so that no order of summation, fused or not, and no matrix kernel can change a result. There are only matrix
products, no convolution, which a library might compute by another algorithm (Winograd, FFT) with other roundings.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from latent_codec.models.context_network import LIMIT, MAX_SUM, WholeNumberMLP

NUM_LAYERS = 3
KERNELS = {"float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True, eq=False)
class WholeNumberNetwork:
    """A trained WholeNumberMLP.

    Raises:
        ValueError: for layers that do not fit each other, or whose sums could reach 2^24.
    """

    weights: tuple[np.ndarray, ...]
    """int8 (outputs, inputs) of each layer."""
    biases: tuple[np.ndarray, ...]
    """int32 (outputs,)."""
    shifts: tuple[np.ndarray, ...]
    """int8 (outputs,): what each sum is divided by, as a power of 2, rounded down."""
    device: str = "cpu"
    kernel: str = "float32"
    """Of the sums: "float32", or "int32", which is slow."""

    def __post_init__(self):
        hidden = self.weights[0].shape[0] if len(self.weights) == NUM_LAYERS else None
        for name, dtype in (("weights", np.int8), ("biases", np.int32), ("shifts", np.int8)):
            arrays = getattr(self, name)
            if len(arrays) != NUM_LAYERS or any(each.dtype != dtype for each in arrays):
                raise ValueError(f"a network needs {NUM_LAYERS} layers, and {name} of {np.dtype(dtype)}")
        for index, (weight, bias, shift) in enumerate(zip(self.weights, self.biases, self.shifts)):
            if weight.ndim != 2 or bias.shape != shift.shape or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"layer {index} has weights {weight.shape}, biases {bias.shape} and shifts {shift.shape}"
                )
            sums = np.abs(weight.astype(np.int64)).sum(1) * LIMIT + np.abs(bias.astype(np.int64))
            if len(sums) and sums.max() >= MAX_SUM:
                raise ValueError(
                    f"sums of layer {index} could reach {sums.max()}; they have to stay below {MAX_SUM}"
                )
            if (shift < 0).any() or (shift > 30).any():
                raise ValueError(
                    f"shifts of layer {index} are {shift.min()} to {shift.max()}; allowed are 0 to 30"
                )
        widths = self.weights[1].shape[1], self.weights[2].shape[1]
        if widths[0] != hidden or widths[1] not in (
            self.weights[1].shape[0],
            self.weights[1].shape[0] + self.inputs,
        ):
            raise ValueError(
                f"its layers take {self.inputs}, {widths[0]} and {widths[1]} inputs, which do not fit each other"
            )

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def outputs(self) -> int:
        return self.weights[2].shape[0]

    @classmethod
    def from_mlp(cls, mlp: WholeNumberMLP) -> "WholeNumberNetwork":
        """What a network was trained to be.

        Raises:
            ValueError: if its shifts are not frozen yet, or its sums could reach 2^24.
        """
        if not mlp.is_frozen:
            raise ValueError("the network is not rounded yet; train it on beyond the point where it is")
        layers = []
        with torch.no_grad():
            for index in range(NUM_LAYERS):
                weight, bias, shift = (each.cpu().numpy() for each in mlp.whole(index))
                layers.append((weight.astype(np.int8), bias.astype(np.int32), shift.astype(np.int8)))
        return cls(*zip(*layers))

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str) -> "WholeNumberNetwork":
        """The inverse of `arrays`, which are taken out.

        Raises:
            KeyError: for a missing array.
            ValueError: for arrays that are no network.
        """
        kinds = ("weights", "biases", "shifts")
        return cls(
            *(tuple(arrays.pop(f"{name}.{index}.{kind}") for index in range(NUM_LAYERS)) for kind in kinds)
        )

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """By the names in an entropy model's file."""
        kinds = (("weights", self.weights), ("biases", self.biases), ("shifts", self.shifts))
        return {f"{name}.{index}.{kind}": each for kind, layers in kinds for index, each in enumerate(layers)}

    def on(self, device: str, kernel: str) -> "WholeNumberNetwork":
        """The same network elsewhere."""
        return replace(self, device=device, kernel=kernel)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Whole numbers (inputs, n), -127 to 127, in any dtype -> int64 (outputs, n)."""
        dtype = KERNELS[self.kernel]
        x = inputs.to(self.device, dtype)
        hidden = self._layer(0, x, dtype).clamp(0, LIMIT)
        hidden = self._layer(1, hidden, dtype).clamp(0, LIMIT)
        if self.weights[2].shape[1] > hidden.shape[0]:
            hidden = torch.cat([hidden, x])
        return self._layer(2, hidden, dtype).to(torch.int64)

    def _layer(self, index: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias, shift = (
            torch.from_numpy(each[index]).to(self.device, dtype)
            for each in (self.weights, self.biases, self.shifts)
        )
        sums = torch.addmm(bias[:, None], weight, x) if len(x) else bias[:, None].expand(-1, x.shape[1])
        if dtype == torch.int32:
            return sums >> shift[:, None]
        return torch.floor(sums * torch.exp2(-shift)[:, None])
