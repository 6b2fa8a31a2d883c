"""What an iteration does beside its steps: saved steps, the log, progress, stopping."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.progress import Advance
from tpaw.storage.artifacts import read_manifest, write_manifest


def seconds_of(saved_step: Path | None) -> float:
    """Seconds of training up to a saved step."""
    return float(read_manifest(saved_step)["seconds"]) if saved_step else 0.0


class Recorder(TrainerCallback):
    """Keeps saved steps whole, writes training.jsonl, shows progress, stops when asked to."""

    def __init__(
        self,
        saved_steps: Path,
        log_file: Path,
        advance: Advance,
        stop: StopSignal,
        seconds_before: float,
    ) -> None:
        self.saved_steps = saved_steps
        self.log_file = log_file
        self.advance = advance
        self.stop = stop
        self.started = time.monotonic() - seconds_before

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return round(time.monotonic() - self.started, 3)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the log anew, from what the saved step knew."""
        # A resumed state brings its old intervals along; those of the configuration hold.
        state.compute_steps(args, state.max_steps)
        # What was logged after the step that is resumed from will be logged again.
        lines = [_json_line(entry) for entry in state.log_history if "loss" in entry]
        self.log_file.write_text("".join(lines), encoding="utf-8")
        self.advance(state.global_step, "")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decide about logging, saving and stopping; move the bar."""
        if state.global_step == state.max_steps:
            control.should_log = True
            control.should_save = False  # θ_t itself is published next
        elif self.stop.signal_number is not None:
            control.should_save = control.should_training_stop = True
        # A line at each saved step: what is summed up for the next one does not survive a crash.
        control.should_log = control.should_log or control.should_save
        self.advance(1, "")
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line of training.jsonl."""
        if not logs or "loss" not in logs:
            return
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(_json_line(state.log_history[-1]))
        note = f"loss {logs['loss']:.4f}"
        if "rewards/target" in logs:
            note += f"  target reward {logs['rewards/target']:+.3f}"
        self.advance(0, note)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the saved step, then remove the older ones."""
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
