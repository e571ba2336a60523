"""Universal logit distillation: match sorted probabilities, position by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch
from ctkd.chunks import PAIRINGS, PositionPairs, pair_positions
from ctkd.dense_logits import DenseLogits
from ctkd.loss import (
    Loss,
    LossOutput,
    Paper,
    Weights,
    average,
    check_choice,
    check_count,
    check_positive,
    masked_sum,
)
from ctkd.pair_solvers import CompiledSolver, PairArrays, RowSolution, RowSolver
from ctkd.powers import Workspace
from ctkd.registry import register
from ctkd.row_pairs import solve_row_pairs
from ctkd.rows import LOG2_E
from ctkd.sorting import ranked_l1
from ctkd.top_k_logits import TopKLogits

__all__ = ["ULD", "sorted_l1"]


def sorted_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Distance between two distributions over different vocabularies.

    .. math:: \sum_k |p_{(k)} - q_{(k)}|, \quad p_{(1)} \ge p_{(2)} \ge \dots

    The shorter vocabulary is padded with zeros. Sorting the logits sorts the probabilities.

    Shape:
        (N, V) and (N, W) give (N,), each value in [0, 2].

    Example:
        >>> sorted_l1(torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.5, 0.5, 0.0]]).log())
        tensor([0.6000])
    """
    student, teacher = (
        logits.sort(dim=-1, descending=True, stable=True).values.softmax(-1)
        for logits in (student_logits, teacher_logits)
    )
    size = max(student.shape[-1], teacher.shape[-1])
    student = F.pad(student, (0, size - student.shape[-1]))
    teacher = F.pad(teacher, (0, size - teacher.shape[-1]))
    return (student - teacher).abs().sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Solver:
    r"""`sorted_l1` and its gradient.

    With g the sign of the difference at the rank of each column, the gradient is
    :math:`p_v (g_v - \sum_u g_u p_u) / \tau`.
    """

    student_temperature: float
    teacher_temperature: float
    workspace: Workspace

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        per_pair: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        teacher_probs = _probs("teacher", teacher_logits, self.teacher_temperature, self.workspace)
        return _solution(student_logits, teacher_probs, self.student_temperature, self.workspace)


@dataclass(frozen=True, slots=True, eq=False)
class _StoredSolver:
    """What `_Solver` does for a stored teacher: probabilities, and in each pair's numbers its tail.

    Args:
        student_temperature: Divides the student's logits.
        width: W.
        workspace: For temporary rows.
    """

    student_temperature: float
    width: int
    workspace: Workspace

    def __call__(
        self,
        student_logits: Tensor,
        teacher_probs: Tensor,
        per_pair: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        if per_pair is None:
            raise TypeError("a stored teacher's rows need the tail of each pair")
        place = torch.arange(self.width, device=teacher_probs.device)
        tail = per_pair[:, :1] * (place < per_pair[:, 1:])
        probs = torch.cat([teacher_probs, tail.to(teacher_probs.dtype)], dim=-1)
        return _solution(student_logits, probs, self.student_temperature, self.workspace)


def _solution(
    student_logits: Tensor, teacher_probs: Tensor, temperature: float, workspace: Workspace
) -> RowSolution:
    probs = _probs("student", student_logits, temperature, workspace)
    room = workspace.rows("signed", student_logits, student_logits.shape[1])
    values, signed = ranked_l1(probs, teacher_probs, out=room)
    mean_sign = signed.sum(-1, keepdim=True)
    gradient = signed.addcmul_(probs, mean_sign, value=-1.0)
    return RowSolution(values, gradient.div_(temperature))


def _probs(name: str, logits: Tensor, temperature: float, workspace: Workspace) -> Tensor:
    room = workspace.rows(name, logits, logits.shape[1])
    scale = LOG2_E / temperature
    torch.add(logits.amax(-1, keepdim=True) * -scale, logits, alpha=scale, out=room).exp2_()
    # The same in any order of the columns, so that a teacher's equal stays equal.
    return room.div_(room.sum(-1, keepdim=True, dtype=torch.float64).to(room.dtype))


def _compiled_solver(
    sizes: tuple[int, int], student_temperature: float, teacher_temperature: float
) -> CompiledSolver:
    """What `_Solver` does, by compiled loops, for V and W columns."""
    student_columns, teacher_columns = (np.arange(size, dtype=np.uint32) for size in sizes)

    def solve(pairs: PairArrays, some: slice) -> None:
        from ctkd.kernels.pair_rows import put_uld

        put_uld(
            *pairs.student,
            *pairs.teacher,
            some.start,
            some.stop,
            student_columns,
            teacher_columns,
            float(student_temperature),
            float(teacher_temperature),
            pairs.per_pair,
            pairs.answers,
            *pairs.gradients,
        )

    return solve


@register("uld")
class ULD(Loss):
    r"""Compares the k-th scored student position with the k-th scored teacher position.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b \sum_{i \le \min(S_b, T_b)} \sum_k
            |p_{b,i,(k)} - q_{b,i,(k)}|

    p and q are the two models' probabilities, each sorted in descending order, the narrower one
    padded with zeros: the optimal transport distance under a uniform cost.

    Shape:
        Student (B, S, V), teacher (B, T, W). Positions past min(S, T) add 0 and are counted.

    Args:
        student_temperature: Divides the student's logits, above 0.
        teacher_temperature: Divides the teacher's logits, above 0.
        top_k: Compare only the k largest probabilities of each side. What is left out at a
            position is at most the probability that both sides hold beyond their top k:
            (1 - top-k mass of p) + (1 - top-k mass of q). Default: the whole vocabulary.
        pairing: ``"position"`` pairs the k-th scored positions, as in the paper; ``"chunk"`` the
            positions at which both models have read the same bytes.

    Raises:
        SettingError: If a temperature is not above 0, ``top_k`` is below 1, or there is no such
            pairing.
        BatchError: If chunks are to be paired and the batch has none.

    Example:
        One position, p = (0.8, 0.2) and q = (0.5, 0.5): 0.3 + 0.3.

        >>> import ctkd, torch
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.2, 0.8], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     teacher_logits=torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 0]]),
        ... )
        >>> ctkd.get_loss("uld")(batch).value
        tensor(0.6000)

    Stored teacher:
        Needs the largest entries of each row. What a row has beside the stored ones is shared
        evenly by its other columns, which changes the sum of a pair of positions by at most twice
        that probability. With ``top_k`` nothing is lost where that many are stored, and a cache of
        fewer is refused.
        `benchmarks/teacher_cache.py` prints the error as a function of k.

    Differs from the paper:
        The authors' code averages over min(S, T) and then over sequences; here the sum is divided
        by the student's scored tokens, so that micro-batches add up.

    References:
        Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
        Loss for LLMs", arXiv:2402.12030, section 3, closed form of the Wasserstein distance.
        Restated in arXiv:2412.14528, eqs. 2-6.
    """

    paper = Paper(
        "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        "2402.12030",
        "closed form of W1, sec. 3",
    )
    matches = "sorted probabilities, position by position"
    unit = "position"
    teacher_needs = "top_k"
    default_weights = Weights(ce=1.0, kd=1.5)

    def __init__(
        self,
        *,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        top_k: int | None = None,
        pairing: str = "position",
    ) -> None:
        super().__init__()
        check_positive("student_temperature", student_temperature)
        check_positive("teacher_temperature", teacher_temperature)
        if top_k is not None:
            check_count("top_k", top_k)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.top_k = top_k
        check_choice("pairing", pairing, PAIRINGS)
        self.pairing = pairing
        if pairing == "chunk":
            self.needs = frozenset({"chunks"})

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    def forward(self, batch: Batch) -> LossOutput:
        pairs = pair_positions(batch, self.pairing)
        if self.top_k is None:
            values = self._all(batch, pairs)
        else:
            values = self._top(batch, pairs, self.top_k)
        return average({"uld": masked_sum(values, pairs.valid)}, self.units(batch))

    def _all(self, batch: Batch, pairs: PositionPairs) -> Tensor:
        student, teacher = batch.student.logits, batch.teacher.logits
        temperatures = self.student_temperature, self.teacher_temperature
        workspace, rows, tails = Workspace(), pairs.rows(batch), None
        solver: RowSolver = _Solver(*temperatures, workspace)
        if isinstance(teacher, TopKLogits):
            # What is not stored is one probability many times.
            solver = _StoredSolver(self.student_temperature, teacher.shape[2], workspace)
            probs, tail_prob, tail_count = teacher.probs_and_tail(self.teacher_temperature)
            tails = torch.stack([tail_prob, tail_count.to(tail_prob.dtype)], -1).flatten(0, 1)
            if tails.shape[0]:
                tails = tails[rows[:, 1].clamp_min(0)]
            else:
                tails = tails.new_zeros((rows.shape[0], 2))
            teacher = DenseLogits(probs, mask=teacher.mask)
        sizes = student.shape[2], teacher.shape[2]
        distances, _ = solve_row_pairs(
            student,
            teacher,
            rows,
            solver,
            compiled=lambda: _compiled_solver(sizes, *temperatures),
            per_pair=tails,
            teacher_temperature=self.teacher_temperature,
        )
        workspace.release()
        return distances.view(pairs.valid.shape)

    def _top(self, batch: Batch, pairs: PositionPairs, k: int) -> Tensor:
        student, teacher = batch.student.logits, batch.teacher.logits
        student_k, teacher_k = (min(k, side.shape[2]) for side in (student, teacher))
        size = max(student_k, teacher_k)
        student_probs = student.sorted_probs(student_k, temperature=self.student_temperature)
        teacher_probs = teacher.sorted_probs(teacher_k, temperature=self.teacher_temperature)
        student_probs = F.pad(pairs.of_student(student_probs), (0, size - student_k))
        teacher_probs = F.pad(pairs.of_teacher(teacher_probs).detach(), (0, size - teacher_k))
        return (student_probs - teacher_probs).abs().sum(-1)

    def extra_repr(self) -> str:
        return (
            f"student_temperature={self.student_temperature}, "
            f"teacher_temperature={self.teacher_temperature}, top_k={self.top_k}, "
            f"pairing={self.pairing!r}"
        )
