"""A teacher that reads each row once and is remembered: its hidden states, in main memory.

They are what its head makes whole rows of logits from, a block at a time, so that every loss is
served exactly. Where rows are read in several epochs, a teacher costs a pass over them. Many runs
on the same rows can have the logits themselves kept, in a file, which spares them the head.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ctkd.cache_folder import building, locked
from ctkd.distill.data.collator import padded_sides
from ctkd.distill.data.encoding import EncodedSide
from ctkd.distill.devices import is_cpu
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.processes import no_bar
from ctkd.logits import DenseLogits, Logits

__all__ = ["KnownStates", "TeacherMemory", "memory_bytes"]

_Row = tuple[int, ...]


@dataclass(slots=True, eq=False)
class KnownStates:
    """What memories of the same teacher pass on to each other.

    Attributes:
        rows_folder: Where the logits of all rows are kept in a file, 4 bytes an entry in float32,
            for later processes as well; None to have the head make them at every step.
        read: Which rows in which batches the states or logits are of, the last ones that were read.
        states: Hidden states by row.
        rows: Logits of all rows (R, V), one row behind the other.
    """

    rows_folder: Path | None = None
    read: tuple[Any, ...] = ()
    states: dict[_Row, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None


def memory_bytes(model: PreTrainedModel, sides: Sequence[EncodedSide], *, score_eos: bool) -> int:
    """What it takes to remember rows."""
    positions = sum(_positions(side, score_eos) for side in sides)
    weight: Tensor = model.get_output_embeddings().weight
    return positions * weight.shape[1] * weight.element_size()


class TeacherMemory:
    """The hidden states of a teacher at every position that predicts a token of an answer.

    The teacher is frozen.

    Args:
        logits: Of the teacher, whose head can be taken apart.
        sides: The rows; read here, always in the same batches, so that a run that goes on after a
            stop has the same states.
        pad_id: What to pad with.
        score_eos: Whether distillation scores the end of sequence.
        vocab_size: Columns to keep of the head's.
        batch_size: Rows that are read together.
        known: States that an earlier memory of the same teacher has read, where the rows and
            batches were the same; else they give way to these. None to share nothing.
    """

    def __init__(
        self,
        logits: ModelLogits,
        sides: Sequence[EncodedSide],
        *,
        pad_id: int,
        score_eos: bool = False,
        vocab_size: int | None = None,
        batch_size: int = 4,
        known: KnownStates | None = None,
    ) -> None:
        self._logits = logits
        self._score_eos = score_eos
        self._vocab_size = vocab_size
        model = logits.model.requires_grad_(False)
        # Read in other batches, states differ in their last digits.
        read = model.dtype, batch_size, score_eos, tuple(map(_key, sides))
        known = known or KnownStates()
        # What lies where in the file of logits.
        sizes = {_key(side): _positions(side, score_eos) for side in sides}
        starts = itertools.accumulate(sizes.values(), initial=0)
        self._starts = dict(zip(sizes, starts, strict=False))
        if known.read != read:
            if known.rows_folder is None:
                known.states = self._read(sides, pad_id, batch_size)
            else:
                known.rows = self._read_rows(known.rows_folder, sizes, sides, pad_id, batch_size)
            known.read = read
        self._states, self._rows = known.states, known.rows

    def _read_rows(
        self,
        folder: Path,
        sizes: dict[_Row, int],
        sides: Sequence[EncodedSide],
        pad_id: int,
        batch_size: int,
    ) -> Tensor:
        """Logits of all rows, in a file that is made once for this model and these rows."""
        model, head = self._logits.model, self._logits.head()
        shape = sum(sizes.values()), self._vocab_size or head.weight.shape[0]
        made_by = hashlib.sha256(repr((shape, head.scale, head.softcap, batch_size)).encode())
        made_by.update(repr(list(sizes)).encode())
        for value in model.state_dict().values():
            made_by.update(value.cpu().flatten().contiguous().view(torch.uint8).numpy().data)
        final = folder / f"rows-{made_by.hexdigest()[:16]}"
        size = math.prod(shape) * model.dtype.itemsize
        with locked(final), torch.no_grad():
            # A file that was cut is made again.
            file = final / "logits"
            if not (file.is_file() and file.stat().st_size == size):
                shutil.rmtree(final, ignore_errors=True)
                states = self._read(sides, pad_id, batch_size)
                with building(final) as partial:
                    rows = _file(partial / "logits", shape, model.dtype, write=True)
                    parts = torch.split(rows, list(sizes.values()))
                    bar = tqdm(parts, desc="teacher: logits", leave=False, disable=no_bar())
                    for key, out in zip(sizes, bar, strict=True):
                        hidden = states[key].to(head.weight.device).unsqueeze(0)
                        for which, block in self._logits.from_hidden(hidden).blocks():
                            out[which] = block[:, : shape[1]].to(out)
        return _file(file, shape, model.dtype, write=False)

    def _read(
        self, sides: Sequence[EncodedSide], pad_id: int, batch_size: int
    ) -> dict[_Row, Tensor]:
        """Hidden states by row."""
        model, states = self._logits.model, {}
        batches = [sides[start : start + batch_size] for start in range(0, len(sides), batch_size)]
        for batch in tqdm(batches, desc="teacher: reading", leave=False, disable=no_bar()):
            inputs, labels = padded_sides(batch, pad_id, with_eos=self._score_eos)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            with torch.no_grad():
                hidden = self._logits.hidden(model, inputs, labels.shape[1])
            for side, of_side in zip(batch, hidden.cpu(), strict=True):
                states[_key(side)] = of_side[side.places(with_eos=self._score_eos)]
        return states

    @property
    def device(self) -> torch.device:
        device: torch.device = self._logits.model.device
        return device

    def batch(
        self, sides: Sequence[EncodedSide], positions: int, *, with_eos: bool = True
    ) -> dict[str, Tensor]:
        """The states of a batch of rows, padded with zeros or cut to so many positions.

        Where whole rows of logits are kept, the places in their file.
        """
        every = [
            side.rows_of(side.places(with_eos=self._score_eos), with_eos=with_eos)[:positions]
            for side in sides
        ]
        if self._rows is not None:
            # What lies behind a row's own positions is not scored.
            places = torch.zeros((len(sides), positions), dtype=torch.int64)
            for row, side, rows in zip(places, sides, every, strict=True):
                row[: len(rows)] = self._starts[_key(side)] + torch.tensor(rows)
            return {"rows": places}
        found = [self._states[_key(side)] for side in sides]
        hidden = found[0].new_zeros((len(found), positions, found[0].shape[-1]))
        for row, states, rows in zip(hidden, found, every, strict=True):
            row[: len(rows)] = states[rows]
        return {"hidden": hidden}

    def logits(self, kept: dict[str, Tensor], mask: Tensor) -> Logits:
        """The teacher's logits at the positions of `batch`."""
        if self._rows is None:
            return self._logits.from_hidden(kept["hidden"], mask=mask, vocab_size=self._vocab_size)
        if is_cpu(mask.device):
            every_row = self._rows.expand(len(mask), -1, -1)
            return DenseLogits(every_row, mask=mask, rows=kept["rows"])
        return DenseLogits(self._rows[kept["rows"].cpu()].to(mask.device), mask=mask)


def _file(path: Path, shape: tuple[int, int], dtype: torch.dtype, *, write: bool) -> Tensor:
    """A tensor that lies in a file."""
    return torch.from_file(str(path), shared=write, size=math.prod(shape), dtype=dtype).view(shape)


def _positions(side: EncodedSide, score_eos: bool) -> int:
    return len(side.places(with_eos=score_eos))


def _key(side: EncodedSide) -> _Row:
    eos_id = -1 if side.eos_id is None else side.eos_id
    kinds = map(ord, side.kinds)
    return (*side.prompt_ids, -1, *side.answer_ids, -1, eos_id, *kinds)
