"""What a hierarchy of latents is for, shown on Fashion-MNIST: bits per dim against a one-level VAE, and what each group says.

    RUNS=folder pytest tests/benchmarks/test_hierarchical_kl.py -s -o addopts=

prints tables as Markdown, and leaves sheets in the runs' folder. Every model has as many parameters, within 5 %, and as much
processor time of one thread: the steps that fit into it are counted before. Two likelihoods of the 8-bit values, each with a
one-level VAE and a hierarchy, are compared within the likelihood; every -ELBO is of the 5,000 test images, by one draw each.

A run that was stopped goes on where RUNS names the same folder, and what is finished is only measured again. SIDE (16 or 32),
MINUTES (20), SEEDS ("0 1 2") and ROWS ("mixture": a likelihood) make it shorter. Needs the data folder next to the checkout;
about 4 hours of one idle core.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tables import table
from test_objectives import mean_and_std, precision_and_recall, recognized, train_classifier, trustworthiness
from torch import Tensor, nn

from latent_codec.analysis.groups import redraw_groups
from latent_codec.codec import LatentCodec
from latent_codec.images.sheets import sheet
from latent_codec.images.sources import ImageSource, open_source
from latent_codec.images.tensors import write_image
from latent_codec.metrics import round_to_8_bits
from latent_codec.models.hierarchical_kl import HierarchicalKL
from latent_codec.training import losses
from latent_codec.training.checkpoints import latest_checkpoint
from latent_codec.training.config import TrainingConfig, load_config
from latent_codec.training.data import TrainingCrops
from latent_codec.training.loop import train

SIDE = int(os.environ.get("SIDE", "16"))
MINUTES = float(os.environ.get("MINUTES", "20"))
SEEDS = [int(each) for each in os.environ.get("SEEDS", "0 1 2").split()]
ROWS = os.environ.get("ROWS", "")
TIMED_STEPS = (4, 16)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
NUM_SAMPLES = 1000
NUM_TEST_IMAGES = int(os.environ.get("NUM_TEST_IMAGES", "5000"))

SIZES = {  # shrunk to 16 px, where more epochs fit into the time; or their 28 px continued to 32
    16: ["data.height=16", "data.pad_small=false", "data.scale=[0.5, 0.5]"],
    32: ["data.height=32", "data.pad_small=true"],
}
# One group, of 16 numbers for 4x4 px, in a network of the hierarchy's layers and as many parameters.
ONE_LEVEL = [
    "model.arguments.block_out_channels=[36, 68]",
    "model.arguments.groups_per_scale=[0, 1]",
    "model.arguments.cells_per_group=2",
    "model.arguments.latent_channels=16",
]
GAUSSIAN = ["model.arguments.likelihood=gaussian"]
AUTOENCODER_KL = {
    16: ["model.arguments.block_out_channels=[8, 16, 32, 32, 36]"],
    32: ["model.arguments.block_out_channels=[8, 16, 24, 32, 32, 32]"],
}[SIDE]
SETTINGS = {
    "one level, mixture": ("nvae-fashion-mnist", ONE_LEVEL),
    "hierarchy, mixture": ("nvae-fashion-mnist", []),
    "one level, Gaussian (AutoencoderKL)": (
        "fashion-mnist-global",
        ["model.initialization=even", "model.arguments.norm_num_groups=4", *AUTOENCODER_KL],
    ),
    "hierarchy, Gaussian": ("nvae-fashion-mnist", GAUSSIAN),
}
"""Preset and overrides of each model."""
SHOWN = "hierarchy, mixture"


@dataclass(frozen=True)
class Trained:
    network: nn.Module
    log_std: Tensor | None
    """Of an AutoencoderKL's Gaussian likelihood."""
    folder: Path
    facts: dict

    @torch.no_grad()
    def bits_per_dim(self, images: Tensor) -> Tensor:
        """-ELBO of each image, by one draw of its latents."""
        generator, found = torch.Generator().manual_seed(0), []
        for part in images.split(250):
            if self.log_std is None:
                found.append(self.network.elbo(part, generator=generator).bits_per_dim)
                continue
            posterior = self.network.encode(part).latent_dist
            reconstruction = self.network.decode(posterior.sample(generator)).sample
            nats = torch.stack(
                [losses.gaussian_nll(*each, self.log_std) for each in zip(part, reconstruction)]
            )
            kl = losses.kl_divergence(posterior.mean, posterior.logvar).flatten(1).sum(1)
            found.append(losses.nats_to_bits_per_dim(nats + kl / part[0].numel()))
        return torch.cat(found)

    @torch.no_grad()
    def samples(self, count: int, temperature: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.log_std is None:
            return self.network.sample(count, temperature, size=(SIDE, SIDE), generator=generator)
        latents = torch.randn(count, self.network.config.latent_channels, 1, 1, generator=generator)
        return self.network.decode(temperature * latents).sample.clamp(-1, 1)


def config_of(name: str, seed: int, steps: int) -> TrainingConfig:
    preset, overrides = SETTINGS[name]
    run = [f"run.steps={steps}", f"run.seed={seed}", "run.log_every=100", "run.checkpoint_every=200"]
    run += ["run.sample_every=100000", "run.calibration_images=0", "run.keep_checkpoints=1"]
    held_out = ["data.held_out=0"] if preset.startswith("nvae") else []
    return load_config(preset, [*run, *SIZES[SIDE], *held_out, *overrides])


def run_training(config: TrainingConfig, source: ImageSource, out: Path):
    network = config.kind.load("build")(config, source)
    return train(config, network, source, out)


def steps_that_fit(name: str, source: ImageSource, folder: Path) -> int:
    """How many steps take MINUTES of processor time, by the difference of two short trainings."""
    seconds = []
    for steps in TIMED_STEPS:
        start = time.process_time()
        run_training(config_of(name, 0, steps), source, folder / f"timed-{steps}")
        seconds.append(time.process_time() - start)
    per_step = (seconds[1] - seconds[0]) / (TIMED_STEPS[1] - TIMED_STEPS[0])
    return max(int(MINUTES * 60 / per_step), TIMED_STEPS[1])


@pytest.fixture(scope="module")
def trained(shared, runs, tmp_path_factory, request):
    """Of every model, one for each seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    source = open_source(shared / "data/fashion_mnist")
    found: dict[str, list[Trained]] = {}
    for name in [name for name in SETTINGS if ROWS in name]:
        for seed in SEEDS:
            stem = name.replace(", ", "-").replace(" ", "-").replace("(", "").replace(")", "")
            folder = runs / f"{stem}-{SIDE}px-{MINUTES:g}min-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            counted = folder / "steps.json"
            if not counted.exists():
                steps = steps_that_fit(name, source, tmp_path_factory.mktemp("timed"))
                counted.write_text(json.dumps(steps))
            steps = json.loads(counted.read_text())
            result = run_training(config_of(name, seed, steps), source, folder / "run")
            log_std = None
            if not isinstance(result.network, HierarchicalKL):
                log_std = load_file(latest_checkpoint(folder / "run") / "model.safetensors")["log_std"]
            facts = {"steps": steps, "parameters": sum(each.numel() for each in result.network.parameters())}
            found.setdefault(name, []).append(Trained(result.network.eval(), log_std, folder, facts))
    return found


def images_and_labels(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images as training sees them, on 8-bit values, and their classes."""
    source = open_source(data, split=split)
    config = config_of(SHOWN, 0, 1)
    crops = TrainingCrops.configured(config, source, 1)
    images = torch.stack([crops[position] for position in range(len(source))])
    labels = [source.label(crops.image_index(position)) for position in range(len(source))]
    return round_to_8_bits(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def held_out(shared) -> tuple[Tensor, Tensor]:
    return images_and_labels(shared / "data/fashion_mnist", "test")


def test_bits_per_dim(trained, held_out):
    """NVAE (arXiv:2007.03898): for as many parameters and as much time, a hierarchy codes images in fewer bits."""
    images = held_out[0][:NUM_TEST_IMAGES]
    bits = {name: [each.bits_per_dim(images).mean() for each in runs] for name, runs in trained.items()}
    rows = []
    for name, runs in trained.items():
        found = torch.stack(bits[name])
        scatter = f" ± {found.std():.4f}" if len(found) > 1 else ""
        facts = runs[0].facts
        rows.append([name, f"{facts['parameters']:,}", f"{facts['steps']:,}", f"{found.mean():.4f}{scatter}"])
    table(
        f"-ELBO, bits per dim of {len(images):,} test images at {SIDE}x{SIDE}; {MINUTES:g} minutes of one thread's time each, "
        f"mean and standard deviation of {len(SEEDS)} seeds",
        ["model", "parameters", "steps", "bits per dim"],
        rows,
    )
    sizes = [runs[0].facts["parameters"] for runs in trained.values()]
    assert max(sizes) < 1.05 * min(sizes)
    for likelihood in ("Gaussian", "mixture"):
        of_one, of_many = (
            [
                value
                for name, values in bits.items()
                if name.startswith(kind) and likelihood in name
                for value in values
            ]
            for kind in ("one level", "hierarchy")
        )
        if of_one and of_many:
            assert max(of_many) < min(of_one)


def test_what_each_group_says(trained, held_out):
    """ELBO by group, KL per group, samples by temperature: two sheets to look at."""
    if SHOWN not in trained:
        pytest.skip(f"needs the row {SHOWN}")
    first = trained[SHOWN][0]
    network, images = first.network, held_out[0][:500]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = [
            network.elbo(images, num_groups=count, generator=generator)
            for count in range(len(network.groups) + 1)
        ]
    kl = found[-1].kl.mean(0).tolist()
    shapes = network.group_shapes(SIDE, SIDE)
    table(
        f"What each group says of {len(images)} test images",
        ["group", "latents", "KL, nats", "-ELBO down to it, bits per dim"],
        [
            ["none", "-", "-", f"{found[0].bits_per_dim.mean():.4f}"],
            *(
                [number, "x".join(map(str, shape)), f"{nats:.2f}", f"{elbo.bits_per_dim.mean():.4f}"]
                for number, (shape, nats, elbo) in enumerate(zip(shapes, kl, found[1:]), 1)
            ),
        ],
    )
    drawn = [list(first.samples(16, temperature)) for temperature in TEMPERATURES]
    titles = [f"T = {temperature:g}" for temperature in TEMPERATURES]
    write_image(sheet(drawn, row_titles=titles, side=48), first.folder / "temperatures.png")
    codec = LatentCodec(network)
    for number in (0, 3):
        rows = redraw_groups(codec, images[number], num=10, temperature=0.8)
        kept = ["the prior", *(f"top {count} kept" for count in range(1, len(rows)))]
        shown = [list(row) for row in rows[:-1]] + [[rows[-1][0], images[number]]]
        write_image(sheet(shown, row_titles=kept, side=48), first.folder / f"groups-{number}.png")
    print(f"\nsheets: {first.folder}/temperatures.png, groups-0.png, groups-3.png")
    assert min(kl) >= 0


@pytest.mark.skipif(SIDE != 16, reason="the judge of test_objectives.py is of images of 16 px")
def test_samples(trained, held_out, shared):
    """Random samples, judged as those of test_objectives.py: recognized, precision, recall."""
    images, labels = held_out
    seen = images_and_labels(shared / "data/fashion_mnist", "train")
    classifier = train_classifier(*seen)
    accuracy, calibration_error = trustworthiness(classifier, images, labels)
    assert accuracy >= 0.88 and calibration_error <= 0.03, "judged on real images, before any decoder's"
    reference = images[NUM_SAMPLES : 3 * NUM_SAMPLES]
    sources = {"test images": [images[:NUM_SAMPLES]]}
    for name, runs in trained.items():
        for temperature in (1.0, 0.8):
            drawn = [each.samples(NUM_SAMPLES, temperature) for each in runs]
            sources[f"{name}, T = {temperature:g}"] = drawn
    table(
        f"{NUM_SAMPLES:,} images of each kind; recognized with at least 90 % confidence by a classifier that names "
        f"{accuracy:.1%} of the test images correctly; mean and standard deviation of {len(SEEDS)} seeds",
        ["images", "recognized", "precision", "recall"],
        [
            [
                name,
                *map(
                    mean_and_std,
                    zip(
                        *(
                            (recognized(classifier, run), *precision_and_recall(classifier, reference, run))
                            for run in runs
                        )
                    ),
                ),
            ]
            for name, runs in sources.items()
        ],
    )
