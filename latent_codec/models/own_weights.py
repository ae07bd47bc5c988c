"""Weights in memory of their own: aligned as torch allocates, and independent of the file that they were read from.

A tensor mapped from a safetensors file starts wherever the file has it. Matrix products then round otherwise than with
the weights that were saved, and the file stays open.
"""

import torch
from torch import Tensor, nn


def own_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the CPU, whatever torch's default dtype and device; `dtype` None keeps the tensor's."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu").copy_(tensor)


def own_weights(module: nn.Module) -> None:
    """Copy every parameter and buffer of `module` that is on the CPU, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def check_finite(tensor: Tensor, key: str, where: object, stored: torch.dtype | None = None) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        where: what messages call the file or the model.
        stored: dtype that `tensor` was converted from; None: it was not converted.

    Raises:
        ValueError: with the file and the tensor.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.element_size() == 1:
        tensor = tensor.float()
    if all(bound.isfinite() for bound in tensor.aminmax()):
        return
    largest = torch.finfo(tensor.dtype).max
    if stored is not None and torch.finfo(stored).max > largest:
        name = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{where}: {key} holds NaN, infinity or values beyond {name}'s {largest:.4g}")
    raise ValueError(f"{where}: {key} holds NaN or infinity; the weights are damaged: fetch them again")


class OwnWeights:
    """For models of diffusers: `from_pretrained` leaves no weights mapped to the file, so that it may be replaced.

    It precedes ModelMixin among the bases.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        own_weights(loaded[0] if isinstance(loaded, tuple) else loaded)  # with loading info it is a pair
        return loaded
