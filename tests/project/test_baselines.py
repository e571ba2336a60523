"""The float64 oracles against frozen numbers, numbers worked by hand, and scalar arithmetic."""

import ast
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import baselines
from baselines import multilevelot, sinkhorn, uld
from tests.golden.golden_values import (
    MATCHINGS,
    gradient_norm,
    load,
    paper_case,
    unequal_case,
    unequal_values,
)

PAPER = load("multilevelot_paper")["cases"]
UNEQUAL = load("multilevelot_unequal")["cases"]
PAPER_RUNS = [
    pytest.param(case["case"], name, values, id=f"{case['case']['seed']}-{name}")
    for case in PAPER
    for name, values in case["values"].items()
    if name in ("sum", "greedy")
]
by_lengths = pytest.mark.parametrize("case", UNEQUAL, ids=lambda case: case["case"]["name"])
LOSSES = (multilevelot.loss, uld.loss, uld.loss_by_transport)
by_matching = pytest.mark.parametrize("matching", MATCHINGS)


def close(actual: object, expected: object, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=0)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape) * scale)


def test_the_oracles_do_not_import_the_package() -> None:
    for path in Path(next(iter(baselines.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "ctkd"], path


# Sinkhorn


@pytest.mark.parametrize("with_masses", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 2), (1, 3)])
def test_plan_agrees_with_loops(shape: tuple[int, int], with_masses: bool) -> None:
    cost = normal(1, *shape).abs().requires_grad_()
    masses = [normal(2 + i, size).exp() if with_masses else None for i, size in enumerate(shape)]
    for iterations in (1, 2, 20):
        plan = sinkhorn.plan(cost, 0.3, iterations, *masses)
        loops = sinkhorn.plan_by_loops(cost, 0.3, iterations, *masses)
        torch.testing.assert_close(plan, loops, rtol=1e-12, atol=1e-15)
        columns = torch.ones(shape[1], dtype=torch.float64) if masses[1] is None else masses[1]
        torch.testing.assert_close(plan.sum(0), columns, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad((p * cost).sum(), cost)[0] for p in (plan, loops)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


def test_plan_gives_nothing_to_a_row_without_mass() -> None:
    cost = normal(3, 3, 4).abs()
    row_mass = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    plan = sinkhorn.plan(cost, 0.3, 5, row_mass)
    assert plan[1].eq(0).all()
    smaller = sinkhorn.plan_by_loops(cost[[0, 2]], 0.3, 5, row_mass[[0, 2]])
    torch.testing.assert_close(plan[[0, 2]], smaller, rtol=1e-12, atol=0)


def test_emd_moves_the_mass_at_least_cost() -> None:
    cost = torch.tensor([[1.0, 2.0], [3.0, 10.0]], dtype=torch.float64, requires_grad=True)
    row_mass = torch.tensor([2.0, 1.0], dtype=torch.float64)
    column_mass = torch.tensor([1.5, 1.5], dtype=torch.float64)
    value = sinkhorn.emd(cost, row_mass, column_mass)
    close(value.item(), 0.5 * 1 + 1.5 * 2 + 1 * 3)
    value.backward()
    close(cost.grad, [[0.5, 1.5], [1.0, 0.0]])


def test_plan_wants_a_round() -> None:
    for function in (sinkhorn.plan, sinkhorn.plan_by_loops):
        with pytest.raises(ValueError, match="at least 1"):
            function(torch.ones(2, 2), 0.1, 0)


# MultiLevelOT, paper form


@pytest.mark.parametrize(("case", "name", "values"), PAPER_RUNS)
def test_paper_form_against_golden(case: dict, name: str, values: dict) -> None:
    student, teacher = paper_case(case)
    student.requires_grad_()
    matching = "mass" if name == "sum" else name
    settings = {"k": case["k"], "matching": matching, "regularization": case["lam"]}
    teacher_columns, student_columns = multilevelot.match(
        student.softmax(1), teacher.softmax(1), k=case["k"], matching=matching
    )
    assert teacher_columns[:8] == values["teacher_dims_first8"]
    assert student_columns[:8] == values["student_dims_first8"]
    cost = multilevelot.sequence_cost(
        (teacher / 2).softmax(1)[:, teacher_columns], (student / 2).softmax(1)[:, student_columns]
    )
    close(cost[0].detach(), values["C_first_row"])
    # The file names this entry after 20 rounds; it was taken after the last N of L_SD_by_N, 50.
    row_sums = sinkhorn.plan(cost, case["lam"], 50).sum(1)
    assert (row_sums - 1).abs().max().item() == pytest.approx(
        values["P20_row_sums_minus1_max"], rel=1e-6, abs=1e-14
    )

    terms = multilevelot.terms([student], [teacher], **settings)
    close(terms["had"].item(), values["L_HAD"])
    close(terms["sl"].item(), values["L_SL"])
    for rounds, expected in values["L_SD_by_N"].items():
        sd = multilevelot.terms([student], [teacher], iterations=int(rounds), **settings)["sd"]
        close(sd.item(), expected)
    value, count = multilevelot.loss([student], [teacher], **settings)
    assert count == case["T"]
    close(value.item() * count, values["L_HAD+0.1*L_SL+0.1*L_SD(N=20)"])
    parts = {"had": terms["had"], "sl": terms["sl"], "sd20": terms["sd"], "kd": value * count}
    for part, expected in values["grad_norm"].items():
        close(gradient_norm(parts[part], [student]), expected)


def test_the_paper_assignment_without_values_meets_padding() -> None:
    student, teacher = paper_case(PAPER[0]["case"])
    probs = student.softmax(1), teacher.softmax(1)
    assert None in multilevelot.match(*probs, k=50, matching="assignment")[1]


def test_the_paper_assignment_of_one_token_against_golden() -> None:
    values = PAPER[1]["values"]["assignment"]
    student, teacher = paper_case(PAPER[1]["case"])
    student.requires_grad_()
    probs = student.softmax(1), teacher.softmax(1)
    teacher_columns, student_columns = multilevelot.match(*probs, k=10, matching="assignment")
    assert teacher_columns[:8] == values["teacher_dims_first8"]
    # With one token the optimum is not unique. The golden one pairs the same ten columns otherwise;
    # of its last two, which the file leaves out, only this order gives its L_SL.
    golden_columns = values["student_dims_first8"] + [15, 69]
    assert sorted(student_columns) == sorted(golden_columns)
    had = multilevelot.terms([student], [teacher], k=10, matching="assignment")["had"]
    close(had.item(), values["L_HAD"])
    close(gradient_norm(had, [student]), values["grad_norm"]["had"])
    sl = multilevelot.cross_entropy(
        probs[1][:, teacher_columns], student.log_softmax(1), golden_columns
    )
    close(sl.item(), values["L_SL"])
    close(gradient_norm(sl, [student]), values["grad_norm"]["sl"])
    cost = multilevelot.sequence_cost(
        (teacher / 2).softmax(1)[:, teacher_columns], (student / 2).softmax(1)[:, golden_columns]
    )
    sd = (sinkhorn.plan(cost, 0.1, 20) * cost).sum()
    close(sd.item(), values["L_SD_by_N"]["20"])
    close(gradient_norm(sd, [student]), values["grad_norm"]["sd20"])
    kd = had + 0.1 * sl + 0.1 * sd
    close(kd.item(), values["L_HAD+0.1*L_SL+0.1*L_SD(N=20)"])
    close(gradient_norm(kd, [student]), values["grad_norm"]["kd"])


def scalar_terms(
    student: list, teacher: list, columns: tuple, temperatures: tuple, lam: float, rounds: int
) -> list[float]:
    """Equations (13) to (20) for one sequence with the columns given, on Python floats."""

    def softmax(row: list[float], temperature: float) -> list[float]:
        weights = [math.exp(x / temperature) for x in row]
        return [weight / sum(weights) for weight in weights]

    def kept(rows: list, ids: list, temperature: float) -> list[list[float]]:
        probs = [softmax(row, temperature) for row in rows]
        return [[0.0 if j is None else row[j] for j in ids] for row in probs]

    had = sl = 0.0
    pairs = list(range(min(len(student), len(teacher))))
    t, s = kept(teacher, columns[0], temperatures[0]), kept(student, columns[1], temperatures[0])
    for x in pairs:
        had += sum(abs(t[x][i] - s[x][i]) for i in range(len(columns[0])))
    t, s = kept(teacher, columns[0], temperatures[1]), kept(student, columns[1], temperatures[1])
    for x in pairs:
        sl -= sum(t[x][i] * math.log(s[x][i]) for i in range(len(columns[0])) if s[x][i] > 0)
    t, s = kept(teacher, columns[0], temperatures[2]), kept(student, columns[1], temperatures[2])
    cost = [[sum(abs(a - b) for a, b in zip(x, y, strict=True)) for y in s] for x in t]
    plan = [[math.exp(-cell / lam) for cell in row] for row in cost]
    for _ in range(rounds):
        plan = [[cell / sum(row) for cell in row] for row in plan]
        sums = [sum(row[j] for row in plan) for j in range(len(s))]
        plan = [[cell / sums[j] for j, cell in enumerate(row)] for row in plan]
    sd = sum(plan[i][j] * cost[i][j] for i in range(len(t)) for j in range(len(s)))
    return [had, sl, sd]


@by_matching
@by_lengths
def test_unequal_lengths_against_golden(case: dict, matching: str) -> None:
    expected, actual = case["values"][matching], unequal_values(case["case"], matching)
    for key in ("teacher_columns", "student_columns", "count"):
        assert actual[key] == expected[key]
    close(actual["loss"], expected["loss"])
    for key in ("terms", "grad_norm"):
        assert actual[key].keys() == expected[key].keys()
        close(list(actual[key].values()), list(expected[key].values()))
    assert [where for where, _ in actual["grad_entries_kd"]] == [
        where for where, _ in expected["grad_entries_kd"]
    ]
    close(
        [value for _, value in actual["grad_entries_kd"]],
        [value for _, value in expected["grad_entries_kd"]],
    )


@by_matching
@by_lengths
def test_frozen_matchings_do_not_hang_on_rounding(case: dict, matching: str) -> None:
    expected, sizes = case["values"][matching], case["case"]
    for seed in range(3):
        for b, rows in enumerate(zip(*unequal_case(sizes), strict=True)):
            probs = [(x + normal(seed, *x.shape, scale=1e-7)).softmax(1) for x in rows]
            columns = multilevelot.match(
                *probs, k=sizes["k"], matching=matching, candidates=sizes["candidates"]
            )
            assert columns == (expected["teacher_columns"][b], expected["student_columns"][b])


@by_matching
@by_lengths
def test_unequal_lengths_against_scalar_arithmetic(case: dict, matching: str) -> None:
    student, teacher = unequal_case(case["case"])
    expected = case["values"][matching]
    columns = list(zip(expected["teacher_columns"], expected["student_columns"], strict=True))
    rows = [[x.tolist() for x in side] for side in (student, teacher)]
    scalars = [
        scalar_terms(rows[0][b], rows[1][b], columns[b], (1.0, 1.0, 2.0), 0.1, 20) for b in (0, 1)
    ]
    close(np.sum(scalars, axis=0), [expected["terms"][name] for name in ("had", "sl", "sd")])


def test_every_setting_against_scalar_arithmetic() -> None:
    student, teacher = normal(5, 4, 9), normal(6, 3, 7)
    probs = (student / 1.3).softmax(1), (teacher / 1.3).softmax(1)
    columns = multilevelot.match(*probs, k=5, matching="greedy")
    terms = multilevelot.terms(
        [student],
        [teacher],
        k=5,
        temperature=1.3,
        sl_temperature=0.7,
        sd_temperature=3.0,
        regularization=0.2,
        iterations=3,
        matching="greedy",
    )
    expected = scalar_terms(student.tolist(), teacher.tolist(), columns, (1.3, 0.7, 3.0), 0.2, 3)
    close([terms[name].item() for name in ("had", "sl", "sd")], expected)


def rows_of(*probs: list[float]) -> Tensor:
    """Logits whose softmax at temperature 1 is the given probabilities."""
    return torch.tensor(probs, dtype=torch.float64).log()


def test_example_worked_by_hand() -> None:
    # Teacher mass (1.2, 0.8), student mass (0.75, 1.25): teacher columns 0, 1 meet student 1, 0.
    teacher = rows_of([0.8, 0.2], [0.4, 0.6])
    student = rows_of([0.25, 0.75], [0.5, 0.5])
    at_one = {"sd_temperature": 1.0, "matching": "mass"}
    terms = multilevelot.terms([student], [teacher], **at_one)
    close(terms["had"].item(), 2 * 0.05 + 2 * 0.1)
    close(terms["sl"].item(), -0.8 * math.log(0.75) - 0.2 * math.log(0.25) - math.log(0.5))
    # One teacher token: every column is one cell, scaled to 1, so all costs are paid in full.
    one = multilevelot.terms([student], [teacher[:1]], **at_one)
    close(one["sd"].item(), 2 * 0.05 + 2 * 0.3)
    # One student token: the rows are scaled to 1 first, then both to a half.
    one = multilevelot.terms([student[:1]], [teacher], **at_one)
    close(one["sd"].item(), (2 * 0.05 + 2 * 0.35) / 2)
    value, count = multilevelot.loss(
        [student], [teacher], had_weight=2.0, sl_weight=0.0, sd_weight=0.0
    )
    assert count == 2
    close(value.item(), 2 * 0.3 / 2)


def test_greedy_takes_what_is_nearest_and_left() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    student = torch.tensor([[0.31, 0.36, 0.18, 0.15]], dtype=torch.float64)
    # 0.5 takes 0.36; 0.3 takes 0.31; 0.2 takes 0.18.
    assert multilevelot.match(student, teacher, k=3, matching="greedy") == ([0, 1, 2], [1, 0, 2])
    # The first 0.34 takes 0.33, the second 0.37; 0.32, which 0.33 would suit as well, gets 0.2.
    teacher = torch.tensor([[0.34, 0.34, 0.32]], dtype=torch.float64)
    student = torch.tensor([[0.1, 0.33, 0.2, 0.37]], dtype=torch.float64)
    assert multilevelot.match(student, teacher, k=3, matching="greedy") == ([0, 1, 2], [1, 3, 2])


@by_matching
def test_ties_go_to_the_lower_id(matching: str) -> None:
    even = torch.full((3, 37), 1 / 37, dtype=torch.float64)
    matched = multilevelot.match(even, even[:, :30], k=5, matching=matching)
    assert matched[0] == [0, 1, 2, 3, 4]
    if matching in ("mass", "greedy"):
        assert matched[1] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("width", "teacher_width"), [(4, 5), (5, 4), (5, 5)])
def test_assignment_is_the_best_of_all_permutations(width: int, teacher_width: int) -> None:
    student, teacher = normal(7, 3, width).softmax(1), normal(8, 4, teacher_width).softmax(1)
    order = multilevelot.columns_by_mass(teacher)
    ranked = torch.nn.functional.pad(teacher[:3, order], (0, 5 - teacher_width))
    padded = torch.nn.functional.pad(student, (0, 5 - width))
    best = min(
        itertools.permutations(range(5)),
        key=lambda p: (ranked - padded[:, list(p)]).abs().sum().item(),
    )
    expected = [j if j < width else None for j in best][: min(3, width)]
    assert multilevelot.match(student, teacher, k=3, matching="assignment") == (order[:3], expected)


@pytest.mark.parametrize("candidates", [1, 4, 256])
def test_assignment_among_candidates_is_the_best_choice(candidates: int) -> None:
    student, teacher = normal(9, 3, 6).softmax(1), normal(10, 2, 8).softmax(1)
    teacher_columns = multilevelot.columns_by_mass(teacher)[:3]
    heaviest = multilevelot.columns_by_mass(student)[: max(candidates, 3)]
    best = min(
        itertools.permutations(heaviest, 3),
        key=lambda p: (teacher[:, teacher_columns] - student[:2, list(p)]).abs().sum().item(),
    )
    matched = multilevelot.match(
        student, teacher, k=3, matching="assignment_topk", candidates=candidates
    )
    assert matched == (teacher_columns, list(best))


def test_one_token_sorted_by_mass_is_an_optimal_assignment() -> None:
    # Without a cut: any optimum costs the same, while a cut of k columns may tell optima apart.
    student, teacher = normal(11, 1, 30, scale=3), normal(12, 1, 30, scale=3)
    had = [
        multilevelot.terms([student], [teacher], matching=matching)["had"].item()
        for matching in ("mass", "assignment")
    ]
    close(had[0], had[1], rtol=1e-12)
    close(had[0], uld.loss([student], [teacher])[0].item(), rtol=1e-12)


@by_matching
def test_student_equal_to_teacher(matching: str) -> None:
    rows = [normal(13, 4, 30, scale=2), normal(14, 2, 30, scale=2)]
    terms = multilevelot.terms(rows, [x.clone() for x in rows], k=7, matching=matching)
    assert terms["had"].item() == 0
    entropy = 0.0
    for x in rows:
        kept = x.softmax(1)[:, x.softmax(1).sum(0).argsort(descending=True)[:7]]
        entropy -= (kept * kept.log()).sum().item()
    close(terms["sl"].item(), entropy)
    assert terms["sd"].item() > 0.01


def test_a_batch_is_the_sum_of_its_sequences_and_an_empty_side_adds_nothing() -> None:
    student = [normal(15, 3, 8), normal(16, 2, 8), normal(17, 4, 8), normal(18, 0, 8)]
    teacher = [normal(19, 5, 6), normal(20, 2, 6), normal(21, 0, 6), normal(22, 3, 6)]
    student = [rows.requires_grad_() for rows in student]
    whole = multilevelot.terms(student, teacher, k=4)
    single = [multilevelot.terms([student[b]], [teacher[b]], k=4) for b in range(4)]
    for name, term in whole.items():
        close(term.item(), single[0][name].item() + single[1][name].item(), rtol=1e-12)
        assert single[2][name].item() == single[3][name].item() == 0
    for loss in LOSSES:
        assert loss(student, teacher)[1] == 9
        value, count = loss(student[2:], teacher[2:])
        assert (value.item(), count) == (0.0, 4)
        value.backward()
        assert student[2].grad.eq(0).all()


@by_matching
def test_gradient_against_finite_differences(matching: str) -> None:
    student = normal(23, 3, 6).requires_grad_()
    teacher = normal(24, 4, 9)

    def kd(rows: Tensor) -> Tensor:
        return multilevelot.loss([rows], [teacher], k=4, matching=matching, sd_weight=1.0)[0]

    assert torch.autograd.gradcheck(kd, (student,), fast_mode=True)


def test_mistakes_are_named() -> None:
    rows = [normal(25, 2, 4)]
    with pytest.raises(ValueError, match="matching must be"):
        multilevelot.terms(rows, rows, matching="sum")
    for loss in LOSSES:
        with pytest.raises(ValueError, match="1 student sequences against 2"):
            loss(rows, rows + rows)
