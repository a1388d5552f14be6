"""Which precision a device multiplies matrices fast in.

A CPU without instructions for bfloat16 multiplies it a hundred times slower than float32 (measured: 0.9 against 90
GFLOP/s on two AVX2 cores), so "mixed precision" there means float32 alone.
"""

import torch

FAST_BFLOAT16 = frozenset({"AVX512", "AMX", "SVE", "SVE256"})  # of torch.backends.cpu.get_cpu_capability()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where `device` multiplies it fast, else float32."""
    kind = torch.device(device).type
    if kind == "cpu" and torch.backends.cpu.get_cpu_capability() not in FAST_BFLOAT16:
        return torch.float32
    return torch.bfloat16


def autocast(device: torch.device | str, *, enabled: bool = True) -> torch.autocast:
    """bfloat16 for what is safe in it, where it is wanted and fast; else every operation in its inputs' precision."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and fast_dtype(device) == torch.bfloat16)
