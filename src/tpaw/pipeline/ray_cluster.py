"""Join or start a Ray cluster, and count the workers that it has room for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import ray
import ray.exceptions

from tpaw.config.schema import LaunchConfig, RunConfig
from tpaw.errors import InputError, first_line, printable

SECONDS_TO_CONNECT = 10.0


def worker_count(config: RunConfig) -> int:
    """How many workers the cluster has room for, or as many as are asked for.

    Raises:
        InputError: there is no room for so many.
    """
    launch, there = config.launch, ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise InputError("device: cuda: the Ray cluster has no GPU; set device to auto or cpu")
    use_gpu = bool(gpus) and config.device != "cpu"
    room = gpus // launch.gpus_per_worker if use_gpu else int(there.get("CPU", 0))
    kind = f"{gpus} GPUs" if use_gpu else f"{room} CPU cores"
    wanted = room if launch.workers == "all" else launch.workers
    if not 1 <= wanted <= room:
        each = f"launch.gpus_per_worker: {launch.gpus_per_worker}" if use_gpu else "one"
        raise InputError(
            f"launch.workers: {launch.workers}: the Ray cluster has {kind}; each worker needs "
            f"{each}"
        )
    processes = wanted * (launch.gpus_per_worker if use_gpu else 1)
    if config.train.batch_size % processes:
        raise InputError(
            f"train.batch_size: {config.train.batch_size}: must be a multiple of the {processes} "
            "processes that train together; change it, or launch.workers"
        )
    return wanted


@contextlib.contextmanager
def connected(launch: LaunchConfig) -> Iterator[None]:
    """Join the Ray cluster, or start one on this machine for the time of the context.

    A program that is connected already stays connected to its cluster.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        _try_to_connect(launch.address)
        with _signals_kept():
            ray.init(
                address=launch.address or "local",
                include_dashboard=None if launch.address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"launch.address: {launch.address}: no Ray cluster answers there "
            f"({printable(first_line(error))}); start one by `ray start --head`, or remove the "
            "setting to use this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _try_to_connect(address: str | None) -> None:
    """Raise an OSError if nobody listens at host:port. Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.rpartition("/")[2], int(port)), SECONDS_TO_CONNECT).close()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM, which stops a run at its next safe point."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)
