"""Queries inside what is compiled."""

import pytest
import torch

from ctkd.logits import DenseLogits
from tests.logits.cases import DIFFERENTIABLE, B, S, V, in_turn, leaf_of, randn

# The compiler looks for gradients of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch):
    # Only a figure for torch's log, for which each function's caches are emptied.
    guards = "torch._dynamo.guards.profile_guard_manager"
    monkeypatch.setattr(guards, lambda *_: 0.0, raising=False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("query", "dtype"),
    in_turn(
        ["log_probs", "sorted_probs", "log_mass", "uld"], others=[torch.float32, torch.float64]
    ),
)
def test_queries_may_be_made_in_a_compiled_function(query, dtype):
    ask, found = DIFFERENTIABLE[query], []
    for call in (ask, torch.compile(lambda logits: 2.0 * ask(logits) / 2.0, backend="aot_eager")):
        leaf, _ = leaf_of(randn(B, S, V), dtype)
        answer = call(DenseLogits(leaf))
        (gradient,) = torch.autograd.grad(answer.square().sum(), leaf)
        found.append((answer, gradient))
    torch.testing.assert_close(found[1], found[0])
