"""Several processes that train together end where one does, and are stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distill.tiny_runs import error_of, finish, invoke, record, weights, write_rows
from tests.distill.training.ranks import of_two, on, steps, train, train_in_parts
from tests.forks import ROOT, python

pytestmark = pytest.mark.slow

TORCHRUN = ["torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]
# On a machine without a GPU, too, that is what it takes to have several processes started.
ACCELERATE = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--no_python", "--main_process_port=0"),
]

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def together(
    launcher: list[str], function: Callable[..., None], *arguments: object, forked: bool = True
) -> tuple[int, str]:
    """Call a function in several processes; the exit code, and what all of them said.

    Args:
        launcher: What starts them.
        function: What each of them calls.
        arguments: That JSON can hold.
        forked: Whether they may find imports done, which may have asked for a GPU.
    """
    called = json.dumps([function.__module__, function.__name__, arguments])
    code = f"import json; from tests.forks import call; call(*json.loads({called!r}))"
    command = [*(python() if forked else [sys.executable]), "-c", code]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout


def alone(forks, folder: Path, *arguments: object) -> dict[str, Tensor]:
    """The weights that one process ends with."""
    output = folder / "alone.log"
    assert forks.run(train, *arguments, str(folder / "alone"), output=output) == 0, (
        output.read_text()
    )
    return torch.load(folder / "alone0.pt")


def of_both(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights that two processes end with, after making sure that they are equal."""
    first, second = (torch.load(folder / f"{name}{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    return first


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a weight."""
    assert ours.keys() == theirs.keys()
    return max(float((value - theirs[key]).abs().max()) for key, value in ours.items())


def runs(place, rows: int, *options: str) -> tuple[list[str], list[str]]:
    """The words of a run in one process, and of the same in two."""
    data = place.folder / f"{rows}.jsonl"
    write_rows(data, rows)
    words = ["--data", str(data), "--eval-data", str(place.rows), *options, "--batch-size"]
    return (
        [*place.train(f"one of {rows}", *words, "4")],
        [*place.train(f"two of {rows}", *words, "2")],
    )


def test_torchrun_trains_like_one_process(place, forks):
    """Plain gradient descent sums the same gradients, in another order.

    Of large steps each makes the rounding of those before larger.
    """
    one, two = runs(place, 13, "--max-steps", "20", "--learning-rate", "0.1", "--control")
    expected = alone(forks, place.folder, one, "sgd")
    code, said = together([*TORCHRUN, "2"], train, two, "sgd", str(place.folder / "two-"))
    assert code == 0, said
    found = of_both(place.folder, "two-")
    assert largest(expected, weights(place.student)) > 0.01
    assert largest(found, expected) < 1e-6
    assert largest(weights(place.folder / "two of 13"), found) == 0
    assert said.count("2 processes, 4 rows a step") == said.count("held-out, 20 examples") == 1
    ours, theirs = (record(place.folder / f"{name} of 13")["results"] for name in ("one", "two"))
    for stage in ("student before", "teacher", "student after", "control", "losses after"):
        assert theirs[stage] == pytest.approx(ours[stage], rel=1e-5), stage
    # Streamed rows are given out as those that were read at once.
    stream = ("--streaming", "--measure", "nothing", "--no-control", "--overwrite")
    expected = alone(forks, place.folder, [*one, *stream], "sgd")
    said = of_two(
        forks, train, [*two, *stream], "sgd", str(place.folder / "streamed-"), output=place.folder
    )
    assert "training: 91 rows read" in said[0] and said[1] == "exit code 0", said
    assert largest(of_both(place.folder, "streamed-"), expected) < 1e-6


def test_accelerate_trains_like_one_process_and_is_stopped_and_resumed(place, forks):
    """AdamW divides by what it has seen, which is tiny at first, so its updates differ by more."""
    settings = ["--loss", "alm", "--score-eos", "--max-steps", "6", "--learning-rate", "0.001"]
    one, two = runs(place, 7, *settings)
    expected = alone(forks, place.folder, one, "adamw_torch")
    kept = str(place.folder / "stopped-")
    code, said = together(ACCELERATE, train, [*two, "--resume"], "adamw_torch", kept, 3)
    assert code == 1, said
    assert said.count("Error: stopped at step 3 of 6; repeat the command with --resume") == 1, said
    assert said.count("Error:") == 1 + said.count("ChildFailedError:"), said
    said = of_two(forks, train, [*two, "--resume"], "adamw_torch", kept, output=place.folder)
    assert "going on from checkpoint-3\n" in said[0], said
    assert said[1] == "exit code 0"
    update = largest(expected, weights(place.student))
    found = of_both(place.folder, "stopped-")
    assert largest(found, expected) < 0.01 * update
    straight = [*two, "--output", str(place.folder / "straight")]
    of_two(
        forks, train, straight, "adamw_torch", str(place.folder / "straight-"), output=place.folder
    )
    assert largest(of_both(place.folder, "straight-"), found) == 0
    card = (place.folder / "two of 7" / "README.md").read_text()
    assert "torchrun --nproc_per_node 2 -m ctkd train \\\n" in card


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, on_cuda])])
def test_models_in_parts_train_like_whole_ones(kind, tmp_path):
    """`fully_shard` in a loop of one's own; what differs is the order of sums in float32."""
    count = 2 if kind == "cpu" else min(2, torch.cuda.device_count())
    launcher, kept = [*TORCHRUN, str(count)], tmp_path / "kept.pt"
    code, said = together(launcher, train_in_parts, kind, str(kept), forked=kind == "cpu")
    assert code == 0, said
    whole, fresh = (on(torch.device(kind)) for _ in range(2))
    steps(whole, torch.device(kind))
    expected, before = (
        {name: one.detach().cpu() for name, one in setup.student.named_parameters()}
        for setup in (whole, fresh)
    )
    assert largest(expected, before) > 0.05
    found = torch.load(kept)
    for ended in found["weights"]:
        torch.testing.assert_close(ended, expected, rtol=1e-6, atol=1e-6)
    # Each of two layers in the forward and in the backward pass; once all else, and the head in it.
    assert found["ranks"] == count
    assert found["gathers"] == (5 if count > 1 else 0)


def test_what_is_wrong_is_said_once(place, forks, monkeypatch):
    killed = place.train("killed", "--measure", "nothing", "--max-steps", "4")
    said = of_two(forks, train, killed, "sgd", "", 2, signal.SIGKILL, output=place.folder)
    assert "Error: another process has ended" in said[0] and "--resume" in said[0], said
    assert [one.rpartition("exit code ")[2] for one in said] == ["1", "-9"]
    words = place.train("wrong", "--max-length", "2")
    said = of_two(forks, train, words, "sgd", "", output=place.folder)
    assert "are longer than 2 tokens" in said[0]
    assert said[0].endswith("exit code 1")
    assert said[1] == "exit code 0"
    monkeypatch.setenv("RANK", "1")  # of a launcher that says nothing of others
    assert "held-out, 2 examples" in finish(*place.train("alone")).stdout
    monkeypatch.delenv("RANK")
    said = of_two(forks, train, place.train("alone", "--resume"), "sgd", "", output=place.folder)
    assert "is finished already" in said[0]
    assert said[1] == "exit code 0"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "told to compute in bf16 (mixed_precision), and dtype is float32" in error_of(
        invoke(*words)
    )
    assert "mixed" not in error_of(invoke(*words, "--dtype", "bfloat16"))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "in parts (FSDP) is not trained by the command" in error_of(invoke(*words))
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = error_of(invoke(*place.evaluate(str(place.student))))
    assert "ctkd evaluate works in one process, and WORLD_SIZE says 2" in error
