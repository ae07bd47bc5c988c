"""Training a HierarchicalKL: the ELBO with warmed-up, balanced divergences, and spectral regularization.

crop --elbo--> nll + sum over groups of beta gamma_l KL_l,  + lambda sum of largest singular values
"""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latent_codec.codec import LatentCodec
from latent_codec.images.sources import ImageSource, SomeImages
from latent_codec.images.tensors import image_grid, write_image
from latent_codec.models.hierarchical_kl import HierarchicalKL
from latent_codec.models.spectral_values import LargestSingularValues
from latent_codec.training import losses, report
from latent_codec.training.build import construct, open_pretrained
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import TrainingCrops
from latent_codec.training.labelled_data import hold_out
from latent_codec.training.task import Task, TaskInputs, collate

LEAST_NATS = 0.01
"""Added to a group's divergence where groups are balanced, so that none is ever free; as in the published code."""
NUM_DRAWN = 32


def build_hierarchical_kl(
    config: TrainingConfig, source: ImageSource | None = None, codec: LatentCodec | None = None
) -> HierarchicalKL:
    """A new network from `model.arguments`, or `model.pretrained`, in float32.

    Raises:
        ValueError: for an argument that it does not have or cannot use.
    """
    if config.model.pretrained:
        return open_pretrained(config).autoencoder.train()
    arguments = {"sample_size": min(config.data.size)} | config.model.arguments
    return construct(HierarchicalKL, arguments, config.run.seed)


class HierarchicalKLObjective(nn.Module):
    """The pass that training differentiates: -ELBO, and the sum of the largest singular values."""

    def __init__(self, network: HierarchicalKL, *, regularized: bool):
        super().__init__()
        self.network = network
        self.singular_values = LargestSingularValues(network) if regularized else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nats of the likelihood (B,), of each group's divergence (B, groups), and the sum."""
        nll, kl, _ = self.network.elbo(image)
        if self.singular_values is None:
            return nll, kl, nll.new_zeros(())
        with torch.autocast(image.device.type, enabled=False):
            return nll, kl, self.singular_values().sum()


class HierarchicalKLTask(Task):
    """-ELBO in nats per value of the image, with a divergence that grows to its weight group by group."""

    def __init__(
        self, config: TrainingConfig, network: HierarchicalKL, inputs: TaskInputs, accelerator: Accelerator
    ):
        self.channels = network.config.in_channels
        numbers = hold_out(inputs.source, config.data.held_out, config.run.seed)
        crops, self.held_out = (
            TrainingCrops.configured(config, SomeImages(inputs.source, each), self.channels)
            for each in numbers
        )
        self.samples = report.SampleImages(inputs.source, self.channels, config)
        shapes = network.group_shapes(*config.data.size)
        self.group_sizes = torch.tensor([math.prod(shape) for shape in shapes], device=accelerator.device)
        super().__init__(config, network, crops, accelerator)

    @classmethod
    def check(cls, config: TrainingConfig, network: HierarchicalKL, inputs: TaskInputs) -> None:
        if config.data.binarize:
            raise config.error(
                "data.binarize", "false for a HierarchicalKL, whose likelihood is of 8-bit values"
            )
        for side in ("height", "width"):
            if (getattr(config.data, side) or 0) % network.multiple:
                expected = f"a multiple of {network.multiple}, a latent's side in pixels of the top group"
                raise config.error(f"data.{side}", expected)

    def build_objective(self) -> HierarchicalKLObjective:
        regularized = self.config.hierarchy.spectral_weight > 0
        return HierarchicalKLObjective(self.network, regularized=regularized)

    @staticmethod
    def headline(terms: dict[str, float]) -> str:
        held_out = terms.get("held_out_bits_per_dim")
        measured = "" if held_out is None else f", {held_out:.4f} held out"
        return f"{terms['bits_per_dim']:.4f} bits per dim{measured}"

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, settings = self.to_device(batch), self.config.hierarchy
        nll, kl, singular_values = self.model(image)
        num_dims = image[0].numel()
        nll, kl = nll.mean() / num_dims, kl.mean(0) / num_dims
        balance = self.accelerator.reduce(kl.detach(), reduction="mean") if settings.kl_balancing else None
        coefficients = kl_coefficients(step, settings.kl_warmup, balance, self.group_sizes / num_dims)
        loss = nll + settings.kl_weight * (coefficients * kl).sum()
        terms = {
            "nll": nll,
            "kl": kl.sum(),
            **{f"kl_{number}": each for number, each in enumerate(kl, 1)},
            "bits_per_dim": losses.nats_to_bits_per_dim((nll + kl.sum()).detach()),
        }
        if settings.spectral_weight:
            terms["spectral"] = singular_values
            loss = loss + settings.spectral_weight * singular_values / num_dims
        return loss, terms

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`held_out_bits_per_dim`, of all images that are held out, with the same draws every time."""
        count = len(self.held_out)
        if not count:
            return {}
        network, total = self.ema.module.eval(), 0.0
        generator = torch.Generator().manual_seed(self.config.run.seed)
        for positions in torch.arange(count).split(self.config.optimizer.batch_size):
            images = self.to_device(collate(self.held_out, positions.tolist()))
            total += float(network.elbo(images, generator=generator).bits_per_dim.sum())
        return {"held_out_bits_per_dim": total / count}

    @torch.no_grad()
    def write_samples(self, path: Path) -> None:
        """Reconstructions, and in a second image draws from the prior at temperature 0.8."""
        network = self.ema.module.eval()
        self.samples.write(network, path, self.accelerator)
        generator = torch.Generator().manual_seed(self.config.run.seed)
        drawn = network.sample(NUM_DRAWN, 0.8, size=self.config.data.size, generator=generator)
        write_image(image_grid(list(drawn.float().cpu()), 8), path.with_name(f"{path.stem}-drawn.png"))


def kl_coefficients(step: int, warmup: int, kl: Tensor | None, sizes: Tensor) -> Tensor:
    """beta gamma_l: the weight of each group's divergence in a step, counted from 0 (NVAE, appendix A).

    beta grows linearly to 1 over `warmup` steps. Until then gamma_l is the group's divergence per value of its latents, over
    the mean of all groups'; afterwards 1.

    Args:
        kl: of each group, mean over the batch, in any unit of `sizes`' per; None: gamma_l is 1 throughout.
        sizes: values of each group's latents.
    """
    beta = min((step + 1) / warmup, 1.0) if warmup else 1.0
    if kl is None or beta == 1:
        return torch.full_like(sizes, beta, dtype=torch.float32)
    share = (kl.float() + LEAST_NATS / len(sizes)) / sizes
    return beta * share / share.mean()
