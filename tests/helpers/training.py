"""A training small enough for a test: a few images of 24 px, a network of 8 channels, some steps."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from latent_codec.images.sources import open_source
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import TrainingConfig
from latent_codec.training.loop import TrainingResult, train

os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU, whose sums are not exact to the bit

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def tiny_config(**sections: dict) -> TrainingConfig:
    """The smallest run, with the given sections' keys put over it: `tiny_config(run={"steps": 2})`."""
    table = {
        "model": {
            "arguments": {
                "block_out_channels": [8, 8],
                "norm_num_groups": 4,
                "latent_channels": 2,
                "mid_block_add_attention": False,
            }
        },
        "data": {"height": 16},
        "optimizer": {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2},
        "run": {"steps": 3, "log_every": 1, "precision": "fp32", "calibration_images": 4},
    }
    for name, values in sections.items():
        table.setdefault(name, {}).update(values)
    return TrainingConfig.from_dict(table)


def write_images(folder: Path, count: int = 6, channels: int = 3, size: tuple[int, int] = (24, 24)) -> Path:
    """Noise on a gradient, as PNG files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        slope = np.linspace(0, 200, size[1])[None, :, None]
        pixels = (slope + random.integers(0, 56, (*size, channels))).astype(np.uint8)
        if channels == 4:
            pixels[..., 3] = 255
        Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, MODES[channels]).save(
            folder / f"{number:02d}.png"
        )
    return folder


def run_tiny(images: Path, out: Path, **sections: dict) -> TrainingResult:
    config = tiny_config(**sections)
    return train(config, build_autoencoder(config), open_source(images), out)


def gradients(checkpoint: Path, beta: float = 0.9) -> dict[int, torch.Tensor]:
    """The gradients of a run's first step, by the optimizer's parameter numbers: Adam's first moment is (1 - beta) g."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    return {number: entry["exp_avg"] / (1 - beta) for number, entry in state.items()}


def weights(checkpoint: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoint / f"{name}.safetensors")
