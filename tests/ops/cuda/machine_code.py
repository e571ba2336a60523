"""All kernels as machine code, without a GPU: nothing may be spilled to memory.

    python -m tests.ops.cuda.machine_code [--few]

prints a line for each kernel, and fails where one spills, needs more shared memory than there is,
or does not read 16 bytes at once where rows allow it. The suite compiles each once, for bfloat16
rows as models have them. The process must not interpret kernels.
"""

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ctkd.ops import Rows, SoftmaxTerm, cuda
from ctkd.ops.cuda import chunks, matched_columns, row_losses, sinkhorn

# Of each capability, the bytes of shared memory that a program may have.
SHARED = {80: 163 << 10, 90: 227 << 10}
# Kernels that read rows 16 bytes at once where these begin at multiples of it.
READ_ROWS = {
    *(
        "bpm_rows",
        "gradient_rows",
        "gold_rows",
        "largest",
        "mass_of_columns",
        "shared_kl_rows",
        "statistics",
    ),
    "uld_rows",
}


class Device:
    """Stands for the driver of a GPU: kernels are compiled as if they were started there."""

    capability = 80

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _: int) -> int:
        return 0


class Check:
    """Compiles what is started, once for each capability, and prints what it is compiled to."""

    def __init__(self, device: Device, capabilities: Sequence[int], once: bool) -> None:
        self.device, self.capabilities, self.once = device, capabilities, once
        self.aligned = False
        self.seen: set[str] = set()
        self.names: set[str] = set()
        self.wrong: list[str] = []

    def start(self, kernel: JITFunction, compile_for: Callable[[], Any], form: dict) -> None:
        if self.once and kernel.fn.__name__ in self.names:
            return
        self.names.add(kernel.fn.__name__)
        for capability in self.capabilities:
            self.device.capability = capability
            compiled = compile_for()
            if compiled.hash not in self.seen:
                self.seen.add(compiled.hash)
                self.look_at(kernel.fn.__name__, compiled, form)

    def look_at(self, name: str, compiled: Any, form: dict) -> None:
        registers, instructions = usage(compiled.asm["cubin"])
        counts = {one: instructions.count(one) for one in sorted({*instructions})}
        shared = compiled.metadata.shared
        faults = []
        if any(one.startswith(("LDL", "STL")) for one in instructions):
            faults.append("spills")
        if shared > SHARED[self.device.capability]:
            faults.append("needs too much shared memory")
        reads_whole = any(one.startswith("LDG") and one.endswith(".128") for one in instructions)
        if self.aligned and name in READ_ROWS and not reads_whole:
            faults.append("reads rows by less than 16 bytes")
        line = f"{name} sm_{self.device.capability}: {registers} registers, {shared} bytes shared"
        print(line, counts, form, *faults, sep="; ", flush=True)
        self.wrong += [f"{line}; {form}; {one}" for one in faults]


def compile_only(check: Check) -> None:
    """Have a start of a kernel compile it."""
    start = JITFunction.run

    def run(kernel, *args, grid, warmup, **kwargs) -> None:
        def compile_for() -> Any:
            return start(kernel, *args, grid=grid, warmup=True, **kwargs)

        check.start(kernel, compile_for, kwargs)

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
    found = re.findall(r"\b(LDL|STL|RED|ATOM|LDGSTS|LDG|STG)((?:\.\w+)*)", text[1])
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
    for has_rest in (False, True):
        settings = {
            "teacher_ids": ids.int(),
            "student_ids": ids.int(),
            "in_image": torch.ones(student.width, dtype=torch.bool),
            "has_rest": has_rest,
            "temperature": 1.5,
            "least_mass": 1e-4,
            "lowest_logit": -(2.0**100),
            "log_floor": -1e4,
        }
        row_losses.bpm(student, teacher, settings, torch.zeros(2, 2, dtype=torch.int64), out)
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
    weights = torch.zeros(2)
    for temperatures in ((1.0,), (2.0, 1.0)):
        cuda.log_normalizers(rows, temperatures, columns=columns)
        for standardize in (False, True):
            _, found = cuda.column_mass(rows, sequence, 1, temperatures, standardize=standardize)
            cuda.chosen_log_probs(rows, ids, 1, found, temperatures)
            terms = [
                SoftmaxTerm(
                    temperature=one,
                    width=rows.width,
                    columns=None if standardize else columns,
                    log_normalizers=some,
                    totals=weights,
                    ids=ids[:, 0],
                    weights=torch.zeros(2, 3),
                )
                for one, some in zip(temperatures, found, strict=True)
            ]
            cuda.softmax_backward(rows, terms, out)
            cuda.softmax_backward(rows, terms, out, out, weights)
    distance = torch.zeros(1, 50, rows.width)
    cuda.add_column_distance_(distance, rows, sequence, torch.zeros(2, 50), weights, 1.0)
    cuda.greedy_partners(distance)
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
    few = "--few" in sys.argv[1:]
    device = Device()
    driver.set_active(device)
    # The first has less memory, and its assembler spills more.
    check = Check(device, [80] if few else list(SHARED), few)
    compile_only(check)
    # Rows as models have them, rows that can be read entry by entry only, and the narrowest ones.
    kinds = itertools.product((torch.bfloat16, torch.float32), ((4096, 2048), (4097, 2049), (1, 1)))
    for dtype, widths in itertools.islice(kinds, 1 if few else None):
        student, teacher, out = pair_of_rows(dtype, *widths)
        check.aligned = widths[0] % 16 == 0
        start_row_losses(student, teacher, out)
        start_operations(student, out)
    check.aligned = False
    start_positions()
    for size in (512,) if few else (512, 256, 128, 64, 16, 511, 100):
        start_transport(size, size)
    for width in (64,) if few else (64, 5):
        start_points(width)
    for one in check.wrong:
        print(one, file=sys.stderr)
    return bool(check.wrong)


if __name__ == "__main__":
    sys.exit(main())
