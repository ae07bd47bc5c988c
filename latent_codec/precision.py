"""Which devices compute in bfloat16, and which only emulate it."""

from pathlib import Path

import torch

EMULATED = "this CPU has no bfloat16 arithmetic: torch emulates it, about 20 to 30 times slower than float32"


def computes_bfloat16(device: str | torch.device, cpu_info: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Tell whether a device has bfloat16 arithmetic of its own.

    A CUDA GPU has it where `torch.cuda.is_bf16_supported(including_emulation=False)`, an x86 CPU with
    AVX512-BF16 or AMX, which Linux lists in `cpu_info`.

    Returns:
        False where torch emulates it; None where that is not known: other processors and other systems.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return None
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return None
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    return None if flags is None else not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
