"""What the processes of one training run do in tests, however they were started."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from ctkd.cli import main
from ctkd.distill.models import ModelLogits
from ctkd.distill.training import Distiller, progress, run
from ctkd.distill.training.sums import Counts
from tests.distill import tiny
from tests.forks import Forks


def train(
    words: list[str], optimizer: str, weights: str, stops: int = 0, by: int = signal.SIGINT
) -> None:
    """A training run that leaves this rank's weights in a file, those of a control aside.

    Args:
        words: Of the command line.
        optimizer: As transformers calls it.
        weights: The beginning of the name of the file.
        stops: The step in which the last rank gets a signal, 0 for none.
        by: The signal.
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
            os.kill(os.getpid(), by)
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


def steps(
    setup: tiny.Setup, device: torch.device, own: slice = slice(None), count: int = 20
) -> None:
    """Train in a loop of one's own by plain gradient descent, each rank on its rows."""
    distiller = Distiller("shared_kl", setup.student_tokenizer, setup.teacher_tokenizer)
    rows = [{"prompt": one.prompt, "answer": one.answer} for one in tiny.examples()[own]]
    batch = {name: value.to(device) for name, value in distiller.collate(rows).items()}
    counts, ranks = torch.stack(distiller.counts(batch)), 1
    if distributed.is_initialized():
        distributed.all_reduce(counts)
        ranks = distributed.get_world_size()
    student, teacher = ModelLogits(setup.student), ModelLogits(setup.teacher)
    optimizer = torch.optim.SGD(setup.student.parameters(), lr=0.02)
    for _ in range(count):
        with torch.no_grad():
            taught = teacher(**distiller.teacher_inputs(batch))
        logits = student(**distiller.student_inputs(batch))
        output = distiller.loss(logits, taught, batch, counts=Counts(*counts))
        (output.value * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()


def on(device: torch.device) -> tiny.Setup:
    """Models in float32 on a device."""
    setup = tiny.Setup()
    for model in (setup.student, setup.teacher):
        model.to(device, torch.float32)
    return setup


class Gathers(TorchDispatchMode):
    """Counts how often tensors are gathered from all ranks."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_between_ranks = function.namespace in ("c10d", "_c10d_functional")
        self.count += is_between_ranks and "gather" in function.name()
        return function(*args, **(kwargs or {}))


def train_in_parts(kind: str, found: str) -> None:
    """Train a student in parts on that kind of device, its teacher whole and then in parts.

    The first rank leaves the weights, and how often parts were gathered in one more step, of a
    whole teacher and a loss that reads its rows one at a time.
    """
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mesh, own = init_device_mesh(kind, (ranks,)), slice(rank, None, ranks)
    weights = []
    for in_parts in (["student"], ["student", "teacher"]):
        setup = on(device)
        for name in in_parts:
            _share_out(getattr(setup, name), mesh)
        steps(setup, device, own)
        parameters = setup.student.named_parameters()
        weights.append({name: one.detach().full_tensor().cpu() for name, one in parameters})
    os.environ["CTKD_BLOCK_ELEMENTS"] = "1"
    setup = on(device)
    _share_out(setup.student, mesh)
    with Gathers() as gathers:
        steps(setup, device, own, count=1)
    if rank == 0:
        torch.save({"weights": weights, "ranks": ranks, "gathers": gathers.count}, found)
    distributed.destroy_process_group()


def _share_out(model: nn.Module, mesh: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
