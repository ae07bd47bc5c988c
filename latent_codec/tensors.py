"""What a tensor has to be before its values are read."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dense(tensor: object, name: str) -> None:
    """Refuse what holds no values that can be read in place, before an operation does in words of its own.

    Args:
        name: of what is expected, in the plural: "latents".

    Raises:
        ValueError: for a nested, sparse, quantized or meta tensor, and for what is no tensor, saying what to do.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"expected {name} as a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        kind, remedy = "nested", "give a list of tensors"
    elif tensor.is_quantized:
        kind, remedy = "quantized", "call dequantize() on it"
    elif tensor.layout is not torch.strided:
        kind, remedy = f"{str(tensor.layout).removeprefix('torch.')} (sparse)", "call to_dense() on it"
    elif tensor.is_meta:
        kind, remedy = "meta", "it has no values; give the one that it stands for"
    else:
        return
    raise ValueError(f"expected {name} as a dense tensor, got a {kind} one; {remedy}")


def check_floating(tensor: object, name: str) -> None:
    """`check_dense`, and of a floating dtype that torch computes with or converts from (float8, too).

    Raises:
        ValueError: for every other tensor.
    """
    check_dense(tensor, name)
    if tensor.is_floating_point():
        try:
            tensor.flatten()[:1].float()
        except (RuntimeError, NotImplementedError):
            pass
        else:
            return
    dtype = str(tensor.dtype).removeprefix("torch.")
    raise ValueError(f"expected {name} as a floating-point tensor, got {dtype}; convert it to float32")


def check_range(numbers: Tensor, size: int, name: str, meaning: str) -> None:
    """Raise ValueError unless integers are from 0 to `size` - 1.

    Args:
        name: of what they are, in the plural: "indices".
        meaning: of the range: "indices of its codebook".
    """
    if ((numbers < 0) | (numbers >= size)).any():
        found = f"{int(numbers.min())} to {int(numbers.max())}"
        raise ValueError(f"{name}: expected 0 to {size - 1}, {meaning}; got {found}")


def check_shape(
    tensor: Tensor, name: str, *shapes: Sequence[int | str], dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless a tensor has one of `shapes`, whose letters are any length, and `dtype` if one is named."""
    fits = any(
        len(shape) == tensor.ndim and all(isinstance(a, str) or a == b for a, b in zip(shape, tensor.shape))
        for shape in shapes
    )
    if not fits or dtype not in (None, tensor.dtype):
        wanted = " or ".join(f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for shape in shapes)
        wanted, got = f"{name} {wanted}", f"shape {tuple(tensor.shape)}"
        if dtype is not None:
            wanted, got = f"{wanted} in {dtype}", f"{got} in {tensor.dtype}"
        raise ValueError(f"expected {wanted}, got {got}")
