"""The processes of the Ray engine that train one iteration together, by Ray Train.

Ray imports this module in processes of its own too, so torch is imported by those that train.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
import ray.exceptions

from tpaw.evaluation.checker import checker_of
from tpaw.pipeline.job import TrainingJob
from tpaw.pipeline.ray_link import SECONDS_BETWEEN_LOOKS, Failure, Place
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import notes_go_to


class _RemoteStop(StopSignal):
    """The stop signal of a process that trains: the controller's, as the link tells it."""

    def __init__(self, link: Any) -> None:
        super().__init__()
        self._link = link
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while self.signal_number is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            with contextlib.suppress(ray.exceptions.RayError):
                self.signal_number = ray.get(self._link.stop_number.remote()) or None


def _train_in_group(settings: dict[str, Any]) -> None:
    """One process of a group that trains; Ray Train calls it."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from tpaw.data.inputs import load_inputs
    from tpaw.pipeline.players import LoadedPlayers
    from tpaw.pipeline.published import Published
    from tpaw.pipeline.training import TrainingData, train_and_publish
    from tpaw.runtime.isolation import isolated

    place: Place = settings["place"]
    job: TrainingJob = settings["job"]
    link: Any = settings["link"]
    failure = ray.get(link.failure.remote())
    if failure is not None and failure.error is not None:
        return  # trying again would not help
    rank = get_context().get_world_rank()
    done = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done
        done += count
        if rank == 0:
            link.report.remote("training", done)

    notes_go_to(lambda text: link.note.remote(text))
    if rank == 0:
        link.report.remote("training", 0)
    try:
        run = place.enter()
        if (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)
        published = Published(run, checker_of(place.config.checker))
        data = TrainingData(place.config, load_inputs(run.inputs, place.config), published)
        with isolated(deterministic=place.config.deterministic):
            train_and_publish(job, data, LoadedPlayers(place.config), advance, _RemoteStop(link))
    except Exception as error:
        # Where a process dies, the others fail too, with any error. Ray Train tries again then.
        ray.get(link.fail.remote(Failure.of(error, f"training, process {rank}", place.root)))
        raise


def run_group(
    settings: dict[str, Any], workers: int, use_gpu: bool, retries: int, folder: str
) -> None:
    """Run the group. It is a task, so that the controller stays free to look and to stop.

    Ray Train starts the processes again when one of them died, and gives up when one of its own
    helpers died with a machine. Then it is started again here.

    Raises:
        WorkerGroupError: the processes failed too often.
        ControllerError, RayActorError: Ray Train itself failed too often.
    """
    from ray.train import ControllerError, FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchTrainer

    for retries_left in reversed(range(retries + 1)):
        trainer = TorchTrainer(
            _train_in_group,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=TrainRunConfig(
                storage_path=folder, failure_config=FailureConfig(max_failures=retries)
            ),
        )
        try:
            trainer.fit()
            return
        except (ControllerError, ray.exceptions.RayActorError):
            if not retries_left:
                raise


GROUP: Any = ray.remote(num_cpus=0)(run_group)
