"""Answers to what a loss may ask, from rows of raw logits read a block at a time.

The rows come from a `ctkd.row_sources.RowSource`; how gradients go back is in
`ctkd.row_gradients`. Views of one source share what was found out about its rows, and one
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctkd.compiled import has_kernels
from ctkd.compiled_softmax import Summed, put_statistics
from ctkd.errors import BatchError
from ctkd.logits import Logits
from ctkd.powers import Workspace
from ctkd.row_gradients import anchored, file_requests
from ctkd.row_requests import Places, Request, Softmax, SoftmaxRequest
from ctkd.row_sources import RowSource
from ctkd.rows import (
    add_rows_,
    check_ids,
    check_k,
    log_normalisers,
    skips_padding,
    softmax_statistics,
    tempered,
)
from ctkd.sorting import stable_top_ids, top_of
from ctkd.tracing import not_traced

__all__ = ["RowLogits"]


class RowLogits(Logits):
    """Positions of a source of raw logits.

    Args:
        source: B * L rows.
        mask: (B, S) bool, scored positions; default all of them.
        rows: (B, S) int64, which of a sequence's L rows holds each position; default its own index.
        vocab_size: Columns to keep, V; default all of them.

    Raises:
        BatchError: If the shapes do not fit, or ``vocab_size`` exceeds the columns there are.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> None:
        batch_size, length, width = source.shape
        if vocab_size is not None and not 1 <= vocab_size <= width:
            raise BatchError(
                f"the tokenizer has {vocab_size} tokens, but the logits only {width} columns; "
                "these logits belong to another tokenizer"
            )
        expected = torch.Size((batch_size, length)) if rows is None else rows.shape
        if mask is None:
            mask = torch.ones(expected, dtype=torch.bool, device=source.device)
        if mask.shape != expected:
            raise BatchError(
                f"mask must be (B, S) of the logits, {tuple(expected)}, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            raise BatchError(f"mask must be a bool tensor, got {mask.dtype}")
        if mask.device != source.device:
            raise BatchError(
                f"mask is on {mask.device}, the logits on {source.device}; move both to one device"
            )
        self.source = source
        self.mask = mask
        self.rows = rows
        self.shape = (mask.shape[0], mask.shape[1], vocab_size or width)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def masked(self, mask: Tensor) -> Self:
        return self if mask is self.mask else self.at(self.rows, mask, self.shape[2])

    def at(self, rows: Tensor | None, mask: Tensor, vocab_size: int | None = None) -> Self:
        """See the same source at other positions; both share readings and a backward pass."""
        other = type(self).__new__(type(self))
        other.__dict__.update(
            (name, value) for name, value in self.__dict__.items() if name not in _OF_A_VIEW
        )
        RowLogits.__init__(other, self.source, mask=mask, rows=rows, vocab_size=vocab_size)
        return other

    @cached_property
    def flat_rows(self) -> Tensor:
        """Row of the source that holds each position, (B * S,) int64."""
        batch_size, length, _ = self.source.shape
        first = torch.arange(batch_size, device=self.device).unsqueeze(1) * length
        if self.rows is None:
            return (first + torch.arange(length, device=self.device)).flatten()
        return (first + self.rows).flatten()

    @cached_property
    def places(self) -> Places:
        return Places.of(self.flat_rows, self.mask.flatten(), self.source.num_rows, self.shape[2])

    @cached_property
    def visited(self) -> Tensor:
        """Positions worth reading, flattened: the scored ones where that costs no waiting."""
        if skips_padding(self.device):
            return self.mask.flatten().nonzero().squeeze(-1)
        return torch.arange(self.mask.numel(), device=self.device)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield flat positions (n,) and their rows (n, V), which must not be written to."""
        visited = self.visited
        for which, block in self.source.blocks(self.flat_rows[visited]):
            yield visited[which], block[:, : self.shape[2]]

    def tables(self, keys: Sequence[Softmax]) -> tuple[list[Tensor], list[Tensor]]:
        """Log-normalisers of the source's rows, and which of each the caller has to fill in."""
        return self.source.memo.tables(self.source, keys, self.flat_rows[self.visited], self.rows)

    def note(self, table: Tensor, position: Tensor, normaliser: Tensor) -> None:
        """Put log-normalisers of flat positions into a table. What is known stays as it is."""
        rows = self.flat_rows[position]
        before = table[rows]
        table[rows] = torch.where(before.isnan(), normaliser, before)

    def _room(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=self.dtype, device=self.device)

    def filled_in(self, keys: Sequence[Softmax]) -> None:
        """Note that the tables hold all rows that are visited."""
        self.source.memo.filled_in(self.source, keys, self.rows)

    def log_normaliser(self, temperatures: Sequence[float], standardise: bool) -> list[Tensor]:
        """Log of the softmax denominator of each row of the source, (B * L + 1,) each.

        Rows of no scored position may hold anything.
        """
        keys = [Softmax(one, standardise, self.shape[2]) for one in temperatures]
        tables, missing = self.tables(keys)
        # What is known stays as it is: a second answer must not differ in its last digit.
        wanted = [index for index, rows in enumerate(missing) if rows.shape[0]]
        if not wanted:
            return tables
        rows = missing[wanted[0]]
        if skips_padding(self.device):
            rows, _ = torch.unique(
                torch.cat([missing[index] for index in wanted]), return_inverse=True
            )
        asked = [temperatures[index] for index in wanted]
        found = self._log_normalisers(rows, asked, standardise)
        for index, answer in zip(wanted, found, strict=True):
            before = tables[index][rows]
            tables[index][rows] = torch.where(before.isnan(), answer, before)
        self.filled_in(keys)
        return tables

    def _log_normalisers(
        self, rows: Tensor, temperatures: Sequence[float], standardise: bool
    ) -> Sequence[Tensor]:
        """Log of the softmax denominator of some rows of the source, (N,) each."""
        if has_kernels(self.device, self.dtype):
            answers = self._room(len(temperatures), rows.shape[0])
            for which, array in self.source.arrays(rows):
                put_statistics(array, self.shape[2], temperatures, standardise, answers[:, which])
            return answers.unbind()
        workspace = Workspace()
        found = [
            log_normalisers(block[:, : self.shape[2]], temperatures, standardise, workspace)
            for _, block in self.source.blocks(rows)
        ]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def log_probs_at(
        self, ids: Tensor, temperatures: Sequence[float], *, standardise: bool = False
    ) -> tuple[Tensor, ...]:
        check_ids(ids, self.shape)
        return self._log_probs_of(ids, tuple(temperatures), standardise, None)

    @not_traced
    def _log_probs_of(
        self,
        ids: Tensor,
        temperatures: tuple[float, ...],
        standardise: bool,
        raw: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Do what `log_probs_at` does, with the raw logits (B, S, K) if they are known."""
        anchor, requests, _ = anchored(self.source)
        answers = _LogProbs.apply(  # type: ignore[no-untyped-call]
            self, ids, temperatures, standardise, raw, requests, anchor
        )
        return tuple(answers)

    @not_traced
    def sorted_probs(self, k: int, *, temperature: float = 1.0) -> Tensor:
        if not has_kernels(self.device, self.dtype):
            return super().sorted_probs(k, temperature=temperature)
        # One reading of the rows says which are the largest, what they are, and of which sum.
        ids, raw = self._top_of_a_reading(k, temperature)
        probs = self._log_probs_of(ids, (temperature,), False, raw)[0].exp()
        return probs.masked_fill(~self.mask.unsqueeze(-1), 0.0)

    @torch.no_grad()
    def _top_of_a_reading(self, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Columns and raw logits of the k largest entries, (B, S, k), and noted normalisers."""
        check_k(k, self.shape[2])
        visited, key = self.visited, Softmax(temperature, False, self.shape[2])
        (table,), (missing,) = self.tables([key])
        ids = visited.new_zeros((self.mask.numel(), k))
        raw = self._room(*ids.shape).zero_()
        for which, array in self.source.arrays(self.flat_rows[visited]):
            position = visited[which]
            ids[position], raw[position] = top_of(array, self.shape[2], k)
            if missing.shape[0]:
                found = self._room(1, position.shape[0])
                put_statistics(array, self.shape[2], [temperature], False, found)
                self.note(table, position, found[0])
        self.filled_in([key])
        shape = (*self.shape[:2], k)
        return ids.view(shape), raw.view(shape)

    @not_traced
    def log_mass(self, columns: Tensor, *, temperature: float = 1.0) -> Tensor:
        # Imported here: it is built on this module.
        from ctkd.log_mass import log_mass

        return log_mass(self, columns, temperature)

    @not_traced
    @torch.no_grad()
    def top_ids(self, k: int) -> Tensor:
        check_k(k, self.shape[2])
        result = torch.zeros((self.mask.numel(), k), dtype=torch.int64, device=self.device)
        if has_kernels(self.device, self.dtype):
            visited = self.visited
            for which, array in self.source.arrays(self.flat_rows[visited]):
                result[visited[which]] = top_of(array, self.shape[2], k)[0]
        else:
            for position, block in self.blocks():
                result[position] = stable_top_ids(block, k)
        result = result.view(*self.shape[:2], k)
        return result.masked_fill_(~self.mask.unsqueeze(-1), 0)

    @not_traced
    @torch.no_grad()
    def column_mass(
        self,
        mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        standardise: bool = False,
        asked_next: Sequence[float] = (),
    ) -> Tensor:
        batch_size, positions, vocabulary = self.shape
        mass = torch.zeros((batch_size, vocabulary), dtype=self.dtype, device=self.device)
        selected = (self.mask if mask is None else mask & self.mask).flatten()
        temperatures = [temperature, *(one for one in asked_next if one != temperature)]
        keys = [Softmax(one, standardise, vocabulary) for one in temperatures]
        tables, _ = self.tables(keys)
        if has_kernels(self.device, self.dtype):
            visited = self.visited
            for which, array in self.source.arrays(self.flat_rows[visited]):
                position = visited[which]
                answers = self._room(len(temperatures), position.shape[0])
                summed = Summed(position // max(positions, 1), selected[position], mass)
                put_statistics(array, vocabulary, temperatures, standardise, answers, summed)
                for table, one in zip(tables, answers, strict=True):
                    self.note(table, position, one)
            self.filled_in(keys)
            return mass
        workspace = Workspace()
        for position, block in self.blocks():
            found, probs = softmax_statistics(block, temperatures, standardise, workspace)
            for table, one in zip(tables, found, strict=True):
                self.note(table, position, one)
            if mask is not None or not skips_padding(self.device):
                probs.masked_fill_(~selected[position].unsqueeze(-1), 0.0)
            add_rows_(mass, position // max(positions, 1), probs)
        self.filled_in(keys)
        return mass

    @not_traced
    @torch.no_grad()
    def column_distance(
        self, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        batch_size, positions, vocabulary = self.shape
        kept = targets.shape[-1]
        distance = torch.zeros((batch_size, kept, vocabulary), dtype=self.dtype, device=self.device)
        selected = (self.mask if mask is None else mask & self.mask).flatten()
        targets = targets.flatten(0, 1).to(self.dtype)
        key = Softmax(temperature, False, vocabulary)
        (table,), _ = self.tables([key])
        workspace = Workspace()
        for position, block in self.blocks():
            (normaliser,), probs = softmax_statistics(block, [temperature], False, workspace)
            self.note(table, position, normaliser)
            left_out = ~selected[position].unsqueeze(-1)
            for column in range(kept):
                gap = workspace.rows("gap", probs, vocabulary)
                torch.sub(probs, targets[position, column : column + 1], out=gap).abs_()
                gap.masked_fill_(left_out, 0.0)
                add_rows_(distance[:, column], position // max(positions, 1), gap)
        self.filled_in([key])
        return distance

    @not_traced
    @torch.no_grad()
    def whole_rows(
        self,
        batch_index: Tensor,
        position: Tensor,
        *,
        temperature: float = 1.0,
        spread_tail: bool = False,
        workspace: Workspace | None = None,
    ) -> Tensor:
        rows = self.flat_rows[batch_index * self.shape[1] + position]
        return self.source.read(rows, workspace)[:, : self.shape[2]]


# What a view does not share with others of the same source.
_OF_A_VIEW = {"source", "mask", "rows", "shape", "flat_rows", "places", "visited"}


class _LogProbs(torch.autograd.Function):
    """Chosen log-probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: RowLogits,
        ids: Tensor,
        temperatures: tuple[float, ...],
        standardise: bool,
        raw: Tensor | None,
        requests: dict[Any, Any],
        _: Tensor,
    ) -> tuple[Tensor, ...]:
        normalisers = logits.log_normaliser(temperatures, standardise)
        if raw is None:
            answers = _picked(logits, ids, temperatures, standardise)
        else:
            answers = [raw / temperature for temperature in temperatures]
        padding = ~logits.mask.unsqueeze(-1)
        for answer, normaliser in zip(answers, normalisers, strict=True):
            answer -= normaliser[logits.flat_rows].view(*logits.shape[:2], 1)
            answer.masked_fill_(padding, 0.0)
        # Kept only so that PyTorch sees it if one of them is overwritten.
        ctx.save_for_backward(*logits.source.inputs)
        ctx.logits, ctx.ids, ctx.normalisers, ctx.requests = logits, ids, normalisers, requests
        ctx.temperatures, ctx.standardise, ctx.question = temperatures, standardise, object()
        return tuple(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        logits: RowLogits = ctx.logits
        ids = ctx.ids.expand(-1, logits.shape[1], -1).flatten(0, 1)
        found: list[Request] = []
        for temperature, normaliser, incoming in zip(
            ctx.temperatures, ctx.normalisers, gradients, strict=True
        ):
            weights = incoming.masked_fill(~logits.mask.unsqueeze(-1), 0.0).flatten(0, 1)
            softmax = Softmax(temperature, ctx.standardise, logits.shape[2])
            found.append(
                SoftmaxRequest(
                    logits.source, logits.places, softmax, normaliser, weights.sum(-1), ids, weights
                )
            )
        anchor_gradient = file_requests(ctx.requests, ctx.question, found)
        return None, None, None, None, None, None, anchor_gradient


def _picked(
    logits: RowLogits, ids: Tensor, temperatures: tuple[float, ...], standardise: bool
) -> list[Tensor]:
    """Chosen logits at each temperature, (B, S, K) each."""
    batch_size, positions, _ = logits.shape
    if not standardise:
        rows = logits.flat_rows.view(batch_size, positions)
        if ids.shape[1] == 1:
            raw = logits.source.pick_shared(rows, ids.squeeze(1))
        else:
            raw = logits.source.pick(rows.flatten(), ids.flatten(0, 1))
        raw = raw.view(batch_size, positions, ids.shape[2])
        return [raw / one for one in temperatures]
    ids = ids.expand(-1, positions, -1).flatten(0, 1)
    answers = [torch.zeros(ids.shape, dtype=logits.dtype, device=ids.device) for _ in temperatures]
    for position, block in logits.blocks():
        for temperature, answer in zip(temperatures, answers, strict=True):
            answer[position] = tempered(block, temperature, True).gather(1, ids[position])
    return [answer.view(batch_size, positions, ids.shape[1]) for answer in answers]
