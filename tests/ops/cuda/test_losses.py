"""Every loss with its rows read by kernels, against the same loss by the reference."""

import pytest
import torch

from ctkd import ops
from ctkd.batch import Batch
from ctkd.ops import use_backend
from ctkd.ops.cuda import row_losses
from ctkd.registry import get_loss, list_losses
from ctkd.testing import make_inputs, make_pair

# Those that count narrow values also in bfloat16, of which rows are tested by themselves.
CASES = [(name, torch.float32) for name in list_losses()]
CASES += [(name, torch.bfloat16) for name in ("uld", "gold", "shared_kl", "alm")]

# A mass of nothing has a log of minus infinity, of which a device makes no word.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def short_scans(monkeypatch):
    """The interpreter goes through these entry by entry."""
    monkeypatch.setattr(row_losses, "_ENTRIES", 16)


def results(loss, inputs, dtype):
    """Value, parts and gradients of a loss and cross-entropy, which share one backward pass."""
    inputs = {
        name: value.to(dtype) if name.endswith(("logits", "hidden")) else value
        for name, value in inputs.items()
    }
    logits = inputs.pop("student_logits").clone().requires_grad_()
    batch = Batch.from_causal_lm(student_logits=logits, **inputs)
    output = loss(batch)
    side = batch.student
    entropy = -side.logits.log_probs(side.token_ids.unsqueeze(-1)).sum() / side.mask.sum()
    (output.value + entropy).backward()
    parts = [output.parts[name].float() for name in sorted(output.parts)]
    return [output.value.detach().float(), entropy.detach().float(), *parts], logits.grad


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_kernels_give_what_the_reference_gives(name, dtype):
    loss = get_loss(name, pair=make_pair())
    answers = []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            answers.append(results(loss, make_inputs(), dtype))
    (found, gradient), (expected, other) = answers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Rounded twice where a known gradient is added to, and cut off by the interpreter.
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-6
    scale = max(1e-3, other.float().abs().max().item())
    torch.testing.assert_close(gradient, other, rtol=rounding, atol=rounding * scale)


def test_the_choice_of_backend_is_told():
    rows = ops.Rows(torch.zeros(2, 3), None, 3)
    with use_backend("cuda"):
        assert ops.backend_for("top_k", rows).__name__ == "ctkd.ops.cuda"
        assert not ops.can_inspect(rows.tensor)
    assert ops.can_inspect(rows.tensor)
