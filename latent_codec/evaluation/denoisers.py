"""A small diffusion model of latents, the same for any codec: what `diffusability` trains.

latents --DenoiserTraining--> DiTTransformer2DModel --sample--> latents
"""

from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

BATCH, SAMPLING_BATCH = 32, 64
WIDTH, NUM_HEADS, NUM_LAYERS = 128, 4, 4
LEARNING_RATE, WARMUP_STEPS, EMA_DECAY = 1e-3, 100, 0.995
SAMPLING_STEPS = 12
VERSION = 1
"""Of all of this: what another version gave is not compared with it."""


class DenoiserTraining:
    """Train a small diffusion transformer (DiT, arXiv:2212.09748) on latents by flow matching (arXiv:2210.02747).

    x_t = (1 - t) x + t e with e ~ N(0, I) and logit(t) ~ N(0, 1); it minimizes |v(x_t, t) - (e - x)|^2. What a step draws depends on
    `seed` and the number of the step only, so that the latents of all codecs are trained on in the same order.

    Args:
        latents: (N, C, side, side), near unit variance, as `LatentCodec.encode` gives them; it trains where they are.
        patch: side of the square of positions that becomes a token.
    """

    def __init__(self, latents: Tensor, *, seed: int = 0, patch: int = 1):
        self.latents, self.seed, self.num_steps = latents.float(), seed, 0
        self.network = _build(latents.shape[1], latents.shape[2], patch, seed).to(latents.device)
        self._averaged = AveragedModel(self.network, multi_avg_fn=_average, use_buffers=False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    @property
    def denoiser(self) -> DiTTransformer2DModel:
        """The moving average of the weights, which samples are drawn with."""
        return self._averaged.module

    def step(self) -> float:
        """Take one training step.

        Returns:
            The loss.

        Raises:
            ValueError: if it is not finite.
        """
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_steps)
        chosen = torch.randint(len(self.latents), (BATCH,), generator=random)
        times = torch.randn(BATCH, generator=random).sigmoid().to(self.latents.device)
        noise = torch.randn((BATCH, *self.latents.shape[1:]), generator=random).to(self.latents.device)
        latents, share = self.latents[chosen.to(self.latents.device)], times[:, None, None, None]
        velocity = _velocity(self.network, latents.lerp(noise, share), times)
        loss = nn.functional.mse_loss(velocity, noise - latents)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (self.num_steps + 1) / WARMUP_STEPS)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._averaged.update_parameters(self.network)
        self.num_steps += 1
        return float(loss.detach())

    def state_dict(self) -> dict:
        return {
            "num_steps": self.num_steps,
            "network": self.network.state_dict(),
            "averaged": self._averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.num_steps = state["num_steps"]
        self.network.load_state_dict(state["network"])
        self._averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_denoiser(
    latents: Tensor,
    *,
    steps: int = 2000,
    seed: int = 0,
    patch: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> DiTTransformer2DModel:
    """Train a `DenoiserTraining` to its end, and give the denoiser."""
    training = DenoiserTraining(latents, seed=seed, patch=patch)
    for _ in range(steps):
        training.step()
        if on_progress:
            on_progress(training.num_steps, steps)
    return training.denoiser


@torch.no_grad()
def sample(
    denoiser: DiTTransformer2DModel, count: int, *, seed: int = 0, num_steps: int = SAMPLING_STEPS
) -> Tensor:
    """Draw latents (count, C, side, side) from a denoiser of `DenoiserTraining`, from noise of `seed`.

    By steps of equal size of the two-step Adams-Bashforth method: x <- x - (3 v - v_before) / (2 num_steps), the first one Euler's.
    """
    config, device = denoiser.config, denoiser.device
    random = torch.Generator().manual_seed(seed)
    shape = count, config.in_channels, config.sample_size, config.sample_size
    found = []
    for latents in torch.randn(shape, generator=random).split(SAMPLING_BATCH):
        latents, before = latents.to(device), None
        for step in range(num_steps):
            times = torch.full((len(latents),), 1 - step / num_steps, device=device)
            velocity = _velocity(denoiser, latents, times)
            ahead = velocity if before is None else 1.5 * velocity - 0.5 * before
            latents, before = latents - ahead / num_steps, velocity
        found.append(latents)
    return torch.cat(found)


def _build(channels: int, side: int, patch: int, seed: int) -> DiTTransformer2DModel:
    """A denoiser that gives 0: DiT's initialization, in which every block begins as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiTTransformer2DModel(
            num_attention_heads=NUM_HEADS,
            attention_head_dim=WIDTH // NUM_HEADS,
            in_channels=channels,
            num_layers=NUM_LAYERS,
            sample_size=side,
            patch_size=patch,
            num_embeds_ada_norm=1,
        )
    last = [block.norm1.linear for block in network.transformer_blocks]
    for linear in (*last, network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return network.eval()  # in training it would drop the one class at random, and nothing else


def _velocity(network: DiTTransformer2DModel, noisy: Tensor, times: Tensor) -> Tensor:
    one_class = torch.zeros(len(noisy), dtype=torch.long, device=noisy.device)
    return network(noisy, times * 1000, one_class, return_dict=False)[0]


def _average(averaged: list[Tensor], current: list[Tensor], count: int) -> None:
    """An exponential moving average that forgets the beginning sooner."""
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + int(count)) / (10 + int(count))))
