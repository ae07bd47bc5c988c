"""Checks of an entropy model's arrays, which may come from a damaged file or a hostile one."""

import numpy as np


def check(holds: bool, expected: str, got: object) -> None:
    """Raise ValueError with what is expected and what is there instead, unless it `holds`."""
    if not holds:
        raise ValueError(f"expected {expected}, got {got}")


def check_array(array: np.ndarray, name: str, dtype: type, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless an array has a dtype and a shape, whose None stand for any length."""
    fits = array.ndim == len(shape) and all(side in (None, got) for side, got in zip(shape, array.shape))
    written = str(shape).replace("None", "any")
    expected = f"{name} in {np.dtype(dtype)} of shape {written}"
    check(array.dtype == dtype and fits, expected, f"{array.dtype} of shape {array.shape}")
