"""Reading latents of 256x256 images (4x32x32, float16) in one process, against the training of a small transformer on them.

    pytest tests/benchmarks/test_data_set_reading.py -s -o addopts=

Processor time counts, so that other programs on the machine fall out. The transformer is DiT-S/2's width with half its
layers, trained on one thread as examples/train_dit_on_latents.py does; readers shuffle, in batches of 32.
"""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from tables import table
from torch.utils.data import DataLoader

from latent_codec import LatentCodec, LatentDataset
from latent_codec.latents.importing import import_latents
from latent_codec.latents.plan import EncodingOptions

NUM_SAMPLES, BATCH_SIZE = 1000, 32

pytestmark = pytest.mark.usefixtures("one_thread")


def samples_per_second(count: int, work: Callable[[], None], rounds: int = 2) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return count / min(seconds)


def training_speed() -> float:
    network = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        num_layers=6,
        sample_size=32,
        patch_size=2,
    )
    optimizer = torch.optim.AdamW(network.parameters())
    latents, labels = torch.randn(4, 4, 32, 32), torch.zeros(4, dtype=torch.int64)

    def step() -> None:
        velocity = network(latents, torch.rand(4) * 1000, labels).sample
        velocity[:, :4].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return samples_per_second(len(latents), step)


def test_reading_is_much_faster_than_training(tmp_path):
    values = np.random.default_rng(0).normal(size=(NUM_SAMPLES, 4, 32, 32)).astype(np.float16)
    np.save(tmp_path / "latents.npy", values)
    codec = LatentCodec.from_pretrained("default")
    training = training_speed()
    rows, slowest = [], float("inf")
    for container in ("webdataset", "parquet", "safetensors"):
        options = EncodingOptions(container=container, dtype="float16", images_per_shard=250)
        import_latents(codec, [tmp_path / "latents.npy"], tmp_path / container, options, values="scaled")

        def stream(folder=tmp_path / container) -> None:
            for batch in LatentDataset(folder).stream(BATCH_SIZE, shuffle=True):
                assert batch["latents"].dtype == torch.float32

        def loader(folder=tmp_path / container) -> None:
            for batch in DataLoader(LatentDataset(folder), batch_size=BATCH_SIZE, shuffle=True):
                assert batch["latents"].dtype == torch.float32

        speeds = [samples_per_second(NUM_SAMPLES, work) for work in (stream, loader)]
        slowest = min(slowest, *speeds)
        rows.append((container, *(f"{speed:,.0f}" for speed in speeds), f"{min(speeds) / training:,.0f}"))
    columns = ["container", "stream", "DataLoader", "slower one over training"]
    table(f"Latents per second; the training takes {training:.1f}", columns, rows)
    assert slowest > 20 * training
