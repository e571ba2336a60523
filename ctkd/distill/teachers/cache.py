"""A teacher's answers on disk: its logits at every answer token, and texts it wrote.

A cache is a folder:

    cache.json                   the teacher, the queries, and the shards written so far
    logits-00000.safetensors     rows of `ctkd.logits.TopK`, or hidden states, for some examples
    head.safetensors             where hidden states are kept, what makes logits of them
    texts.jsonl                  what the teacher wrote to prompts

Rows are found by the token ids of prompt and answer, so that a row can never be taken for another.
`ctkd.distill.teachers.cache_writing` writes caches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ctkd.distill.data.encoding import EncodedExample, EncodedSide
from ctkd.distill.models.fingerprint import file_sha256, model_fingerprint
from ctkd.distill.teachers.texts import TeacherTexts
from ctkd.errors import DataError, ModelError, SettingError
from ctkd.logits import HeadLogits, Logits, TopK, TopKLogits
from ctkd.loss import Loss
from ctkd.tokenization.token_bytes import TokenBytes
from ctkd.tokenization.vocabulary_map import fingerprint

__all__ = [
    "CACHE_FILE",
    "FORMAT",
    "HEAD_FILE",
    "TEXTS_FILE",
    "TeacherCache",
    "is_whole",
    "read_record",
    "row_key",
    "write_record",
]

CACHE_FILE = "cache.json"
HEAD_FILE = "head.safetensors"
TEXTS_FILE = "texts.jsonl"
FORMAT = 3
_CHECK = "check"


def row_key(side: EncodedSide) -> str:
    """Name a row by what the teacher reads and is scored on."""
    text = f"{side.prompt_ids} {side.answer_ids} {side.eos_id}"
    if side.kinds:
        text += f" {side.kinds}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row lies: its shard, and its first and last position there."""

    shard: int
    start: int
    stop: int


class TeacherCache:
    """A finished cache, opened for reading.

    Args:
        path: The folder.
        record: What ``cache.json`` holds.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self.texts = TeacherTexts(
            path / TEXTS_FILE,
            max_new_tokens=record["max_new_tokens"],
            one_line=record.get("one_line", True),
        )
        self._places: dict[str, _Place] = {}
        self._shards = [path / shard["file"] for shard in record["shards"]]
        self._open: dict[int, Any] = {}
        self._heads: dict[torch.device, dict[str, Tensor]] = {}
        for number, shard in enumerate(record["shards"]):
            start = 0
            for key, count in shard["rows"]:
                self._places[key] = _Place(number, start, start + count)
                start += count

    @classmethod
    def open(
        cls, path: str | Path, *, say: Callable[[str], None] = lambda line: None
    ) -> TeacherCache:
        """Open a cache and verify every file of it.

        Args:
            path: The folder.
            say: Prints one line of progress.

        Raises:
            DataError: If there is no finished cache, or a file of it is missing or damaged.
        """
        folder = Path(path).expanduser()
        record = read_record(folder)
        if record is None and folder.is_file():
            raise DataError(
                f"{folder} is a file, and a teacher cache is a folder; make one with "
                "`ctkd cache --output FOLDER`"
            )
        if record is None:
            raise DataError(
                f"{folder} holds no teacher cache ({CACHE_FILE} is missing); make one with "
                f"`ctkd cache --output {folder}`"
            )
        if not record["finished"]:
            raise DataError(
                f"the teacher cache {folder} is not finished; repeat the `ctkd cache` that began it"
            )
        heads = [record["head"]] if record.get("head") else []
        for number, shard in enumerate([*heads, *record["shards"]], 1):
            file = folder / shard["file"]
            if not is_whole(file, shard["sha256"]):
                raise DataError(
                    f"{file} is missing or not as it was written; repeat the `ctkd cache` that "
                    "made this cache, only what is damaged is computed again"
                )
            if number % 100 == 0:
                say(f"verified {number} of {len(record['shards'])} shards of {folder}")
        cache = cls(folder, record)
        if len(cache.texts) < record["texts"]:
            raise DataError(
                f"{cache.texts.path} holds {len(cache.texts)} of {record['texts']} texts that can "
                "be read; repeat the `ctkd cache` that made this cache, only what is missing is "
                "written again"
            )
        return cache

    @property
    def holds_states(self) -> bool:
        """True if hidden states are kept, which serve every query."""
        return bool(self.record.get("head"))

    @property
    def k(self) -> int:
        """Entries kept at each position."""
        return int(self.record["k"])

    @property
    def kept(self) -> str:
        """What is kept of each row, for a person."""
        if self.holds_states:
            return f"hidden states in {self.record['states']}"
        kept = "all" if self.k == self.vocab_size else f"top {self.k}"
        return f"{kept} of {self.vocab_size}"

    device = None

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the teacher can be asked."""
        return tuple(self.record["temperatures"])

    @property
    def vocab_size(self) -> int:
        """Columns of the teacher's logits."""
        return int(self.record["vocab_size"])

    @property
    def teacher_width(self) -> int:
        """Width of the teacher's head, which may exceed its vocabulary."""
        return int(self.record["teacher"]["head_width"])

    @property
    def fingerprint(self) -> str:
        """Equal for caches that answer alike."""
        names = ("format", "rows", "prompt", "k", "temperatures", "vocab_size", "dtype")
        queries = {name: self.record[name] for name in (*names, "max_new_tokens")}
        if self.holds_states:
            queries["states"] = self.record["states"]
        teacher = {**self.record["teacher"], "name": None}
        text = json.dumps({**queries, "teacher": teacher}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, side: EncodedSide) -> bool:
        return row_key(side) in self._places

    def check_teacher(
        self, name: str, table: TokenBytes, *, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """Refuse a cache of another teacher.

        Args:
            name: What the settings call the teacher.
            table: Of its tokenizer.
            say: Prints a line if the teacher's weights are not there to compare.

        Raises:
            SettingError: If the cache was made from other weights or for another tokenizer.
        """
        made_from = self.record["teacher"]
        if fingerprint(table) != made_from["tokenizer"]:
            raise SettingError(
                f"the teacher cache {self.path} was made for the tokenizer of "
                f"{made_from['name']}, that of {name} differs; give --teacher "
                f"{made_from['name']}, or cache {name}"
            )
        try:
            weights = model_fingerprint(name)
        except ModelError:
            say(f"the weights of {name} are not here, so they are not compared with the cache's")
            return
        if weights != made_from["weights"]:
            raise SettingError(
                f"the teacher cache {self.path} was made from other weights than those of {name} "
                f"(it was made from {made_from['name']}); give that teacher, or cache {name} anew"
            )

    def check_rows(self, rows: Sequence[EncodedExample], what: str) -> None:
        """Refuse rows that the cache does not hold.

        Raises:
            DataError: If there is such a row.
        """
        missing = [row.id for row in rows if row.teacher is not None and row.teacher not in self]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(rows)} {what} rows are not in the teacher cache "
                f"{self.path}, the first is {missing[0]}; it was made with other data, answers, "
                "prompt form, date, length limit, seed or --eval-limit. Run `ctkd cache` with the "
                "same options"
            )

    def check_serves(self, loss: Loss, name: str) -> None:
        """Refuse a loss that this cache cannot serve, before anything is trained.

        Args:
            loss: The loss.
            name: What to call it.

        Raises:
            SettingError: If the loss needs more of the teacher than is stored.
        """
        needs, limit = loss.teacher_needs, self.vocab_size
        way_out = "train it with the live teacher (leave --teacher-cache out)"
        if "hidden" in loss.needs:
            raise SettingError(
                f"{name} needs all of the teacher's hidden states, which no cache holds; {way_out}"
            )
        if self.holds_states:
            return
        if needs == "rows" and self.k < limit:
            raise SettingError(
                f"{name} needs whole rows of the teacher's logits, but {self.path} keeps "
                f"{self.k} of {limit} entries; {way_out}, or cache with --states bfloat16"
            )
        if needs == "top_k" and self.k == 0:
            raise SettingError(
                f"{name} needs the teacher's largest logits, but {self.path} keeps only those of "
                "observed tokens (k is 0); cache with --k 256"
            )
        if loss.teacher_entries > self.k and self.k < limit:
            raise SettingError(
                f"{name} looks up the {loss.teacher_entries} largest entries of each position, but "
                f"{self.path} keeps {self.k}; cache the teacher again with --k "
                f"{loss.teacher_entries} or more, or {way_out}"
            )
        for temperature in loss.teacher_temperatures:
            if temperature not in self.temperatures:
                kept = ", ".join(f"{one:g}" for one in self.temperatures)
                raise SettingError(
                    f"{name} needs the teacher at temperature {temperature:g}, but {self.path} was "
                    f"made for {kept}; cache it again with --temperature {temperature:g}, or "
                    f"{way_out}"
                )

    def batch(
        self, sides: Sequence[EncodedSide], positions: int, *, with_eos: bool = True
    ) -> dict[str, Tensor]:
        """Read the rows of a batch, padded with zeros or cut to so many positions.

        Args:
            sides: The rows.
            positions: T.
            with_eos: Whether ends of answers are among the positions.

        Shape:
            As `TopK`, with (B, T) in front and T ``positions``; or hidden states (B, T, H).

        Raises:
            DataError: If a row is not stored.
        """
        columns: dict[str, list[Tensor]] = {}
        for side in sides:
            for name, value in self._row(side, with_eos).items():
                value = value[:positions]
                padded = value.new_zeros((positions, *value.shape[1:]))
                padded[: value.shape[0]] = value
                columns.setdefault(name, []).append(padded)
        return {name: torch.stack(values) for name, values in columns.items()}

    def logits(self, kept: dict[str, Tensor], mask: Tensor) -> Logits:
        """The teacher's logits at the positions of `batch`, as far as they are stored."""
        if self.holds_states:
            head, hidden = self._head(mask.device), kept["hidden"]
            return HeadLogits(
                hidden.to(head["weight"].dtype),
                **head,
                scale=self.record["head"]["scale"],
                softcap=self.record["head"]["softcap"],
                mask=mask,
                vocab_size=self.vocab_size,
            )
        top = TopK(**kept, temperatures=self.temperatures, vocab_size=self.vocab_size)
        return TopKLogits(top, mask=mask)

    def _head(self, device: torch.device) -> dict[str, Tensor]:
        """The head's weight and perhaps its bias."""
        if device not in self._heads:
            path = self.path / HEAD_FILE
            try:
                self._heads[device] = load_file(path, device=str(device))
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
        return self._heads[device]

    def _row(self, side: EncodedSide, with_eos: bool) -> dict[str, Tensor]:
        place = self._places.get(row_key(side))
        if place is None:
            raise DataError(
                f"a row is not in the teacher cache {self.path}; run `ctkd cache` with the same "
                "options"
            )
        shard = self._shard(place.shard)
        tensors = {name: shard.get_slice(name)[place.start : place.stop] for name in shard.keys()}
        rows = side.rows_of(side.places(with_eos=True), with_eos=with_eos)
        return {
            name: value[rows].to(torch.int64) if name.endswith("ids") else value[rows]
            for name, value in tensors.items()
        }

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            try:
                self._open[number] = safe_open(str(self._shards[number]), framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{self._shards[number]} cannot be read: {error}") from error
        return self._open[number]


def is_whole(file: Path, sha256: str) -> bool:
    """True if a file is there and as it was written."""
    try:
        return file.is_file() and file_sha256(file) == sha256
    except OSError:
        return False


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read ``cache.json``; None if there is none.

    Raises:
        DataError: If it is not one that this version can read, or not as it was written.
    """
    path = folder / CACHE_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete the folder") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(
            f"{path} was not written by this version of ctkd (format {FORMAT}); delete the folder, "
            "or make the cache in another one"
        )
    if record.pop(_CHECK, None) != _checksum(record):
        raise DataError(f"{path} is not as it was written; restore it, or delete the folder")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``cache.json`` at once or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    partial = folder / f".{CACHE_FILE}.partial"
    text = json.dumps({**record, _CHECK: _checksum(record)}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, folder / CACHE_FILE)


def _checksum(record: dict[str, Any]) -> str:
    """Tells a record that is as it was written: what it says decides what is trained."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
