"""Callbacks of a training run: its clock, its progress, and its end on a signal."""

from __future__ import annotations

import signal
import statistics
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ctkd.distill.devices import now
from ctkd.distill.processes import any_of_all, no_bar

__all__ = ["StepClock", "StepReport", "StepsAsAsked", "StopOnSignal", "loss_line"]


class StepClock(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Adds up the seconds of optimizer steps, over resumes too.

    A step begins with the fetching of its batches, which may read a cache, and is over when the
    device is done with it; evaluation and saving are not counted.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.last = 0.0
        self._started: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.go_on(state)
        # A checkpoint of a run without a clock has no place for it.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def go_on(self, state: TrainerState) -> None:
        """Take up the seconds that a checkpoint holds."""
        logged = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.total = logged[-1] if logged else 0.0
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved is not None:
            self.total = saved["attributes"]["total"]

    def state(self) -> dict[str, Any]:
        """The clock as a checkpoint keeps it."""
        return {"args": {}, "attributes": {"total": self.total}}

    def start(self) -> None:
        """A step begins."""
        self._started = now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._started is not None:
            self.last = now() - self._started
            self.total += self.last
            self._started = None


class StepReport(TrainerCallback):  # type: ignore[misc]
    """Shows a bar on a terminal and a line per log, and keeps the time of steps.

    Args:
        say: Prints one line.
        clock: What measures the steps; it must be called before this.
    """

    def __init__(self, say: Callable[[str], None], clock: StepClock) -> None:
        self._say = say
        self._clock = clock
        self._bar: Any = None
        self._held_out_bar: Any = None
        self.seconds: list[float] = []

    @property
    def seconds_per_step(self) -> float | None:
        """Median time of an optimizer step, without evaluation and saving."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=no_bar(),
            leave=False,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.seconds.append(self._clock.last)
        self._bar.update(1)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if self._held_out_bar is None:
            self._held_out_bar = tqdm(
                total=len(eval_dataloader),
                desc="held-out losses",
                unit="batch",
                disable=no_bar(),
                leave=False,
            )
        self._held_out_bar.update(1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._held_out_bar is not None:
            self._held_out_bar.close()
            self._held_out_bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "ce" not in logs:
            return
        line = f"step {state.global_step:>4}/{state.max_steps}  {loss_line(logs)}"
        if self.seconds:
            line += f"  {self.seconds[-1]:.1f} s/step"
        if self._bar is None or self._bar.disable:
            self._say(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar.close()


def loss_line(logs: dict[str, Any]) -> str:
    """Cross-entropy, the loss and its parts on one line.

    Example:
        >>> loss_line({"ce": 2.5, "kd": 1.25, "kd/had": 1.0, "kd/sl": 0.25})
        'ce 2.5000  kd 1.2500 (had 1.0000, sl 0.2500)'
    """
    line = f"ce {logs['ce']:.4f}"
    if "kd" in logs:
        parts = [
            f"{name.removeprefix('kd/')} {value:.4f}"
            for name, value in logs.items()
            if name.startswith("kd/")
        ]
        line += f"  kd {logs['kd']:.4f}"
        if len(parts) > 1:
            line += f" ({', '.join(parts)})"
    return line


class StepsAsAsked(TrainerCallback):  # type: ignore[misc]
    """Logs and saves a resumed run as often as it is asked to now, not as it was at its start."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ends training after the current step, with a checkpoint, on the first interrupt.

    A second interrupt ends it at once. Several processes end it after the same step.

    Args:
        say: Prints one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[int, Any] = {}
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.stopped = any_of_all(self.stopped)
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Give signals back their handlers; to be called however training ends."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _stop(self, number: int, frame: object) -> None:
        if self.stopped:
            self.restore()
            raise KeyboardInterrupt
        self.stopped = True
        # A signal can come while a line is being written, and then none can be written here.
        with suppress(RuntimeError):
            self._say("stopping after this step, with a checkpoint (once more to stop at once)")
