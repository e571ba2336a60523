"""Kernels for CUDA without a GPU: run by Triton's interpreter, and what they would cost."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ctkd
from ctkd import ops
from ctkd.logits import DenseLogits
from ctkd.ops import Rows
from ctkd.ops.costs import DECLARED
from ctkd.testing import make_pair
from tests.ops.cuda.widening import KNOWN, known, loads, narrow_loads

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_give_what_the_reference_gives_and_fit_a_gpu():
    """In a process each, as kernels are interpreted there or compiled."""
    tests = ["pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/ops/cuda"]
    for module, interpreted, told in (
        (tests, "1", " passed"),
        (["tests.ops.cuda.machine_code", "--few"], "0", "gradient_rows sm_80: "),
    ):
        environment = {**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"}
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
            environment.pop(name, None)
        command = [sys.executable, "-m", *module]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert told in done.stdout


# Launches of a forward and backward pass, beside cross-entropy on the same rows, and how often the
# logits of both sides are moved: 2,048 rows of bfloat16.
BUDGETS = {
    "alm": 60,
    "bpm": 70,
    "gold": 60,
    "mined": 60,
    "multilevelot": 80,
    "multilevelot_released": 70,
    "multilevelot_sequence": 60,
    "multilevelot_token": 60,
    "shared_kl": 60,
    "uld": 40,
}


class Launches(TorchDispatchMode):
    """Counts operators that compute something, declared ones as they are declared."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = 0
        self.undeclared: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        if func.namespace == "ctkd":
            cost = ops.cost_of(func, args, kwargs or {})
            if cost is None:
                self.undeclared.add(str(func))
            else:
                self.launches += cost.launches
                self.moved += cost.bytes_moved
        elif func.namespace == "aten" and not func.is_view:
            outputs = [
                one for one in torch.utils._pytree.tree_leaves(answer) if torch.is_tensor(one)
            ]
            if any(one.device.type == "meta" for one in outputs):
                self.launches += not func._schema.name.startswith(
                    ("aten::empty", "aten::new_empty")
                )
        return answer


def test_a_step_stays_within_its_budget():
    student, teacher = 151_936, 128_256
    pair = make_pair(student, teacher)
    for name, budget in BUDGETS.items():
        loss = ctkd.get_loss(name, pair=pair).to("meta")
        labels = torch.zeros(8, 256, dtype=torch.int64, device="meta")
        logits = [
            torch.empty(8, 256, width, dtype=torch.bfloat16, device="meta")
            for width in (student, teacher)
        ]
        logits[0].requires_grad_()
        sides = [ctkd.Side.from_encoder_decoder(one, labels, chunk_ids=labels) for one in logits]
        counter = Launches()
        with counter:
            batch = ctkd.Batch(student=sides[0], teacher=sides[1], num_chunks=256)
            loss(batch).value.backward()
        assert not counter.undeclared, name
        assert counter.launches <= budget, name
        # One gradient, and each side read a few times.
        assert counter.moved <= 13 * logits[0].nbytes, name


PLANTED = """
def kernel(rows, out, columns):
    place = rows.tensor + columns
    fine = tl.load(place, mask=columns > 0).to(tl.float32) + tl.load(rows.numbers)
    bits = tl.load(place).to(tl.int16, bitcast=True)
    tl.store(out + columns, tl.load(place))
    x = tl.load(place + 1)
    tl.store(out + tl.load(place), tl.load(rows.tensor) * 2.0)
    return x.to(tl.float32) + tl.load(place).to(tl.float16).to(tl.float32)
"""


def test_operators_are_declared_and_their_kernels_widen_what_they_load():
    assert narrow_loads(PLANTED) == ["kernel.rows.tensor"] * 4
    used = set()
    for file in sorted((ROOT / "ctkd/ops/cuda").glob("*.py")):
        source = file.read_text()
        assert not narrow_loads(source), file
        used |= {one for name, wide in loads(source) if not wide for one in known(name)}
    # Exceptions that nothing needs any more would hide what is new.
    assert used == KNOWN
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ctkd::")
    }
    assert registered and registered <= DECLARED.keys()
    for name in registered:
        arguments = getattr(torch.ops.ctkd, name).default._schema.arguments
        assert sum(not one.kwarg_only for one in arguments) <= 8, name


def test_without_values_operators_make_what_kernels_would():
    rows = Rows(
        torch.empty(2, 3, 7, device="meta"), torch.empty(6, dtype=torch.int64, device="meta"), 6
    )
    normalizers = ops.log_normalizers(rows, (1.0, 2.0, 3.0))
    assert normalizers.shape == (3, 6) and normalizers.dtype == torch.float32
    ids, values = ops.top_k(rows, 2)
    assert ids.shape == values.shape == (6, 2)
    logits = DenseLogits(rows.tensor.to(torch.bfloat16))
    assert logits.log_probs(torch.zeros(2, 1, 4, dtype=torch.int64, device="meta")).shape == (
        2,
        3,
        4,
    )
