"""What report.html says of a run, as the values that its template places."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from tpaw.config.files import to_yaml
from tpaw.config.schema import RunConfig
from tpaw.data.inputs import described_skips_by_source
from tpaw.errors import ArtifactError
from tpaw.report.html.charts import Line, chart
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.failures import readable_size
from tpaw.storage.run_directory import RunDirectory

CURVES = (
    ("rewards", ("rewards/target", "rewards/generated", "rewards/margins"), False),
    ("log-prob per token, nats", ("logps/target_per_token", "logps/generated_per_token"), False),
    ("loss", ("loss",), False),
    ("share of target weights that are η", ("weights/target",), True),
    ("player weights", tuple(f"weights/player_{k}" for k in range(8)), False),
    ("norm of the gradient", ("grad_norm",), False),
    ("learning rate", ("learning_rate",), False),
    ("share of triples", ("share/identical", "share/truncated"), True),
)
CHANGING = ("report.html", "summary.json", "lock", "trackers.json", "tensorboard")
"""Files and folders of a run that change after a report; they are small."""
STAGES = ("generate", "critic", "score", "train", "evaluate", "suites")


class Cell(NamedTuple):
    """A line of a list of facts."""

    name: str
    value: str


def progress_charts(summary: Mapping[str, Any]) -> list[Markup]:
    """Charts by iteration: accuracy and log-probs on held-out prompts, and the responses."""
    players = summary["players"]

    def line(name: str, get: Any, interval: Any = None) -> Line | None:
        points = []
        for entry in players:
            try:
                points.append((entry["iteration"], get(entry), entry))
            except KeyError:
                continue
        if not points:
            return None
        low = [interval(entry)[0] for *_, entry in points] if interval else []
        high = [interval(entry)[1] for *_, entry in points] if interval else []
        return Line(name, [i for i, *_ in points], [y for _, y, _ in points], low, high)

    def of_logps(name: str) -> Any:
        return lambda entry: entry["evaluation"]["logps"][name]

    temperatures = sorted({
        t for p in players for t in p.get("evaluation", {}).get("sampled_exact_match", {})
    })  # fmt: skip
    wanted = [
        ("accuracy, held-out", True, [
            line("greedy", lambda e: e["evaluation"]["exact_match"]["accuracy"],
                 lambda e: e["evaluation"]["exact_match"]["interval_95"]),
            *(line(f"T = {t}", lambda e, t=t:
                   e["evaluation"]["sampled_exact_match"][t]["accuracy"]) for t in temperatures),
        ]),
        ("held-out margin and gap, nats", False,
         [line("margin", of_logps("margin")), line("gap", of_logps("gap"))]),
        ("share of held-out gaps ≤ 0", True, [line("gaps ≤ 0", of_logps("nonpositive_gap_share"))]),
        ("log-prob of held-out targets, nats", False, [line("target", of_logps("target_logp"))]),
        ("drift from θ_0, nats per token", False, [line("drift", of_logps("drift"))]),
        ("responses to training prompts", True, [
            line("identical", lambda e: e["responses"]["identical_share"]),
            line("truncated", lambda e: e["responses"]["truncated_share"]),
        ]),
        ("tokens of a response, mean", False, [
            line("tokens", lambda e: e["responses"]["tokens"] / e["responses"]["rows"])]),
    ]  # fmt: skip
    return [
        chart(title, found, x_label="iteration", as_percent=as_percent, with_points=True)
        for title, as_percent, lines in wanted
        if (found := [line for line in lines if line is not None])
    ]


def training_charts(logs: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Markup]:
    """Charts by optimizer step over all iterations, which are shaded in turn.

    Args:
        logs: the lines of training.jsonl, by iteration.
    """
    lines: list[dict[str, Any]] = []
    ends = []
    offset = 0
    for _, log in sorted(logs.items()):
        lines += [{**entry, "step": entry["step"] + offset} for entry in log]
        offset = lines[-1]["step"]
        ends.append(offset)
    return [
        chart(title, found, x_label="optimizer step", bands=ends[:-1], as_percent=as_percent)
        for title, names, as_percent in CURVES
        if (found := [drawn for name in names if (drawn := _curve(lines, name)) is not None])
    ]


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Line | None:
    points = [(line["step"], float(line[name])) for line in lines if name in line]
    if not points:
        return None
    short = name.partition("/")[2] or name
    return Line(short.replace("_", " "), [x for x, _ in points], [y for _, y in points])


def training_logs(
    run: RunDirectory, iterations: int, problems: list[str]
) -> dict[int, list[dict[str, Any]]]:
    """The lines of each iteration's training.jsonl; those of a running one as far as it has come.

    Args:
        problems: gets a line for each file that is damaged.
    """
    logs = {}
    for i in range(1, iterations + 1):
        if not run.training_log(i).exists():
            continue
        try:
            log = (
                run.read_training_log(i)
                if is_published(run.checkpoint(i))
                else _lines_so_far(run.training_log(i))
            )
        except ArtifactError as error:
            problems.append(str(error))
            continue
        if log:
            logs[i] = log
    return logs


def _lines_so_far(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that is being written."""
    lines = []
    with contextlib.suppress(OSError, ValueError):
        for line in log.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def data_facts(run: RunDirectory, summary: Mapping[str, Any]) -> list[Cell]:
    """What the run was given."""
    if not is_published(run.inputs):
        return []
    inputs = read_manifest(run.inputs)
    duplicates = ", ".join(f"{n:,} in {source}" for source, n in inputs["duplicates"].items() if n)
    facts = [
        ("training prompts", f"{inputs['rows']:,}"),
        ("held-out prompts", f"{inputs['heldout_rows']:,}"),
        ("tokens of both", f"{inputs['tokens']:,}"),
        ("skipped records", described_skips_by_source(inputs["skipped"])),
        ("duplicates", duplicates or "none"),
        ("held-out prompts in the training data", f"{inputs['heldout_prompts_in_training']:,}"),
    ]
    for entry in summary["players"]:
        if found := entry.get("responses"):
            facts.append((
                f"responses of θ_{entry['iteration'] - 1}",
                f"{found['rows']:,}, {found['tokens'] / found['rows']:.0f} tokens in the mean, "
                f"{found['identical_share']:.1%} identical with the target, "
                f"{found['truncated_share']:.1%} truncated",
            ))  # fmt: skip
    return [Cell(*fact) for fact in facts]


def cost_rows(run: RunDirectory, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Seconds by iteration and stage, and bytes on disk by iteration: headings and rows."""
    players = [entry for entry in summary["players"] if entry["seconds"]]
    stages = [stage for stage in STAGES if any(stage in entry["seconds"] for entry in players)]
    headings = ["iteration", *(f"{stage}, s" for stage in stages), "all, s", "disk"]
    rows = [
        [
            f"θ_{entry['iteration']}",
            *(_seconds(entry["seconds"].get(stage)) for stage in stages),
            _seconds(sum(entry["seconds"].values())),
            readable_size(_size(run.iteration(entry["iteration"] - 1).folder))
            if entry["iteration"]
            else "–",
        ]
        for entry in players
    ]
    if rows:
        sums = [sum(entry["seconds"].get(stage, 0) for entry in players) for stage in stages]
        rows.append(
            [
                "all",
                *map(_seconds, sums),
                _seconds(sum(sums)),
                readable_size(_size(run.root, CHANGING)),
            ]
        )
    return headings, rows


def reproduce(run: RunDirectory, config: RunConfig) -> dict[str, Any]:
    """The command, the configuration, the versions and when the run began."""
    facts = run.facts()
    found = {"python": facts.get("python"), "machine": facts.get("machine")}
    versions = {**facts.get("versions", {}), **found}
    return {
        "command": f"tpaw run {shlex.quote('config.yaml')} --output {shlex.quote(run.root.name)}",
        "config": to_yaml(config, comments=False),
        "versions": [Cell(name, str(value)) for name, value in versions.items() if value],
        "began": str(facts.get("began", "")),
    }


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _size(folder: Path, without: Collection[str] = ()) -> int:
    """Bytes of the files in a folder, some of which may be removed meanwhile.

    Args:
        without: names of files and folders in it that are not counted.
    """
    total = 0
    for path in folder.rglob("*"):
        if path.relative_to(folder).parts[0] in without:
            continue
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
