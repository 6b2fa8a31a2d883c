"""The actors of the Ray engine that do shards."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import ray
import ray.exceptions
import ray.util

from tpaw.config.schema import RunConfig
from tpaw.models.loading import pick_device
from tpaw.models.sharding import ALONE, Member, join_group
from tpaw.models.tokenizers import load_tokenizer
from tpaw.pipeline.ray_link import Failure, Place, Reporter, Work
from tpaw.pipeline.worker import Worker
from tpaw.runtime.isolation import isolated
from tpaw.runtime.progress import notes_go_to
from tpaw.runtime.shards import Do
from tpaw.storage.run_directory import RunDirectory


class ShardWorker:
    """Does shards. It keeps the player that it loaded, and what its last task has opened."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._task: Any = None
        self._opened = contextlib.ExitStack()
        self._do: Do[Any, Any] | None = None
        self._member = ALONE

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    def ready(self) -> None:
        """Answer, once this process runs; Ray may have to restart it first."""

    def close(self) -> None:
        """Free the device: the player, and the server that generates."""
        self._close()
        if self._worker is not None:
            self._worker.players.release()

    def address(self) -> str:
        """Where this process can be the first of a group: host:port."""
        with contextlib.closing(socket.socket()) as found:
            found.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{found.getsockname()[1]}"

    def join(self, address: str, member: Member, device: str) -> None:
        """Wait for the others of a group, which do each shard together from now on."""
        self._member = member
        join_group(address, member, "nccl" if pick_device(device).type == "cuda" else "gloo")

    def do(self, place: Place, link: Any, task: Any, work: Work) -> Any:
        """Do a shard. Return its result and the amount of work, or the failure as a whole."""
        notes_go_to(lambda text: link.note.remote(text))
        reporter = Reporter(link, work.key)
        try:
            run = place.enter()
            with isolated(deterministic=place.config.deterministic):
                return self._opened_for(task, run, place.config)(
                    work.shard, reporter
                ), reporter.done
        except Exception as error:
            self._close()
            return Failure.of(error, task.title(work.shard), place.root)

    def _opened_for(self, task: Any, run: RunDirectory, config: RunConfig) -> Do[Any, Any]:
        if self._worker is None:
            tokenizer = load_tokenizer(config.model, str(run.inputs / "tokenizer"))
            self._worker = Worker(config, run, tokenizer, member=self._member)
        if self._do is None or task != self._task:
            self._close()
            self._task = task
            self._do = self._opened.enter_context(task.opened(self._worker))
        return self._do

    def _close(self) -> None:
        self._do = self._task = None
        self._opened.close()


# The engine gives the shard of an actor that died to another one.
SHARD_WORKER: Any = ray.remote(max_task_retries=0)(ShardWorker)
