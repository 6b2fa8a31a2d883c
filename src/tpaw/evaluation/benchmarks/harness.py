"""Run lm-evaluation-harness tasks with TPAW's generator.

The harness gives tasks, prompts, filters and metrics. Its own model class computes log-likelihoods.
`HFGenerator` generates greedy responses, because it is several times as fast
(`benchmarks/exact_match.py` measures it). Only this module imports lm_eval.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from tpaw.config.messages import explain_unknown
from tpaw.data.token_ids import token_ids
from tpaw.errors import InputError, first_line
from tpaw.evaluation.benchmarks.results import item_outcomes, reported_metrics, task_facts
from tpaw.evaluation.benchmarks.suite import Suite, SuiteTask
from tpaw.evaluation.items import Item
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.models.finite import non_finite
from tpaw.runtime.memory import memory_limited_by
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
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

# Opens a progress bar, given description, total and unit. The work calls the returned function with
# the number of units done.
ProgressBar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]

# Some tasks shuffle their choices when they are loaded. The harness uses the same seed.
LOADING_SEED = 0
# The harness's aggregations whose values are not shares in [0, 1].
NOT_SHARES = {
    "bits_per_byte",
    "bleu",
    "bypass_agg",
    "chrf",
    "chrfpp",
    "perplexity",
    "ter",
    "weighted_perplexity",
}
# Generation settings of a task that `HFGenerator` supports.
GREEDY_SETTINGS = {"do_sample", "temperature", "until"}


class LoadedTask(NamedTuple):
    """A task whose data is loaded.

    Attributes:
        name: the harness's name of the task.
        column: the entry of the suite that the task belongs to.
        task: the harness's task.
    """

    name: str
    column: SuiteTask
    task: Task


def harness_version() -> str:
    """Return the version of the installed lm_eval."""
    return version("lm_eval")


def load_tasks(suite: Suite, on_done: OnDone = ignore) -> list[LoadedTask]:
    """Load every task of a suite with its data. Download data that is not there.

    A group is replaced by its subtasks.

    Args:
        suite: a suite that `load_suite` returned.
        on_done: called with the number of columns loaded since the last call.

    Raises:
        InputError: a task, metric or lower bound does not exist, or tasks cannot be loaded. The
            error names every task that cannot be loaded, with the reason.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [column.task for column in suite.tasks if not Path(column.task).is_absolute()]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(
                f"{suite.name}: task: {name!r} is not a task of lm-evaluation-harness{hint}"
            )
    loaded: list[LoadedTask] = []
    failures: list[str] = []
    for column in suite.tasks:
        random.seed(LOADING_SEED)
        folder = Path(column.task).parent if Path(column.task).is_absolute() else Path.cwd()
        try:
            with contextlib.chdir(folder):
                found = manager.load([column.task])["tasks"]
        # The hub, the datasets library or code of the task may raise any exception.
        except Exception as error:
            failures.append(
                f"  {column.name} ({column.task}): {type(error).__name__}: {first_line(error)}"
            )
            continue
        loaded += [LoadedTask(name, column, task) for name, task in found.items()]
        on_done(1)
    if failures:
        raise InputError(f"{suite.name}: these tasks cannot be loaded:\n" + "\n".join(failures))
    for name, column, task in loaded:
        _check(name, column, task)
        task.set_config("num_fewshot", column.num_fewshot)
    if repeated := [t.name for t in loaded if sum(t.name == o.name for o in loaded) > 1]:
        raise InputError(f"{suite.name}: the task {repeated[0]} occurs twice; remove one of them")
    return loaded


def _check(name: str, column: SuiteTask, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"{column.name}: {name} runs code that the model wrote; TPAW refuses such tasks"
        )
    filters = [f["name"] for f in task.get_config("filter_list") or [{"name": "none"}]]
    known = [f"{metric},{of}" for metric in task.aggregation() for of in filters]
    explain_unknown(f"{column.name}: metric", column.metric_keys, known)
    for key in column.metric_keys:
        aggregation = task.aggregation()[key.partition(",")[0]]
        if getattr(aggregation, "__name__", "") in NOT_SHARES:
            raise InputError(
                f"{column.name}: metric: {key}: it is not a share between 0 and 1, so it has no "
                "score in percent; choose another metric"
            )
    column.lower_bound_of(name)


def run_task(
    model: HarnessModel, loaded: LoadedTask, *, chat: bool, fewshot_seed: int
) -> tuple[dict[str, Any], list[Item]]:
    """Evaluate a model on one task.

    Args:
        model: the model under evaluation.
        loaded: the task.
        chat: whether to render prompts with the chat template.
        fewshot_seed: seed of the choice of few-shot examples.

    Returns:
        The task's entry in results.json (see `task_facts`), and its items.
    """
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
    facts = task_facts(name, column, task.VERSION, metrics, items)
    return facts | {"data_commits": data_commits(task)}, items


def data_commits(task: Task) -> list[str]:
    """Return the commits of the Hub datasets that a loaded task uses.

    The datasets library names the folder of a Hub dataset in its cache after the commit. Local data
    has none: `task_file.content_hash` covers it.
    """
    splits = getattr(task, "dataset", None)
    files = [
        Path(file["filename"])
        for split in (splits.values() if isinstance(splits, Mapping) else ())
        for file in getattr(split, "cache_files", ())
    ]
    return sorted({f.parent.name for f in files if re.fullmatch("[0-9a-f]{40}", f.parent.name)})


class HarnessModel(HFLM):
    """The harness's model class for a loaded model. `HFGenerator` generates greedy responses.

    All generation settings come from the task. So the model's generation config is replaced by one
    that holds only the stop tokens. Otherwise the harness would apply settings of that config, for
    example a repetition penalty.

    Args:
        model: a loaded model.
        tokenizer: the model's tokenizer.
        stop_ids: each of these tokens ends a response.
        tokens_per_row: token budget of one forward pass for log-likelihoods.
        tokens_per_batch: token budget of a generation batch; see `HFGenerator`.
        bar: opens a progress bar. The function that it returns may raise to stop the work.
        name: name of the model, for progress titles and errors.
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
        """Call the harness's method with the largest batch size that `tokens_per_row` allows.

        Raises:
            NonFiniteError: a log-likelihood is NaN.
        """
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=1)
        # The harness calls the cache hook after each request that has a key. Windows of a rolling
        # log-likelihood have none.
        keyed = [(key or ("", ""), context, rest) for key, context, rest in requests]
        with (
            self.bar(
                f"compute log-likelihoods with {self.name}", len(keyed), "requests"
            ) as on_done,
            self._batches_of(max(1, self.tokens_per_row // longest)),
            memory_limited_by("score.tokens_per_row", self.tokens_per_row),
        ):
            self.cache_hook = _RequestHook(self.model, on_done)
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                keyed, disable_tqdm=True
            )
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Call the harness's method so that it passes all windows to `_loglikelihood_tokens`."""
        with self._batches_of(sys.maxsize):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    @contextlib.contextmanager
    def _batches_of(self, size: int) -> Iterator[None]:
        """Set the harness's batch size. It ignores `override_bs` if this is a number."""
        before = self.batch_size
        self.batch_size_per_gpu = size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate greedy responses with `HFGenerator`, sampled ones with the harness's own loop.

        Returns:
            The texts, in the order of the requests.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        responses: dict[int, str] = {}
        with self.bar(f"generate with {self.name}", len(requests), "prompts") as on_done:
            for settings, positions in groups.items():
                group = [requests[i] for i in positions]
                kwargs = normalize_gen_kwargs(json.loads(settings), self.max_gen_toks)
                is_greedy = set(kwargs) <= GREEDY_SETTINGS | {"max_gen_toks"}
                if is_greedy and not kwargs.get("temperature") and not kwargs["do_sample"]:
                    texts = self._greedy([r.args[0] for r in group], kwargs, on_done)
                else:
                    self.model.generation_config = GenerationConfig(eos_token_id=[*self.stop_ids])
                    self.cache_hook = _RequestHook(self.model, on_done)
                    texts = super().generate_until(group, disable_tqdm=True)
                responses.update(zip(positions, texts, strict=True))
        return [responses[i] for i in range(len(requests))]

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the harness's method, and check the logits of each token."""
        checks = LogitsProcessorList([self._check_logits])
        found: torch.Tensor = super()._model_generate(*args, logits_processor=checks, **kwargs)
        return found

    def _check_logits(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not bool(logits.amax(-1).isfinite().all()):  # -inf for some tokens is allowed
            raise non_finite(self.model, "logits")
        return logits

    def _greedy(
        self, contexts: Sequence[str], kwargs: Mapping[str, Any], on_done: Callable[[int], None]
    ) -> list[str]:
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs["until"], eos=end)
        limit = kwargs["max_gen_toks"]
        room = self.max_length - limit
        if room < 1:
            raise InputError(
                f"max_gen_toks {limit}: there is no room for a prompt in the {self.max_length} "
                f"positions of {self.name}; choose a task with shorter responses"
            )
        # Cut long prompts on the left, as the harness does.
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
        # Decoding removes special tokens, so a special token can only stop by its id.
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
        # A token has at least one byte. So this many tokens hold the longest string and all tokens
        # since the last call.
        window = 8 + max(len(text.encode()) for text in strings)

        def is_enough(emitted: Sequence[int]) -> bool:
            tail = self.tok_decode(list(emitted[-window:]))
            return any(text in tail for text in strings)

        return is_enough

    def _special_id(self, text: str) -> int | None:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and not self.tok_decode(ids) else None


class _RequestHook:
    """Replaces the harness's response cache, to count and check finished requests."""

    def __init__(self, model: PreTrainedModel, on_done: Callable[[int], None]) -> None:
        self.model = model
        self.on_done = on_done

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """Count one finished request.

        Raises:
            NonFiniteError: its log-likelihood is NaN.
        """
        if attribute == "loglikelihood_rolling":
            return  # its windows are counted
        if attribute == "loglikelihood" and math.isnan(answer[0]):
            raise non_finite(self.model, "log-likelihoods")
        self.on_done(1)
