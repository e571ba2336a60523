"""What reads rows runs as it is inside what is compiled."""

import pytest
import torch

import ctkd
from ctkd.batch import Batch
from ctkd.dense_logits import DenseLogits
from ctkd.errors import BatchError
from ctkd.testing import make_inputs
from ctkd.tracing import not_traced

# The compiler looks for gradients of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

LOGITS = torch.linspace(-1.0, 1.0, 24).view(2, 3, 4)
QUESTIONS = {
    "sorted_probs": lambda logits: logits.sorted_probs(2),
    "log_probs": lambda logits: logits.log_probs(torch.tensor([[[1]], [[3]]])),
    "log_mass": lambda logits: logits.log_mass(torch.tensor([True, False, True, False])),
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_questions_may_be_asked_in_a_compiled_function(ask, dtype):
    found = []
    for call in (ask, torch.compile(lambda logits: 2.0 * ask(logits) / 2.0, backend="aot_eager")):
        tensor = LOGITS.to(dtype).requires_grad_()
        answer = call(DenseLogits(tensor))
        (gradient,) = torch.autograd.grad(answer.square().sum(), tensor)
        found.append((answer, gradient))
    torch.testing.assert_close(found[1], found[0])


def test_a_function_that_is_not_traced_is_never_seen_by_a_compiler():
    seen = []

    @not_traced
    def inner(tensor):
        seen.append(torch.compiler.is_compiling())
        return 2 * tensor

    compiled = torch.compile(lambda tensor: inner(tensor + 1) - 1, backend="aot_eager")
    assert compiled(torch.ones(())).item() == 3.0
    assert inner(torch.ones(())).item() == 2.0
    assert seen == [False, False]


def test_what_a_function_refuses_it_refuses_in_a_compiled_one():
    ask = torch.compile(lambda logits: logits.sorted_probs(5), backend="aot_eager")
    with pytest.raises(BatchError, match="the largest 5 entries"):
        ask(DenseLogits(LOGITS))


def test_a_whole_step_may_be_compiled():
    inputs = make_inputs(dtype=torch.float32)
    loss = ctkd.get_loss("uld")

    def step(logits):
        return loss(Batch.from_causal_lm(**{**inputs, "student_logits": 1.0 * logits})).value

    values = []
    for call in (step, torch.compile(step, backend="aot_eager")):
        logits = inputs["student_logits"].clone().requires_grad_()
        value = call(logits)
        value.backward()
        values.append((value.detach(), logits.grad))
    torch.testing.assert_close(values[1], values[0])
