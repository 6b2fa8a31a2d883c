#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of less than ten minutes each.
#
#   benchmarks/gpu.sh list                    the pieces
#   benchmarks/gpu.sh facts split-8b          these pieces, one after the other
#   benchmarks/gpu.sh all                     every piece
#   DEVICE=cpu SMALL=1 benchmarks/gpu.sh all  tries the script itself, on tiny models
#
# A piece writes PIECE.log and PIECE.json to docs/results/gpu (OUT=FOLDER: elsewhere). It ends after
# 590 seconds (LIMIT=SECONDS). The exit status is 1 if a piece failed. Weights are random, made from
# shapes; nothing is downloaded. PYTHON is .venv/bin/python where there is one. The pieces of vLLM fail
# without .venv-vllm; `make vllm` makes it, or PYTHON_OF_VLLM names the Python of another environment.
# Start with `facts`: it says what is missing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-}
LIMIT=${LIMIT:-590}
OUT=${OUT:-docs/results/gpu}
WORKERS=${WORKERS:-4}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
PYTHON_OF_VLLM=${PYTHON_OF_VLLM:-.venv-vllm/bin/python}
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

PIECES=(
  facts
  tests-logprobs tests-training tests-generation tests-models tests-runs tests-rest
  exact-100m exact-1.5b exact-8b
  trl-100m trl-1.5b memory-1.5b
  peak-100m peak-1.5b team-100m iteration-100m
  steps-1.5b split-8b qlora-8b
  generation vllm vllm-100m
)

# The benchmark of a file, at a shape, with its own options.
benchmark() {
  local file=$1 size=$2
  shift 2
  local options=(--device "$DEVICE" --json "$OUT/$piece.json")
  if [ -n "$SMALL" ]; then
    size=tiny
    options+=(--length-scale 0.1)
  fi
  "$PYTHON" "benchmarks/$file.py" --size "$size" "${options[@]}" "$@"
}

# `choose LARGE SMALL` is the number for this run.
choose() {
  if [ -n "$SMALL" ]; then echo "$2"; else echo "$1"; fi
}

# The tests of some folders, with what became of them as JSON.
tests() {
  local options=(--device "$DEVICE" -q -p no:cacheprovider "--junitxml=$OUT/$piece.xml")
  if [ -n "$SMALL" ]; then
    options+=(-n 0 --collect-only)
  else
    options+=(-n "$WORKERS" --dist loadfile)
  fi
  "$PYTHON" -m pytest "${options[@]}" "$@"
  local status=$?
  "$PYTHON" - "$OUT/$piece.xml" "$OUT/$piece.json" "$status" <<'PYTHON'
import json, os, sys
from pathlib import Path
from xml.etree import ElementTree

source, target, status = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
found = {"exit_status": status}
if source.exists():
    suite = ElementTree.parse(source).getroot().find("testsuite")
    found |= {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    found["seconds"] = float(suite.get("time"))
    found["failed"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    os.remove(source)
target.write_text(json.dumps(found, indent=1) + "\n")
PYTHON
  return "$status"
}

facts() {
  "$PYTHON" - "$OUT/$piece.json" "$DEVICE" <<'PYTHON'
import inspect, json, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn.attention.varlen import varlen_attn

facts = {}
wanted = {
    "torch": (2, 13), "transformers": (5, 23), "accelerate": (1, 15), "datasets": (5, 2),
    "pyarrow": (24, 0), "pydantic": (2, 12), "scipy": (1, 15), "rich": (14, 0), "typer": (0, 20),
    "peft": (0, 18), "bitsandbytes": (0, 50), "trl": (1, 16), "pytest": (9, 0),
    "pytest-xdist": (3, 8), "lm_eval": (0, 4), "ray": (2, 60),
}
problems = []
for name, least in wanted.items():
    try:
        facts[name] = version(name)
    except PackageNotFoundError:
        problems.append(f"{name}: missing")
        continue
    numbers = [int("".join(c for c in part if c.isdigit()) or 0) for part in facts[name].split(".")]
    if tuple(numbers[:2]) < least:
        problems.append(f"{name}: {facts[name]}, older than {'.'.join(map(str, least))}")
arguments = inspect.signature(varlen_attn).parameters
lacking = {"scale", "window_size", "enable_gqa"} - set(arguments)
if lacking:
    problems.append(f"varlen_attn of this torch lacks {sorted(lacking)}: packed rows will fail in bf16")
if sys.argv[2] == "cuda":
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "bytes": properties.total_memory}
        facts |= {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
        facts["compute capability"] = torch.cuda.get_device_capability(0)
    else:
        problems.append("torch sees no CUDA device")
facts["problems"] = problems
Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
print(json.dumps(facts, indent=1))
sys.exit(bool(problems))
PYTHON
}

generation() {
  local size=0.1B
  [ -n "$SMALL" ] && size=small
  "$PYTHON" benchmarks/generation.py --device "$DEVICE" --size "$size" --precision bf16 \
    --rows "$(choose 512 2)" --scale "$(choose 0.5 0.02)" --repeats "$(choose 3 1)" \
    --output "$OUT/$piece.json"
}

# checks/vllm.py with options. It prints tokens a second of vLLM and of this package.
vllm() {
  local status=0
  if ! command -v "$PYTHON_OF_VLLM" >/dev/null; then
    echo "not run: there is no $PYTHON_OF_VLLM; \`make vllm\` makes it"
    echo '{"run": false}' >"$OUT/$piece.json"
    return 1
  fi
  "$PYTHON" checks/vllm.py "$@" || status=$?
  printf '{"run": true, "exit_status": %d}\n' "$status" >"$OUT/$piece.json"
  return "$status"
}

run() {
  case $piece in
    facts) facts ;;
    tests-logprobs) tests tests/logprobs tests/scoring tests/objectives ;;
    tests-training) tests tests/training ;;
    tests-generation) tests tests/generation tests/evaluation ;;
    tests-models) tests tests/models tests/runtime ;;
    tests-runs) tests tests/test_selfplay.py tests/pipeline ;;
    tests-rest)
      tests tests/cli tests/config tests/data tests/report tests/starter tests/statistics \
        tests/storage tests/study tests/test_[!s]*.py
      ;;
    exact-100m) benchmark exactness 100m --triples "$(choose 64 4)" ;;
    exact-1.5b) benchmark exactness qwen2.5-1.5b --triples "$(choose 32 4)" ;;
    exact-8b) benchmark exactness llama-3.1-8b --triples "$(choose 8 4)" --tokens-per-row 4096 ;;
    trl-100m) trl 100m --triples "$(choose 64 4)" --batch "$(choose 32 4)" ;;
    trl-1.5b) trl qwen2.5-1.5b --triples "$(choose 32 4)" --batch "$(choose 16 4)" ;;
    memory-1.5b) memory qwen2.5-1.5b ;;
    peak-100m) peak 100m --triples "$(choose 128 4)" --batch "$(choose 64 2)" ;;
    peak-1.5b) peak qwen2.5-1.5b --triples "$(choose 64 4)" --batch "$(choose 32 2)" ;;
    team-100m)
      benchmark team_step 100m --bf16 --prompts "$(choose 16 2)" --batch "$(choose 48 4)" \
        --repeats "$(choose 3 1)"
      ;;
    iteration-100m)
      benchmark whole_iteration 100m --bf16 --prompts "$(choose 32 2)" --batch "$(choose 32 4)" \
        --repeats "$(choose 3 1)"
      ;;
    steps-1.5b) steps qwen2.5-1.5b ;;
    split-8b) steps llama-3.1-8b --checkpointing --weights split ;;
    qlora-8b) steps llama-3.1-8b --checkpointing --weights nf4 ;;
    generation) generation ;;
    # Two iterations of the starter (0.4M parameters): log-probs of both agree.
    vllm) vllm --prompts "$(choose 2000 8)" ;;
    # Tokens a second at a shape where a GPU has work to do. vLLM has no attention for heads as small
    # as those of the shape tiny.
    vllm-100m) vllm --size "$(choose 100m 39m)" --prompts "$(choose 512 8)" ;;
    *)
      echo "$piece: no such piece; choose from: ${PIECES[*]}" >&2
      return 2
      ;;
  esac
}

trl() {
  local size=$1
  shift
  benchmark train_step "$size" --bf16 --pairs 1 4 --no-memory --repeats "$(choose 3 1)" "$@"
}

memory() {
  benchmark train_step "$1" --bf16 --pairs 1 4 --repeats 0 --triples "$(choose 8 4)" \
    --batch "$(choose 8 4)"
}

peak() {
  local size=$1
  shift
  benchmark ceiling "$size" --bf16 --repeats "$(choose 3 1)" "$@"
}

steps() {
  local size=$1
  shift
  benchmark steps_per_second "$size" --bf16 --batch "$(choose 64 2)" --steps "$(choose 6 2)" "$@"
}

if [ $# -eq 0 ] || [ "$1" = list ]; then
  printf '%s\n' "${PIECES[@]}"
  exit 0
fi
if [ "$1" = --piece ]; then # this script calls itself, so that `timeout` can end a piece
  piece=$2
  run
  exit
fi
[ "$1" = all ] && set -- "${PIECES[@]}"
mkdir -p "$OUT" || exit 2
export DEVICE SMALL OUT WORKERS PYTHON PYTHON_OF_VLLM
failed=()
for piece in "$@"; do
  began=$SECONDS
  echo "== $piece"
  timeout --signal=INT --kill-after=10 "$LIMIT" benchmarks/gpu.sh --piece "$piece" 2>&1 |
    tee "$OUT/$piece.log"
  status=${PIPESTATUS[0]}
  echo "== $piece: exit status $status after $((SECONDS - began)) s" | tee -a "$OUT/$piece.log"
  [ "$status" -eq 0 ] || failed+=("$piece")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
