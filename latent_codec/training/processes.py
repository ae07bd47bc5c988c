"""`accelerate launch --num_processes N` where accelerate starts a single process: on a CPU.

Accelerate starts several processes only for several GPUs. On a CPU it runs the program
once and says nothing, so that a run would silently have a smaller batch than was asked for.
"""

import os
import sys
from pathlib import Path

import torch

_STARTED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def on_cpu() -> bool:
    """Whether this process computes on the CPU: there is nothing else, or `accelerate launch --cpu` said so."""
    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return wanted or not torch.accelerator.is_available()


def is_main_process() -> bool:
    """Whether this process writes files for all of a run's."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu()).is_main_process


def start_missing_processes() -> None:
    """Become torchrun with as many processes as the `accelerate launch` above this one was asked for.

    Does nothing under any other parent, and where the processes are running already.

    Raises:
        ValueError: if several processes were asked for on a machine with one GPU.
    """
    wanted = _processes_asked_for()
    if wanted < 2:
        return
    if not on_cpu():
        raise ValueError(
            f"accelerate was asked for {wanted} processes and found one GPU: ask it for one process, or for the CPU."
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={wanted}"]
    sys.stderr.flush()
    program = sys.orig_argv[1:]
    if program[0] == "-m":
        command.append(program.pop(0))
    # Behind "--" torchrun takes none of the program's flags for its own.
    os.execv(sys.executable, [*command, "--", *program])


def _processes_asked_for() -> int:
    """`--num_processes` of the accelerate launcher that is this process's parent; 1 without one."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or any(name in os.environ for name in _STARTED):
        return 1
    import psutil
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 1
    # `accelerate launch`, `accelerate-launch`, `python -m accelerate.commands.launch`
    ends = [place for place, word in enumerate(words) if word.removesuffix(".py").endswith("launch")]
    if not ends or not any("accelerate" in Path(word).name for word in words[: ends[0] + 1]):
        return 1
    return launch_command_parser().parse_args(words[ends[0] + 1 :]).num_processes or 1
