"""The machine's peak: the fastest matrix product of a few sizes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from contender import synchronize

MODES = {"fp32": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16}


def modes(device: torch.device) -> list[str]:
    """The precisions that this device has."""
    return list(MODES) if device.type == "cuda" else ["fp32", "bf16"]


def peak_flops(device: torch.device, mode: str, *, quick: bool = False) -> float:
    """FLOP/s of the fastest square product of random numbers; about a second a size.

    Args:
        quick: one small size, for checking that the program runs.
    """
    sizes = (256,) if quick else (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    with _tf32(mode == "TF32"):
        return max(_rate(size, MODES[mode], device, 0.05 if quick else 1.0) for size in sizes)


def _rate(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    left = torch.randn((size, size), device=device).to(dtype)
    right = torch.randn((size, size), device=device).to(dtype)
    out = torch.empty_like(left)
    best = 0.0
    # The first runs choose kernels and fill caches; the best of the others counts.
    ends = time.perf_counter() + seconds
    runs = 0
    while runs < 4 or time.perf_counter() < ends:
        synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
        runs += 1
    return best


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
