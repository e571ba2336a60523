"""One process whose peak of memory `benchmarks.train_step` reads: it takes one training step.

What it prints is the step's peak beyond that of the models, gradients and the state of AdamW. A
step before it is not counted: it compiles, makes that state, and runs code for the first time.
"""

import tempfile

import click
import torch

from benchmarks.measuring import print_peak
from benchmarks.options import threads_option
from benchmarks.steps import Prepared
from benchmarks.train_step import live_step
from ctkd.distill.devices import PeakMemory, give_back_freed_memory


@click.command()
@click.argument("name")
@click.option("--student", required=True)
@click.option("--teacher", required=True)
@click.option("--batch-size", required=True, type=int)
@click.option("--length", required=True, type=int)
@click.option("--scored", required=True, type=int)
@threads_option
def main(
    name: str,
    student: str,
    teacher: str,
    batch_size: int,
    length: int,
    scored: int,
) -> None:
    """Take one step of a kind, and print the most memory that it needed."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Prepared.make(
            folder,
            student=student,
            teacher=teacher,
            loss="gold",
            batch_size=batch_size,
            length=length,
            scored=scored,
            cached=False,
        )
        step = live_step(prepared, name, folder, prepared.optimizer())
        step()
        give_back_freed_memory()
        student = prepared.models.student
        peak = PeakMemory(student.device)
        for parameter in student.parameters():
            # What is not written to is not resident.
            parameter.grad = torch.ones_like(parameter)
        held = peak.read() or 0
        student.zero_grad()
        give_back_freed_memory()
        peak = PeakMemory(student.device)
        step()
        print_peak(peak, beyond=held)


if __name__ == "__main__":
    main()
