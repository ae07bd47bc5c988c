"""What an optimizer buys: the shipped codec of 16 channels from its linear start, by AdamW and by SOAP, for as many steps.

    pytest tests/benchmarks/test_optimizers.py -s -o addopts=

prints a table as Markdown, the short form of the comparison in docs/training.md. Needs the data folder next to the checkout; STEPS=150 steps take ten
minutes of one idle core for each row, and RUNS=folder keeps the runs.
"""

import os
from statistics import mean

from tables import table

from latent_codec import LatentCodec
from latent_codec.evaluation.reconstruction import reconstruct
from latent_codec.images.sources import open_source
from latent_codec.metrics import psnr
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.loop import train
from latent_codec.training.report import read_metrics

STEPS = int(os.environ.get("STEPS", 150))
SIDE = 256
OPTIMIZERS = {
    "AdamW, 3e-4": ["optimizer.kind=adamw", "optimizer.learning_rate=3e-4", "optimizer.betas=[0.9, 0.99]"],
    "SOAP, 3e-4": ["optimizer.learning_rate=3e-4"],
    "SOAP, 1e-3": [],
}


def test_optimizers_from_a_linear_start(shared, kodak, runs, one_thread):
    photos = open_source(shared / "data/photos")
    crops = [image[..., -SIDE:, -SIDE:] for image in kodak]
    rows, score = [], {}
    for number, (name, overrides) in enumerate(OPTIMIZERS.items()):
        short = [f"run.steps={STEPS}", "run.calibration_images=0", "objective.lpips_weight=0"]
        config = load_config("default-f8c16", [*short, "optimizer.ema_decay=0.95", *overrides])
        run = runs / f"optimizer-{number}"
        codec = LatentCodec(train(config, build_autoencoder(config), photos, run).network)
        score[name] = mean(psnr(reconstruct(codec, crop), crop).item() for crop in crops)
        speeds = [line["images_per_second"] for line in read_metrics(run)]
        rows.append([name, score[name], mean(speeds)])
    table(
        f"default-f8c16, {STEPS} steps of 4 crops of 128 px from its linear start; {SIDE}-px crops of {len(kodak)} kodak images",
        ["", "PSNR, dB", "crops a second"],
        rows,
    )
    assert max(score["SOAP, 3e-4"], score["SOAP, 1e-3"]) > score["AdamW, 3e-4"] + 0.5
