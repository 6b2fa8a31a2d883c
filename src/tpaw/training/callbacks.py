"""What the Trainer does between steps: save steps, write the log, show progress and stop."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.processes import (
    is_main_process,
    largest_of_all,
    process_count,
    wait_for_all,
)
from tpaw.runtime.progress import Advance
from tpaw.storage.artifacts import read_manifest, remove_artifacts, write_manifest, write_text


def seconds_of(saved_step: Path | None) -> float:
    """Return the seconds of training up to a saved step; 0 if there is none."""
    return float(read_manifest(saved_step)["seconds"]) if saved_step else 0.0


class Recorder(TrainerCallback):
    """Publishes saved steps, writes training.jsonl, shows progress, and stops on a signal.

    Where several processes train together, each has one: all stop at the same step, and the main
    process alone writes.

    Args:
        saved_steps: folder of the saved steps.
        log_file: path of training.jsonl.
        advance: moves the progress bar.
        stop: tells whether the user asked for a stop.
        seconds_before: seconds of training before the step that is resumed from.
    """

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
        """Write the log again from the state of the saved step."""
        # The saved state holds the old intervals. Those of the configuration apply, because they
        # may change when a run is resumed.
        state.compute_steps(args, state.max_steps)
        # Drop the lines after the saved step: the resumed training logs these steps again.
        lines = [_json_line(entry) for entry in state.log_history if "loss" in entry]
        if is_main_process():
            write_text(self.log_file, "".join(lines))
        self.advance(state.global_step, "")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decide whether to log, save and stop, and move the progress bar."""
        if state.global_step == state.max_steps:
            control.should_log = True
            # The caller publishes the trained player next, so a saved step is not needed.
            control.should_save = False
        elif number := largest_of_all(self.stop.signal_number or 0):
            self.stop.signal_number = number
            control.should_save = control.should_training_stop = True
        # Log at each saved step: the metric sums for the next line are not part of a saved step.
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
        """Append a line to training.jsonl and show the loss beside the progress bar."""
        if not logs or "loss" not in logs:
            return
        if is_main_process():
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(_json_line(state.log_history[-1]))
        note = f"loss {logs['loss']:.4f}"
        if "rewards/target" in logs:
            note += f"  target reward {logs['rewards/target']:+.3f}"
        self.advance(0, note)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the saved step, then remove older saved steps."""
        wait_for_all()  # each process writes a part of a saved step
        if is_main_process():
            self._publish(state.global_step)
        wait_for_all()  # a process that stops now may end the others

    def _publish(self, step: int) -> None:
        saved = self.saved_steps / f"checkpoint-{step}"
        write_manifest(saved, {"seconds": self.seconds, "processes": process_count()})
        # Remove older steps only after this one is published. A crash before would lose both.
        for path in self.saved_steps.glob("checkpoint-*"):
            if path != saved:
                remove_artifacts(path)


def _json_line(entry: dict[str, Any]) -> str:
    # TRL restarts its token count when training is resumed, so the number would be wrong.
    entry = {name: value for name, value in entry.items() if name != "num_tokens"}
    # JSON has no infinity and no NaN. Write them as text, so that a gradient norm of "nan" is seen.
    readable = {
        k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()
    }
    # Sorted, as in the saved state: a resumed run writes the same bytes.
    return json.dumps(readable, sort_keys=True) + "\n"
