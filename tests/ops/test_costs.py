"""Costs of operations: counted on shapes alone, or declared."""

import pytest
import torch

from ctkd import ops
from ctkd.ops import RowLoss, Rows, SoftmaxTerm, cost_of
from ctkd.ops.costs import DECLARED, Cost

ROWS, WIDTH = 4, 1000


def rows(dtype: torch.dtype = torch.float32) -> Rows:
    return Rows(torch.zeros(ROWS, WIDTH, dtype=dtype), None, WIDTH)


def test_an_operation_reads_its_rows_and_writes_its_answer():
    cost = cost_of(ops.log_normalizers, (rows(), [1.0]), {})
    # Rows are read, written over the temperature, and read again for their sums.
    assert 0 < cost.bytes_moved - 3 * 4 * ROWS * WIDTH < 4 * WIDTH
    assert 3 <= cost.launches <= 6
    assert 0 < cost.scratch - 4 * ROWS * WIDTH < 4 * WIDTH


def test_what_is_widened_is_scratch():
    narrow = cost_of(ops.log_normalizers, (rows(torch.bfloat16), [1.0]), {})
    assert narrow.scratch >= 4 * ROWS * WIDTH
    assert narrow.launches == cost_of(ops.log_normalizers, (rows(), [1.0]), {}).launches + 1


def test_arguments_keep_their_values_and_terms_may_be_among_them():
    term = SoftmaxTerm(
        temperature=1.0,
        width=WIDTH,
        columns=None,
        log_normalizers=torch.zeros(ROWS),
        totals=torch.ones(ROWS),
        ids=torch.zeros(ROWS, 1, dtype=torch.int64),
        weights=torch.ones(ROWS, 1),
    )
    given, out = rows(), rows()
    one = cost_of(ops.softmax_backward, (given, [term], out), {})
    two = cost_of(ops.softmax_backward, (given, [term, term], out), {})
    assert two.launches > one.launches > 1
    assert two.bytes_moved > one.bytes_moved >= 3 * 4 * ROWS * WIDTH
    assert not out.tensor.any()


def test_a_function_of_rows_costs_what_it_does():
    loss = RowLoss("", lambda student, teacher: (student - teacher).abs().sum(-1))
    forward = cost_of("row_loss", (loss, rows(), rows()), {})
    both = cost_of("row_loss", (loss, rows(), rows()), {"out": rows()})
    assert both.bytes_moved > forward.bytes_moved


def test_a_backend_declares_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(DECLARED, "top_k", lambda given, k: Cost(1, len(given) * k, 0))
    assert cost_of("top_k", (rows(), 5), {}) == (1, 5 * ROWS, 0)


@pytest.mark.parametrize("operator", [torch.ops.aten.add.Tensor, "add_rows", "Rows"])
def test_other_operators_have_no_cost_here(operator: object):
    assert cost_of(operator, (), {}) is None


def test_kernels_declare_a_launch_and_copies_of_what_lies_apart():
    cost = torch.empty(3, 64, 50, device="meta")
    assert ops.kernels_for("sinkhorn", cost) is not None

    def declared(cost: torch.Tensor, iterations: int) -> Cost:
        arguments = (cost, None, None, None, None, 0.1, iterations)
        return cost_of(torch.ops.ctkd.sinkhorn.default, arguments, {})

    few, many = declared(cost, 1), declared(cost, 11)
    assert few.launches == many.launches == 1 and few.scratch == 0
    # An iteration reads the cost and writes a potential of each row and column.
    assert many.bytes_moved - few.bytes_moved == 10 * (cost.nbytes + 4 * 3 * (64 + 50))
    apart = declared(cost.mT.contiguous().mT, 1)
    assert apart.launches == 2 and apart.scratch == cost.nbytes
    assert apart.bytes_moved == few.bytes_moved + 2 * cost.nbytes
