"""What each objective is for, shown on Fashion-MNIST: denoising, the ELBO, beta, and drawing from the prior.

    pytest tests/benchmarks/test_objectives.py -s -o addopts=

prints the tables that the README quotes, as Markdown. One network, the preset fashion-mnist-global (16 numbers per
image) on images shrunk to 16 px, is trained afresh for every row, through the project's own trainer and for equally
long, so that a table's rows differ by their objective alone. Needs the data folder next to the checkout; about 25 minutes
of one idle core.
"""

from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tables import table
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.images.sources import open_source
from latent_codec.images.tensors import image_grid
from latent_codec.metrics import psnr, round_to_8_bits
from latent_codec.training import losses
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.data import TrainingCrops
from latent_codec.training.loop import train

PRESET = "fashion-mnist-global"
STEPS = 800  # of 32 images each: 1.3 epochs
DENOISING_STEPS = 600
SEEDS = (0, 1, 2)
SIDE = 16
SMALLER = (  # halves a training's time, and 16 px are enough to tell garments by; a start at random, as objectives are compared
    "model.initialization=even",
    "model.arguments.norm_num_groups=4",
    f"data.height={SIDE}",
    "data.pad_small=false",
    "data.scale=[0.5, 0.5]",
    "model.arguments.block_out_channels=[16, 32, 64, 64, 64]",
)
NOISE, DROPPED = 0.5, 0.5
ACTIVE_VARIANCE = (
    0.01  # of the posterior's mean over images: importance weighted AE, arXiv:1509.00519, section 5.2
)
CONFIDENCE = 0.9
NUM_SAMPLES = 1000
# Four numbers per pixel (16 channels on an 8x8 grid), so that the identity is there to be learned.
OVERCOMPLETE = "model.arguments.block_out_channels=[16, 32]"
AUTOENCODER = ("objective.reconstruction=mse", "objective.posterior=mean", "objective.kl_weight=0")
VAE_SAMPLES, AUTOENCODER_SAMPLES = "VAE, z ~ N(0, I)", "autoencoder, z ~ N(0, I)"
FITTED_SAMPLES = "autoencoder, z ~ N(mean, std of its codes)"
PEAK_RATE = 2e-3  # of the classifier
NONE_OF_THESE = 10  # the classifier's class after the ten kinds of garment


@dataclass(frozen=True)
class Trained:
    autoencoder: AutoencoderKL
    log_std: Tensor | None
    """Of the Gaussian likelihood, as learned."""

    @torch.no_grad()
    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (N, 16, 1, 1)."""
        pairs = [self.autoencoder.encode(part).latent_dist for part in image.split(250)]
        return torch.cat([pair.mean for pair in pairs]), torch.cat([pair.logvar for pair in pairs])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.autoencoder.decode(part).sample for part in latents.split(250)])

    def reconstruct(self, image: Tensor) -> Tensor:
        """Clamped: under the Gaussian, black is a bin that reaches to minus infinity, and the decoder goes far."""
        return self.decode(self.posterior(image)[0]).clamp(-1, 1)

    @torch.no_grad()
    def negative_elbo(self, image: Tensor) -> tuple[float, Tensor]:
        """Bits per dimension, and the KL of every latent dimension in nats (16,); one draw of z per image."""
        mean, log_variance = self.posterior(image)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        reconstruction = self.decode(mean + torch.exp(0.5 * log_variance) * noise)
        if self.log_std is None:
            nats = losses.bernoulli_nll(image, reconstruction)
        else:
            nats = losses.gaussian_nll(image, reconstruction, self.log_std)
        divergence = losses.kl_divergence(mean, log_variance).mean(0).flatten()
        total = nats + divergence.sum() / image[0].numel()
        return float(losses.nats_to_bits_per_dim(total)), divergence


def images_and_labels(data, split: str) -> tuple[Tensor, Tensor]:
    """All images as training sees them, on 8-bit levels, (N, 1, 16, 16), and their classes (N,)."""
    source = open_source(data, split=split)
    crops = TrainingCrops(source, size=(SIDE, SIDE), scale=(0.5, 0.5), channels=1, flip=False)
    images = torch.stack([crops[position] for position in range(len(source))])
    labels = [source.label(crops.image_index(position)) for position in range(len(source))]
    return round_to_8_bits(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data/fashion_mnist"


@pytest.fixture(scope="module")
def held_out(data) -> tuple[Tensor, Tensor]:
    return images_and_labels(data, "test")


@pytest.fixture(scope="module")
def seen(data) -> tuple[Tensor, Tensor]:
    return images_and_labels(data, "train")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A function of the settings to put over the preset's; what was trained once is kept."""
    kept: dict[tuple, Trained] = {}

    def of(*overrides: str, steps: int = STEPS, seed: int = 0) -> Trained:
        key = (*overrides, steps, seed)
        if key not in kept:
            run = [f"run.steps={steps}", f"run.seed={seed}", "run.log_every=100"]
            config = load_config(PRESET, [*run, *SMALLER, *overrides])
            out = tmp_path_factory.mktemp("run")
            result = train(config, build_autoencoder(config), open_source(data), out)
            learned = load_file(out / "checkpoints" / str(steps) / "model.safetensors")
            kept[key] = Trained(result.network.eval(), learned.get("log_std"))
        return kept[key]

    return of


def corrupted(image: Tensor, *, noise: float = 0.0, dropped: float = 0.0) -> Tensor:
    generators = [torch.Generator().manual_seed(index) for index in range(len(image))]
    return losses.corrupt(image, generators, noise=noise, dropped=dropped, patch=1)


def test_denoising(trained, held_out):
    """Vincent et al. 2008: a code with room for everything learns to copy, noise and all, unless it must denoise."""
    clean = held_out[0][:2000]
    inputs = {
        "clean": clean,
        f"noise, std {NOISE}": corrupted(clean, noise=NOISE),
        f"{DROPPED:.0%} of the pixels dropped": corrupted(clean, dropped=DROPPED),
    }
    _, noise, dropped = inputs
    models = {
        name: trained(OVERCOMPLETE, *AUTOENCODER, *corruption, steps=DENOISING_STEPS)
        for name, corruption in {
            "autoencoder": [],
            "denoising, noise": [f"objective.input_noise={NOISE}"],
            "denoising, dropped pixels": [f"objective.dropped_pixels={DROPPED}"],
        }.items()
    }

    score = {
        model: {name: psnr(net.reconstruct(image), clean).mean().item() for name, image in inputs.items()}
        for model, net in models.items()
    }
    untouched = [psnr(image.clamp(-1, 1), clean).mean().item() for image in list(inputs.values())[1:]]

    table(
        "PSNR in dB of the reconstruction against the clean image (2,000 test images), by input; 1,024 latents",
        ["", *inputs],
        [
            ["the input itself", "", *untouched],
            *([model, *row.values()] for model, row in score.items()),
        ],
    )
    assert score["denoising, noise"][noise] > score["autoencoder"][noise] + 1
    assert score["denoising, dropped pixels"][dropped] > score["autoencoder"][dropped] + 1
    assert score["denoising, noise"][noise] > untouched[0] + 1


def test_elbo(trained, seen, held_out):
    """VAE (arXiv:1312.6114): a code of 16 numbers, paid for, still shortens what has to be sent."""
    train_images, test_images = seen[0], held_out[0]
    without = best_fixed_image(train_images, test_images, gaussian=True)
    gaussian, gaussian_kl = trained().negative_elbo(test_images)

    black_or_white = torch.where(test_images > 0, 1.0, -1.0)
    without_binary = best_fixed_image(
        torch.where(train_images > 0, 1.0, -1.0), black_or_white, gaussian=False
    )
    bernoulli, bernoulli_kl = trained(
        "objective.reconstruction=bernoulli", "data.binarize=true"
    ).negative_elbo(black_or_white)

    table(
        f"Held-out -ELBO, bits per dim ({len(test_images):,} test images, shrunk to 16x16)",
        ["likelihood", "VAE", "of which KL", "one fixed image, no latents"],
        [
            ["Gaussian, learned std, 8-bit levels", gaussian, bits_of(gaussian_kl), without],
            ["Bernoulli, binarized images", bernoulli, bits_of(bernoulli_kl), without_binary],
        ],
    )
    assert 0 < gaussian < without
    assert 0 < bernoulli < without_binary


def best_fixed_image(train_images: Tensor, test_images: Tensor, *, gaussian: bool) -> float:
    """Bits per dim of `test_images` under the likelihood's best parameters that no latent informs."""
    if not gaussian:  # its maximum likelihood is known: how often each pixel is white
        share = train_images.mean(0)
        return float(
            losses.nats_to_bits_per_dim(losses.bernoulli_nll(test_images, share.expand_as(test_images)))
        )
    image = train_images.mean(0).requires_grad_()
    log_std = (train_images - image).std().log().detach().requires_grad_()
    optimizer = torch.optim.Adam([image, log_std], lr=0.03)
    for step in range(200):
        batch = train_images[torch.arange(step * 250, (step + 1) * 250) % len(train_images)]
        optimizer.zero_grad()
        losses.gaussian_nll(batch, image, log_std).backward()
        optimizer.step()
    with torch.no_grad():
        return float(losses.nats_to_bits_per_dim(losses.gaussian_nll(test_images, image, log_std)))


def bits_of(divergence: Tensor) -> float:
    """Nats per latent dimension (16,) -> bits per dimension of the image."""
    return float(losses.nats_to_bits_per_dim(divergence.sum())) / SIDE**2


def test_beta(trained, held_out):
    """beta-VAE (Higgins et al. 2017): a higher price on information leaves fewer nats, in fewer dimensions."""
    rows, total = [], {}
    for beta in (1, 4, 10):
        model = trained() if beta == 1 else trained(f"objective.kl_weight={beta}")
        bits, divergence = model.negative_elbo(held_out[0])
        ordered = divergence.sort(descending=True).values
        total[beta] = float(divergence.sum())
        quality = psnr(model.reconstruct(held_out[0]), held_out[0]).mean().item()
        mean, _ = model.posterior(held_out[0])
        active = f"{int((mean.var(0) > ACTIVE_VARIANCE).sum())} of {len(ordered)}"
        rows.append(
            [beta, bits, quality, f"{total[beta]:.1f}", active, " ".join(f"{nats:.2f}" for nats in ordered)]
        )

    table(
        "beta: what a nat costs, and how many are bought (test split)",
        [
            "beta",
            "-ELBO, bits per dim",
            "PSNR, dB",
            "KL, nats",
            "active dimensions",
            "KL per latent dimension, nats",
        ],
        rows,
    )
    assert total[1] > total[4] > total[10] > 0
    assert rows[0][1] < rows[2][1], "beta = 1 optimizes the ELBO itself"


def test_samples(trained, seen, held_out, tmp_path):
    """VAE (arXiv:1312.6114): its latents are a standard normal's, so that what is drawn from one decodes to images.

    Two judges, both fixed by real images alone. The classifier's confidence also falls with blur, of which a VAE has
    more. Precision (arXiv:1904.06991, equation 2, k = 3) is the share of images whose nearest real one, by the
    classifier's features, is as near as real ones are to each other; recall the share of real images that lie as near
    to a decoded one, which blur and sameness lower.
    """
    classifier = train_classifier(*seen)
    images, labels = held_out
    accuracy, calibration_error = trustworthiness(classifier, images, labels)
    assert accuracy >= 0.88 and calibration_error <= 0.03, "judged on real images, before any decoder's"
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(NUM_SAMPLES, 16, 1, 1, generator=generator)
    noise = torch.rand(NUM_SAMPLES, 1, SIDE, SIDE, generator=generator) * 2 - 1
    real, others = images[:NUM_SAMPLES], images[-NUM_SAMPLES:]
    reference = images[NUM_SAMPLES : 3 * NUM_SAMPLES]

    sources: dict[str, list[Tensor]] = {
        "test images": [real],
        "averages of two test images": [(real + others) / 2],
        "uniform noise": [noise],
    }
    for seed in SEEDS:
        variational, plain = trained(seed=seed), trained(*AUTOENCODER, seed=seed)
        codes, _ = plain.posterior(seen[0][:5000])
        spread, center = torch.std_mean(codes, dim=0)
        for name, images in {
            VAE_SAMPLES: variational.decode(normal),
            AUTOENCODER_SAMPLES: plain.decode(normal),
            FITTED_SAMPLES: plain.decode(center + spread * normal),
            "VAE, reconstructed test images": variational.reconstruct(real),
            "autoencoder, reconstructed test images": plain.reconstruct(real),
        }.items():
            sources.setdefault(name, []).append(images)

    scores = {
        name: [
            (recognized(classifier, run), *precision_and_recall(classifier, reference, run)) for run in runs
        ]
        for name, runs in sources.items()
    }

    sheet = tmp_path / "samples.png"
    drawn = (VAE_SAMPLES, AUTOENCODER_SAMPLES, FITTED_SAMPLES)
    image_grid([sources[name][0][i].clamp(-1, 1) for name in drawn for i in range(32)], 16).save(sheet)
    table(
        f"{NUM_SAMPLES:,} images of each kind; recognized: by a classifier, as one kind of garment, with at least "
        f"{CONFIDENCE:.0%} confidence (it names {accuracy:.1%} of the test images correctly, and its confidence is off "
        f"by {calibration_error:.1%} on average); mean and standard deviation of {len(SEEDS)} trainings. "
        f"Two rows each of the first three: {sheet}",
        ["images", "recognized", "precision", "recall"],
        [[name, *map(mean_and_std, zip(*runs))] for name, runs in scores.items()],
    )
    precision = {name: [run[1] for run in scores[name]] for name in drawn}
    assert min(precision[VAE_SAMPLES]) > max(precision[AUTOENCODER_SAMPLES] + precision[FITTED_SAMPLES])


def mean_and_std(shares: tuple[float, ...]) -> str:
    values = torch.tensor(shares, dtype=torch.float64)
    return f"{values.mean():.1%}" + (f" ± {values.std():.1%}" if len(shares) > 1 else "")


def trustworthiness(classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and the expected calibration error (arXiv:1706.04599, equation 3) in ten bins."""
    confidence, kind = class_probabilities(classifier, images)[:, :NONE_OF_THESE].max(1)
    correct = (kind == labels).double()
    bins = (confidence * 10).long().clamp_max(9)
    error = sum(
        (bins == each).double().mean()
        * (correct[bins == each].mean() - confidence[bins == each].mean()).abs()
        for each in bins.unique()
    )
    return float(correct.mean()), float(error)


def train_classifier(images: Tensor, labels: Tensor, num_epochs: int = 8) -> nn.Module:
    """A small CNN of eleven classes: the ten garments, and none of these.

    A classifier of garments alone must call everything a garment, and does so with confidence. The eleventh class is
    learned from what is none: noise, coarse blobs, garments in pieces, and averages of two kinds of garment. A third of
    the garments are slightly blurred, because decoders of 16 numbers blur, and a blurred boot is a boot.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, NONE_OF_THESE + 1),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_RATE)
        orders = [torch.randperm(len(images), generator=generator) for _ in range(num_epochs)]
        batches = [batch for order in orders for batch in order.split(64)]
        for number, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = PEAK_RATE * (1 - number / len(batches))
            wrong = no_garments(images[batch], labels[batch], generator)
            shown = torch.cat([images[batch], wrong])
            side = (16, 12, 8)[number % 3]
            blurred = F.interpolate(shown[::2], (side, side), mode="area")
            shown[::2] = F.interpolate(blurred, (SIDE, SIDE), mode="bilinear")
            target = torch.cat([labels[batch], torch.full((len(wrong),), NONE_OF_THESE)])
            loss = F.cross_entropy(classifier(shown), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


def no_garments(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """About half as many as `images`: noise, blobs, shuffled quarters of quarters, averages of two classes."""
    eighth = max(len(images) // 8, 1)
    noise = torch.rand(eighth, 1, SIDE, SIDE, generator=generator) * 2 - 1
    coarse = torch.randn(eighth, 1, 4, 4, generator=generator)
    blobs = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").clamp(-1, 1)
    tile = SIDE // 4
    tiles = F.unfold(images[:eighth], tile, stride=tile)[:, :, torch.randperm(16, generator=generator)]
    pieces = F.fold(tiles, SIDE, tile, stride=tile)
    halves = len(images) // 2
    differ = labels[:halves] != labels[halves : 2 * halves]
    averages = ((images[:halves] + images[halves : 2 * halves]) / 2)[differ][:eighth]
    return torch.cat([noise, blobs, pieces, averages])


@torch.no_grad()
def class_probabilities(classifier: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([classifier(part) for part in images.split(500)]).softmax(1)


def recognized(classifier: nn.Module, images: Tensor) -> float:
    """Share of `images` with one garment's probability at 90 % or more."""
    garments = class_probabilities(classifier, round_to_8_bits(images.clamp(-1, 1)))[:, :NONE_OF_THESE]
    return (garments.amax(1) >= CONFIDENCE).double().mean().item()


def precision_and_recall(classifier: nn.Sequential, real: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991, equations 1 and 2, with k = 3)."""
    real, decoded = features(classifier, real), features(classifier, decoded)
    distance = torch.cdist(decoded, real)
    near_real = distance <= distance_to_neighbor(real)
    near_decoded = distance.mT <= distance_to_neighbor(decoded)
    return near_real.any(1).double().mean().item(), near_decoded.any(1).double().mean().item()


def distance_to_neighbor(points: Tensor, k: int = 3) -> Tensor:
    """Of each of (N, D) `points`, to its k-th nearest among the others: (N,)."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values


@torch.no_grad()
def features(classifier: nn.Sequential, images: Tensor) -> Tensor:
    """The last convolution's 128 channels, averaged over the image."""
    convolutions = classifier[:9]
    rounded = round_to_8_bits(images.clamp(-1, 1))
    return torch.cat([convolutions(part).mean((2, 3)) for part in rounded.split(500)]).double()
