"""A smile as a direction of latents: does it tell smiling faces apart, and do faces smile that are moved along it?

    pytest tests/benchmarks/test_analysis_attributes.py -s -o addopts=        about 45 minutes of one core

Trains the preset faces-global and, with a seed of its own, a classifier of smiles on 32x32 px; RUNS=folder keeps both
there and takes them from there. All figures are of held-out faces. Faces stay out of the repository: the strip of the first ten
is written to a temporary folder, whose path is printed.
"""

import pytest
import torch
from judges import probabilities, train_judge
from sklearn.metrics import roc_auc_score
from tables import table

from latent_codec import LatentCodec
from latent_codec.analysis.attributes import apply_attribute, fit_attribute
from latent_codec.analysis.features import extract_features
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import SomeImages, open_source
from latent_codec.images.tensors import fit_square, write_image
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.finish_codec import finish_codec
from latent_codec.training.loop import train

AMOUNTS = (-2, -1, 0, 1, 2)
NUM_FACES = 200
JUDGE_SIDE = 32
OF_SMILES = (
    "model.arguments.in_channels=3",
    "data.label=Smiling",
    f"data.height={JUDGE_SIDE}",
    "data.scale=[0.36, 0.36]",
    "data.flip=true",
    "run.steps=800",
)


@pytest.fixture(scope="module")
def faces(shared):
    return [open_source(shared / f"data/faces/faces-{split}.tar") for split in ("train", "test")]


@pytest.fixture(scope="module")
def codec(faces, runs) -> LatentCodec:
    config, run = load_config("faces-global"), runs / "faces"
    network = train(config, build_autoencoder(config), faces[0], run).network
    return LatentCodec.from_pretrained(finish_codec(config, network, faces[0], run, data_name="faces"))


def test_smiling(faces, codec, runs, tmp_path_factory):
    seen, held_out = faces
    judge = train_judge(seen, runs / "judge-of-smiles", *OF_SMILES)

    def smiling(images: torch.Tensor) -> torch.Tensor:
        return probabilities(judge, torch.stack([fit_square(image, JUDGE_SIDE) for image in images]))[:, 1]

    features = extract_features(held_out, codec)
    is_smiling = features.classes("Smiling").numpy()
    real = torch.stack([fit_square(held_out.image(index), 64) for index in range(len(held_out))])
    judged = float(((smiling(real) >= 0.5).numpy() == is_smiling).mean())
    some = SomeImages(held_out, range(NUM_FACES))
    rows, figures = [], {}
    for method in ("means", "classifier"):
        for without in ((), ("Male",)):
            direction = fit_attribute(codec, seen, "Smiling", method=method, without=without)
            along = direction.project(features.vectors).numpy()
            moved = torch.stack(
                [apply_attribute(codec, some.image(index), direction, AMOUNTS) for index in range(NUM_FACES)]
            )
            seen_at = torch.stack([smiling(moved[:, place]) for place in range(len(AMOUNTS))])
            auc, rises = roc_auc_score(is_smiling, along), float((seen_at[-1] > seen_at[2]).float().mean())
            figures[method, without] = auc, rises
            means = " ".join(f"{value:.2f}" for value in seen_at.mean(1).tolist())
            rows.append((f"{method}{' without Male' if without else ''}", float(auc), f"{rises:.1%}", means))
            if (method, without) == ("means", ()):
                strip = tmp_path_factory.mktemp("strip") / "smiling.png"
                cells = [[some.image(index), *moved[index]] for index in range(10)]
                write_image(sheet(cells, column_titles=["image", *map(str, AMOUNTS)], side=64), strip)
    table(
        f"Smiling on {len(held_out)} held-out faces; the judge names {judged:.1%} of them as their labels do; strip: {strip}",
        [
            "direction",
            "AUC",
            f"more probable at 2 than at 0, of {NUM_FACES}",
            f"mean probability at {AMOUNTS}",
        ],
        rows,
    )
    auc, rises = figures["means", ()]
    assert auc >= 0.8 and rises >= 0.8
