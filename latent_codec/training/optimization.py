"""The optimizer, its learning rate as a pure function of the step, and the moving average of the weights."""

import copy
import math
from collections.abc import Iterable
from itertools import compress

import torch
from torch import nn

from latent_codec.training.config import OptimizerConfig

MAX_SIDE = 2048
"""SOAP leaves a weight's side that is longer as it is: finding its axes takes the cube of its length."""
SCALAR_FACTOR = 10.0  # a lone scalar, such as the likelihood's log std, has units of its own to cross


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then the schedule's course to `num_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * share)


def build_optimizer(
    trained: Iterable[nn.Parameter],
    discriminator: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    encoder: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """One AdamW or SOAP for both networks, since they share the loss scale of float16.

    Every group has a `factor`, by which `set_learning_rate` multiplies the step's rate: the
    discriminator's own rate, the encoder's share, the fan-in's share of `optimizer.fan_in_reference`, and
    10 for scalars.

    Args:
        trained: all that is trained of the autoencoder and its likelihood.
        discriminator: what judges it, or nothing.
        encoder: which of `trained` learn by `optimizer.encoder_factor`.
    """
    ratio = (config.discriminator_learning_rate or config.learning_rate) / config.learning_rate
    slow = {id(parameter) for parameter in encoder}
    trained = list(trained)
    learning = (
        ([each for each in trained if id(each) not in slow], 1.0),
        ([each for each in trained if id(each) in slow], config.encoder_factor),
        (discriminator, ratio),
    )
    groups = [group for some, factor in learning for group in _groups(some, factor, config.fan_in_reference)]
    settings = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    from pytorch_optimizer import SOAP  # takes a second to import

    return SOAP(groups, max_precondition_dim=MAX_SIDE, **settings)


def _groups(parameters: Iterable[nn.Parameter], ratio: float, fan_in_reference: int | None) -> list[dict]:
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        factor = ratio
        if parameter.ndim == 0:
            factor *= SCALAR_FACTOR
        elif fan_in_reference and parameter.ndim > 1:
            factor *= min(1.0, fan_in_reference / max(1, parameter[0].numel()))
        groups.setdefault(factor, []).append(parameter)
    return [{"params": members, "factor": factor} for factor, members in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


class MovingAverage(nn.Module):
    """A copy of a network, `module`, that `update_parameters` makes an exponential moving average of it.

    The n-th update (from 1) copies the weights for n = 1, and after it uses
    min(decay, n / (9 + n)), which forgets the beginning of a run sooner.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(network), decay
        self.register_buffer("n_averaged", torch.tensor(0))  # on the CPU: to read it waits for no device

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        count = int(self.n_averaged)
        averaged, current = list(self.module.parameters()), list(network.parameters())
        if count:
            share = 1 - min(self.decay, (1 + count) / (10 + count))
            learned = [each.requires_grad for each in current]
            torch._foreach_lerp_(list(compress(averaged, learned)), list(compress(current, learned)), share)
            # What stays, stays to the bit: an average of -0 and -0 is +0. Codebooks move without gradients.
            for mine, now in zip(averaged, current):
                if not now.requires_grad:
                    mine.copy_(torch.where(mine == now, now, mine.lerp(now, share)))
        else:
            torch._foreach_copy_(averaged, current)
        for mine, theirs in zip(self.module.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
        self.n_averaged += 1
