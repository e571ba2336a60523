"""Frozen numbers of `tests/golden`, and the inputs they belong to.

Run as a module, it writes `multilevelot_unequal.json` anew.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIRECTORY = Path(__file__).parent
MATCHINGS = ("mass", "greedy", "assignment", "assignment_topk")
UNEQUAL_ABOUT = {
    "what": "Values of baselines/multilevelot.py (float64) on sequences whose lengths differ "
    "between student and teacher. kd = had + 0.1 sl + 0.1 sd, the sum; loss = kd / count.",
    "recipe": "rs=RandomState(seed); for S in student_lengths: rs.standard_normal((S,V))*scale "
    "FIRST, one draw per sequence; then for T in teacher_lengths: rs.standard_normal((T,W))*scale",
    "gradients": "of kd with respect to the student's logits; norms run over all sequences; an "
    "entry is [[sequence, position, column], value]",
}
UNEQUAL_CASES: list[dict[str, Any]] = [
    {
        "name": "wider_student",
        "seed": 41,
        "student_lengths": [12, 9],
        "teacher_lengths": [10, 13],
        "V": 26,
        "W": 20,
        "k": 8,
        "candidates": 12,
        "scale": 3.0,
    },
    {
        "name": "wider_teacher",
        "seed": 42,
        "student_lengths": [10, 14],
        "teacher_lengths": [13, 9],
        "V": 16,
        "W": 40,
        "k": 10,
        "candidates": 12,
        "scale": 3.0,
    },
]


def load(name: str) -> dict[str, Any]:
    """Contents of the golden file ``name``, given without its suffix."""
    contents: dict[str, Any] = json.loads((DIRECTORY / f"{name}.json").read_text())
    return contents


def paper_case(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Student (T, n) and teacher (T, m) logits of a case of `multilevelot_paper.json`."""
    rs = np.random.RandomState(case["seed"])
    student = rs.standard_normal((case["T"], case["n"])) * case["scale"]
    teacher = rs.standard_normal((case["T"], case["m"])) * case["scale"]
    return torch.from_numpy(student), torch.from_numpy(teacher)


def released_case(
    case: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits and labels, teacher logits and labels of `multilevelot_released.json`."""
    rs = np.random.RandomState(case["seed"])
    sides = (case["student"], case["teacher"])
    batch = len(case["student"]["prefix"])
    logits = [
        torch.from_numpy(rs.standard_normal((batch, side["seq"], side["vocab"])) * case["scale"])
        for side in sides
    ]
    labels = []
    for side in sides:
        ids = np.full((batch, side["seq"]), -100, dtype=np.int64)
        for b, (prefix, size) in enumerate(zip(side["prefix"], side["size"], strict=True)):
            ids[b, prefix : prefix + size] = rs.randint(0, side["vocab"], size=size)
        labels.append(torch.from_numpy(ids))
    return logits[0].to(dtype), labels[0], logits[1].to(dtype), labels[1]


def released_settings(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the as-published losses that belong to a released case."""
    names = ("student_temperature", "teacher_temperature", "skip_student_eos", "skip_teacher_eos")
    return {name: case[name] for name in names}


def entries_of(tensor: Tensor, entries: list[Any]) -> tuple[list[float], list[float]]:
    """Actual and expected values of golden entries, which are [[indices], value]."""
    if not entries:
        raise ValueError("a golden list of entries is empty")
    return [tensor[tuple(where)].item() for where, _ in entries], [value for _, value in entries]


def unequal_case(case: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher rows, one tensor per sequence, of `multilevelot_unequal.json`."""
    rs = np.random.RandomState(case["seed"])
    student, teacher = (
        [torch.from_numpy(rs.standard_normal((n, width)) * case["scale"]) for n in lengths]
        for lengths, width in (
            (case["student_lengths"], case["V"]),
            (case["teacher_lengths"], case["W"]),
        )
    )
    return student, teacher


def gradient_norm(value: Tensor, leaves: list[Tensor]) -> float:
    """Euclidean norm of the gradient over all leaves together; the graph is kept."""
    gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def unequal_values(case: dict[str, Any], matching: str) -> dict[str, Any]:
    """What the oracle says about one case: terms, columns, gradient norms and entries."""
    from baselines import multilevelot

    student, teacher = unequal_case(case)
    student = [rows.requires_grad_() for rows in student]
    settings = {"k": case["k"], "matching": matching, "candidates": case["candidates"]}
    terms = multilevelot.terms(student, teacher, **settings)
    parts = {**terms, "kd": terms["had"] + 0.1 * terms["sl"] + 0.1 * terms["sd"]}
    columns = [
        multilevelot.match(rows.softmax(1), other.softmax(1), **settings)
        for rows, other in zip(student, teacher, strict=True)
    ]
    gradients = torch.autograd.grad(parts["kd"], student, retain_graph=True)
    entries = [
        [[b, position, column], gradients[b][position, column].item()]
        for b, rows in enumerate(student)
        for position in (0, len(rows) - 1)
        for column in (0, 1, case["V"] // 2, case["V"] - 1)
    ]
    value, count = multilevelot.loss(student, teacher, **settings)
    return {
        "terms": {name: part.item() for name, part in parts.items()},
        "loss": value.item(),
        "count": count,
        "teacher_columns": [teacher_columns for teacher_columns, _ in columns],
        "student_columns": [student_columns for _, student_columns in columns],
        "grad_norm": {name: gradient_norm(part, student) for name, part in parts.items()},
        "grad_entries_kd": entries,
    }


def record_unequal() -> None:
    """Write `multilevelot_unequal.json`."""
    cases = [
        {"case": case, "values": {name: unequal_values(case, name) for name in MATCHINGS}}
        for case in UNEQUAL_CASES
    ]
    text = json.dumps({"_about": UNEQUAL_ABOUT, "cases": cases}, indent=1)
    (DIRECTORY / "multilevelot_unequal.json").write_text(text + "\n")


if __name__ == "__main__":
    record_unequal()
