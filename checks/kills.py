"""Kill the processes of runs on a Ray cluster at random moments, and compare what the runs publish.

    python checks/kills.py [worker] [node] [controller] [--kills 10] [--seed 0]

The cluster is on this machine: a head without cores and two nodes of one core. For each kind, runs
are started until so many kills have happened: of a worker's process, of a whole node, of `tpaw run`
itself. Then each file of responses, log-probs and weights must have the bytes of a run that nobody
disturbed; so must the outcomes of each held-out problem. Files before the first training must have
those of a run without Ray, too, and the losses of the first training must be its losses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray.cluster_utils
from rich.console import Console
from rich.table import Table

from tpaw.storage.run_directory import RunDirectory

CHANGES = (
    *("data.limit=192", "evaluate.data.limit=300", "iterations=2"),
    *("generate.shard_size=16", "score.shard_size=32"),
    *("train.epochs=2", "train.batch_size=16", "train.save_every=3", "train.learning_rate=1e-4"),
)
KINDS = ("worker", "node", "controller")
SECONDS_BETWEEN_KILLS = (1.0, 14.0)
SECONDS_OF_A_RUN = 900.0


class Cluster:
    """Two nodes of one core. A node that was killed is replaced."""

    def __init__(self) -> None:
        self._cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(2)]

    def kill_node(self, choose: random.Random) -> str:
        """Kill one node, with all its processes, and add another one."""
        node = self._nodes.pop(choose.randrange(2))
        self._cluster.remove_node(node, allow_graceful=False)
        time.sleep(choose.random() * 3)
        self._nodes.append(self._cluster.add_node(num_cpus=1))
        return "node"

    def close(self) -> None:
        """Stop it."""
        self._cluster.shutdown()


def kill_worker(address: str, choose: random.Random) -> str | None:
    """Kill one process of the cluster that does shards or trains; None if there is none now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            raylet = Path("/proc", parent, "cmdline").read_bytes()
        except OSError:
            continue
        kinds = (b"ray::ShardWorker", b"ray::RayTrainWorker", b"ray::TrainWorker")
        if line.startswith(kinds) and f"--gcs-address={address}".encode() in raylet:
            found.append((int(folder.name), line.split(b"\0")[0].decode()[5:]))
    if not found:
        return None
    pid, name = choose.choice(sorted(found))
    os.kill(pid, signal.SIGKILL)
    return name.partition(".")[0]


def command(folder: Path, address: str | None) -> list[str]:
    """`tpaw run` of the check; without Ray if there is no address."""
    changes = [*CHANGES, "deterministic=true"]
    if address is not None:
        changes += ["launch.engine=ray", f"launch.address={address}", "launch.workers=2"]
        changes += ["launch.max_retries=50"]
    settings = [part for change in changes for part in ("--set", change)]
    return [sys.executable, "-m", "tpaw", "run", "starter", *settings, "-o", str(folder)]


def start(folder: Path, address: str | None) -> subprocess.Popen[bytes]:
    """Start the command; what it says goes to a file beside its folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command(folder, address), stdout=log, stderr=log, env=environment, process_group=0
        )


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the files that hold responses, log-probs, weights and held-out outcomes."""
    run = RunDirectory(folder)
    kinds = ("*.parquet", "*.safetensors", "evaluation/*.jsonl")
    paths = [path for kind in kinds for path in run.root.rglob(kind)]
    return {
        str(path.relative_to(run.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


def losses(folder: Path) -> list[float]:
    """Of the steps of the first training."""
    lines = RunDirectory(folder).training_log(1).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def disturbed(
    folder: Path, address: str, kill: Callable[[subprocess.Popen[bytes]], str | None], kills: int
) -> list[str]:
    """A run, killed up to so many times and continued until it ends.

    Returns:
        What was killed and after how many seconds.

    Raises:
        RuntimeError: it failed, or did not end.
    """
    choose = random.Random(folder.name)
    done: list[str] = []
    began = time.monotonic()
    process = start(folder, address)
    moment = began + choose.uniform(*SECONDS_BETWEEN_KILLS)
    while True:
        if time.monotonic() - began > SECONDS_OF_A_RUN:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{folder}: the run did not end in {SECONDS_OF_A_RUN:.0f} s")
        code = process.poll()
        if code == 0:
            return done
        if code is not None:
            if code != -signal.SIGKILL:
                raise RuntimeError(f"{folder}: exit code {code}; see {folder.with_suffix('.log')}")
            process = start(folder, address)
        elif (
            time.monotonic() > moment and len(done) < kills and (what := kill(process)) is not None
        ):
            done.append(f"{what} at {time.monotonic() - began:.0f} s")
            print(f"  killed: {done[-1]}", flush=True)
            moment = time.monotonic() + choose.uniform(*SECONDS_BETWEEN_KILLS)
        time.sleep(0.1)


def kill_controller(process: subprocess.Popen[bytes]) -> str:
    """Kill `tpaw run`. Ray ends its actors."""
    process.kill()
    process.wait()
    return "controller"


def main() -> int:
    """Run the check; 1 if a run failed or published other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Format)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="default: all")
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"Runs and logs: {root}", flush=True)
    began = time.monotonic()
    if start(root / "alone", None).wait() != 0:
        print(f"the run without Ray failed; see {root}/alone.log")
        return 1
    alone = digests(root / "alone")
    cluster, choose, failures = Cluster(), random.Random(options.seed), 0
    table = Table("killed", "kills", "runs", "seconds", "files", "files that differ")
    try:
        if start(root / "calm", cluster.address).wait() != 0:
            print(f"the run that nobody disturbs failed; see {root}/calm.log")
            return 1
        calm = digests(root / "calm")
        early = [name for name in calm if calm[name] == alone.get(name)]
        print(
            f"{len(calm)} files, {len(early)} of them with the bytes of one process; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        pairs = list(zip(losses(root / "calm"), losses(root / "alone"), strict=True))
        largest = max(abs(a / b - 1) for a, b in pairs)
        print(f"{len(pairs)} losses of θ_1 differ from one process's by at most {largest:.1e}")
        failures += largest > 1e-5
        # θ_1 is trained by two processes here, which rounds differently.
        begun = ("inputs/", "iterations/0/", "iterations/1/responses/")
        before_training = [n for n in calm if n.startswith(begun)]
        before_training += [n for n in calm if "/iteration-1-" in n]
        failures += len(set(before_training) - set(early))
        actions: dict[str, Callable[[subprocess.Popen[bytes]], str | None]] = {
            "worker": lambda _: kill_worker(cluster.address, choose),
            "node": lambda _: cluster.kill_node(choose),
            "controller": kill_controller,
        }
        for kind in options.kinds or KINDS:
            kills = runs = differ = 0
            since = time.monotonic()
            while kills < options.kills:
                folder = root / f"{kind}-{options.seed}-{runs}"
                kills += len(
                    disturbed(folder, cluster.address, actions[kind], options.kills - kills)
                )
                runs += 1
                found = digests(folder)
                other = {n for n in calm.keys() | found.keys() if calm.get(n) != found.get(n)}
                differ += len(other)
                for name in sorted(other):
                    print(f"  {folder.name}: {name} differs", flush=True)
            seconds = f"{time.monotonic() - since:.0f}"
            table.add_row(kind, *map(str, (kills, runs, seconds, runs * len(calm), differ)))
            failures += differ
    finally:
        cluster.close()
    Console().print(table)
    return int(failures > 0)


class _Format(argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the text above."""


if __name__ == "__main__":
    sys.exit(main())
