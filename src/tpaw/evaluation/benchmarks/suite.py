"""What a suite of benchmarks is, and how its score comes about. The suites are in `tpaw/suites`.

A suite is a list of tasks of lm-evaluation-harness, each with its own number of few-shot examples.
A task may be a group with subtasks. A value v in [0, 1] becomes 100 · (v − b) / (1 − b) for its
lower bound b, and 0 below it; a group's score is the plain mean over its subtasks, the suite's the
plain mean over its tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tpaw.config.files import read_mapping
from tpaw.config.messages import explain_unknown, validate_as
from tpaw.config.schema import Section, Strings
from tpaw.errors import InputError


def _as_number(value: Any) -> Any:
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError):
        return value  # text, which is refused as a number


Bound = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_as_number)]
# Names become names of folders and files.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]


class SuiteTask(Section):
    """A column of the table: a task of the harness, or a group of them."""

    name: Name = Field(description="What the table calls it.")
    task: str = Field(
        description="A task or group that the harness knows, or a task's YAML file, beside the "
        "suite's; the data files that such a file names lie beside it too."
    )
    num_fewshot: int = Field(ge=0, description="Solved examples before each question.")
    metric: Strings = Field(
        min_length=1,
        description="Of the harness: acc_norm, or exact_match,strict-match with a filter. Of "
        "several the mean.",
    )
    lower_bound: Bound | Mapping[str, Bound] = Field(
        0.0,
        description="What guessing scores, as a number or a fraction such as 1/3; or one for each "
        "subtask, by name.",
    )

    @property
    def metric_keys(self) -> list[str]:
        """Names of the metrics as the harness's results have them, "metric,filter"."""
        return [name if "," in name else f"{name},none" for name in self.metric]

    def definition(self) -> dict[str, Any]:
        """All of it, for the record; a task's file is known by its name and content."""
        facts = self.model_dump(mode="json")
        if Path(self.task).is_absolute():
            digest = hashlib.sha256(Path(self.task).read_bytes()).hexdigest()
            facts["task"] = f"{Path(self.task).name} {digest[:12]}"
        return facts

    def lower_bound_of(self, subtask: str) -> float:
        """The bound of a subtask.

        Raises:
            InputError: there are bounds by subtask, and none for this one.
        """
        if not isinstance(self.lower_bound, Mapping):
            return self.lower_bound
        if subtask not in self.lower_bound:
            raise InputError(f"{self.name}: lower_bound: has none for {subtask}")
        return self.lower_bound[subtask]


class Suite(Section):
    """A list of tasks, and how they are asked."""

    name: Name = Field(description="Of the suite, and of the folder of its results.")
    tasks: Annotated[tuple[SuiteTask, ...], Field(strict=False)] = Field(
        description="The columns of the table."
    )
    apply_chat_template: bool | Literal["auto"] = Field(
        False,
        description="Render prompts with the tokenizer's chat template, few-shot examples as turns "
        "of their own. auto: where it has one.",
    )
    fewshot_seed: int = Field(1234, description="Of the choice of examples; the harness's default.")

    @model_validator(mode="after")
    def _tasks_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("tasks: there must be one at least")
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: {', '.join(names)}")
        return self


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    found = (Path(file.name) for file in (files("tpaw.evaluation.benchmarks") / "suites").iterdir())
    return sorted(file.stem for file in found if file.suffix == ".yaml")


def load_suite(name: str) -> Suite:
    """A suite that comes with the package, or a YAML file of the user's.

    Paths of tasks in it come out absolute.

    Raises:
        InputError: there is none of that name, or the file does not describe one.
    """
    path = Path(name)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise InputError(f"--suite {name}: no such file")
        explain_unknown("--suite", [name], suite_names())
        path = Path(str(files("tpaw.evaluation.benchmarks") / "suites" / f"{name}.yaml"))
    suite = validate_as(Suite, read_mapping(path, name), prefix=f"{name}: ")
    tasks = tuple(_located(task, path.parent, name) for task in suite.tasks)
    return suite.model_copy(update={"tasks": tasks})


def task_score(value: float, lower_bound: float) -> float:
    """Percent of the way from the lower bound to 1; 0 below it."""
    return 100 * max(0.0, value - lower_bound) / (1 - lower_bound)


def benchmark_scores(suite: Suite, tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Score and standard error of each column, from those of its subtasks.

    Args:
        tasks: by the name of the harness, each with `benchmark`, `score` and `stderr`.

    Returns:
        By the suite's names: `score`, `stderr` (as if subtasks were independent; None where a
        subtask has none), and, where it is the share of items that are right, `interval_95`.
    """
    scores = {}
    for column in suite.tasks:
        members = [task for task in tasks.values() if task["benchmark"] == column.name]
        scores[column.name] = _mean(members)
        if len(members) == 1 and members[0].get("interval_95") and not members[0]["lower_bound"]:
            scores[column.name]["interval_95"] = [100 * end for end in members[0]["interval_95"]]
    return scores


def suite_score(benchmarks: Mapping[str, Any]) -> dict[str, Any]:
    """Score and standard error of the suite."""
    return _mean(list(benchmarks.values()))


def _mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [part["stderr"] for part in parts]
    known = None not in errors
    return {
        "score": math.fsum(part["score"] for part in parts) / len(parts),
        "stderr": math.hypot(*errors) / len(parts) if known else None,
    }


def _located(task: SuiteTask, folder: Path, suite: str) -> SuiteTask:
    if Path(task.task).suffix not in (".yaml", ".yml"):
        return task
    path = (folder / task.task).resolve()
    if not path.is_file():
        raise InputError(f"{suite}: {task.name}: task: {path}: no such file")
    return task.model_copy(update={"task": str(path)})
