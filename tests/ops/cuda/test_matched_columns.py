"""Kernels of the terms of matched columns, run by the interpreter of Triton, in whole losses."""

import pytest
import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.losses.mined import fused_target
from ctkd.losses.multilevelot import MultiLevelOT
from ctkd.ops import cost_of
from ctkd.ops.cuda import matched_columns, sinkhorn
from tests.ragged_batches import ragged_inputs

# numpy, which runs the kernels, warns of differences of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

KERNELS = {"matched_columns": matched_columns, "sinkhorn": sinkhorn}


def outcome(inputs: dict, loss: MultiLevelOT, dtype: torch.dtype) -> list[Tensor]:
    inputs = {
        name: one.clone().to(dtype) if torch.is_tensor(one) and one.is_floating_point() else one
        for name, one in inputs.items()
    }
    leaf = inputs["student_logits"].requires_grad_()
    output = loss(Batch.from_causal_lm(**inputs))
    return [*output.parts.values(), *torch.autograd.grad(output.value, leaf)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sl_temperature": 1.5, "sd_weight": 0.0},
        {"had_weight": 0.0, "sl_weight": 2.0, "sl_temperature": 0.7, "pairing": "chunk"},
        {"had_weight": 0.5, "sl_weight": 0.0, "sd_weight": 0.0, "pairing": "chunk"},
        {"had_weight": 0.0, "sl_weight": 0.0},
    ],
    ids=str,
)
def test_a_loss_is_what_float64_says(settings, monkeypatch):
    inputs = ragged_inputs(3, student_lengths=(6, 3, 0, 4), teacher_lengths=(4, 5, 2, 0))
    inputs["student_logits"][:, :, 2] = -torch.inf  # A column that is not there.
    loss = MultiLevelOT(k=5, iterations=4, **settings)
    expected = outcome(inputs, loss, torch.float64)
    asked = []

    def kernels_for(part: str, *tensors: Tensor):
        asked.append(part)
        return None if tensors[0].dtype == torch.float64 else KERNELS[part]

    for module in ("ctkd.losses.multilevelot", "ctkd.ot.sinkhorn"):
        monkeypatch.setattr(f"{module}.kernels_for", kernels_for)
    found = outcome(inputs, loss, torch.float32)
    assert ("matched_columns" in asked) == (loss.had_weight + loss.sl_weight > 0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apart", [False, True])
def test_operators_are_those_that_torch_expects(apart):
    generator = torch.Generator().manual_seed(0)
    student, log_student, teacher = (-torch.rand(2, 4, 70, generator=generator) for _ in range(3))
    missing = torch.arange(70).view(1, 1, -1).expand(2, -1, -1) % 9 == 0
    position = torch.arange(3).expand(2, -1)
    valid = torch.tensor([[True, False, True], [True, True, True]])
    given = ([student, log_student] if apart else [student], [teacher])
    given = (*given, missing, [position, position], valid, [1.0, 0.5])
    gradients = [torch.tensor(2.0).expand(2), None]
    operators = torch.ops.ctkd
    # Positions that are not paired, and names that are given twice.
    target = torch.arange(70).expand(2, 4, -1).contiguous(), teacher, torch.arange(70) // 2
    target = (*target, torch.tensor([[3, -1, 0], [0, 2, -1]]), position.contiguous())
    for found, expected in zip(operators.fused_target(*target), fused_target(*target), strict=True):
        torch.testing.assert_close(found, expected)
    checks = ("test_schema", "test_faketensor")
    for operator, arguments, launches in (
        (operators.matched_columns, given, 1),
        (operators.matched_columns_backward, (*given, gradients), 2),
        (operators.fused_target, target, 1),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)
        cost = cost_of(operator.default, arguments, {})
        assert cost.launches == launches and cost.bytes_moved > teacher.nbytes
