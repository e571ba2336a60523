"""Kernels of row losses as machine code, without a GPU: nothing may be spilled to memory.

    python -m tests.ops.cuda.machine_code

prints a line for each kernel and fails where one spills. The process must not interpret kernels.
"""

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
from triton.compiler import ASTSource

from ctkd.ops.cuda import row_losses
from ctkd.ops.rows import Rows

CAPABILITIES = 80, 90
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class Recorder:
    """Stands for a module of kernels: compiles each for the arguments it would be started with."""

    def __init__(self, module, found: dict) -> None:
        self.module, self.found = module, found

    def __getattr__(self, name: str):
        kernel = getattr(self.module, name)

        class Launcher:
            def __getitem__(launcher, grid):
                return lambda *args, **kwargs: self.compile(name, kernel, args, kwargs)

        return Launcher()

    def compile(self, name, kernel, args, kwargs) -> None:
        options = {one: kwargs.pop(one) for one in OPTIONS if one in kwargs}
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = [p.name for p in kernel.params if p.is_constexpr]
        # What the launcher would find out: numbers that are 1, and alignment for wide loads.
        constants += [one for one, value in named.items() if type(value) is int and value == 1]
        signature = {
            one: "constexpr" if one in constants else type_of(named[one])
            for one in kernel.arg_names
        }
        aligned = [
            (number,)
            for number, one in enumerate(kernel.arg_names)
            if signature[one].startswith("*")
            or (signature[one] in ("i32", "i64") and named[one] % 16 == 0)
        ]
        values = {one: named[one] for one in constants}
        key = name, str(signature), str(values), str(aligned)
        if key in self.found:
            return
        self.found[key] = []
        for capability in CAPABILITIES:
            source = ASTSource(
                kernel,
                signature,
                constexprs=values,
                attrs={one: [["tt.divisibility", 16]] for one in aligned},
            )
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options=options)
            self.found[key].append((capability, *usage(compiled.asm["cubin"])))


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


def starts(dtype: torch.dtype, width: int, other_width: int) -> None:
    """Start each loss once, on few rows that are not read."""
    student = Rows(torch.zeros(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64), width)
    teacher = Rows(torch.zeros(2, other_width, dtype=dtype), student.index, other_width)
    out = Rows(torch.zeros(3, width, dtype=dtype), student.index, width)
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
    if dtype == torch.float32:
        row_losses.uld(student, teacher, temperatures, torch.zeros(2, 2), out)
        return
    for beta in (0.0, 0.5):
        settings = temperatures | {
            "student_columns": torch.arange(width),
            "teacher_columns": torch.arange(other_width),
            "shared": 16,
            "beta": beta,
            "matched_weight": 0.5,
            "unmatched_weight": 0.5,
            "log_floor": -1e4,
        }
        row_losses.gold(student, teacher, settings, torch.zeros(2, 2), out, True)


def main() -> int:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    found: dict = {}
    kernels = row_losses.kernels
    row_losses.kernels = lambda name: Recorder(kernels(name), found)
    # Rows as models have them, rows that can be read entry by entry only, and the narrowest ones.
    for dtype, (width, other_width) in itertools.product(
        (torch.bfloat16, torch.float32), ((4096, 2048), (4097, 2049), (1, 1))
    ):
        starts(dtype, width, other_width)
    spilled = False
    for (name, signature, values, _), answers in found.items():
        for capability, registers, instructions in answers:
            counts = {one: instructions.count(one) for one in sorted({*instructions})}
            print(f"{name} sm_{capability}: {registers} registers, {counts}", values, signature)
            spilled |= any(one.startswith(("LDL", "STL")) for one in instructions)
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
