"""Encode with a few processes that `accelerate launch` started: each takes every n-th shard, as the engine `local` does.

accelerate launch --num_processes 4 -m latent_codec.cli encode photos/ --engine accelerate --format webdataset
"""

from dataclasses import replace
from datetime import timedelta

import torch

from latent_codec.latents.engines import local
from latent_codec.latents.engines.accounting import Accounting, Progress
from latent_codec.latents.shards import Job

_PATIENCE = timedelta(days=30)
"""For the slowest process, which the others wait for."""


def run(job: Job, on_progress: Progress | None = None, *, num_workers: int | None = None) -> Accounting:
    """Encode this process's part of the missing shards, and wait for the others to encode theirs.

    On a CPU each process computes with one thread: start as many as there are cores.

    Args:
        num_workers: processes of each of these that decode images; None: they share the CPUs.

    Returns:
        The counts of all of them.

    Raises:
        As `local.run`.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    on_cpu = job.codec.device.type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if on_cpu:
        torch.set_num_threads(1)
    else:
        job.codec.to(state.device)
    part = replace(job, plan=job.plan[state.process_index :: state.num_processes])
    if num_workers is None:
        images = sum(len(each.numbers) for each in part.plan)
        num_workers = local.default_workers(images) // state.num_processes
    accounting = local.run(part, on_progress, num_workers=num_workers)
    counts = gather_object([accounting])  # which waits for all
    for number, other in enumerate(counts):
        if number != state.process_index:
            accounting.add(other)
    return accounting
