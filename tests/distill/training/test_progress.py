"""What is shown of a run, and how a signal ends one."""

import io
import os
import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState

from ctkd.distill.training.progress import StepClock, StepReport, StopOnSignal, loss_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(report, step, **logs) -> None:
    state = TrainerState(global_step=step, max_steps=12)
    report.on_log(None, state, TrainerControl(), logs=logs)


def begin(report) -> None:
    report.on_train_begin(None, TrainerState(global_step=2, max_steps=12), TrainerControl())


def test_one_part_says_no_more_than_the_loss():
    assert loss_line({"ce": 2.5}) == "ce 2.5000"
    assert loss_line({"ce": 2.5, "kd": 1.0, "kd/uld": 1.0}) == "ce 2.5000  kd 1.0000"


def test_a_line_is_said_for_each_log_of_training():
    lines = []
    report = StepReport(lines.append, StepClock())
    begin(report)
    log(report, 3, ce=2.0, kd=0.5)
    report.seconds.append(1.26)
    log(report, 4, ce=1.5, kd=0.25)
    log(report, 4, eval_ce=1.5)
    log(report, 12, train_runtime=3.0)
    report.on_log(None, TrainerState(), TrainerControl())
    report.on_train_end(None, TrainerState(), TrainerControl())
    assert lines == [
        "step    3/12  ce 2.0000  kd 0.5000",
        "step    4/12  ce 1.5000  kd 0.2500  1.3 s/step",
    ]


def test_on_a_terminal_nothing_goes_to_stdout(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    lines = []
    report = StepReport(lines.append, StepClock())
    begin(report)
    report.on_step_end(None, TrainerState(), TrainerControl())
    log(report, 3, ce=2.0)
    report.on_train_end(None, TrainerState(), TrainerControl())
    assert "2/12" in terminal.getvalue()
    assert "step    3/12  ce 2.0000" in terminal.getvalue()
    assert capsys.readouterr().out == ""
    assert lines == []


def test_the_time_of_a_step_is_the_median(monkeypatch):
    clock = StepClock()
    report = StepReport(print, clock)
    assert report.seconds_per_step is None
    ticks = iter([0.0, 1.0, 50.0, 52.0, 100.0, 190.0])
    monkeypatch.setattr("ctkd.distill.devices.time.perf_counter", lambda: next(ticks))
    begin(report)
    for _ in range(3):
        clock.start()
        clock.on_step_end(None, TrainerState(), TrainerControl())
        report.on_step_end(None, TrainerState(), TrainerControl())
    assert report.seconds == [1.0, 2.0, 90.0]
    assert clock.total == 93.0
    assert report.seconds_per_step == 2.0


@pytest.fixture
def handlers():
    """Our own handlers, so that a mistake ends a test and not pytest."""
    caught = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, f: caught.append(n)) for number in numbers]
    yield caught
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_step_with_a_checkpoint(handlers, number):
    lines = []
    stop = StopOnSignal(lines.append)
    begin(stop)
    control = TrainerControl()
    stop.on_step_end(None, TrainerState(), control)
    assert not control.should_training_stop and not control.should_save
    os.kill(os.getpid(), number)
    assert stop.stopped
    assert lines == ["stopping after this step, with a checkpoint (once more to stop at once)"]
    stop.on_step_end(None, TrainerState(), control)
    assert control.should_training_stop and control.should_save
    stop.restore()
    assert handlers == []
    os.kill(os.getpid(), number)
    assert handlers == [number]


def test_a_signal_while_a_line_is_written_stops_as_well(handlers):
    def say(line):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    stop = StopOnSignal(say)
    begin(stop)
    os.kill(os.getpid(), signal.SIGINT)
    stop.restore()
    assert stop.stopped


def test_the_second_signal_ends_it_at_once(handlers):
    stop = StopOnSignal(lambda line: None)
    begin(stop)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == [signal.SIGTERM]


def test_a_thread_leaves_signals_alone(handlers):
    stop = StopOnSignal(lambda line: None)
    thread = threading.Thread(target=begin, args=(stop,))
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGINT)
    assert handlers == [signal.SIGINT]
    assert not stop.stopped
