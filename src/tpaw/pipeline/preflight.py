"""Everything that can be refused is refused here, before anything is written or loaded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Examples, Prepared, prepare_examples
from tpaw.data.inputs import Inputs
from tpaw.errors import InputError
from tpaw.evaluation.benchmarks.run import check_suites
from tpaw.evaluation.checker import checker_of
from tpaw.generation.server import check_command
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.models.adapters import require_peft
from tpaw.models.checks import (
    BUILD_ERRORS,
    cannot_build,
    check_model,
    check_vocabulary,
    read_config,
)
from tpaw.models.loading import disable_dropout, pick_device
from tpaw.models.quantization import check_quantization, require_bitsandbytes
from tpaw.models.reduced import reduced_model
from tpaw.models.size import model_size
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.pipeline.space import bytes_of_inputs, space_for_run
from tpaw.report.tracker_clients import check_trackers
from tpaw.runtime.progress import OnDone, ignore
from tpaw.runtime.watch import Watch
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.storage.run_directory import RunDirectory, check_output
from tpaw.training.arguments import check_training


def read_and_check(config: RunConfig, output: str | Path, watch: Watch) -> Inputs | None:
    """Refuse a run that cannot work, before anything is written.

    Returns:
        The inputs; None if the run directory has published them already.

    Raises:
        InputError: naming the setting, the file or the record.
        StorageError: the disk is too full for what the run occupies at its peak.
    """
    _refuse_several_processes()
    check_output(output, config)
    run = RunDirectory(output)
    check_suites(config.evaluate.suites, run, config.iterations)
    check_command(config.generate.server)
    if is_published(run.inputs):
        check_training(_as_tried_here(config))  # some of its settings may have changed
        _check_libraries(config)
        _check_space_of_the_rest(config, run)
        return None
    with watch.progress("read and tokenize", None, "records") as on_done:
        inputs = read_inputs(config, on_done)
    plans = plan_run(config, len(inputs.examples))  # it refuses an iteration without effect
    try_architecture(config)
    rows = len(inputs.examples) + len(inputs.heldout)
    size_of_inputs = bytes_of_inputs(inputs.tokens, rows)
    size = model_size(config.model, config.iterations)
    space_for_run(run.root, config, plans, size, len(inputs.heldout), size_of_inputs)
    return inputs


def _check_space_of_the_rest(config: RunConfig, run: RunDirectory) -> None:
    """Check the space for a resumed run.

    Raises:
        StorageError: the disk is too full.
    """
    published = [i for i in range(1, config.iterations + 1) if is_published(run.checkpoint(i))]
    model = config.model
    if published:  # θ_0 may be gone
        newest = str(run.checkpoint(published[-1]))
        model = model.model_copy(update={"path": newest, "revision": None})
    inputs = read_manifest(run.inputs)
    rows, heldout = inputs["rows"], inputs["heldout_rows"]
    # A run that began before they were counted does not name its tokens.
    size_of_inputs = bytes_of_inputs(inputs.get("tokens", 0), rows + heldout)
    plans = plan_run(config, rows)
    with contextlib.suppress(InputError):  # a stage that needs the model says what is wrong
        size = model_size(model, config.iterations)
        space_for_run(run.root, config, plans, size, heldout, size_of_inputs)


def _check_libraries(config: RunConfig) -> None:
    """Refuse trackers, adapters and 4-bit weights whose libraries are missing or cannot work.

    With Ray the machines share an environment, so what is missing is missing here. Whether
    bitsandbytes works on their GPUs shows when a worker loads the base, after the run has begun.
    """
    check_trackers(config.train.report_to)
    if config.model.adapter is not None:
        require_peft()
    if config.model.quantization is None:
        return
    require_bitsandbytes()
    if config.launch.engine == "in_process":
        check_quantization(pick_device(config.device))


def _as_tried_here(config: RunConfig) -> RunConfig:
    """The configuration as this process tries it.

    With Ray the workers have the GPUs. This process may see none of them, or all of a machine, and
    must not take the memory of any. What the cluster lacks is refused when it is joined.
    """
    if config.launch.engine == "in_process":
        return config
    return config.model_copy(update={"device": "cpu"})


def _refuse_several_processes() -> None:
    """A run belongs to one process. With a folder for each, all would train with other batches."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.strip() not in ("", "1"):
        raise InputError(
            f"WORLD_SIZE: {count}: a run is started once, without torchrun or accelerate launch; "
            "set launch.engine to ray to use several devices, or train with TeamTrainer in your "
            "own script (docs/how-to/own-loop.md)"
        )


def read_inputs(config: RunConfig, on_done: OnDone = ignore) -> Inputs:
    """Check the model's kind, then read, template and tokenise the data.

    Args:
        on_done: called with the number of rows read since the last call.

    Raises:
        InputError: naming the setting, the file or the row.
    """
    pick_device(_as_tried_here(config).device)
    check_training(_as_tried_here(config))
    _check_libraries(config)
    model_config = check_model(config.model, config.max_length, is_trained=True)
    tokenizer = load_tokenizer(config.model)
    stop_ids = stop_token_ids(config.model, tokenizer)
    tokenizer.eos_token_id = stop_ids[0]

    def prepare(key: str) -> Prepared:
        data = config.data if key == "data" else config.evaluate.data
        if data is None:
            return Prepared(Examples.of([]), {}, [])
        preferences = config.method == "dpo" and key == "data"
        return prepare_examples(
            data, key, tokenizer, stop_ids, config.max_length, on_done, preferences=preferences
        )

    train, heldout = prepare("data"), prepare("evaluate.data")
    used = max(train.examples.largest_id, heldout.examples.largest_id)
    check_vocabulary(config.model, model_config, used)
    checker = checker_of(config.checker)
    if config.objective.needs.responses == "correct" and not checker.can_check(train.examples):
        raise InputError(
            f"objective.name: {config.objective.name}: it trains on the responses that are right, "
            "but some target of data has no `#### number`"
        )
    for setting in ("exact_match", "temperatures", "stop_when_worse"):
        if getattr(config.evaluate, setting) and not heldout.examples:
            raise InputError(f"evaluate.{setting}: it needs held-out records; set evaluate.data")
        if getattr(config.evaluate, setting) and not checker.can_check(heldout.examples):
            raise InputError(f"evaluate.{setting}: some held-out target has no `#### answer`")
    skipped = {"data": train.skipped, "evaluate.data": heldout.skipped}
    return Inputs(train.examples, heldout.examples, skipped, tokenizer, stop_ids)


def try_architecture(config: RunConfig) -> tuple[str, ...]:
    """Compute a few log-probs with a small random model of the same architecture.

    Returns:
        How log-probs are computed with this model, as sentences.

    Raises:
        InputError: the architecture cannot be used; see `prepare_for_logprobs`.
    """
    found = read_config(config.model)
    try:
        model = reduced_model(found, config.model)
        if model is None:
            return ("Layout: not known before the run; a layer of this model is too large to try.",)
        disable_dropout(model)
    except BUILD_ERRORS as error:
        raise cannot_build(config.model, error) from None
    try:
        return prepare_for_logprobs(model, config.max_length).described()
    except InputError as error:
        raise InputError(f"model.path: {config.model.path}: {error}") from None
