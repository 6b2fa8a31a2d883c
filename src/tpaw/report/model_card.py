"""The model card of a checkpoint of a run: README.md, as the Hugging Face Hub reads it.

Whoever reads the card has neither the run nor the machine. So it names no folder of the machine,
and texts from outside (names of models, data sets and modules) are data: they end neither the
front matter nor the Markdown around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from tpaw.config.methods import method_names
from tpaw.config.schema import EXACT_MATCH, DataConfig, RunConfig
from tpaw.data.chat_template import is_templated
from tpaw.data.inputs import first_prompt
from tpaw.data.readers import SUFFIXES
from tpaw.errors import printable
from tpaw.models.references import Checkpoint
from tpaw.models.tokenizers import load_tokenizer
from tpaw.report.summary import summarise
from tpaw.report.tables import suites_of_run, summary_table
from tpaw.report.verdict import NOT_COMPARED, against_start
from tpaw.storage.artifacts import read_manifest, read_sealed
from tpaw.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAG = "tpaw"
"""The tag of every card. `tpaw push` replaces the files of no repository without it."""
FOLDER = "FOLDER"
"""Stands for the model in the card's code, where nobody knows where it will be."""
_METHODS = {
    "sft": "supervised fine-tuning (SFT), continued from θ_0",
    "dpo": "DPO on preference data",
    "critic": "training on the best of several responses, as a critic sees them",
}
_OF_GENERATE = ("temperature", "top_p", "top_k", "max_new_tokens", "samples")
_OF_TRAIN = (
    *("learning_rate", "epochs", "batch_size", "optimizer", "schedule", "warmup"),
    *("weights", "group_by_prompt"),
)
# Settings that may say what a model is. All others are about machines and folders.
_TOLD: Mapping[str, Any] = {
    "max_length": True,
    "seed": True,
    "precision": True,
    "checker": True,
    "deterministic": True,
    "model": {"eos_token": True, "adapter": True, "quantization": True},
    "data": {"turn": True, "template": True, "limit": True, "chunks": True},
    "team": True,
    "objective": True,
    "generate": dict.fromkeys(_OF_GENERATE, True),
    "train": dict.fromkeys(_OF_TRAIN, True),
}
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_OF_CRITIC = {"critic": {"path": True}}


class _Origin(NamedTuple):
    """A model that a checkpoint comes from.

    Attributes:
        shown: its name as Markdown.
        hub_id: None for a model that is not on the Hub.
    """

    shown: str
    hub_id: str | None


def model_card(
    checkpoint: Checkpoint, *, dtype: str, merge: bool, repository: str | None = None
) -> str | None:
    """Write the model card of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        dtype: type of the exported weights: fp32, bf16 or fp16.
        merge: whether an adapter is exported as an ordinary model.
        repository: its id on the Hub, for the code that loads it.

    Returns:
        Markdown with front matter; None for a model that no run has trained, θ_0 included.

    Raises:
        ArtifactError: a published file of the run is damaged.
    """
    run, i = checkpoint.run, checkpoint.player.index
    if run is None or i == 0:
        return None
    config = run.load_config()
    summary = summarise(run, config)
    summary["players"] = summary["players"][: i + 1]
    is_adapter = checkpoint.player.adapter_folder is not None and not merge
    start = _start(run)
    base = _base_of_adapter(checkpoint) if is_adapter else start
    name = repository or f"θ_{i} of {run.root.resolve().name}"
    inputs = read_manifest(run.inputs)
    tokenizer = load_tokenizer(checkpoint.model, checkpoint.tokenizer_folder)
    environment = Environment(
        loader=PackageLoader("tpaw.report"),
        autoescape=False,  # it is Markdown; `_code` and `_cell` escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md").render(
        front_matter=_front_matter(run, config, summary["players"][-1], base, name, is_adapter),
        title=repository or f"θ_{i} of {_code(run.root.resolve().name)}",
        index=i,
        iterations=config.iterations,
        method=_method(config),
        start=start.shown,
        rows=f"{inputs['rows']:,}",
        data=_data(config.data, run),
        heldout=None
        if config.evaluate.data is None
        else f"{inputs['heldout_rows']:,} records of {_data(config.evaluate.data, run)}",
        seen=inputs.get("heldout_prompts_in_training", 0),
        seed=config.seed,
        precision=config.precision,
        weights=_weights(checkpoint, config, dtype, merge=merge),
        versions=", ".join(_cell(f"{k} {v}") for k, v in _versions(run)),
        settings=_settings(config),
        tables=[_markdown(table) for table in (summary_table(summary), *suites_of_run(summary))],
        rounded=None if dtype == "fp32" else dtype,
        verdict=against_start(summary["players"]),
        checker=None if config.checker == EXACT_MATCH else _code(config.checker),
        not_compared=None if config.method == "sft" else NOT_COMPARED,
        is_adapter=is_adapter,
        base=base.shown,
        place=repository or FOLDER,
        needs_code=config.model.trust_remote_code,
        chat=is_templated(tokenizer, first_prompt(run.inputs)),
        stop_ids=list(map(int, inputs["stop_ids"])),
        max_new_tokens=config.generate.max_new_tokens,
    )


def _front_matter(
    run: RunDirectory,
    config: RunConfig,
    entry: Mapping[str, Any],
    base: _Origin,
    name: str,
    is_adapter: bool,
) -> str:
    from huggingface_hub import ModelCardData

    results = _results(run, config, entry)
    datasets = [config.data.path] if _is_on_hub(config.data, run) else None
    method = config.method.replace("_", "-")
    objective = config.objective.name if config.objective.name in method_names() else None
    of_objective = objective if config.method == "self_play" and objective != "tpaw" else None
    return str(
        ModelCardData(
            base_model=base.hub_id,
            base_model_relation=None
            if base.hub_id is None
            else "adapter"
            if is_adapter
            else "finetune",
            library_name="peft" if is_adapter else "transformers",
            pipeline_tag="text-generation",
            datasets=datasets,
            tags=[t for t in (TAG, method, of_objective, "lora" if is_adapter else None) if t],
            model_name=printable(name) if results else None,
            eval_results=results or None,
        ).to_yaml(line_break="\n")
    )


def _results(run: RunDirectory, config: RunConfig, entry: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    found = entry.get("evaluation", {}).get("exact_match")
    data = config.evaluate.data
    if found is None or data is None:
        return []
    on_hub = _is_on_hub(data, run)
    is_exact = config.checker == EXACT_MATCH
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.path if on_hub else "held-out",
            dataset_name=data.path if on_hub else printable(_last_part(data.path)),
            dataset_config=printable(data.name) if on_hub and data.name else None,
            dataset_split=printable(data.split) if on_hub else None,
            metric_type="exact_match" if is_exact else "accuracy",
            metric_name="exact match, greedy" if is_exact else "right by a checker, greedy",
            metric_value=found["accuracy"],
            metric_args={"items": found["items"], "interval_95": list(found["interval_95"])},
        )
    ]


def _start(run: RunDirectory) -> _Origin:
    """θ_0 as the run has recorded it."""
    recorded = read_sealed(run.initial_player_file)
    return _origin(recorded["path"], recorded["revision"])


def _base_of_adapter(checkpoint: Checkpoint) -> _Origin:
    base = checkpoint.player.base
    assert base is not None
    return _origin(base.name, base.revision)


def _origin(name: str, revision: str | None) -> _Origin:
    if revision is None:
        return _Origin(f"{_code(_last_part(name))}, which is not on the Hub", None)
    is_id = _HUB_ID.fullmatch(name) is not None
    return _Origin(f"{_code(name)} (commit {_code(revision[:12])})", name if is_id else None)


def _data(data: DataConfig, run: RunDirectory) -> str:
    if not _is_on_hub(data, run):
        return _code(_last_part(data.path))
    parts = (data.path, data.name, data.split)
    return " ".join(_code(part) for part in parts if part)


def _is_on_hub(data: DataConfig, run: RunDirectory) -> bool:
    """Whether the records are a dataset on the Hub. A folder may have the form of its id."""
    is_id = _HUB_ID.fullmatch(data.path) is not None and "/" in data.path
    if not is_id or Path(data.path).suffix in SUFFIXES:
        return False
    here = (Path(), *run.root.absolute().parents)
    return not any((folder / data.path).exists() for folder in here)


def _method(config: RunConfig) -> str:
    if config.method != "self_play":
        return _METHODS[config.method]
    if config.objective.name == "tpaw":
        return "team-based self-play with dual adaptive weighting (TPAW)"
    return f"self-play with the method {_code(config.objective.name)}"


def _weights(checkpoint: Checkpoint, config: RunConfig, dtype: str, *, merge: bool) -> str:
    if checkpoint.player.adapter_folder is None:
        return f"the whole model in {dtype}"
    quantization = config.model.quantization
    bits = "" if quantization is None else f", on which it was trained in 4 bits ({quantization})"
    if merge:
        return f"the whole model in {dtype}: a LoRA adapter, added to its base{bits}"
    return f"a LoRA adapter in {dtype}, without its base{bits}"


def _versions(run: RunDirectory) -> Iterator[tuple[str, str]]:
    facts = run.facts()
    for name, version in {**facts.get("versions", {}), "python": facts.get("python")}.items():
        if version:
            yield printable(str(name), 40), printable(str(version), 40)


def _settings(config: RunConfig) -> str:
    """The settings that differ from their defaults, as YAML."""
    told = dict(_TOLD)
    if config.method == "critic":
        told["critic"] = True
    changed = config.model_dump(
        mode="json", by_alias=True, exclude_defaults=True, include=told, exclude=_OF_CRITIC
    )
    shown = {key: value for key, value in _without_folders(changed).items() if value != {}}
    return yaml.safe_dump(shown, allow_unicode=True, sort_keys=False, width=10_000) if shown else ""


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {printable(str(k)): _without_folders(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(part) for part in value]
    return printable(_last_part(value)) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    """A path without its folders: they are nobody else's business."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "a folder"


def _code(text: str) -> str:
    """Text from outside as a code span, in which nothing is markup."""
    shown = printable(text).strip()
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in shown[:1] + shown[-1:] or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _markdown(table: Table) -> dict[str, Any]:
    """A table of the terminal as lines of Markdown. The seconds of a machine are left out."""
    columns = [column for column in table.columns if column.header != "seconds"]
    headings = [_cell(str(column.header)) for column in columns]
    rows = zip(*([_cell(str(cell)) for cell in column.cells] for column in columns), strict=True)
    return {
        "lines": [_line(headings), _line(["---"] * len(headings)), *map(_line, rows)],
        "caption": _cell(str(table.caption)),
    }


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Numbers stay; whatever could be markup is escaped."""
    return re.sub(r"([\\`*<>|#!~&]|\](?=[(\[:]))", r"\\\1", printable(text))
