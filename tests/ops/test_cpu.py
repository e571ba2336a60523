"""Kernels for a CPU against the reference, operation by operation, wherever rows lie."""

import pytest
import torch
from torch import Tensor

import ctkd
from ctkd import ops
from ctkd.batch import Batch
from ctkd.errors import BatchError
from ctkd.logits import TopK, TopKLogits
from ctkd.ops import RowLoss, Rows, SoftmaxTerm, backend_for, use_backend
from ctkd.testing import make_inputs, make_pair
from tests.ops.torch_threads import torch_threads
from tests.rounding import rounding

cpu = pytest.importorskip("ctkd.ops.cpu", exc_type=ImportError)

N, V, W = 6, 70, 55
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
# Of a tensor of 3 sequences of 4 rows; the last of them is a row that nobody names.
INDEX = torch.tensor([9, -1, 0, 3, -1, 5])


@pytest.fixture(autouse=True)
def shared_out(monkeypatch):
    """However few entries there are, threads share them."""
    monkeypatch.setattr(cpu, "_LEAST_SHARED", 0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(values: Tensor, index: Tensor | None) -> Tensor:
    return values


def cut(values: Tensor, index: Tensor | None) -> Tensor:
    """The same columns of wider rows."""
    return torch.nn.functional.pad(values, (4, 9), value=50.0)[..., 4:-9]


def transposed(values: Tensor, index: Tensor | None) -> Tensor:
    """Sequences inside."""
    return values.transpose(0, 1).contiguous().transpose(0, 1)


def garbage(values: Tensor, index: Tensor | None) -> Tensor:
    """What nobody names is no number."""
    named = torch.zeros(values.shape[:-1].numel(), dtype=torch.bool)
    if index is None:
        return values
    named[index[index >= 0]] = True
    return values.masked_fill(~named.view(*values.shape[:-1], 1), torch.nan)


LAYOUTS = (plain, cut, transposed, garbage)


def make_rows(layout, dtype: torch.dtype, width: int, seed: int = 0) -> Rows:
    """N rows, of which two are none; without an index where they are all of a tensor."""
    extra = 5 if layout is cut else 0
    values = (3.0 * randn(3, 4, width + extra, seed=seed)).to(dtype)
    return Rows(layout(values, INDEX), INDEX, width)


def both(function, operation: str, *rows: Rows):
    """What the kernels answer, and what the reference answers."""
    assert backend_for(operation, *rows).__name__ == "ctkd.ops.cpu"
    answer = function()
    with use_backend("reference"):
        assert backend_for(operation, *rows) is ops.reference
        return answer, function()


def agree(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = V,
    scale: float = 0.0,
) -> None:
    """Equal but for the rounding of sums in float32, and of one result in a narrower dtype.

    Args:
        scale: Of terms that may cancel; at least that of the result.
    """
    relative = rounding(torch.float32, width)
    scale = max(scale, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(
        actual,
        expected,
        rtol=max(relative, float(torch.finfo(dtype).eps)),
        atol=relative * scale,
    )


def out_rows(layout, dtype: torch.dtype, width: int) -> Rows:
    """Where a gradient goes: one row more than can be named, and more columns than count."""
    return Rows(torch.full((13, width), 7.0, dtype=dtype), INDEX, width)


def check_out(written: Rows, expected: Rows, dtype: torch.dtype, scale: float = 0.0) -> None:
    named = INDEX[INDEX >= 0]
    agree(written.tensor[named].float(), expected.tensor[named].float(), dtype, scale=scale)
    others = torch.ones(12, dtype=torch.bool).index_fill(0, named, False)
    # What is written for -1 goes to the last row.
    assert (written.tensor[:12][others] == 7.0).all()


@DTYPES
def test_statistics(dtype):
    for layout in LAYOUTS:
        check_statistics(make_rows(layout, dtype, V))


def check_statistics(rows: Rows) -> None:
    real, columns = INDEX >= 0, torch.arange(V) % 3 == 1
    for standardize, chosen in ((False, None), (True, None), (False, columns)):
        answers = both(
            lambda s=standardize, c=chosen: ops.log_normalizers(
                rows, [1.0, 0.5, 3.0], standardize=s, columns=c
            ),
            "log_normalizers",
            rows,
        )
        size = (3, 2, N) if standardize else (3, N)
        assert answers[0].shape == size and answers[0].dtype == torch.float32
        agree(*(answer[..., real] for answer in answers))


@DTYPES
def test_column_mass(dtype):
    for layout in LAYOUTS:
        check_column_mass(make_rows(layout, dtype, V))


def check_column_mass(rows: Rows) -> None:
    # Nothing of the second sequence is scored, and the last has no row.
    real, sequence = INDEX >= 0, torch.tensor([0, 1, 2, 2, 2, 2])
    for standardize in (False, True):
        (mass, normalizers), (expected, others) = both(
            lambda s=standardize: ops.column_mass(rows, sequence, 4, [2.0, 0.5], standardize=s),
            "column_mass",
            rows,
        )
        agree(mass, expected)
        assert not mass[1].any() and not mass[3].any() and mass[0].all()
        agree(normalizers[..., real], others[..., real])


@DTYPES
def test_top_k(dtype):
    for layout in LAYOUTS:
        check_top_k(make_rows(layout, dtype, V))


def check_top_k(rows: Rows) -> None:
    real = INDEX >= 0
    for k in (0, 1, 7, V):
        (ids, values), (expected, others) = both(lambda k=k: ops.top_k(rows, k), "top_k", rows)
        assert torch.equal(ids[real], expected[real])
        assert torch.equal(values[real], others[real])
        assert not ids[~real].any() and not values[~real].any()


def terms_of(rows: Rows, *settings: tuple[float, bool, int, Tensor | None]) -> list[SoftmaxTerm]:
    """A term for each temperature, scale, width and set of columns."""
    terms = []
    for number, (temperature, standardize, width, columns) in enumerate(settings):
        narrow = Rows(rows.tensor, rows.index, width)
        with use_backend("reference"):
            (normalizers,) = ops.log_normalizers(
                narrow, [temperature], standardize=standardize, columns=columns
            )
        ids = torch.randint(width, (N, 3), generator=torch.Generator().manual_seed(number))
        ids[:, 2] = ids[:, 0]
        weights = randn(N, 3, seed=number + 20)
        # A row that this term knows nothing of.
        if number == 0:
            normalizers[..., 2] = torch.inf
        weights[2] *= number != 0
        terms.append(
            SoftmaxTerm(
                temperature=temperature,
                width=width,
                columns=columns,
                log_normalizers=normalizers,
                totals=weights.sum(-1) * 0.7,
                ids=ids,
                weights=weights,
            )
        )
    return terms


SOME = torch.arange(V) % 3 == 1
TERMS = {
    "one": [(1.3, False, V, None)],
    # Some are half of another, and one is not.
    "squares": [(one, False, V, None) for one in (2.0, 1.0, 0.5, 0.3)],
    "standardized": [(0.7, True, V, None), (1.4, True, V, None)],
    "restricted": [(1.0, False, V, SOME), (1.0, False, V, None), (2.0, False, V, SOME)],
    "narrower": [(2.0, False, V - 9, None), (1.0, False, V, None), (1.0, True, V - 9, None)],
    "none": [],
}


@pytest.mark.parametrize("case", TERMS)
@DTYPES
def test_softmax_backward(case, dtype):
    layout = {"one": cut, "squares": transposed, "restricted": garbage}.get(case, plain)
    rows = make_rows(layout, dtype, V)
    # The reference is told of the same garbage.
    terms = terms_of(rows, *TERMS[case])

    def run() -> Rows:
        out = out_rows(layout, dtype, V + 3)
        ops.softmax_backward(rows, terms, out)
        return out

    written, expected = both(run, "softmax_backward", rows)
    check_out(written, expected, dtype)
    assert not written.tensor[INDEX[INDEX >= 0], V:].any()


@pytest.mark.parametrize("in_place", [False, True])
@DTYPES
def test_a_known_gradient_is_weighed(dtype, in_place):
    rows = make_rows(plain, dtype, V)
    terms, weights = terms_of(rows, (1.0, False, V, None)), randn(N, seed=3)
    weights[0] = 0.0

    def run() -> Rows:
        out = out_rows(plain, dtype, V)
        known = randn(13, V, seed=4).to(dtype)
        # A weight of 0 ignores even what is no number.
        known[INDEX[0]] = torch.nan
        source = Rows(known, INDEX, V)
        if in_place:
            out.tensor[INDEX] = known[INDEX]
            source = out
        ops.softmax_backward(rows, terms, out, known=source, weights=weights)
        return out

    check_out(*both(run, "softmax_backward", rows), dtype)


@DTYPES
def test_a_gradient_may_replace_the_rows(dtype):
    rows = make_rows(plain, dtype, V)
    terms = terms_of(rows, (1.0, False, V, None))

    def run() -> Tensor:
        tensor = rows.tensor.view(12, V).clone()
        index = torch.tensor([9, 11, 0, 3, 10, 5])
        ops.softmax_backward(Rows(tensor, index, V), terms, Rows(tensor, index, V))
        return tensor

    found, expected = both(run, "softmax_backward", rows)
    agree(found.float(), expected.float(), dtype)


def row_loss_of(monkeypatch, name: str, settings: dict) -> RowLoss:
    """The function and the settings that a loss hands over."""
    asked = []
    original = ops.row_loss
    with monkeypatch.context() as patched:
        patched.setattr(
            ops,
            "row_loss",
            lambda loss, *rest, **named: asked.append(loss) or original(loss, *rest, **named),
        )
        size = make_pair(V, W)
        inputs = make_inputs(dtype=torch.float32)
        for side, width in (("student", V), ("teacher", W)):
            inputs[f"{side}_logits"] = randn(*inputs[f"{side}_labels"].shape, width)
        inputs["student_vocab_size"] = None
        stored = settings.pop("stored", False)
        batch = Batch.from_causal_lm(**inputs)
        if stored:
            teacher = batch.teacher
            kept = TopK.of(teacher.logits, teacher.token_ids, 8, [1.0])
            side = ctkd.Side(
                logits=TopKLogits(kept, mask=teacher.mask),
                token_ids=teacher.token_ids,
                mask=teacher.mask,
            )
            batch = Batch(student=batch.student, teacher=side)
        ctkd.get_loss(name, pair=size, **settings)(batch)
    return asked[0]


LOSSES = {
    "uld": ("uld", {"student_temperature": 0.8, "teacher_temperature": 2.0}),
    "uld of a stored teacher": ("uld", {"stored": True}),
    "gold": ("gold", {}),
    "gold with scales": ("gold", {"merging": "observed", "beta": 0.3, "teacher_temperature": 0.9}),
    "matched gold": ("gold", {"merging": "bayesian", "matched_weight": 1, "unmatched_weight": 0}),
    "unmatched gold": ("gold", {"beta": 1.0, "matched_weight": 0, "unmatched_weight": 2}),
    "renormalized": ("shared_kl", {"rest": "renormalize", "temperature": 1.4}),
    "class": ("shared_kl", {"rest": "class", "direction": "reverse", "temperature": 0.7}),
    "prefixes": ("bpm", {"rest": "renormalize", "temperature": 1.4}),
    "prefixes and a rest": ("bpm", {"temperature": 0.7}),
}


@pytest.mark.parametrize("case", LOSSES)
@DTYPES
def test_row_losses(case, dtype, monkeypatch):
    name, settings = LOSSES[case]
    loss = row_loss_of(monkeypatch, name, dict(settings))
    layout = {"uld": cut, "gold": transposed, "class": garbage}.get(case, plain)
    student, per_row = make_rows(layout, dtype, V), None
    teacher = make_rows(plain, dtype, W, seed=1)
    if "stored" in case:
        probs = teacher.tensor.float().softmax(-1)[..., :9].to(dtype)
        teacher = Rows(probs, INDEX, 9)
        per_row = torch.stack([torch.full((N,), 1e-3), torch.tensor([46.0, 0, 3, 46, 1, 0])], -1)
    if name == "bpm":
        # At the beginning of a teacher token, and inside one.
        entries = loss.settings["student_ids"]
        end = W if loss.settings["has_rest"] else int((entries[:W] < V).sum())
        per_row = torch.tensor([[0, end], [W, len(entries)]] * (N // 2))
    if "scales" in case or "bayesian" in settings.values():
        per_row = randn(N, 2, seed=6) - 1.0
    differentiate = per_row is not None and name == "gold"

    def run():
        out = out_rows(layout, dtype, V + 3)
        answer = ops.row_loss(loss, student, teacher, per_row, out, differentiate=differentiate)
        values = ops.row_loss(loss, student, teacher, per_row).values
        torch.testing.assert_close(values, answer.values, rtol=0, atol=0)
        return answer, out

    (answer, out), (expected, wanted) = both(run, name, student, teacher)
    assert answer.values.shape == (N, loss.parts)
    assert not answer.values[INDEX < 0].any() and expected.values[INDEX >= 0].any()
    agree(answer.values, expected.values)
    # Probabilities that are weighed, from which their weighed mean is taken.
    largest = student.read()[INDEX >= 0].softmax(-1).max()
    check_out(out, wanted, dtype, scale=float(largest))
    assert not out.tensor[INDEX[INDEX >= 0], V:].any()
    assert (answer.per_row_gradient is None) == (expected.per_row_gradient is None)
    assert (answer.per_row_gradient is None) == (not differentiate)
    if answer.per_row_gradient is not None:
        # Only the student's numbers are differentiated by a kernel.
        agree(answer.per_row_gradient[:, 0], expected.per_row_gradient[:, 0])


@pytest.mark.parametrize("largest", [1e2, 1e3, 1e5, 1e30])
@pytest.mark.parametrize("standardize", [False, True])
def test_the_gradient_of_large_logits(largest, standardize):
    rows = Rows(largest * randn(4, V), None, V)
    gradients = []
    for name in ("cpu", "reference"):
        out = torch.zeros(4, V)
        with use_backend(name):
            normalizers = ops.log_normalizers(rows, [1.0], standardize=standardize)[0]
            term = SoftmaxTerm(
                temperature=1.0, width=V, columns=None,
                log_normalizers=normalizers, totals=torch.ones(4),
                ids=torch.zeros(4, 1, dtype=torch.int64), weights=torch.ones(4, 1),
            )  # fmt: skip
            ops.softmax_backward(rows, [term], Rows(out, None, V))
        gradients.append(out)
    scale = 1.0 / largest if standardize else 1.0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6 * scale)


def test_another_default_device_changes_nothing(monkeypatch):
    loss = ctkd.get_loss("uld")
    batch = Batch.from_causal_lm(**make_inputs(dtype=torch.float32))
    expected = loss(batch).value
    torch.set_default_device("meta")
    try:
        assert torch.equal(loss(batch).value, expected)
    finally:
        torch.set_default_device(None)


def test_no_rows_at_all():
    for rows in (
        Rows(torch.zeros(0, 5), None, 5),
        Rows(torch.zeros(2, 0, 5), torch.zeros(0, dtype=torch.int64), 5),
        Rows(torch.zeros(2, 3, 5), torch.zeros(0, dtype=torch.int64), 5),
        Rows(torch.zeros(2, 3, 5), torch.full((3,), -1), 5),
        Rows(torch.zeros(2, 0, 5), torch.full((3,), -1), 5),
    ):
        for threads in (1, 2):
            with torch_threads(threads):
                check_no_rows(rows)


def check_no_rows(rows: Rows) -> None:
    count = len(rows)
    sequence = torch.zeros(count, dtype=torch.int64)

    temperatures = {"student_temperature": 1.0, "teacher_temperature": 1.0}
    loss = RowLoss("uld", lambda student, _: student.sum(-1), settings=temperatures)

    def run():
        return (
            ops.log_normalizers(rows, [1.0, 2.0]),
            *ops.column_mass(rows, sequence, 2, [1.0]),
            *ops.top_k(rows, 2),
            ops.row_loss(loss, rows, rows).values,
        )

    for answer, expected in zip(*both(run, "top_k", rows), strict=True):
        assert torch.equal(answer, expected)


def test_a_row_of_one_column_may_have_any_stride():
    tensor = torch.arange(6.0).view(3, 2)[:, :1]
    answer, _ = both(lambda: ops.top_k(Rows(tensor, None, 1), 1), "top_k", Rows(tensor, None, 1))
    assert answer[1].flatten().tolist() == [0.0, 2.0, 4.0]


def test_columns_that_do_not_exist_are_refused_before_anything_is_written():
    rows = make_rows(plain, torch.float32, V)
    (term,) = terms_of(rows, (1.0, False, V - 9, None))
    term.ids[1, 1] = V - 9
    out = out_rows(plain, torch.float32, V)
    with pytest.raises(BatchError, match=f"to {V - 9}, but the logits have {V - 9} columns"):
        ops.softmax_backward(rows, [term], out)
    assert (out.tensor == 7.0).all()


def test_a_row_that_is_no_number_costs_nobody_else_anything():
    logits = randn(1, 3, 20, seed=7)
    rows = torch.arange(3)
    expected = ops.log_normalizers(Rows(logits, rows, 20), [1.0])
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = logits.clone()
        spoiled[0, 1] = value
        answer = ops.log_normalizers(Rows(spoiled, rows, 20), [1.0])
        assert not answer[0, 1].isfinite()
        assert torch.equal(answer[0, [0, 2]], expected[0, [0, 2]])
        ids, _ = ops.top_k(Rows(spoiled, rows, 20), 20)
        assert torch.equal(ids.sort(-1).values, torch.arange(20).expand(3, -1))


def test_sums_over_many_rows_of_many_sequences():
    logits, sequence = 3.0 * randn(60, V), torch.arange(5).repeat_interleave(12)
    rows = Rows(logits, None, V)
    (mass, _), (expected, _) = both(
        lambda: ops.column_mass(rows, sequence, 5, [2.0]), "column_mass", rows
    )
    agree(mass, expected, width=V + 12)


def test_rows_beyond_the_largest_32_bit_number():
    columns, row = 1 << 16, (1 << 15) + 2
    # Memory of which three rows are ever touched.
    tensor = torch.empty(row + 1, columns, dtype=torch.bfloat16)
    index = torch.tensor([row, -1, 3])
    tensor[index] = 0.0
    tensor[row, 7] = 2.0
    rows = Rows(tensor, index, columns)
    ids, values = ops.top_k(rows, 2)
    assert ids.tolist() == [[7, 0], [0, 0], [0, 1]] and values[0].tolist() == [2.0, 0.0]
    weights = torch.ones(3, 1)
    (normalizers,) = ops.log_normalizers(rows, [1.0])
    term = SoftmaxTerm(
        temperature=1.0,
        width=columns,
        columns=None,
        log_normalizers=normalizers,
        totals=weights[:, 0],
        ids=ids[:, :1],
        weights=weights,
    )
    ops.softmax_backward(rows, [term], rows)
    assert tensor[row, 7] == 1.0 and tensor[row, 6] < 0.0
    assert tensor[3, 0] == 1.0 and tensor[3, 6] < 0.0
