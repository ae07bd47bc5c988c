"""A photograph that every installation has: matplotlib's."""

from pathlib import Path

SAMPLE_SIZE = 512
"""Pixels per side of the crop of it that is taken, its middle."""


def sample_photograph() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
