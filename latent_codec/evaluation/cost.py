"""What a call costs: seconds, and the most memory held meanwhile."""

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from latent_codec.files import human_bytes

_CPU_INFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class CostMeter:
    """Times calls on a device and follows the most memory that they held.

    On a GPU that is what torch allocated there. On the CPU it is the resident memory of the
    whole process, libraries included: Linux tells and forgets its peak on request;
    elsewhere only the peak since the process began is known.
    """

    device: torch.device
    peak_bytes: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        self.bytes_before = _peak_memory(self.device, since_reset=_reset_peak(self.device))

    def timed(self, what: str, call: Callable[[], object], megapixels: float) -> object:
        """Run `call`, note its seconds per megapixel under `what`, and give what it returned."""
        _reset_peak(self.device)
        wait_for(self.device)
        start = time.perf_counter()
        result = call()
        wait_for(self.device)
        self.seconds.setdefault(what, []).append((time.perf_counter() - start) / megapixels)
        peak = _peak_memory(self.device, since_reset=True)
        if peak is not None:
            self.peak_bytes = max(peak, self.peak_bytes or 0)
        return result

    def seconds_per_megapixel(self, what: str) -> float:
        """The median over the calls of `what`."""
        return median(self.seconds[what])

    @property
    def memory_note(self) -> str:
        """What the peak counts."""
        if self.peak_bytes is None:
            return "not measured: this system does not tell"
        if self.device.type == "cuda":
            return "allocated on the GPU, weights included"
        before = (
            f", {human_bytes(self.bytes_before)} of it before the first image" if self.bytes_before else ""
        )
        return f"resident memory of the whole process{before}"


def device_name(device: torch.device | str) -> str:
    """What figures were measured on: the CPU's name and torch's threads, or the GPU's name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"


def _cpu_name() -> str:
    try:
        lines = _CPU_INFO.read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or not x86
        return platform.processor() or platform.machine() or "CPU"


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that the clock shows the work and not its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak(device: torch.device) -> bool:
    """Forget the peak so far; whether that was possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # proc(5): sets the peak resident size to the present one
    except OSError:
        return False
    return True


def _peak_memory(device: torch.device, *, since_reset: bool) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not since_reset:
        return None
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
