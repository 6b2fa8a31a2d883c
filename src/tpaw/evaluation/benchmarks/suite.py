"""A suite of benchmarks and its score. The suites of the package are in the folder `suites`.

A suite is a list of lm-evaluation-harness tasks. Each task has its own number of few-shot examples.
A task may be a group of subtasks. A value v in [0, 1] with the lower bound b gets the score
100 · (v − b) / (1 − b), or 0 if v is below b. The score of a group is the mean over its subtasks.
With `pool: true` it is the score of the mean over all items. The score of a suite is the mean over
its tasks.
"""

from __future__ import annotations

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
from tpaw.evaluation.benchmarks.task_file import content_hash


def _as_number(value: Any) -> Any:
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError):
        return value  # pydantic then refuses the text


Bound = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_as_number)]
# A name is also used as the name of a folder or file.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]


class SuiteTask(Section):
    """An entry of a suite and a column of the table: a task or a group of tasks."""

    name: Name = Field(description="Name of the column in the table.")
    task: str = Field(
        description="Name of a task or group of the harness, or path of a task's YAML file. The "
        "path is relative to the suite's file. Data files in it are relative to the task's file."
    )
    num_fewshot: int = Field(ge=0, description="Number of few-shot examples before each item.")
    metric: Strings = Field(
        min_length=1,
        description="A metric of the harness, such as acc_norm, or with a filter, such as "
        "exact_match,strict-match. Several metrics are averaged.",
    )
    lower_bound: Bound | Mapping[str, Bound] = Field(
        0.0,
        description="Score of random guessing, as a number or a fraction such as 1/3. For a group, "
        "it may be a mapping from subtask names to bounds.",
    )

    pool: bool = Field(
        False,
        description="For a group: compute one score, from the mean over the items of all subtasks. "
        "Default: the mean of the scores of the subtasks.",
    )

    @model_validator(mode="after")
    def _pooled_bound(self) -> SuiteTask:
        if self.pool and isinstance(self.lower_bound, Mapping):
            raise ValueError("lower_bound: a mapping; with pool: true it must be one number")
        return self

    @property
    def metric_keys(self) -> list[str]:
        """Names of the metrics in the harness's results, "metric,filter"."""
        return [name if "," in name else f"{name},none" for name in self.metric]

    def definition(self) -> dict[str, Any]:
        """Return all fields for results.json. A task file is given by name and content hash."""
        facts = self.model_dump(mode="json")
        if Path(self.task).is_absolute():
            facts["task"] = f"{Path(self.task).name} {content_hash(Path(self.task))[:12]}"
        return facts

    def lower_bound_of(self, subtask: str) -> float:
        """Return the lower bound of a subtask.

        Raises:
            InputError: `lower_bound` is a mapping without this subtask.
        """
        if not isinstance(self.lower_bound, Mapping):
            return self.lower_bound
        if subtask not in self.lower_bound:
            raise InputError(
                f"{self.name}: lower_bound: has none for {subtask}; add a bound for each subtask"
            )
        return self.lower_bound[subtask]


class Suite(Section):
    """A list of tasks and the settings of their prompts."""

    name: Name = Field(description="Name of the suite and of the folder of its results.")
    tasks: Annotated[tuple[SuiteTask, ...], Field(strict=False)] = Field(
        description="The tasks; each is a column of the table."
    )
    apply_chat_template: bool | Literal["auto"] = Field(
        False,
        description="Render prompts with the tokenizer's chat template. Each few-shot example is a "
        "turn of the conversation. auto: only if the tokenizer has a chat template.",
    )
    fewshot_seed: int = Field(
        1234,
        description="Seed of the choice of few-shot examples. The default is the harness's.",
    )

    @model_validator(mode="after")
    def _tasks_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("tasks: the list is empty; add at least one task")
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: {', '.join(names)}; names must differ")
        return self


def suite_names() -> list[str]:
    """Return the names of the suites in the package."""
    found = (Path(file.name) for file in (files("tpaw.evaluation.benchmarks") / "suites").iterdir())
    return sorted(file.stem for file in found if file.suffix == ".yaml")


def load_suites(names: Sequence[str], *, trust: bool = False) -> list[Suite]:
    """Load the suites of a run's configuration (`evaluate.suites`); see `load_suite`."""
    return [load_suite(name, trust=trust, setting="evaluate.suites") for name in names]


def load_suite(name: str, *, trust: bool = False, setting: str = "--suite") -> Suite:
    """Load a suite of the package, or a suite from a YAML file.

    Args:
        name: name of a suite or path of a YAML file.
        trust: whether the suite may have task files that are not in the package. They are code.
        setting: where the name comes from, for errors.

    Returns:
        The suite. Paths of task files in it are absolute.

    Raises:
        InputError: there is no such suite, the file is not a valid suite, or it has task files
            without `trust`.
    """
    path = Path(name)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise InputError(
                f"{setting}: {name}: no such file; suites of the package: "
                f"{', '.join(suite_names())}"
            )
        explain_unknown(setting, [name], suite_names())
        path = Path(str(files("tpaw.evaluation.benchmarks") / "suites" / f"{name}.yaml"))
    suite = validate_as(Suite, read_mapping(path, name), prefix=f"{name}: ")
    tasks = tuple(_located(task, path.parent, name, trust) for task in suite.tasks)
    return suite.model_copy(update={"tasks": tasks})


def task_score(value: float, lower_bound: float) -> float:
    """Convert a value to a score.

    Args:
        value: in [0, 1].
        lower_bound: score of random guessing, in [0, 1).

    Returns:
        100 · (value − lower_bound) / (1 − lower_bound), or 0 if the value is below the bound.
    """
    return 100 * max(0.0, value - lower_bound) / (1 - lower_bound)


def benchmark_scores(suite: Suite, tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compute score and standard error of each column from its tasks.

    Args:
        suite: gives the columns.
        tasks: entries of `task_facts`, by the harness's name of the task.

    Returns:
        By column name, all in percent: `score`; `stderr`, which assumes that subtasks are
        independent and is None if a subtask has none; and `interval_95`, present only if the score
        is a share of right items. A column with `pool` also has its `value` in [0, 1].
    """
    scores = {}
    for column in suite.tasks:
        members = [task for task in tasks.values() if task["benchmark"] == column.name]
        scores[column.name] = _pooled(members) if column.pool else _mean(members)
        if len(members) == 1 and members[0].get("interval_95") and not members[0]["lower_bound"]:
            scores[column.name]["interval_95"] = [100 * end for end in members[0]["interval_95"]]
    return scores


def suite_score(benchmarks: Mapping[str, Any]) -> dict[str, Any]:
    """Compute score and standard error of the suite, in percent, from those of its columns."""
    return _mean(list(benchmarks.values()))


def _pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute score and standard error of the mean over the items of all subtasks.

    The standard error is the harness's for groups that are weighted by size: of the mean of all
    items, with the variance pooled within the subtasks.
    """
    sizes, errors = [part["items"] for part in parts], [part["stderr"] for part in parts]
    total, bound = sum(sizes), parts[0]["lower_bound"]
    value = math.fsum(n * part["value"] for n, part in zip(sizes, parts, strict=True)) / total
    error = None
    if None not in errors:
        # Each error squared is a sample variance divided by the number of items.
        squares = math.fsum((n - 1) * n * e**2 for n, e in zip(sizes, errors, strict=True))
        error = math.sqrt(squares / (total - len(parts)) / total)
    return {"value": value, "score": task_score(value, bound), "stderr": error}


def _mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [part["stderr"] for part in parts]
    known = None not in errors
    return {
        "score": math.fsum(part["score"] for part in parts) / len(parts),
        "stderr": math.hypot(*errors) / len(parts) if known else None,
    }


def _located(task: SuiteTask, folder: Path, suite: str, trust: bool) -> SuiteTask:
    if Path(task.task).suffix not in (".yaml", ".yml"):
        return task
    path = (folder / task.task).resolve()
    if not path.is_file():
        raise InputError(
            f"{suite}: {task.name}: task: {path}: no such file; "
            "give the path relative to the suite's file"
        )
    package = Path(str(files("tpaw.evaluation.benchmarks"))).resolve()
    if not trust and not path.is_relative_to(package):
        raise InputError(
            f"{suite}: {task.name}: task: {path}: a task file is code: lm-evaluation-harness runs "
            "its functions and its templates; read it, then add --trust"
        )
    return task.model_copy(update={"task": str(path)})
