"""All kernels as machine code, without a GPU: nothing may be spilled to memory.

    python -m tests.ops.cuda.machine_code

prints a line for each kernel and fails where one spills. The process must not interpret kernels.
"""

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ctkd.ops import Rows, SoftmaxTerm, cuda
from ctkd.ops.cuda import chunks, matched_columns, row_losses, sinkhorn

CAPABILITIES = 80, 90


class Device:
    """Stands for the driver of a GPU: kernels are compiled as if they were started there."""

    capability = CAPABILITIES[0]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _: int) -> int:
        return 0


def compile_only(device: Device, found: dict) -> None:
    """Have a start of a kernel compile it for each capability, by what it is compiled for."""
    start = JITFunction.run

    def run(kernel, *args, grid, warmup, **kwargs) -> None:
        for device.capability in CAPABILITIES:
            compiled = start(kernel, *args, grid=grid, warmup=True, **kwargs)
            found[compiled.hash] = kernel.fn.__name__, device.capability, compiled

    JITFunction.run = run


@functools.cache
def usage(cubin: bytes) -> tuple[int, list[str]]:
    """Registers, and instructions that move registers to memory or atomically add."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        text = [
            subprocess.run([tools / tool, option, file], capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        ]
    registers = int(re.search(r"REG:(\d+)", text[0])[1])
    found = re.findall(r"\b(LDL|STL|RED|ATOM|LDG|STG)((?:\.\w+)*)", text[1])
    return registers, ["".join(one) for one in found]


def pair_of_rows(dtype: torch.dtype, width: int, other_width: int) -> tuple[Rows, Rows, Rows]:
    """Few rows of a student, of a teacher and of a gradient."""
    student = Rows(torch.zeros(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64), width)
    teacher = Rows(torch.zeros(2, other_width, dtype=dtype), student.index, other_width)
    return student, teacher, Rows(torch.zeros(3, width, dtype=dtype), student.index, width)


def start_row_losses(student: Rows, teacher: Rows, out: Rows) -> None:
    ids = torch.arange(16)
    for beta, others in ((0.0, None), (0.5, ids)):
        settings = {
            "student_ids": ids,
            "teacher_ids": ids,
            "student_others": others,
            "teacher_others": others,
            "temperature": 1.5,
            "beta": beta,
            "lowest_logit": -(2.0**100),
            "log_floor": -1e4,
        }
        row_losses.shared_kl(student, teacher, settings, None, out)
    temperatures = {"student_temperature": 1.0, "teacher_temperature": 1.0}
    row_losses.uld(student, teacher, temperatures, None, out)
    if student.tensor.dtype == torch.float32:
        row_losses.uld(student, teacher, temperatures, torch.zeros(2, 2), out)
        return
    for beta in (0.0, 0.5):
        settings = temperatures | {
            "student_columns": torch.arange(student.width),
            "teacher_columns": torch.arange(teacher.width),
            "shared": 16,
            "beta": beta,
            "matched_weight": 0.5,
            "unmatched_weight": 0.5,
            "log_floor": -1e4,
        }
        row_losses.gold(student, teacher, settings, torch.zeros(2, 2), out, True)


def start_operations(rows: Rows, out: Rows) -> None:
    columns = torch.ones(rows.width, dtype=torch.bool)
    sequence, ids = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, 3, dtype=torch.int64)
    deviations = cuda.deviations(rows)
    for temperatures in ((1.0,), (2.0, 1.0)):
        cuda.log_normalizers(rows, temperatures, columns=columns)
        for standardize in (False, True):
            _, found = cuda.column_mass(rows, sequence, 1, temperatures, standardize=standardize)
            given = deviations if standardize else None
            cuda.chosen_log_probs(rows, ids, 1, found, temperatures, given)
            terms = [
                SoftmaxTerm(
                    temperature=one,
                    standardize=standardize,
                    width=rows.width,
                    columns=None if standardize else columns,
                    log_normalizers=deviations,
                    totals=deviations,
                    ids=ids[:, 0],
                    weights=torch.zeros(2, 3),
                )
                for one in temperatures
            ]
            cuda.softmax_backward(rows, terms, out)
            cuda.softmax_backward(rows, terms, out, out, deviations)
    cuda.top_k(rows, min(16, rows.width))
    cuda.clear_rows(out.tensor, out.index)


def start_positions() -> None:
    """Operations on masks, ids and chunks."""
    targets = torch.zeros(2, 50, dtype=torch.int64)
    for chunk_ids in (None, targets):
        cuda.pack_scored(targets, -100, 40, 50, chunk_ids)
    chunks.chunk_table(targets > 0, targets, 30)
    values = torch.zeros(2, 50, requires_grad=True)
    chunks.chunk_sums(values, targets > 0, targets, 30)[0].sum().backward()


def start_transport(rows: int, columns: int) -> None:
    masses = torch.zeros(1, rows), torch.zeros(1, columns)
    masks = tuple(one > 0 for one in masses)
    for given in ((None, None, *masks), (*masses, *masks)):
        cost = torch.zeros(1, rows, columns, requires_grad=True)
        plan, value, _ = sinkhorn.transport(cost, *given, 0.1, 3)
        total = value.sum() if given[0] is None else value.sum() + plan.sum()
        total.backward()


def start_points(width: int) -> None:
    """Costs of points, and terms of matched columns, which have as many."""
    points, others = torch.zeros(2, 5, width), torch.zeros(2, 4, width)
    sinkhorn.l1_cost(points.requires_grad_(), others).sum().backward()
    positions = torch.zeros(2, 3, dtype=torch.int64)
    missing, valid = torch.zeros(2, 1, width) > 0, positions > 0
    for count in (1, 2):
        student = [torch.zeros(2, 5, width, requires_grad=True) for _ in range(count)]
        sums = matched_columns.sums_at_positions(
            (student[0], student[-1]), (others, others), missing, positions, positions, valid,
            (1.0, 0.5),
        )  # fmt: skip
        (sums[0] + sums[1]).sum().backward()
    if matched_columns.serves_target(missing):
        ids = torch.zeros(2, 5, width, dtype=torch.int64)
        labels = positions
        matched_columns.fused_target(ids, torch.zeros(2, 5, width), labels[0], labels, labels)


def main() -> int:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    found: dict = {}
    device = Device()
    driver.set_active(device)
    compile_only(device, found)
    # Rows as models have them, rows that can be read entry by entry only, and the narrowest ones.
    for dtype, widths in itertools.product(
        (torch.bfloat16, torch.float32), ((4096, 2048), (4097, 2049), (1, 1))
    ):
        student, teacher, out = pair_of_rows(dtype, *widths)
        start_row_losses(student, teacher, out)
        start_operations(student, out)
    start_positions()
    for size in (512, 256, 128, 64, 16, 511, 100):
        start_transport(size, size)
    for width in (64, 5):
        start_points(width)
    spilled = False
    for name, capability, compiled in found.values():
        registers, instructions = usage(compiled.asm["cubin"])
        counts = {one: instructions.count(one) for one in sorted({*instructions})}
        arguments = re.search(r"func public @\w+\((.*?)\) attributes", compiled.asm["ttir"])[1]
        arguments = re.sub(r" loc\(.*?\)\)", "", arguments)
        print(f"{name} sm_{capability}: {registers} registers, {counts}", arguments, flush=True)
        spilled |= any(one.startswith(("LDL", "STL")) for one in instructions)
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
