"""What the processes of one training run do in tests, however they were started."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctkd.cli import main
from ctkd.distill.training import progress, run
from tests.forks import Forks


def train(words: list[str], optimizer: str, weights: str, stops: int = 0) -> None:
    """A training run that leaves this rank's weights in a file, those of a control aside.

    Args:
        words: Of the command line.
        optimizer: As transformers calls it.
        weights: The beginning of the name of the file.
        stops: The step in which the last rank is interrupted, 0 for none.
    """
    number, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    train_from, step_end = run._train_from, progress.StepReport.on_step_end

    def train_and_keep(trainer, checkpoint):
        train_from(trainer, checkpoint)
        if Path(trainer.args.output_dir).name == "control":
            return
        found = {name: one.detach() for name, one in trainer.model.named_parameters()}
        torch.save(found, f"{weights}{number}.pt")

    def step(self, args, state, control, **rest):
        if state.global_step == stops and number == count - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step_end(self, args, state, control, **rest)

    run._train_from = train_and_keep
    run.TrainingArguments = partial(run.TrainingArguments, optim=optimizer)
    progress.StepReport.on_step_end = step
    main(words)


def of_two(forks: Forks, function: Callable[..., Any], *arguments: Any, output: Path) -> list[str]:
    """Call a function in two processes as torchrun starts them, and return what each has said."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    together = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    outputs = [output / f"rank {rank}" for rank in range(2)]
    ranks = [
        forks.start(
            function,
            *arguments,
            output=said,
            environment={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, said in enumerate(outputs)
    ]
    ends = [forks.wait(rank) for rank in ranks]
    return [f"{said.read_text()}exit code {end}" for end, said in zip(ends, outputs, strict=True)]
