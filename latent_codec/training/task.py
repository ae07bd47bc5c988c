"""What the loop trains: the part of a run that knows data, networks and losses."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import PositionSampler
from latent_codec.training.optimization import build_optimizer, moving_average
from latent_codec.training.stopping import ignore_interrupts


class Task:
    """One kind of training, of which the loop (training/loop.py) knows nothing but this.

        __init__ -> prepare -> resume -> batches -> [begin_step -> accumulate ... -> end_step] x steps

    A subclass sets, before `prepare`, the attributes below; everything else has a default.

    Args:
        config: of the run.
        network: what is trained in place, and ships.
        accelerator: device, precision and processes.
    """

    objective: nn.Module
    """Holds `network`; its forward is the pass that training differentiates."""
    ema: nn.Module
    """The moving average of `network`, as its `.module`."""
    modules: dict[str, nn.Module]
    """By file stem: what a checkpoint holds beside objective and average."""
    num_images: int | None
    """In an epoch; None for a stream."""
    headline: Callable[[dict[str, float]], str] = staticmethod(lambda terms: f"loss {terms['loss']:.4f}")
    """A step's terms in the few words of the progress bar."""

    def __init__(self, config: TrainingConfig, network: nn.Module, accelerator: Accelerator):
        self.config, self.network, self.accelerator = config, network, accelerator
        self.modules = {}

    def prepare(self) -> torch.optim.Optimizer:
        """Wrap the networks for several processes; return the optimizer of all that is trained."""
        optimizer = build_optimizer(self.trained, [], self.config.optimizer)
        self.model, optimizer = self.accelerator.prepare(self.objective, optimizer)
        return optimizer

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.objective.parameters() if parameter.requires_grad]

    @property
    def skipped(self) -> list[str]:
        """Names of the images that this process could not read so far."""
        return []

    def resume(self, state: dict[str, Any], out: Path) -> None:
        """Take up what `state_dict` left in a checkpoint of the run `out`, whose modules are restored.

        Args:
            state: entries of state.json; {"step": 0} where there is no checkpoint.
            out: for messages.

        Raises:
            ValueError: if this is not the run that the checkpoint was made by.
        """

    def state_dict(self) -> dict[str, Any]:
        """Further entries of a checkpoint's state.json; called in every process."""
        return {}

    def batches(self, start: int) -> Iterator[Any]:
        """This process's micro-batches from step `start` on."""
        raise NotImplementedError

    def begin_step(self, step: int) -> None:
        """Before the gradients of a step, counted from 0."""

    def terms(self, batch: Any, step: int) -> dict[str, Tensor]:
        """The named terms of a micro-batch, `loss` among them, by `self.model`."""
        raise NotImplementedError

    def accumulate(self, batch: Any, step: int, *, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's gradients, synchronised with the other processes' after the `last`; return its terms."""
        with self.synchronizing(self.model, last):
            with self.accelerator.autocast():
                terms = self.terms(batch, step)
            self.accelerator.backward(terms["loss"] / self.config.optimizer.accumulation)
        return {name: value.detach().float() for name, value in terms.items()}

    def train_directly(self, network: nn.Module) -> None:
        """Make the network itself the objective, whose forward is trained."""
        network.to(self.accelerator.device).train()
        if self.config.run.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.ema = moving_average(network, self.config.optimizer.ema_decay)
        self.objective = network

    def seed_dropout(self, step: int) -> None:
        """Make dropout a function of the step and the process, so that a resumed run goes on to the same weights."""
        process = self.accelerator.process_index
        torch.manual_seed((self.config.run.seed * 1_000_003 + step) * 1_009 + process)

    def synchronizing(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def end_step(self, step: int, terms: dict[str, float]) -> None:
        """After the optimizer's step, `step` being done; further terms of the step go into `terms`."""
        self.ema.update_parameters(self.network)

    def measure(self) -> dict[str, float]:
        """Terms that are only had every `run.sample_every` steps, of the averaged network; in the main process."""
        return {}

    def write_samples(self, path: Path) -> None:
        """Paint what the averaged network can do so far; in the main process."""

    def release(self) -> None:
        """Let go of what `prepare` wrapped: DistributedDataParallel must not outlive the processes' group."""
        self.model = None

    def check_end(self) -> None:
        """Assert what must hold after the last step."""

    def positions(self, start: int, dataset: Dataset) -> Iterator[tuple[list[int], Any]]:
        """Micro-batches of `dataset` and their positions, each process its own."""
        sampler = self.position_sampler(start)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.config.data.num_workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return zip(sampler, loader)

    def position_sampler(self, start: int) -> Iterable[list[int]]:
        settings = self.config.optimizer
        return PositionSampler(
            start,
            batch_size=settings.batch_size,
            accumulation=settings.accumulation,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_steps=self.config.run.steps - start,
        )
