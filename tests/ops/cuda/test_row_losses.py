"""Row losses by Triton kernels, against the reference in float64."""

import pytest
import torch

from ctkd.losses.shared_kl import SharedKL
from ctkd.ops import Rows
from ctkd.ops.cuda import row_losses
from tests.ops.cuda.row_pairs import DTYPES, Tokens, check, logits_of, row_loss_of

by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def with_masked_columns(block):
    block[0, ::3] = -torch.inf
    return block


@by_dtype
def test_shared_kl(dtype):
    kinds = [("forward", "renormalize"), ("forward", "class"), ("reverse", "class")]
    for seed, (direction, rest) in enumerate([*kinds, ("jsd", "renormalize"), ("jsd", "class")]):
        pair = Tokens(9001, 7000, 4000)
        loss = row_loss_of(SharedKL(pair=pair, rest=rest, direction=direction, temperature=1.3))
        student, teacher = logits_of(dtype, 2, 9001, seed), logits_of(dtype, 2, 7000, 10 + seed)
        with_masked_columns(student)
        with_masked_columns(teacher.flip(0))
        check(row_losses.shared_kl, loss, student, teacher)


def test_shared_kl_of_no_rows_of_one_column_and_of_large_logits():
    loss = row_loss_of(SharedKL(pair=Tokens(1, 1, 1), direction="jsd"))
    empty = Rows(torch.empty(0, 1), None, 1)
    assert row_losses.shared_kl(empty, empty, loss.settings, None, empty).values.shape == (0, 1)
    one = torch.tensor([[1e30], [-torch.inf]])
    assert (check(row_losses.shared_kl, loss, one, one.flip(0)) == 0).all()
    large = logits_of(torch.float32, 2, 50, 0, scale=1e30)
    for rest in ("renormalize", "class"):
        loss = row_loss_of(SharedKL(pair=Tokens(50, 50, 20), direction="reverse", rest=rest))
        check(row_losses.shared_kl, loss, large, large.flip(1))


def test_shared_kl_of_equal_rows_is_0():
    ids = torch.arange(300)
    for direction in ("forward", "reverse", "jsd"):
        loss = row_loss_of(SharedKL(pair=Tokens(500, 500, 300), direction=direction))
        loss.settings.update(student_ids=ids, teacher_ids=ids)
        rows = Rows(logits_of(torch.bfloat16, 2, 500, 0), None, 500)
        out = Rows(torch.empty(2, 500, dtype=torch.bfloat16), None, 500)
        values = row_losses.shared_kl(rows, rows, loss.settings, None, out).values
        assert (values == 0).all() and (out.tensor == 0).all()
