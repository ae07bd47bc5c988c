"""What beta does to one-vector codecs of generated shapes: MIG and DCI at beta 1 and 4, three seeds each.

    pytest tests/benchmarks/test_analysis_disentanglement.py -s -o addopts=

It trains six codecs, about 6 minutes of one core each. RUNS=FOLDER keeps them, and goes on with those that are there.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from tables import table

from latent_codec.analysis.disentanglement import factors_of, measure_disentanglement
from latent_codec.analysis.features import extract_features
from latent_codec.evaluation.reconstruction import evaluate
from latent_codec.images.sources import open_source
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.loop import train

BETAS = (1, 4)
SEEDS = (0, 1, 2)
DATA, HELD_OUT = "shapes:20000x32", "shapes:5000x32"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return Path(os.environ.get("RUNS") or tmp_path_factory.mktemp("runs"))


def trained(runs: Path, beta: int, seed: int) -> Path:
    codec = runs / f"beta{beta}-seed{seed}" / "codec"
    if not (codec / "config.json").exists():
        config = load_config("shapes-global", [f"objective.kl_weight={beta}", f"run.seed={seed}"])
        train(config, build_autoencoder(config), open_source(DATA), codec.parent)
    return codec


def test_beta_and_disentanglement(runs):
    names = ("MIG", "disentanglement", "completeness", "informativeness", "PSNR (dB)")
    rows = []
    for beta in BETAS:
        figures = []
        for seed in SEEDS:
            codec = trained(runs, beta, seed)
            features = extract_features(HELD_OUT, codec, split="test")
            found = measure_disentanglement(features.vectors, factors_of(features))
            psnr = evaluate(open_source(HELD_OUT, split="test"), codec, limit=500).psnr.value
            figures.append(
                (found.mig, found.disentanglement, found.completeness, found.informativeness, psnr)
            )
            print(
                f"beta {beta}, seed {seed}: " + ", ".join(f"{n} {v:.3f}" for n, v in zip(names, figures[-1]))
            )
        assert np.isfinite(figures).all()
        means, spreads = np.mean(figures, 0), np.std(figures, 0, ddof=1)
        rows.append([beta, *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(means, spreads))])
    table(f"beta of shapes-global, {len(SEEDS)} seeds, mean ± standard deviation", ["beta", *names], rows)
