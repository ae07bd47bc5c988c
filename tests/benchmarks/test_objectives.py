"""What each objective is for, shown on Fashion-MNIST: denoising, the ELBO, beta, and drawing from the prior.

    pytest tests/benchmarks/test_objectives.py -s -o addopts=

prints the tables that the README quotes, as Markdown. One network, the preset fashion-mnist-global (16 numbers per
picture) on pictures shrunk to 16 px, is trained afresh for every row, through the project's own trainer and for equally
long, so that rows differ by their objective alone. Needs the data folder beside the checkout; about eight minutes of one
idle core.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.metrics import psnr, round_to_8_bits
from latent_codec.picture_sources import open_source
from latent_codec.pictures import picture_grid
from latent_codec.training import losses
from latent_codec.training.build import build_autoencoder
from latent_codec.training.config import load_config
from latent_codec.training.data import TrainingCrops
from latent_codec.training.loop import train

PRESET = "fashion-mnist-global"
STEPS = 600  # of 32 pictures each: an epoch
SIDE = 16
SMALLER = (  # halves a training's time, and 16 px are enough to tell garments by
    f"data.height={SIDE}",
    "data.scale=[0.5, 0.5]",
    "model.arguments.block_out_channels=[16, 32, 64, 64, 64]",
)
NOISE, DROPPED = 0.5, 0.5
ACTIVE_NATS = 0.01
CONFIDENCE = 0.9
NUM_SAMPLES = 1000
# Four numbers per pixel (16 channels on an 8x8 grid), so that the identity is there to be learned.
OVERCOMPLETE = "model.arguments.block_out_channels=[16, 32]"
AUTOENCODER = ("objective.reconstruction=mse", "objective.posterior=mean", "objective.kl_weight=0")
PEAK_RATE = 2e-3  # of the classifier
NONE_OF_THESE = 10  # the classifier's class beside the ten kinds of garment


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
        """Bits per dimension, and the KL of every latent dimension in nats (16,); one draw of z per picture."""
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


def pictures_and_labels(data, split: str) -> tuple[Tensor, Tensor]:
    """All pictures as training sees them, on 8-bit levels, (N, 1, 16, 16), and their classes (N,)."""
    source = open_source(data, split=split)
    crops = TrainingCrops(source, size=(SIDE, SIDE), scale=(0.5, 0.5), channels=1, flip=False)
    images = torch.stack([crops[position] for position in range(len(source))])
    labels = [source.label(crops.picture_index(position)) for position in range(len(source))]
    return round_to_8_bits(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data/fashion_mnist"


@pytest.fixture(scope="module")
def test_split(data) -> tuple[Tensor, Tensor]:
    return pictures_and_labels(data, "test")


@pytest.fixture(scope="module")
def train_split(data) -> tuple[Tensor, Tensor]:
    return pictures_and_labels(data, "train")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A function of the settings to put over the preset's; what was trained once is kept."""
    kept: dict[tuple[str, ...], Trained] = {}

    def of(*overrides: str) -> Trained:
        if overrides not in kept:
            config = load_config(PRESET, [f"run.steps={STEPS}", "run.log_every=100", *SMALLER, *overrides])
            out = tmp_path_factory.mktemp("run")
            autoencoder = start_evenly(build_autoencoder(config))
            result = train(config, autoencoder, open_source(data), out)
            learned = load_file(out / "checkpoints" / str(STEPS) / "model.safetensors")
            kept[overrides] = Trained(result.autoencoder.eval(), learned.get("log_std"))
        return kept[overrides]

    return of


@torch.no_grad()
def start_evenly(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Kaiming's initialisation without biases, residual branches silent: equal variance at every depth.

    torch's own shrinks the signal in every layer and adds biases, under which a single vector that passes six
    levels is lost for the first thousand steps; this one is 3 dB ahead after 300.
    """
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return autoencoder


def corrupted(image: Tensor, *, noise: float = 0.0, dropped: float = 0.0) -> Tensor:
    generators = [torch.Generator().manual_seed(index) for index in range(len(image))]
    return losses.corrupt(image, generators, noise=noise, dropped=dropped, patch=1)


def table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print as Markdown, floats to three places."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row)} |")


def test_denoising(trained, test_split):
    """Vincent et al. 2008: a code with room for everything learns to copy, noise and all, unless it must denoise."""
    clean = test_split[0][:2000]
    inputs = {
        "clean": clean,
        f"noise, std {NOISE}": corrupted(clean, noise=NOISE),
        f"{DROPPED:.0%} of the pixels dropped": corrupted(clean, dropped=DROPPED),
    }
    _, noise, dropped = inputs
    models = {
        "autoencoder": trained(OVERCOMPLETE, *AUTOENCODER),
        "denoising, noise": trained(OVERCOMPLETE, *AUTOENCODER, f"objective.input_noise={NOISE}"),
        "denoising, dropped pixels": trained(
            OVERCOMPLETE, *AUTOENCODER, f"objective.dropped_pixels={DROPPED}"
        ),
    }

    score = {
        model: {name: psnr(net.reconstruct(image), clean).mean().item() for name, image in inputs.items()}
        for model, net in models.items()
    }
    untouched = [psnr(image.clamp(-1, 1), clean).mean().item() for image in list(inputs.values())[1:]]

    table(
        "PSNR in dB of the reconstruction against the clean picture (2,000 test pictures), by input; 1,024 latents",
        ["", *inputs],
        [
            ["the input itself", "", *untouched],
            *([model, *row.values()] for model, row in score.items()),
        ],
    )
    assert score["denoising, noise"][noise] > score["autoencoder"][noise] + 1
    assert score["denoising, dropped pixels"][dropped] > score["autoencoder"][dropped] + 1
    assert score["denoising, noise"][noise] > untouched[0] + 1


def test_elbo(trained, train_split, test_split):
    """VAE (arXiv:1312.6114): a code of 16 numbers, paid for, still shortens what has to be sent."""
    train_images, test_images = train_split[0], test_split[0]
    without = best_fixed_picture(train_images, test_images, gaussian=True)
    gaussian, gaussian_kl = trained().negative_elbo(test_images)

    black_or_white = torch.where(test_images > 0, 1.0, -1.0)
    without_binary = best_fixed_picture(
        torch.where(train_images > 0, 1.0, -1.0), black_or_white, gaussian=False
    )
    bernoulli, bernoulli_kl = trained(
        "objective.reconstruction=bernoulli", "data.binarize=true"
    ).negative_elbo(black_or_white)

    table(
        f"Held-out -ELBO, bits per dim ({len(test_images):,} test pictures, shrunk to 16x16)",
        ["likelihood", "VAE", "of which KL", "one fixed picture, no latents"],
        [
            ["Gaussian, learned std, 8-bit levels", gaussian, bits_of(gaussian_kl), without],
            ["Bernoulli, binarised pictures", bernoulli, bits_of(bernoulli_kl), without_binary],
        ],
    )
    assert 0 < gaussian < without
    assert 0 < bernoulli < without_binary


def best_fixed_picture(train_images: Tensor, test_images: Tensor, *, gaussian: bool) -> float:
    """Bits per dim of `test_images` under the likelihood's best parameters that no latent informs."""
    if not gaussian:  # its maximum likelihood is known: how often each pixel is white
        share = train_images.mean(0)
        return float(
            losses.nats_to_bits_per_dim(losses.bernoulli_nll(test_images, share.expand_as(test_images)))
        )
    picture = train_images.mean(0).requires_grad_()
    log_std = (train_images - picture).std().log().detach().requires_grad_()
    optimizer = torch.optim.Adam([picture, log_std], lr=0.03)
    for step in range(200):
        batch = train_images[torch.arange(step * 250, (step + 1) * 250) % len(train_images)]
        optimizer.zero_grad()
        losses.gaussian_nll(batch, picture, log_std).backward()
        optimizer.step()
    with torch.no_grad():
        return float(losses.nats_to_bits_per_dim(losses.gaussian_nll(test_images, picture, log_std)))


def bits_of(divergence: Tensor) -> float:
    """Nats per latent dimension (16,) -> bits per dimension of the picture."""
    return float(losses.nats_to_bits_per_dim(divergence.sum())) / SIDE**2


def test_beta(trained, test_split):
    """beta-VAE (Higgins et al. 2017): a higher price on information leaves fewer nats, in fewer dimensions."""
    rows, total = [], {}
    for beta in (1, 4, 10):
        model = trained() if beta == 1 else trained(f"objective.kl_weight={beta}")
        bits, divergence = model.negative_elbo(test_split[0])
        ordered = divergence.sort(descending=True).values
        total[beta] = float(divergence.sum())
        quality = psnr(model.reconstruct(test_split[0]), test_split[0]).mean().item()
        active = f"{int((ordered > ACTIVE_NATS).sum())} of {len(ordered)}"
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
            f"dimensions above {ACTIVE_NATS} nats",
            "KL per latent dimension, nats",
        ],
        rows,
    )
    assert total[1] > total[4] > total[10] > 0
    assert rows[0][1] < rows[2][1], "beta = 1 optimises the ELBO itself"


def test_samples(trained, train_split, test_split, tmp_path):
    """A VAE's latents are a standard normal's, so that what is drawn from one decodes to pictures."""
    classifier = train_classifier(*train_split)
    images, labels = test_split
    accuracy = (class_probabilities(classifier, images)[:, :NONE_OF_THESE].argmax(1) == labels).float().mean()
    assert accuracy >= 0.88

    variational, plain, costly = trained(), trained(*AUTOENCODER), trained("objective.kl_weight=10")
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(NUM_SAMPLES, 16, 1, 1, generator=generator)
    codes, _ = plain.posterior(train_split[0][:5000])
    spread, centre = torch.std_mean(codes, dim=0)
    drawn = {
        "VAE, z ~ N(0, I)": variational.decode(normal),
        "beta-VAE, beta = 10, z ~ N(0, I)": costly.decode(normal),
        "autoencoder, z ~ N(0, I)": plain.decode(normal),
        "autoencoder, z ~ normal of its own codes' means and stds": plain.decode(centre + spread * normal),
    }
    references = {
        "test pictures": images[:NUM_SAMPLES],
        "their reconstructions by the VAE": variational.reconstruct(images[:NUM_SAMPLES]),
        "their reconstructions by the autoencoder": plain.reconstruct(images[:NUM_SAMPLES]),
        "uniform noise": torch.rand(NUM_SAMPLES, 1, SIDE, SIDE, generator=generator) * 2 - 1,
        "averages of two test pictures": (images[:NUM_SAMPLES] + images[-NUM_SAMPLES:]) / 2,
    }

    share = {name: recognised(classifier, image) for name, image in (drawn | references).items()}

    sheet = tmp_path / "samples.png"
    picture_grid([row[i].clamp(-1, 1) for row in drawn.values() for i in range(16)], 16).save(sheet)
    table(
        f"Share recognised as a garment with at least {CONFIDENCE:.0%} confidence, by a classifier of "
        f"{accuracy:.1%} test accuracy (rows of {sheet}: the first four)",
        ["pictures", "garment, or none of these", "which garment"],
        [[name, *(f"{part:.1%}" for part in shares)] for name, shares in share.items()],
    )
    best = share["VAE, z ~ N(0, I)"]
    assert best[0] > share["autoencoder, z ~ N(0, I)"][0]
    assert best[0] > share["autoencoder, z ~ normal of its own codes' means and stds"][0]


def train_classifier(images: Tensor, labels: Tensor, num_epochs: int = 4) -> nn.Module:
    """A small CNN of eleven classes: the ten garments, and none of these.

    A classifier of garments alone must call everything a garment, and does so with confidence. The eleventh class is
    learned from what is none: noise, coarse blobs, garments in pieces, and averages of two kinds of garment. Half of
    all it sees is blurred, because decoders of 16 numbers blur, and a blurred boot is a boot.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 16, NONE_OF_THESE + 1),
        )  # fmt: skip
    optimizer = torch.optim.Adam(classifier.parameters(), lr=PEAK_RATE)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(num_epochs)]
    batches = [batch for order in orders for batch in order.split(64)]
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = PEAK_RATE * (1 - number / len(batches))
        wrong = no_garments(images[batch], labels[batch], generator)
        shown = torch.cat([images[batch], wrong])
        side = (16, 12, 8, 6)[number % 4]
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


def recognised(classifier: nn.Module, images: Tensor) -> tuple[float, float]:
    """Share of `images` with one garment's probability at 90 % or more; and so if it must be a garment."""
    garments = class_probabilities(classifier, round_to_8_bits(images.clamp(-1, 1)))[:, :NONE_OF_THESE]
    among = garments / garments.sum(1, keepdim=True).clamp_min(math.ulp(0.0))
    return tuple((p.amax(1) >= CONFIDENCE).float().mean().item() for p in (garments, among))
