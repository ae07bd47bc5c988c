"""scikit-learn, which the extra [analysis] brings, imported where it is needed."""

from importlib import import_module
from types import ModuleType


def scikit(module: str) -> ModuleType:
    """A module of scikit-learn: `scikit("cluster").KMeans`.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(
            'this needs scikit-learn, which is not installed: pip install "latent-codec[analysis]"'
        ) from error
