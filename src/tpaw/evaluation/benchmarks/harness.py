"""lm-evaluation-harness: its tasks, prompts, filters and metrics, with our generator under them.

The only place that imports lm_eval. Log-likelihoods are computed by the harness's own model class;
greedy answers by `HFGenerator`, which is several times as fast (`benchmarks/exact_match.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel

from tpaw.config.messages import explain_unknown
from tpaw.data.token_ids import token_ids
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.results import item_outcomes, reported_metrics, task_facts
from tpaw.evaluation.benchmarks.suite import Suite, SuiteTask
from tpaw.evaluation.items import Item
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.runtime.progress import OnDone, ignore

try:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise InputError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'tpaw[evaluate]'"
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

# Shows progress: description, total and unit; the work calls what it is given with a count.
ProgressBar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]

# Some tasks shuffle choices as they are loaded; the harness's own seed.
LOADING_SEED = 0
# Settings of a task's generation that a greedy answer may have.
GREEDY_SETTINGS = {"do_sample", "temperature", "until"}


class LoadedTask(NamedTuple):
    """A task with its data, and the column of the suite that it belongs to."""

    name: str
    column: SuiteTask
    task: Task


def harness_version() -> str:
    """Of the lm_eval that is installed."""
    return version("lm_eval")


def load_tasks(suite: Suite, on_done: OnDone = ignore) -> list[LoadedTask]:
    """Every task of a suite with its data, downloaded if need be; groups become their subtasks.

    Args:
        on_done: called with the number of columns loaded since the last call.

    Raises:
        InputError: a task, a metric or a bound that does not exist, or data that cannot be had:
            all such tasks, each with the reason.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [column.task for column in suite.tasks if not Path(column.task).is_absolute()]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{suite.name}: the harness knows no task {name!r}{hint}")
    loaded: list[LoadedTask] = []
    failures: list[str] = []
    for column in suite.tasks:
        random.seed(LOADING_SEED)
        folder = Path(column.task).parent if Path(column.task).is_absolute() else Path.cwd()
        try:
            with contextlib.chdir(folder):
                found = manager.load([column.task])["tasks"]
        except Exception as error:  # the hub's, datasets', or the task's own
            first_line = str(error).partition("\n")[0]
            failures.append(
                f"  {column.name} ({column.task}): {type(error).__name__}: {first_line}"
            )
            continue
        loaded += [LoadedTask(name, column, task) for name, task in found.items()]
        on_done(1)
    if failures:
        raise InputError(f"{suite.name}: tasks that cannot be loaded:\n" + "\n".join(failures))
    for name, column, task in loaded:
        _check(name, column, task)
        task.set_config("num_fewshot", column.num_fewshot)
    if repeated := [t.name for t in loaded if sum(t.name == o.name for o in loaded) > 1]:
        raise InputError(f"{suite.name}: the task {repeated[0]} stands in it twice")
    return loaded


def _check(name: str, column: SuiteTask, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"{column.name}: {name} runs code that the model wrote, which is refused")
    filters = [f["name"] for f in task.get_config("filter_list") or [{"name": "none"}]]
    known = [f"{metric},{of}" for metric in task.aggregation() for of in filters]
    explain_unknown(f"{column.name}: metric", column.metric_keys, known)
    column.lower_bound_of(name)


def run_task(
    model: HarnessModel, loaded: LoadedTask, *, chat: bool, fewshot_seed: int
) -> tuple[dict[str, Any], list[Item]]:
    """Ask a model one task: what results.json says of it, and the outcome of every item."""
    name, column, task = loaded
    task.set_fewshot_seed(fewshot_seed)
    found = evaluate(
        model,
        {"tasks": {name: task}},
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    metrics = reported_metrics(found["results"][name])
    items = item_outcomes(found["samples"][name], column.metric_keys, task.OUTPUT_TYPE)
    return task_facts(name, column, task.VERSION, metrics, items), items


class HarnessModel(HFLM):
    """The harness's model over one that is loaded, with our generator for greedy answers.

    The model's generation config is cleared but for what ends an answer: settings are the task's
    alone. (With a repetition penalty in that file, the harness's own loop would apply it.)

    Args:
        stop_ids: any of them ends an answer.
        tokens_per_row: tokens of one forward pass for log-likelihoods.
        tokens_per_batch: see `SamplingParams`.
        bar: shows progress; what it gives may raise to stop the work.
        name: of the model, for progress.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int],
        tokens_per_row: int,
        tokens_per_batch: int,
        bar: ProgressBar = lambda *what: contextlib.nullcontext(lambda count: None),
        name: str = "model",
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer)
        self.stop_ids = tuple(stop_ids)
        self.tokens_per_row = tokens_per_row
        self.tokens_per_batch = tokens_per_batch
        self.bar = bar
        self.name = name

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The harness's, with as many rows at a time as the longest allows."""
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=1)
        rows = max(1, self.tokens_per_row // longest)
        with self.bar(f"{self.name} scores choices", len(requests), "requests") as on_done:
            self.cache_hook = _CountingHook(on_done)  # told of every request that is done
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs or rows
            )
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers by our generator; others, of tasks that sample, by the harness's loop."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers: dict[int, str] = {}
        with self.bar(f"{self.name} answers", len(requests), "prompts") as on_done:
            for settings, rows in groups.items():
                group = [requests[i] for i in rows]
                kwargs = normalize_gen_kwargs(json.loads(settings), self.max_gen_toks)
                is_greedy = set(kwargs) <= GREEDY_SETTINGS | {"max_gen_toks"}
                if is_greedy and not kwargs["temperature"] and not kwargs["do_sample"]:
                    texts = self._answer([r.args[0] for r in group], kwargs, on_done)
                else:
                    self.model.generation_config = GenerationConfig(eos_token_id=[*self.stop_ids])
                    texts = super().generate_until(group, disable_tqdm=True)
                    on_done(len(group))
                answers.update(zip(rows, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _answer(
        self, contexts: Sequence[str], kwargs: Mapping[str, Any], on_done: Callable[[int], None]
    ) -> list[str]:
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs["until"], eos=end)
        limit = kwargs["max_gen_toks"]
        room = self.max_length - limit
        if room < 1:
            raise InputError(
                f"max_gen_toks {limit}: the task leaves no room for a prompt in the "
                f"{self.max_length} positions of {self.name}"
            )
        # What does not fit is cut on the left, as the harness does.
        prompts = [
            token_ids(self.tok_batch_encode([text], left_truncate_len=room)[0][0].tolist())
            for text in contexts
        ]
        special = [i for text in until if (i := self._special_id(text)) is not None]
        sampling = SamplingParams(
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=limit,
            max_length=self.max_length,
            stop_token_ids=tuple(dict.fromkeys((*self.stop_ids, *special))),
        )
        # In a text decoded without special tokens they are not to be found.
        strings = [text for text in until if text and self._special_id(text) is None]
        generator = HFGenerator(
            self.model, self.tokens_per_batch, self._ends_with_any(strings) if strings else None
        )
        completions = generator.generate(prompts, sampling, 0, on_done)
        return [
            postprocess_generated_text(
                self.tok_decode(completion.token_ids.tolist()), until, think_end_token=None
            )
            for completion in completions
        ]

    def _ends_with_any(self, strings: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        # A token is a byte at least, so this many hold the longest string and what is new.
        window = 8 + max(len(text.encode()) for text in strings)

        def is_enough(emitted: Sequence[int]) -> bool:
            tail = self.tok_decode(list(emitted[-window:]))
            return any(text in tail for text in strings)

        return is_enough

    def _special_id(self, text: str) -> int | None:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and not self.tok_decode(ids) else None


class _CountingHook:
    """Stands where the harness has its cache of answers."""

    def __init__(self, on_done: Callable[[int], None]) -> None:
        self.on_done = on_done

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """One more is done."""
        self.on_done(1)
