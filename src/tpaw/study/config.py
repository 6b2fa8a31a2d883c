"""The configuration of a study: methods × settings × seeds of one recipe. It does not import torch.

recipe: starter                     # a recipe or a list; later ones override earlier ones
methods: [tpaw, spin]               # recipes that override `recipe`; or a mapping from names:
methods:
  SPIN as published: [spin, spin_schedule]
  TPAW, η = 4: {objective: {eta: 4.0}}
vary:                               # settings and values; every combination is run
  objective.gamma: [0.0, 0.5]
  team.opponents.last, team.main_players.last: [1, 2]      # both settings get the same value
seeds: 6                            # seeds 0 … 5; or a list of seeds
set: {iterations: 4}                # settings of every run
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from tpaw.config.files import nested, read_mapping
from tpaw.config.messages import explain_unknown, validate_as
from tpaw.config.schema import RunConfig, Section, Strings
from tpaw.errors import InputError, brief

# A study with more runs is a typing error.
MAX_RUNS = 10_000

Source = str | Mapping[str, Any]


def _as_methods(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = dict(zip(value, value, strict=True))
    if not isinstance(value, dict):
        return value
    return {name: tuple(v) if isinstance(v, list) else (v,) for name, v in value.items()}


def _as_seeds(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(min(value, MAX_RUNS + 1)))
    return tuple(value) if isinstance(value, list) else value


def _as_tuples(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}


class StudyConfig(Section):
    """The configuration of a study. `read_study` reads it from a file."""

    recipe: Strings = Field(description="Recipes or files. Later ones override earlier ones.")
    methods: Annotated[Mapping[str, tuple[Source, ...]], BeforeValidator(_as_methods)] = Field(
        {"tpaw": ("tpaw",)},
        description="Recipes that override `recipe`; or a mapping from your own names to recipes, "
        "files or settings.",
    )
    vary: Annotated[Mapping[str, tuple[Any, ...]], BeforeValidator(_as_tuples)] = Field(
        {},
        description="Settings and their values. Every combination is run. Keys separated by a "
        "comma get the same value.",
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(_as_seeds)] = Field(
        tuple(range(6)),
        description="Number of seeds, or a list of seeds. With fewer than six seeds no exact "
        "paired test can reach 0.05.",
    )
    set_: Mapping[str, Any] = Field(
        {}, alias="set", description="Settings of every run. Methods override them."
    )
    baseline: str | None = Field(
        None, description="The condition that the others are compared with. Default: the first."
    )

    @model_validator(mode="after")
    def _fits(self) -> StudyConfig:
        if not self.methods or not self.seeds:
            raise ValueError("methods and seeds: empty; give at least one of each")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {brief(list(self.seeds))}: a seed occurs twice; remove it")
        empty = [key for key, values in self.vary.items() if not values]
        if empty:
            raise ValueError(f"vary.{empty[0]}: no values; give at least one")
        combinations = math.prod(len(values) for values in self.vary.values())
        if len(self.seeds) * len(self.methods) * combinations > MAX_RUNS:
            raise ValueError(
                f"methods × vary × seeds: more than {MAX_RUNS} runs; give fewer values or seeds"
            )
        return self


class Condition(NamedTuple):
    """A method with one combination of varied settings. It has one run for each seed.

    Attributes:
        name: name in tables and figures.
        method: name of the method.
        settings: the varied settings and their values.
        sources: recipes, files and settings of the configuration, without the seed.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    sources: tuple[Source, ...]

    @property
    def folder(self) -> str:
        """The name of the condition's folder."""
        return re.sub(r"[^\w.=+-]+", "-", self.name.replace(" = ", "=")).strip("-.")

    def config(self, seed: int) -> RunConfig:
        """Return the configuration of the run with this seed."""
        return RunConfig.load(*self.sources, {"seed": seed})


def study_names() -> list[str]:
    """Return the names of the studies in the package."""
    folder = files("tpaw") / "study" / "studies"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def read_study(source: str) -> tuple[StudyConfig, list[Condition]]:
    """Read and validate a study.

    Args:
        source: path of a YAML file, or name of a study in the package.

    Returns:
        The configuration of the study, and its conditions.

    Raises:
        InputError: the study or the configuration of a run is not valid. The error names the key.
    """
    path = Path(source)
    if not os.path.isfile(path):
        explain_unknown("study", [source], study_names())
        path = Path(str(files("tpaw") / "study" / "studies" / f"{source}.yaml"))
    study = validate_as(StudyConfig, read_mapping(path, source), f"{source}: ")
    conditions = list(_conditions(study, path.parent))
    folders = [condition.folder for condition in conditions]
    if len(set(folders)) < len(folders) or not all(folders):
        raise InputError(
            f"{source}: methods: two names give the same folder: {folders}; use names with other "
            "letters or digits"
        )
    for condition in conditions:
        try:
            config = condition.config(study.seeds[0])
        except InputError as error:
            raise InputError(f"{source}: {condition.name}: {error}") from None
        if config.evaluate.data is None and not config.evaluate.suites:
            raise InputError(
                f"{source}: {condition.name}: evaluate.data: missing; a study needs held-out "
                "records or benchmarks (evaluate.suites) to compare checkpoints"
            )
        if config.evaluate.stop_when_worse:
            raise InputError(
                f"{source}: {condition.name}: evaluate.stop_when_worse: true: the runs of a study "
                "must end together, or the bad ones would be missing from the means; set it to "
                "false"
            )
    if study.baseline is not None:
        explain_unknown(f"{source}: baseline", [study.baseline], [c.name for c in conditions])
    return study, conditions


def _conditions(study: StudyConfig, folder: Path) -> Iterator[Condition]:
    combinations = itertools.product(*study.vary.values())
    for values in combinations:
        settings = dict(zip(study.vary, values, strict=True))
        varied = [nested(k.strip(), v) for keys, v in settings.items() for k in keys.split(",")]
        for method, overlays in study.methods.items():
            sources = (*study.recipe, study.set_, *overlays, *varied)
            yield Condition(
                ", ".join([method, *(f"{_short(k)} = {_said(v)}" for k, v in settings.items())]),
                method,
                settings,
                tuple(_beside(source, folder) for source in sources),
            )


def _short(keys: str) -> str:
    """Shorten the name of a setting for tables: objective.gamma → gamma.

    If several keys get the same value: team.opponents.last, team.main_players.last → team.last.
    """
    section, _, key = keys.partition(",")[0].strip().rpartition(".")
    return key if "," not in keys else f"{section.partition('.')[0]}.{key}"


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _beside(source: Source, folder: Path) -> Source:
    is_file = isinstance(source, str) and os.path.isfile(folder / source)
    return str(folder / source) if is_file else source  # type: ignore[operator]
