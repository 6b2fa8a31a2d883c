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

from tpaw.config.schema import RunConfig
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
    if config.train.weights == "split" and processes > 1:
        raise InputError(
            f"train.weights: split: works in one process only, and {processes} would train "
            "together; set it to fp32, or launch.workers and launch.gpus_per_worker to 1"
        )
    return wanted


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """Join the Ray cluster, or start one on this machine for the time of the context.

    A program that is connected already stays connected to its cluster.

    Raises:
        InputError: there is no cluster at the address, or it has no room for the workers.
    """
    if ray.is_initialized():
        worker_count(config)
        yield
        return
    launch = config.launch
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        with _signals_kept():
            ray.init(
                address=launch.address or "local",
                include_dashboard=None if launch.address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except Exception as error:  # Ray raises many types, and Exception itself
        if launch.address is None:
            raise InputError(
                "launch.engine: ray: Ray does not start on this machine "
                f"({printable(first_line(error))}); its logs are in /tmp/ray/session_latest/logs"
            ) from None
        raise _no_cluster(launch.address, error) from None
    try:
        worker_count(config)
        yield
    finally:
        ray.shutdown()


def try_to_connect(address: str | None) -> None:
    """Try whether somebody listens at an address host:port. Ray itself would try for minutes.

    Raises:
        InputError: nobody does.
    """
    host, _, port = (address or "").rpartition(":")
    if address is not None and host and port.isdecimal() and not ray.is_initialized():
        try:
            place = host.rpartition("/")[2], int(port)
            socket.create_connection(place, SECONDS_TO_CONNECT).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(
        f"launch.address: {address}: no Ray cluster answers there "
        f"({printable(first_line(error))}); start one by `ray start --head`, or remove the "
        "setting to use this machine alone"
    )


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
