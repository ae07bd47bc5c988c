"""What the loop trains: the part of a run that knows data, networks and losses."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.labels import Images
from latent_codec.training.config import TrainingConfig
from latent_codec.training.data import PositionSampler
from latent_codec.training.optimization import MovingAverage, build_optimizer
from latent_codec.training.stopping import ignore_interrupts

Terms = dict[str, Tensor | float]
"""Named scalars of a step. Tensors stay on the device until the journal reads them."""


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """What a task is built from, besides its configuration and network."""

    source: Images | None
    """Images, or codes of the codec; with a stream, its first images."""
    codec: LatentCodec | None = None
    """The codec to learn from; None for a kind that learns from images only."""
    stream: Any = None
    """A `datasets.IterableDataset` to train on."""
    resumes: bool = False
    """Whether a checkpoint will be restored, so that nothing need be initialized from data."""


class Task(ABC):
    """One kind of training, of which the loop (training/loop.py) knows nothing but this.

        check -> __init__ -> resume -> batches -> [begin_step -> accumulate ... -> end_step] x steps

    A subclass has `loss`, and an `__init__(config, network, inputs, accelerator)` that makes its data set and calls this one.

    Args:
        config: of the run.
        network: what is trained in place, and ships.
        dataset: what a batch is collated from, by position; `len` is an epoch, `skipped` names unreadable images.
        accelerator: device, precision and processes.
    """

    modules: dict[str, nn.Module]
    """By file stem: what a checkpoint holds besides objective and average."""
    num_images: int | None
    """In an epoch; None for a stream."""
    headline: Callable[[dict[str, float]], str] = staticmethod(lambda terms: f"loss {terms['loss']:.4f}")
    """A step's terms in the few words of the progress bar."""

    def __init__(
        self, config: TrainingConfig, network: nn.Module, dataset: Dataset, accelerator: Accelerator
    ):
        self.config, self.network, self.dataset, self.accelerator = config, network, dataset, accelerator
        self.num_images = len(dataset)
        network.to(accelerator.device).train()
        if config.run.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.ema = MovingAverage(network, config.optimizer.ema_decay)
        self.modules = {}
        self.objective = self.build_objective()
        self.model, self.optimizer = accelerator.prepare(self.objective, self.build_optimizer())

    @classmethod
    def check(cls, config: TrainingConfig, network: nn.Module, inputs: TaskInputs) -> None:
        """Refuse a configuration that this network cannot be trained by, before anything is written.

        Raises:
            ValueError: for what does not fit together.
        """
        return

    @abstractmethod
    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What a micro-batch is trained to lower, by `self.model`, and the named terms to be logged."""

    def build_objective(self) -> nn.Module:
        """What holds `network` and whose forward is the pass that training differentiates: by default the network itself."""
        return self.network

    def build_optimizer(self) -> torch.optim.Optimizer:
        """One optimizer of all that is trained."""
        return build_optimizer(self.trained, [], self.config.optimizer)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.objective.parameters() if parameter.requires_grad]

    @property
    def skipped(self) -> list[str]:
        """Names of the images that this process could not read so far."""
        return self.dataset.skipped

    def resume(self, state: dict[str, Any], out: Path) -> None:
        """Take up what `state_dict` left in a checkpoint of the run `out`, whose modules are restored.

        Args:
            state: entries of state.json; {"step": 0} where there is no checkpoint.
            out: for messages.

        Raises:
            ValueError: if this is not the run that the checkpoint was made by.
        """
        return

    def check_teacher(self, codec: LatentCodec, before: str | None, now: str, what: str, out: Path) -> None:
        """Refuse to go on with another codec than the run in `out` learned from, by its fingerprint before and now."""
        if before not in (None, now):
            raise SettingError(
                "model.teacher",
                f"the codec that the run in {out} was started with ({what} {before})",
                f"{codec.name} ({now})",
                advice="or give another `run_folder`",
            )

    def state_dict(self) -> dict[str, Any]:
        """Further entries of a checkpoint's state.json; called in every process."""
        return {}

    def batches(self, start: int) -> Iterator[Any]:
        """This process's micro-batches from step `start` on."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.position_sampler(start),
            num_workers=self.config.data.num_workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(loader)

    def position_sampler(self, start: int) -> PositionSampler:
        settings = self.config.optimizer
        return PositionSampler(
            start,
            batch_size=settings.batch_size,
            accumulation=settings.accumulation,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_steps=self.config.run.steps - start,
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device without waiting for it."""
        device = self.accelerator.device
        if device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    def begin_step(self, step: int) -> None:
        """Before the gradients of a step, counted from 0: make dropout a function of the step and the process.

        So a resumed run goes on to the same weights.
        """
        process = self.accelerator.process_index
        torch.manual_seed((self.config.run.seed * 1_000_003 + step) * 1_009 + process)

    def accumulate(self, batch: Any, step: int, *, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's gradients, synchronized with the other processes' after the `last`; return its terms."""
        with self.synchronizing(self.model, last):
            with self.accelerator.autocast():
                total, terms = self.loss(batch, step)
            self.accelerator.backward(total / self.config.optimizer.accumulation)
        return {"loss": total.detach().float()} | {
            name: value.detach().float() for name, value in terms.items()
        }

    def synchronizing(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def end_step(self, step: int) -> dict[str, Tensor]:
        """After the optimizer's step, `step` being done; return further terms of the step."""
        self.ema.update_parameters(self.network)
        return {}

    def measure(self) -> dict[str, float]:
        """Terms that are only measured every `run.sample_every` steps, of the averaged network; in the main process."""
        return {}

    def write_samples(self, path: Path) -> None:
        """Write an image that shows what the averaged network can do so far; in the main process."""
        return

    def write_companions(self, out: Path) -> None:
        """Write what was trained with the network into the run folder; with each checkpoint, in the main process."""
        return

    def release(self) -> None:
        """Drop what was wrapped for several processes: DistributedDataParallel must not outlive the processes' group."""
        self.model = self.optimizer = None

    def check_end(self) -> None:
        """Assert what must hold after the last step."""
        return


def collate(dataset: Dataset, positions: Iterable[int]) -> Any:
    """A batch of these positions, as a loader makes it."""
    return torch.utils.data.default_collate([dataset[position] for position in positions])
