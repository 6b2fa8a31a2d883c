"""Restore the process-wide settings of torch and Python that a run changes."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator


@contextlib.contextmanager
def isolated(*, deterministic: bool = False) -> Iterator[None]:
    """Restore torch flags, random states and the working directory when the context ends.

    Args:
        deterministic: inside the context, use only kernels that give the same result every time.
            If false, the caller's choice stays in force.
    """
    import numpy as np
    import torch

    folder = os.getcwd()
    numpy_state = np.random.get_state()  # noqa: NPY002
    states = random.getstate(), torch.get_rng_state()
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else None
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled_memory = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul_precision = torch.get_float32_matmul_precision()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        if deterministic:
            # Without this variable, deterministic torch refuses matrix products on CUDA.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # Deterministic torch fills new memory to hide reads of uninitialized memory. TPAW has no
        # such reads, and the filling took half of the training time of SFT on the starter.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        os.chdir(folder)
        random.setstate(states[0])
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(states[1])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled_memory  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision(matmul_precision)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
