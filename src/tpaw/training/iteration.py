"""One iteration's training over a run directory: settings, saved steps, resuming, the log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from tpaw.config.schema import RunConfig, at_iteration
from tpaw.data.examples import Example
from tpaw.data.inputs import Inputs
from tpaw.data.token_ids import TokenIds
from tpaw.errors import DivergenceError
from tpaw.generation.responses import Response
from tpaw.runtime.interrupt import StopSignal
from tpaw.storage.artifacts import read_manifest, write_manifest
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.arguments import split_optimizer, training_arguments
from tpaw.training.split_weights import restore_fp32
from tpaw.training.trainer import ADVICE, FIRST_STEP_TOLERANCE, TeamTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Triple(NamedTuple):
    """(x, y, y_gen): an example and what one opponent answered to its prompt."""

    example: Example
    response: Response
    opponent: int

    @property
    def target(self) -> tuple[TokenIds, TokenIds]:
        """Prompt and target ids."""
        return self.example.prompt_ids, self.example.target_ids

    @property
    def generated(self) -> tuple[TokenIds, TokenIds]:
        """Prompt and generated ids."""
        return self.example.prompt_ids, self.response.token_ids


class TripleRows(torch.utils.data.Dataset[dict[str, Any]]):
    """D_O with its reference log-probs, as `TeamTrainer` reads it."""

    def __init__(
        self,
        triples: Sequence[Triple],
        target_logps_NK: NDArray[np.float64],
        generated_logps_NK: NDArray[np.float64],
    ) -> None:
        self.triples = triples
        self.target_logps_NK = target_logps_NK
        self.generated_logps_NK = generated_logps_NK

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        triple = self.triples[index]
        return {
            "prompt_ids": triple.example.prompt_ids,
            "target_ids": triple.example.target_ids,
            "generated_ids": triple.response.token_ids,
            "player_target_logps": self.target_logps_NK[index],
            "player_generated_logps": self.generated_logps_NK[index],
            "is_truncated": triple.response.finish_reason == "length",
        }


# (policy, tokenizer, rows, config, t, arguments): the trainer of the iteration that makes θ_{t+1}.
BuildTrainer = Callable[..., Trainer]


def team_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: TripleRows,
    config: RunConfig,
    t: int,
    arguments: TrainingArguments,
) -> TeamTrainer:
    """The trainer of self-play."""
    return TeamTrainer(
        model=policy,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        objective={
            "lambda_": at_iteration(config.objective.lambda_, t),
            **config.objective.model_dump(exclude={"lambda_"}),
        },
        tokens_per_row=config.train.tokens_per_row,
        group_by_prompt=config.train.group_by_prompt,
        first_step_tolerance=FIRST_STEP_TOLERANCE[config.precision],
        optimizer_cls_and_kwargs=split_optimizer(config, arguments),
    )


def train_iteration(
    policy: PreTrainedModel,
    inputs: Inputs,
    rows: Any,
    config: RunConfig,
    run: RunDirectory,
    t: int,
    *,
    publish_to: Path,
    on_step: Callable[[int, str], None],
    stop: StopSignal,
    build: BuildTrainer = team_trainer,
) -> float:
    """Train θ_{t+1} from `policy`, which is θ_t in fp32, and save it into `publish_to` in fp32.

    Goes on from the last saved step, if there is one.

    Args:
        rows: what the trainer that `build` makes is to train on.

    Returns:
        Seconds of training, those before an interruption included.

    Raises:
        Interrupted: a stop was asked for; the step is saved.
        DivergenceError: the policy's log-probs or weights are no longer numbers.
    """
    resume_from = run.last_saved_step(t + 1)
    recorder = _Recorder(
        run.training(t + 1), run.training_log(t + 1), on_step, stop, _seconds_of(resume_from)
    )
    # The answers of θ_{t+1} end where those of the self-play did. Sampling defaults of θ_0 are not
    # handed on: they were not used, and some that are published cannot be saved.
    policy.generation_config = GenerationConfig(
        eos_token_id=list(inputs.stop_ids),
        pad_token_id=inputs.tokenizer.pad_token_id,
        bos_token_id=inputs.tokenizer.bos_token_id,
    )
    arguments = training_arguments(config, t, run.training(t + 1))
    with _tensorboard_in(run.iteration(t + 1) / "tensorboard"):
        trainer = build(policy, inputs.tokenizer, rows, config, t, arguments)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if trainer.state.global_step < trainer.state.max_steps:
        stop.check()
    if config.train.weights == "split":
        restore_fp32(trainer.optimizer)
    if not all(bool(p.isfinite().all()) for p in policy.parameters()):
        raise DivergenceError(f"θ_{t + 1} has weights that are not numbers; {ADVICE}")
    trainer.save_model(str(publish_to))
    (publish_to / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
    return recorder.seconds


@contextlib.contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Keep event files from among the saved steps, which are removed; a user's choice stays."""
    name = "TENSORBOARD_LOGGING_DIR"
    chosen = os.environ.get(name)
    os.environ[name] = chosen or str(folder)
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[name]


def _seconds_of(saved_step: Path | None) -> float:
    return float(read_manifest(saved_step)["seconds"]) if saved_step else 0.0


class _Recorder(TrainerCallback):
    """Keeps saved steps whole, writes training.jsonl, shows progress, heeds a stop."""

    def __init__(
        self,
        saved_steps: Path,
        log_file: Path,
        on_step: Callable[[int, str], None],
        stop: StopSignal,
        seconds_before: float,
    ) -> None:
        self.saved_steps = saved_steps
        self.log_file = log_file
        self.on_step = on_step
        self.stop = stop
        self.started = time.monotonic() - seconds_before

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return round(time.monotonic() - self.started, 3)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed state brings its old intervals along; those of the configuration hold.
        state.compute_steps(args, state.max_steps)
        # What was logged after the step that is resumed from will be logged again.
        lines = [_json_line(entry) for entry in state.log_history if "loss" in entry]
        self.log_file.write_text("".join(lines), encoding="utf-8")
        self.on_step(state.global_step, "")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == state.max_steps:
            control.should_log = True
            control.should_save = False  # θ_t itself is published next
        elif self.stop.signal_number is not None:
            control.should_save = control.should_training_stop = True
        # A line at each saved step: what is summed up for the next one does not survive a crash.
        control.should_log = control.should_log or control.should_save
        self.on_step(1, "")
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(_json_line(state.log_history[-1]))
        note = f"loss {logs['loss']:.4f}"
        for name in ("rewards/target", "rewards/chosen"):  # TRL says chosen
            if name in logs:
                note += f"  target reward {logs[name]:+.3f}"
        self.on_step(0, note)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = self.saved_steps / f"checkpoint-{state.global_step}"
        write_manifest(saved, {"seconds": self.seconds})
        # The older ones go only now that this one is whole.
        for path in self.saved_steps.glob("checkpoint-*"):
            if path != saved:
                shutil.rmtree(path)


def _json_line(entry: dict[str, Any]) -> str:
    # TRL counts its tokens anew after an interruption, so the number would not be one of the run.
    entry = {name: value for name, value in entry.items() if name != "num_tokens"}
    # JSON has no infinity and no NaN; as text, a gradient norm of "nan" is still there to see.
    honest = {
        k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()
    }
    return json.dumps(honest) + "\n"
