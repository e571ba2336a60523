"""Divergence on the tokens that both vocabularies have, where both have read the same bytes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.chunks import chunk_pairs, chunks_on_both_sides
from ctkd.compiled import as_columns
from ctkd.divergences import LOG_FLOOR, divergence_terms
from ctkd.errors import SettingError
from ctkd.loss import Loss, LossOutput, Paper, Weights, average, check_choice, check_positive
from ctkd.pair import Pair, check_sizes
from ctkd.powers import LOG_2, Powers, Workspace, powers_of_two
from ctkd.registry import register
from ctkd.row_pairs import CompiledSolver, PairArrays, RowSolution, RowSolver, solve_row_pairs

__all__ = [
    "SharedKL",
    "columns_outside",
    "shared_log_probs",
    "take_columns",
]

# `jsd` with this weight of the teacher.
_BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}

# The log of a sum of nothing but zeros has no gradient. This is as good as minus infinity; being a
# power of two, it is scaled without rounding, so that rows of nothing else are still even.
_LOWEST_LOGIT = -(2.0**100)

# Far below that: stands in columns that are no class, so that they take no part in a softmax.
_NO_CLASS = -3e38


def columns_outside(ids: Tensor, size: int) -> Tensor:
    """Columns of a vocabulary that are not among some ids, ascending.

    Example:
        >>> columns_outside(torch.tensor([3, 0]), 5)
        tensor([1, 2, 4])
    """
    outside = torch.ones(size, dtype=torch.bool)
    outside[ids] = False
    return outside.nonzero().squeeze(-1)


def take_columns(rows: Tensor, ids: Tensor) -> Tensor:
    """Columns (N, M) of rows (N, V), the same for every row."""
    return rows.gather(1, ids.expand(rows.shape[0], -1))


def shared_log_probs(logits: Tensor, shared: Tensor, others: Tensor | None) -> Tensor:
    r"""Log-probabilities of the shared tokens and of "any other token" as one more class.

    .. math:: \log s_i = x_i - \log \sum_j e^{x_j}, \quad \log s_{rest} = \log
        \sum_{j \notin M} e^{x_j} - \log \sum_j e^{x_j}

    Without ``others`` the first sum goes over the shared tokens alone.

    Shape:
        (N, V) gives (N, M + 1), or (N, M) without ``others``.

    Args:
        logits: Rows of one model.
        shared: Columns of the shared tokens, (M,).
        others: All other columns, (V - M,).

    Example:
        >>> logits = torch.tensor([[0.2, 0.2, 0.6]]).log()
        >>> shared_log_probs(logits, torch.tensor([2, 0]), torch.tensor([1])).exp()
        tensor([[0.6000, 0.2000, 0.2000]])
        >>> shared_log_probs(logits, torch.tensor([2, 0]), None).exp()
        tensor([[0.7500, 0.2500]])
    """
    logits = logits.clamp_min(_LOWEST_LOGIT)
    classes = take_columns(logits, shared)
    if others is not None:
        rest = take_columns(logits, others).logsumexp(-1, keepdim=True)
        classes = torch.cat([classes, rest], dim=-1)
    return classes.log_softmax(-1)


class _Columns(NamedTuple):
    """Where the classes of both sides are; the student's order of columns is that of both.

    Attributes:
        sources: Teacher column of each student column, (V,), any where it is no shared token.
        lowest: Least logit in each student column, (V,).
        highest: Largest logit in each student column, (V,).
        student_others: Columns of the class of the rest, if there is one.
        teacher_others: The same on the other side.
    """

    sources: Tensor
    lowest: Tensor
    highest: Tensor
    student_others: Tensor | None
    teacher_others: Tensor | None


class _Classes(NamedTuple):
    """Probabilities of one side: of shared tokens in their columns, and of the rest.

    Attributes:
        exponents: (N, V), so that log p = ``LOG_2 * exponents + offset``.
        offset: (N, 1) float64.
        probs: (N, V), 0 in columns that are no class.
        log_rest: (N, 1) float64.
        rest: Powers of the columns of the rest.
    """

    exponents: Tensor
    offset: Tensor
    probs: Tensor
    log_rest: Tensor | None
    rest: Powers | None


def _classes(
    logits: Tensor,
    others: Tensor | None,
    columns: _Columns,
    temperature: float,
    room: tuple[Tensor, Tensor],
) -> _Classes:
    # One pass; a mask would take many times as long on a CPU.
    logits = torch.clamp(logits, columns.lowest, columns.highest, out=room[0])
    shared = powers_of_two(logits, temperature, exponents=logits, powers=room[1])
    offset = -shared.log_total
    log_rest = rest = None
    if others is not None:
        others = others.clamp_min_(_LOWEST_LOGIT)
        rest = powers_of_two(others, temperature, exponents=others)
        log_shared, log_rest = shared.log_normaliser, rest.log_normaliser
        normaliser = torch.logaddexp(log_shared, log_rest)
        # Low enough for `LOG_FLOOR` to have the last word, high enough not to swamp exponents.
        offset += (log_shared - normaliser).clamp_min_(2 * LOG_FLOOR)
        log_rest = (log_rest - normaliser).clamp_min_(LOG_FLOOR)
    probs = shared.powers.mul_(offset.exp().to(logits.dtype))
    floor = ((LOG_FLOOR - offset) / LOG_2).to(logits.dtype)
    exponents = torch.maximum(shared.exponents, floor, out=shared.exponents)
    return _Classes(exponents, offset, probs, log_rest, rest)


@dataclass(frozen=True, slots=True, eq=False)
class _Solver:
    """`jsd` between `shared_log_probs` of both sides, and its gradient."""

    columns: _Columns
    beta: float
    temperature: float
    workspace: Workspace

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        per_pair: Tensor | None,
        with_gradient: bool,
    ) -> RowSolution:
        student, teacher = self._sides(student_logits, teacher_logits)
        difference = (student.offset - teacher.offset).to(student_logits.dtype)
        gap = student.exponents.sub_(teacher.exponents)
        gap = torch.add(difference, gap, alpha=LOG_2, out=gap)
        spare = None
        if 0 < self.beta < 1:
            spare = teacher.exponents, self._room("term", student_logits)
        term, other_term = divergence_terms(
            gap, student.probs, teacher.probs, self.beta, spare=spare
        )
        total = term.sum(-1, keepdim=True).double()
        values = total + other_term.sum(-1, keepdim=True)
        rest_change = None
        if student.log_rest is not None and teacher.log_rest is not None:
            rest_prob = student.log_rest.exp()
            rest_term, other_term = divergence_terms(
                student.log_rest - teacher.log_rest, rest_prob, teacher.log_rest.exp(), self.beta
            )
            total, values = total + rest_term, values + rest_term + other_term
            rest_change = rest_term - rest_prob * total
        if not with_gradient:
            return RowSolution(values)
        # The terms are derivatives with respect to log-probabilities, of which the sum is fixed.
        gradient = term.addcmul_(student.probs, -total.to(term.dtype))
        if rest_change is not None:
            self._add_rest_(gradient, student, rest_change)
        if self.temperature != 1.0:
            gradient.div_(self.temperature)
        # Where a logit was cut off it has no influence.
        if gradient.device.type != "cpu" or bool(student_logits.amin() < _LOWEST_LOGIT):
            gradient.masked_fill_(student_logits < _LOWEST_LOGIT, 0.0)
        return RowSolution(values, gradient)

    def _sides(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[_Classes, _Classes]:
        columns = self.columns
        carried = self._room("teacher", student_logits)
        index = columns.sources.expand(teacher_logits.shape[0], -1)
        torch.gather(teacher_logits, 1, index, out=carried)
        student, teacher = (
            _classes(
                logits,
                None if others is None else take_columns(raw, others),
                columns,
                self.temperature,
                (room, self._room(f"{side} probs", student_logits)),
            )
            for side, logits, raw, others, room in (
                (
                    "student",
                    student_logits,
                    student_logits,
                    columns.student_others,
                    self._room("student", student_logits),
                ),
                ("teacher", carried, teacher_logits, columns.teacher_others, carried),
            )
        )
        return student, teacher

    def _add_rest_(self, gradient: Tensor, student: _Classes, change: Tensor) -> None:
        if student.rest is not None and self.columns.student_others is not None:
            share = (change / student.rest.total).to(gradient.dtype)
            within = student.rest.powers.mul_(share)
            gradient.scatter_(1, self.columns.student_others.expand_as(within), within)

    def _room(self, name: str, block: Tensor) -> Tensor:
        return self.workspace.rows(name, block, block.shape[1])


@register("shared_kl")
class SharedKL(Loss):
    r"""Compares the probabilities of shared tokens at the first position of each chunk.

    .. math::
        L = \frac{1}{C} \sum_c D(t_c, s_c), \quad
        D = \sum_{i \in M} t_{c,i} \log \frac{t_{c,i}}{s_{c,i}}

    M holds the tokens that both vocabularies have, as equal bytes or an equal role, and C counts
    the chunks that both sides have. At the first token of a chunk both models have read the same
    bytes, so t and s answer one question. What each model thinks of its other tokens is either
    left out or put into one class.

    Shape:
        Student (B, S, V), teacher (B, T, W), C chunks with an id on both sides. The later
        positions of a chunk of several tokens are not compared.

    Args:
        pair: The two tokenizers.
        rest: ``"renormalise"`` divides both sides by their probability on M: how much the
            student puts on M is left free. ``"class"`` keeps the probabilities and adds one class
            that holds the rest of each side, so that it is matched too. If M is a whole
            vocabulary, a side has no rest, and ``"class"`` is ``"renormalise"``.
        direction: ``"forward"`` is KL(t || s), ``"reverse"`` is KL(s || t), ``"jsd"`` is their
            Jensen-Shannon divergence with beta 0.5.
        temperature: Divides both models' logits, above 0. The value is not multiplied by its
            square.

    Raises:
        SettingError: If a setting lies outside its range, or the vocabularies share no token.
        BatchError: If the batch has no chunks, or a side's logits are not as wide as its
            tokenizer is long.

    Example:
        One chunk, t = (0.5, 0.5) and s = (0.25, 0.75) on the two shared tokens after
        renormalising: 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75).

        >>> import ctkd
        >>> class Tokens(ctkd.pair.PlaceholderPair):
        ...     student_size, teacher_size = 3, 2
        ...     def shared_ids(self):
        ...         return torch.tensor([0, 2]), torch.tensor([1, 0])
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.2, 0.2, 0.6], [0.0, 0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     student_chunk_ids=torch.tensor([[-1, 0]]),
        ...     teacher_logits=torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 0]]),
        ...     teacher_chunk_ids=torch.tensor([[-1, 0]]),
        ... )
        >>> ctkd.get_loss("shared_kl", pair=Tokens())(batch).value
        tensor(0.1438)

    Stored teacher:
        Needs whole rows, and refuses a cache that holds less: a shared token that is not stored
        would get an even share of what is left, however likely it was.

    Differs from the paper:
        SimCT compares at the same positions, but adds to M the multi-token units of the text,
        scored by mean log-probability, and takes the reverse KL on text that the student wrote.
        This is its point of departure, the comparison on shared tokens alone, with the forward KL
        by default; ``direction="reverse"`` is the paper's. ``rest="class"`` is not in it. The
        paper gives no weight of a cross-entropy; 1 and 1 are a neutral choice.

    References:
        Sun et al., "SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy
        Distillation", arXiv:2605.07711, the shared-vocabulary form.
    """

    paper = Paper(
        "SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy Distillation",
        "2605.07711",
        "shared-vocabulary form",
    )
    matches = "probabilities of shared tokens at the start of each chunk"
    unit = "chunk"
    needs = frozenset({"chunks", "pair"})
    default_weights = Weights(ce=1.0, kd=1.0)

    student_ids: Tensor
    teacher_ids: Tensor
    student_others: Tensor
    teacher_others: Tensor
    sources: Tensor

    def __init__(
        self,
        *,
        pair: Pair,
        rest: str = "renormalise",
        direction: str = "forward",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("rest", rest, ("renormalise", "class"))
        check_choice("direction", direction, tuple(_BETAS))
        check_positive("temperature", temperature)
        self.rest = rest
        self.direction = direction
        self.temperature = temperature
        self.student_size = pair.student_size
        self.teacher_size = pair.teacher_size
        student_ids, teacher_ids = pair.shared_ids()
        if not student_ids.shape[0]:
            raise SettingError(
                "shared_kl compares tokens that both vocabularies have, but these tokenizers share "
                "none; use a loss that needs no shared tokens, such as uld or alm"
            )
        # Columns in ascending order are read and written faster.
        order = student_ids.argsort()
        student_ids, teacher_ids = student_ids[order], teacher_ids[order]
        sources = student_ids.new_zeros(pair.student_size)
        sources[student_ids] = teacher_ids
        for name, ids in (
            ("student_ids", student_ids),
            ("teacher_ids", teacher_ids),
            ("student_others", columns_outside(student_ids, pair.student_size)),
            ("teacher_others", columns_outside(teacher_ids, pair.teacher_size)),
            ("sources", sources),
        ):
            self.register_buffer(name, ids, persistent=False)

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.student_size, self.teacher_size)
        dtype, workspace = batch.student.logits.dtype, Workspace()

        @functools.cache
        def general() -> RowSolver:
            return _Solver(
                self._columns(dtype), _BETAS[self.direction], self.temperature, workspace
            )

        values, _ = solve_row_pairs(
            batch.student.logits,
            batch.teacher.logits,
            chunk_pairs(batch),
            lambda *block: general()(*block),
            compiled=self._compiled,
            teacher_temperature=self.temperature,
        )
        workspace.release()
        sums = values.view(batch.student.mask.shape[0], batch.num_chunks).sum(1)
        return average({"shared_kl": sums}, self.units(batch))

    def _columns(self, dtype: torch.dtype) -> _Columns:
        bounds = torch.full(
            (2, self.student_size), _NO_CLASS, dtype=dtype, device=self.student_ids.device
        )
        bounds[0, self.student_ids] = _LOWEST_LOGIT
        bounds[1, self.student_ids] = torch.inf
        return _Columns(self.sources, bounds[0], bounds[1], *self._others())

    def _others(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Columns of the class of the rest of both sides, if there is one."""
        if self.rest == "class" and self.student_others.numel() and self.teacher_others.numel():
            return self.student_others, self.teacher_others
        return None, None

    def _compiled(self) -> CompiledSolver:
        # Made once for all parts of the rows.
        student_ids, teacher_ids, student_others, teacher_others = (
            as_columns(self.student_ids[:0] if one is None else one)
            for one in (self.student_ids, self.teacher_ids, *self._others())
        )

        def solve(pairs: PairArrays, some: slice) -> None:
            from ctkd.kernels.pair_rows import put_shared_kl

            put_shared_kl(
                *pairs.student,
                *pairs.teacher,
                some.start,
                some.stop,
                student_ids,
                teacher_ids,
                student_others,
                teacher_others,
                self.temperature,
                _BETAS[self.direction],
                _LOWEST_LOGIT,
                LOG_FLOOR,
                pairs.answers,
                *pairs.gradients,
                self.student_size,
            )

        return solve

    def extra_repr(self) -> str:
        return (
            f"rest={self.rest!r}, direction={self.direction!r}, temperature={self.temperature}, "
            f"shared={self.student_ids.shape[0]}"
        )
