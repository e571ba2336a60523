"""Rows of raw logits, of a tensor or of a model's head, and the one backward pass over them.

The backward pass of a query leaves a pending gradient, which is small: chosen entries and their
weights, or one weight per row. The rows themselves hang on an anchor, which autograd runs once all
queries of it have run in a pass. It works through the rows once and fulfills all of them, so that
cross-entropy and a loss of many terms cost one reading of the rows and one gradient of their size.
Passes are told apart, because they may run inside each other or in several threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from ctkd import ops
from ctkd.logits.base import Logits
from ctkd.ops import RowLoss, Rows, SoftmaxTerm, Which

__all__ = [
    "HeadRows",
    "Pending",
    "PendingRowLoss",
    "RowSource",
    "TensorRows",
    "anchored",
    "file_pending",
    "version_of",
]

# The number of the backward pass that is running in this thread.
_backward_pass: Callable[[], int] = torch._C._current_graph_task_id

_WriteGradient: TypeAlias = Callable[[Which, Rows, Rows], None]
"""Which rows of an index, their logits, and where their gradient goes; both may be the same."""


def version_of(tensors: Iterable[Tensor]) -> int | None:
    """A number that changes when one of them is written to; None where that cannot be seen."""
    if any(map(Tensor.is_inference, tensors)):
        return None
    versions: Iterable[int] = map(attrgetter("_version"), tensors)
    return sum(versions)


class _KnownNormalizers:
    """Log-normalizers of the rows of a source, kept until the rows change.

    One for each softmax: temperature, whether standardized, columns. Where values may be inspected,
    they are known by row; elsewhere rows are known if something was kept for this very index, as a
    table of all rows would cost several launches a look.

    Args:
        source: The rows.
        version: Of the source.
    """

    def __init__(self, source: RowSource, version: int | None) -> None:
        self.version = version
        self._size = source.num_rows + 1
        self._by_row = ops.can_inspect(source.inputs[0])
        # A number for each row, and one more for -1; nan where it is unknown.
        self._tables: dict[Any, Tensor] = {}
        # By identity of an index: the index, and the normalizers of its rows.
        self._kept: dict[int, tuple[Tensor, dict[Any, Tensor]]] = {}

    def look_up(
        self, index: Tensor, temperatures: Sequence[float], standardize: bool, width: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """`ctkd.ops.log_normalizers` of rows (N,), nan where unknown; and the rows that lack them.

        These are an index (N,), -1 for the others, or None. The former are None if none is known.
        """
        keys = list(zip(temperatures, repeat(standardize), repeat(width), strict=False))
        if not self._by_row:
            _, kept = self._kept.get(id(index), (index, {}))
            if not kept.keys() >= set(keys):
                return None, index
            answers = list(map(kept.__getitem__, keys))
            return answers[0].unsqueeze(0) if len(answers) == 1 else torch.stack(answers), None
        found = self._tables.keys() & set(keys)
        if not found:
            return None, index
        unknown = torch.full_like(self._tables[found.pop()], torch.nan)
        known = torch.stack(list(map(self._tables.get, keys, repeat(unknown))))[..., index]
        missing = known.isnan().flatten(0, -2).any(0).logical_and_(index >= 0)
        return known, index.masked_fill(~missing, -1) if missing.any() else None

    def keep(
        self,
        index: Tensor,
        temperatures: Sequence[float],
        standardize: bool,
        width: int,
        values: Tensor,
    ) -> None:
        """Keep `ctkd.ops.log_normalizers` of rows (N,); what is known stays as it is."""
        for temperature, normalizers in zip(temperatures, values.unbind(), strict=True):
            key = temperature, standardize, width
            if not self._by_row:
                self._kept.setdefault(id(index), (index, {}))[1].setdefault(key, normalizers)
                continue
            if key not in self._tables:
                size = *normalizers.shape[:-1], self._size
                self._tables[key] = normalizers.new_full(size, torch.nan)
            table = self._tables[key]
            known = table[..., index]
            table[..., index] = torch.where(known.isnan(), normalizers, known)


class RowSource(ABC):
    """B * L rows of V' raw logits, known by one number b * L + i; -1 is no row.

    Attributes:
        shape: (B, L, V').
        dtype: Of statistics, float64 or float32.
        num_rows: B * L.
        device: Of all tensors.
        inputs: The tensors that gradients flow into.
        anchor: What represents the rows in the autograd graph, see `anchored`.
    """

    def __init__(self, shape: tuple[int, int, int], *inputs: Tensor) -> None:
        self.shape, self.inputs, self.device = shape, inputs, inputs[0].device
        self.dtype = ops.statistics_dtype(inputs[0].dtype)
        self.num_rows = shape[0] * shape[1]
        self.anchor = _Anchor(None, {}, None)
        # What is made in inference mode may not be written to later.
        version = None if torch.is_inference_mode_enabled() else version_of(inputs)
        self._normalizers = _KnownNormalizers(self, version)

    def normalizers(self) -> _KnownNormalizers:
        """Log-normalizers of the rows as they are now."""
        version = version_of(self.inputs)
        if version is None or torch.is_inference_mode_enabled():
            # They could be out of date later, or not be written to.
            return _KnownNormalizers(self, None)
        if self._normalizers.version != version:
            self._normalizers = _KnownNormalizers(self, version)
        return self._normalizers

    @abstractmethod
    def chunks(self, index: Tensor, width: int) -> Iterable[tuple[Which, Rows]]:
        """The first columns of rows (N,), as many rows at a time as the source holds.

        A chunk may be overwritten by the next one. Where values may be inspected,
        -1 is left out or a row of index -1; elsewhere it may be any row.
        """

    @abstractmethod
    def chosen_log_probs(
        self,
        index: Tensor,
        ids: Tensor,
        positions: int,
        normalizers: Tensor,
        temperatures: Sequence[float],
    ) -> list[Tensor]:
        """See `ctkd.ops.chosen_log_probs`."""

    def gradient_buffer(self, index: Tensor) -> Tensor | None:
        """Memory for a gradient of all rows, see `ctkd.ops.gradient_rows`; None if that is much."""
        return None

    @abstractmethod
    def backward(
        self, index: Tensor, write: _WriteGradient, buffer: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, from the gradient of each row.

        Args:
            index: (N,) no row twice; all others get no gradient.
            write: Writes the gradient of a chunk.
            buffer: From `gradient_buffer`; it becomes the gradient.
        """


class TensorRows(RowSource):
    """Rows of a tensor.

    Args:
        tensor: (B, L, V').
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__((tensor.shape[0], tensor.shape[1], tensor.shape[2]), tensor)

    def chunks(self, index: Tensor, width: int) -> Iterable[tuple[Which, Rows]]:
        return [(slice(None), Rows(self.inputs[0].detach(), index, width))]

    def chosen_log_probs(
        self,
        index: Tensor,
        ids: Tensor,
        positions: int,
        normalizers: Tensor,
        temperatures: Sequence[float],
    ) -> list[Tensor]:
        rows = Rows(self.inputs[0].detach(), index, self.shape[2])
        return ops.chosen_log_probs(rows, ids, positions, normalizers, temperatures)

    def gradient_buffer(self, index: Tensor) -> Tensor:
        return ops.gradient_rows(self.inputs[0], index)

    def backward(
        self, index: Tensor, write: _WriteGradient, buffer: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient = ops.gradient_rows(self.inputs[0], index) if buffer is None else buffer
        for which, rows in self.chunks(index, self.shape[2]):
            write(which, rows, Rows(gradient, index, self.shape[2]))
        return (gradient[:-1].view(self.shape),)


class HeadRows(RowSource):
    """Rows that a model's head computes of hidden states, when they are read.

    Args:
        hidden: (B, L, H).
        weight: (V', H).
        bias: (V',).
        scale: Multiplies the logits.
        softcap: Bounds them then, by ``softcap * tanh(x / softcap)``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
        super().__init__((hidden.shape[0], hidden.shape[1], weight.shape[0]), *inputs)
        self.bias, self.scale, self.softcap = bias, scale, softcap

    def chunks(self, index: Tensor, width: int) -> Iterator[tuple[Which, Rows]]:
        for which, logits, _ in self._chunks(index):
            yield which, Rows(logits, self._numbers(index[which]), width)

    def _numbers(self, index: Tensor) -> Tensor | None:
        """Rows of a chunk; None where all of them are rows."""
        if ops.can_inspect(index):
            return None
        # What was computed where there is no row must not be taken for one.
        return torch.arange(index.shape[0], device=self.device).masked_fill_(index < 0, -1)

    def chosen_log_probs(
        self,
        index: Tensor,
        ids: Tensor,
        positions: int,
        normalizers: Tensor,
        temperatures: Sequence[float],
    ) -> list[Tensor]:
        entries = self._entries(index.view(ids.shape[0], positions), ids)
        return ops.log_probs_of(entries, index, normalizers, temperatures)

    def _entries(self, index: Tensor, ids: Tensor) -> Tensor:
        """Entries of rows, (B, S) and (B, S or 1, K) give (B, S, K); any where there is no row."""
        shape, answers = (*index.shape, ids.shape[2]), []
        # One product where a sequence's rows share their ids, else a few rows at a time.
        size = ops.head_rows(self.inputs[0].shape[2] * max(ids.shape[2], 1), self.device, 1)
        if ids.shape[1] != 1:
            index, ids = index.view(-1, 1), ids.flatten(0, 1).unsqueeze(1)
        for start in range(0, max(index.shape[0], 1), size):
            some, some_ids = index[start : start + size], ids[start : start + size]
            hidden = self._hidden(some.flatten()).view(*some.shape, self.inputs[0].shape[2])
            with ops.full_precision(self.device):
                logits = torch.bmm(hidden, self._weight(some_ids.squeeze(1)).transpose(1, 2))
            bias = None if self.bias is None else self.bias[some_ids]
            answers.append(self._finished(logits, bias).to(self.dtype))
        return torch.cat(answers).view(shape)

    def gradient_buffer(self, index: Tensor) -> Tensor | None:
        # Not more than the logits of a few rows, which the forward pass holds anyway. Without it
        # the backward pass would work through both sides' rows again.
        width = self.shape[2]
        if self.num_rows > ops.head_rows(width, self.device, 1):
            return None
        return torch.empty((self.num_rows + 1, width), dtype=self.dtype, device=self.device)

    def backward(
        self, index: Tensor, write: _WriteGradient, buffer: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight = self.inputs[:2]
        hidden_gradient = hidden.new_zeros(self.num_rows + 1, hidden.shape[2])
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        bias_gradient = None
        if self.bias is not None and self.bias.requires_grad:
            bias_gradient = torch.zeros_like(self.bias, dtype=self.dtype)
        for which, logits, rows in self._chunks(index):
            if buffer is None:
                self._replace(which, logits, write)
            else:
                self._replace(which, logits, write, Rows(buffer, index[which], self.shape[2]))
            with ops.full_precision(self.device):
                hidden_gradient[index[which]] = logits @ self._weight()
                if weight_gradient is not None:
                    _add_product_(weight_gradient, logits, rows)
            if bias_gradient is not None:
                bias_gradient += logits.sum(0, dtype=self.dtype)
        of_hidden = hidden_gradient[:-1].view(hidden.shape)
        return (of_hidden, weight_gradient, bias_gradient)[: len(self.inputs)]

    def _replace(
        self, which: Which, logits: Tensor, write: _WriteGradient, known: Rows | None = None
    ) -> None:
        """Overwrite logits by the gradient of what the head computes before scale and softcap.

        Args:
            which: Of an index.
            logits: Theirs.
            write: See `RowSource.backward`.
            known: A gradient to which it adds.
        """
        width = self.shape[2]
        if known is None and self.softcap is None and self.scale == 1.0:
            write(which, Rows(logits, None, width), Rows(logits, None, width))
            return
        # Scaled before it is rounded to a narrow dtype.
        numbers = None if known is None or known.index is None else self._numbers(known.index)
        out = known or Rows(torch.empty_like(logits, dtype=self.dtype), None, width)
        write(which, Rows(logits, numbers, width), out)
        gradient = out.read()
        if self.softcap is not None:
            gradient.mul_(1.0 - (logits.to(self.dtype) / self.softcap).square_())
        logits.copy_(gradient.mul_(self.scale))
        if numbers is not None:
            logits.masked_fill_((numbers < 0).unsqueeze(-1), 0.0)

    def _chunks(self, index: Tensor) -> Iterator[tuple[Which, Tensor, Tensor]]:
        """Selections of rows, their logits, which may be overwritten, and hidden states."""
        size = ops.head_rows(self.shape[2], self.device)
        rows = torch.arange(index.shape[0], device=self.device)
        if ops.can_inspect(index):
            rows = rows[index >= 0]
        for start in range(0, rows.shape[0], size):
            which = rows[start : start + size]
            hidden = self._hidden(index[which])
            with ops.full_precision(self.device):
                logits = hidden @ self._weight().t()
            yield which, self._finished(logits, self.bias), hidden

    def _hidden(self, index: Tensor) -> Tensor:
        """Hidden states (N, H), 0 where there is no row: garbage times 0 may be nan."""
        hidden = self.inputs[0].detach()
        if not self.num_rows:
            return hidden.new_zeros(index.shape[0], hidden.shape[2])
        row = index.clamp_min(0)
        rows = hidden[row // self.shape[1], row % self.shape[1]]
        return rows.masked_fill_((index < 0).unsqueeze(-1), 0.0)

    def _weight(self, ids: Tensor | None = None) -> Tensor:
        weight = self.inputs[1].detach()
        return (weight if ids is None else weight[ids]).to(self.inputs[0].dtype)

    def _finished(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            logits += bias.detach().to(logits.dtype)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def _add_product_(weight_gradient: Tensor, rows_gradient: Tensor, hidden: Tensor) -> None:
    """Add the outer product of (n, V') and (n, H) to (V', H)."""
    if weight_gradient.dtype == rows_gradient.dtype:
        weight_gradient.addmm_(rows_gradient.t(), hidden)
        return
    # A product of another dtype needs memory of its own: a part of the vocabulary at a time.
    size = 1 << 14
    for start in range(0, weight_gradient.shape[0], size):
        columns = slice(start, start + size)
        weight_gradient[columns] += rows_gradient[:, columns].t() @ hidden


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingRowLoss:
    """Gradient of a function of whole rows of both sides, times a weight per row.

    Args:
        loss: The function.
        width: Columns of the student.
        teacher: Logits of the other side.
        teacher_index: (N,) positions of the teacher, -1 for none.
        options: Of `Logits.chunks`.
        per_row: (N, E) numbers for the function.
        weights: (N,), known when the backward pass comes.
        buffer: The unweighted gradient of all rows, if the forward pass computed it.
    """

    loss: RowLoss
    width: int
    teacher: Logits
    teacher_index: Tensor
    options: dict[str, Any]
    per_row: Tensor | None = None
    weights: Tensor | None = None
    buffer: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A query's contribution to the gradient of rows.

    Args:
        index: (N,) rows of the source, no row twice, -1 for none.
        terms: Softmaxes of these rows.
        row_loss: A function of whole rows.
    """

    index: Tensor
    terms: tuple[SoftmaxTerm, ...] = ()
    row_loss: PendingRowLoss | None = None


class _Anchor(NamedTuple):
    """Node that represents a source in the autograd graph.

    Attributes:
        tensor: Input of every query.
        pending: By backward pass. What a pass that failed has left there is never read.
        state: Of the source when the anchor was made.
    """

    tensor: Tensor | None
    pending: dict[int, list[Pending]]
    state: Any


def anchored(source: RowSource) -> Tensor | None:
    """The anchor's tensor, of a source as it is now; None if no gradient is wanted."""
    flags = tuple(map(attrgetter("requires_grad"), source.inputs))
    if not (torch.is_grad_enabled() and any(flags)):
        return None
    state = version_of(source.inputs), flags
    if source.anchor.state != state:
        pending: dict[int, list[Pending]] = {}
        tensor = _Rows.apply(ref(source), pending, *source.inputs)  # type: ignore[no-untyped-call]
        source.anchor = _Anchor(tensor, pending, state)
    return source.anchor.tensor


def file_pending(pending: dict[int, list[Pending]], gradient: Pending) -> Tensor:
    """File a query's pending gradient, and return the gradient of the anchor."""
    pending.setdefault(_backward_pass(), []).append(gradient)
    return ops.host_zero()


class _Rows(torch.autograd.Function):
    """All rows of a source as one node, which runs after all queries of a pass."""

    @staticmethod
    def forward(
        ctx: Any, source: ref[RowSource], pending: dict[int, list[Pending]], *inputs: Tensor
    ) -> Tensor:
        # A node that held its source, which holds the node, could never be freed.
        ctx.source, ctx.pending = source, pending
        # For autograd this is a node of the host, which has no stream to come back to.
        ctx.stream = ops.current_stream(inputs[0].device)
        return ops.host_zero()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        filed = ctx.pending.pop(_backward_pass(), None)
        if not filed:
            return (None,) * len(ctx.needs_input_grad)
        # The queries, which are still there, hold it.
        source = ctx.source()
        with torch.no_grad(), ctx.stream():
            gradients = _gradients(source, filed)
        if torch.is_grad_enabled():
            # Autograd would take them for constants, and a second derivative for 0.
            gradients = tuple(
                None if one is None else _Once.apply(one, *source.inputs)  # type: ignore[no-untyped-call]
                for one in gradients
            )
        return None, None, *gradients


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a ctkd loss, or of a query of logits, cannot be differentiated again; "
            "leave out create_graph, or what depends on the gradient's gradient"
        )


def _gradients(source: RowSource, filed: Sequence[Pending]) -> tuple[Tensor | None, ...]:
    """Gradients of a source's inputs."""
    index, filed = _on_one_index(source, filed)
    terms: dict[Any, SoftmaxTerm] = {}
    row_losses = []
    for one in filed:
        for term in one.terms:
            shape = term.log_normalizers.shape
            key = term.temperature, shape, term.width, id(term.columns)
            terms[key] = _sum(terms[key], term) if key in terms else term
        if one.row_loss is not None:
            row_losses.append(one.row_loss)
    gradients = _one_pass(source, index, list(terms.values()), next(iter(row_losses), None))
    # More than one function of whole rows is rare: each gets a pass of its own.
    for row_loss in row_losses[1:]:
        more = _one_pass(source, index, [], row_loss)
        gradients = tuple(
            one if other is None or one is None else one + other
            for one, other in zip(gradients, more, strict=True)
        )
    return gradients


def _one_pass(
    source: RowSource,
    index: Tensor,
    terms: Sequence[SoftmaxTerm],
    row_loss: PendingRowLoss | None,
) -> tuple[Tensor | None, ...]:
    buffer = None if row_loss is None else row_loss.buffer
    weights = None if row_loss is None else row_loss.weights

    def write(which: Which, rows: Rows, out: Rows) -> None:
        known = (None, None) if weights is None else (out, weights[which])
        # Rows with the index itself are all of them.
        some = terms if rows.index is index else _some(terms, which)
        ops.softmax_backward(rows, some, out, *known)

    if row_loss is None or weights is None or buffer is not None:
        return source.backward(index, write, buffer)

    numbers = torch.arange(index.shape[0], device=index.device)
    size = ops.pass_rows(index.device)
    scratch = torch.empty((size, source.shape[2]), dtype=source.dtype, device=index.device)

    def compute(which: Which, rows: Rows, out: Rows) -> None:
        chunk = numbers[which]
        matched = row_loss.teacher_index[chunk] >= 0
        present = torch.arange(len(rows), device=index.device)
        if ops.can_inspect(matched):
            rest, present = (~matched).nonzero().squeeze(-1), matched.nonzero().squeeze(-1)
            ops.softmax_backward(rows[rest], _some(terms, chunk[rest]), out[rest])
        # The teacher's rows as many at a time as it can give, the gradient a few at a time.
        teacher_index = row_loss.teacher_index[chunk[present]]
        for inner, teacher in row_loss.teacher.chunks(teacher_index, **row_loss.options):
            for start in range(0, len(teacher), size):
                part = present[inner][start : start + size]
                some, known = chunk[part], Rows(scratch[: part.shape[0]], None, source.shape[2])
                student = replace(rows[part], width=row_loss.width)
                per_row = None if row_loss.per_row is None else row_loss.per_row[some]
                some_teacher = teacher[start : start + size]
                ops.row_loss(row_loss.loss, student, some_teacher, per_row, known)
                ops.softmax_backward(
                    rows[part], _some(terms, some), out[part], known, weights[some]
                )

    return source.backward(index, compute, None)


def _some(terms: Sequence[SoftmaxTerm], which: Which) -> Sequence[SoftmaxTerm]:
    """Terms of selected rows."""
    return [_mapped(term, lambda values, _: values[which]) for term in terms]


def _mapped(term: SoftmaxTerm, change: Callable[[Tensor, float], Tensor]) -> SoftmaxTerm:
    """A term with its values per row changed; the number is the value for no row."""
    return replace(
        term,
        # A matrix of standardized rows has them in its columns.
        log_normalizers=change(term.log_normalizers.t(), torch.inf).t(),
        totals=change(term.totals, 0.0),
        ids=change(term.ids, 0),
        weights=change(term.weights, 0.0),
    )


def _sum(term: SoftmaxTerm, other: SoftmaxTerm) -> SoftmaxTerm:
    """Two terms of the same softmax as one."""
    return replace(
        term,
        # Infinite where a term knows nothing of a row.
        log_normalizers=torch.minimum(term.log_normalizers, other.log_normalizers),
        totals=term.totals + other.totals,
        ids=torch.cat([term.ids, other.ids], -1),
        weights=torch.cat([term.weights, other.weights], -1),
    )


def _on_one_index(source: RowSource, filed: Sequence[Pending]) -> tuple[Tensor, Sequence[Pending]]:
    """Pending gradients with their values in the order of one index of rows."""
    indexes: list[Tensor] = list(map(attrgetter("index"), filed))
    if len(set(map(id, indexes))) == 1:
        return indexes[0], filed
    # What queries of different positions have in common are the rows of the source.
    used = torch.zeros(source.num_rows + 1, dtype=torch.bool, device=source.device)
    used[torch.cat(indexes)] = True
    index = torch.arange(source.num_rows, device=source.device).masked_fill(~used[:-1], -1)
    return index, [_placed(one, source.num_rows) for one in filed]


def _placed(pending: Pending, num_rows: int) -> Pending:
    def place(values: Tensor, missing: float) -> Tensor:
        rows = values.new_full((num_rows + 1, *values.shape[1:]), missing)
        rows[pending.index] = values
        return rows[:-1]

    row_loss = pending.row_loss
    if row_loss is not None:
        row_loss = replace(
            row_loss,
            teacher_index=place(row_loss.teacher_index, -1),
            per_row=None if row_loss.per_row is None else place(row_loss.per_row, 0.0),
            weights=None if row_loss.weights is None else place(row_loss.weights, 0.0),
        )
    terms = tuple(_mapped(term, place) for term in pending.terms)
    return replace(pending, terms=terms, row_loss=row_loss)
