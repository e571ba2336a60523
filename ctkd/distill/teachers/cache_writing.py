"""Teacher caches written: every row of a data set, queried once.

Shards are written one after another, each whole or not at all, so that a run that was killed goes
on behind the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.batch import IGNORE_INDEX
from ctkd.distill.config import CacheSettings, TrainConfig
from ctkd.distill.data.collator import padded_sides, padding_id
from ctkd.distill.data.encoding import EncodedSide
from ctkd.distill.data.tasks import Example, get_task
from ctkd.distill.devices import choose_device
from ctkd.distill.models.fingerprint import file_sha256, model_fingerprint
from ctkd.distill.models.loading import (
    check_token_ids,
    head_width,
    last_logits,
    load_tokenizer,
)
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.preparing import (
    Forms,
    Models,
    answerable,
    answered_by_teacher,
    encode,
    load_examples,
    load_models,
    load_teacher,
    teacher_precision,
    with_student,
)
from ctkd.distill.teachers.cache import (
    CACHE_FILE,
    FORMAT,
    HEAD_FILE,
    TEXTS_FILE,
    TeacherCache,
    is_whole,
    read_record,
    row_key,
    write_record,
)
from ctkd.distill.teachers.texts import TeacherTexts
from ctkd.errors import ModelError, OutputError, SettingError
from ctkd.logits import DenseLogits, TopK
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.vocabulary_map import fingerprint

__all__ = ["LazyTeacher", "write_cache"]

LOCK = ".lock"
STATES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Record = dict[str, Any]


def write_cache(
    config: TrainConfig,
    folder: Path,
    settings: CacheSettings | None = None,
    *,
    say: Callable[[str], None] = print,
) -> TeacherCache:
    """Store a teacher's logits on the rows that a run reads, and its answers to their prompts.

    A folder that holds this cache already is completed where something is missing or damaged, and
    opened at once where nothing is. The teacher is loaded only if it has to be asked.

    Args:
        config: The settings of the run; all losses between two models read the same rows.
        folder: Where to write.
        settings: Contents of the cache; by default those of `CacheSettings`.
        say: Prints one line of progress.

    Raises:
        CtkdError: If something that was given cannot be used, or the folder holds another cache.
    """
    settings = CacheSettings() if settings is None else settings
    if not config.distils and config.answers == "data":
        raise SettingError(
            "loss 'sft' asks no teacher, so there is nothing to cache; name a loss between two "
            "models, such as multilevelot: all of them read the same rows"
        )
    if read_record(folder) is None and _is_occupied(folder):
        raise OutputError(f"{folder} exists and is no teacher cache; choose another folder")
    with _alone(folder):
        _write(config, folder, settings, say)
    return TeacherCache.open(folder, say=say)


def _write(
    config: TrainConfig,
    folder: Path,
    settings: CacheSettings,
    say: Callable[[str], None],
) -> None:
    before = read_record(folder)
    training, held_out = load_examples(config, say)
    config = with_student(config, training, say)
    models = load_models(config, say, student=False, teacher=False)
    tokenizer = load_tokenizer(config.teacher)
    pair = TokenizerPair(models.student_tokenizer, tokenizer)
    day = config.date or (before or {}).get("date") or date.today().isoformat()
    config = replace(config, date=day)
    forms = Forms.of(config, training)
    teacher = LazyTeacher(config, tokenizer, choose_device(config.device), say)
    described = _described(teacher, pair, before)
    models = replace(
        models, teacher_tokenizer=tokenizer, pair=pair, teacher_width=described["head_width"]
    )
    vocabulary = min(pair.teacher_size, described["head_width"])
    one_line = get_task(config.task).one_line
    record: dict[str, Any] = {
        "format": FORMAT,
        "teacher": described,
        "data": config.data,
        "date": day,
        "prompt": {
            "template": config.teacher_template,
            "shots": [shot.id for shot in forms.teacher.shots],
        },
        "one_line": one_line,
        "states": settings.states,
        "head": None,
        "k": min(settings.k, vocabulary) if settings.states == "none" else vocabulary,
        "temperatures": [float(temperature) for temperature in settings.temperatures],
        "vocab_size": vocabulary,
        "dtype": teacher_precision(config),
        "max_new_tokens": config.max_new_tokens,
        "shard_rows": settings.shard_rows,
        "rows": None,
        "texts": 0,
        "finished": False,
        "shards": [],
    }
    if before is not None:
        _check_same(folder, before, record)
    taught, ends = config.answers == "teacher", forms.teacher.ends(tokenizer)
    sides: list[EncodedSide] = []
    if not taught:
        # Before hours are spent on texts for a folder that is refused.
        sides = _sides(config, models, training, held_out, forms, say)
        _name_rows(folder, before, record, sides)
    if before is None:
        _save(folder, record)
    written = TeacherTexts(
        folder / TEXTS_FILE, max_new_tokens=config.max_new_tokens, one_line=one_line
    )
    answered = get_task(config.task).answered
    if taught or (settings.texts == "all" and answered):
        chosen, prompts = answerable(config, models, training, forms, "training", say)
        written.complete(
            prompts, teacher.with_tokenizer, ends=ends, progress="teacher, training prompts"
        )
        if taught:
            training = answered_by_teacher(chosen, prompts, written, say)
    if settings.texts != "none" and answered:
        _, prompts = answerable(config, models, held_out, forms, "held-out", say)
        written.complete(
            prompts, teacher.with_tokenizer, ends=ends, progress="teacher, held-out prompts"
        )
    record["texts"] = len(written)
    if taught:
        sides = _sides(config, models, training, held_out, forms, say)
        _name_rows(folder, before, record, sides)
    _write_shards(folder, before, record, sides, teacher, say)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other processes out of it."""
    present = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {folder}: {error.strerror or error}; choose another folder"
        ) from error
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            try:
                yield
            finally:
                if not present and not (folder / CACHE_FILE).exists():
                    shutil.rmtree(folder, ignore_errors=True)
    except filelock.Timeout as error:
        raise OutputError(
            f"another process writes the teacher cache {folder}; wait for it, or choose another "
            "folder"
        ) from error


def _described(teacher: LazyTeacher, pair: TokenizerPair, before: Record | None) -> dict[str, Any]:
    name = teacher.config.teacher
    weights = model_fingerprint(name)
    if before is not None and before["teacher"]["weights"] == weights:
        width = before["teacher"]["head_width"]
    else:
        width = head_width(teacher.model())
    return {
        "name": name,
        "weights": weights,
        "tokenizer": fingerprint(pair.teacher_bytes),
        "head_width": width,
    }


def _is_occupied(folder: Path) -> bool:
    """True if there is more than a kill leaves before the first record is whole."""
    if not folder.is_dir():
        return folder.exists()
    left = {f".{CACHE_FILE}.partial", LOCK}
    return any(entry.name not in left for entry in folder.iterdir())


def _check_same(folder: Path, before: Record, now: Record) -> None:
    """Refuse a folder whose cache answers other queries."""
    compared = {
        "teacher": ("teacher", "weights"),
        "tokenizer": ("teacher", "tokenizer"),
        "prompt form": ("prompt",),
        "rule for where answers end": ("one_line",),
        "dtype of hidden states": ("states",),
        "k": ("k",),
        "temperatures": ("temperatures",),
        "dtype": ("dtype",),
        "max_new_tokens": ("max_new_tokens",),
        "shard_rows": ("shard_rows",),
    }
    for what, path in compared.items():
        was, is_now = {"one_line": True, "states": "none", **before}, now
        for name in path:
            was, is_now = was[name], is_now[name]
        if was != is_now:
            raise OutputError(
                f"{folder} was begun with another {what} ({_short(was)}, now {_short(is_now)}); "
                "give the same options to go on with it, or choose another folder"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _sides(
    config: TrainConfig,
    models: Models,
    training: Sequence[Example],
    held_out: Sequence[Example],
    forms: Forms,
    say: Callable[[str], None],
) -> list[EncodedSide]:
    """Each row once, longest first: what does not fit in memory fails at once."""
    distinct = {
        row_key(row.teacher): row.teacher
        for chosen, what in ((training, "training"), (held_out, "held-out"))
        for row in encode(config, models, chosen, forms, what, say).rows
        if row.teacher is not None
    }
    return [
        distinct[key]
        for key in sorted(
            distinct,
            key=lambda key: (
                -len(distinct[key].prompt_ids) - len(distinct[key].answer_ids),
                key,
            ),
        )
    ]


def _rows(sides: Sequence[EncodedSide]) -> list[list[Any]]:
    return [[row_key(side), len(side.places(with_eos=True))] for side in sides]


def _name_rows(
    folder: Path, before: Record | None, record: Record, sides: Sequence[EncodedSide]
) -> None:
    """Enter the digest of the rows in the record, and refuse a folder that holds other rows."""
    record["rows"] = hashlib.sha256(json.dumps(_rows(sides)).encode()).hexdigest()
    if before is not None and before["rows"] not in (None, record["rows"]):
        raise OutputError(
            f"{folder} was begun with other data or answers, another student's tokenizer, length "
            "limit, seed or --eval-limit; give the same options to go on with it, or choose "
            "another folder"
        )


def _write_shards(
    folder: Path,
    before: Record | None,
    record: Record,
    sides: Sequence[EncodedSide],
    teacher: LazyTeacher,
    say: Callable[[str], None],
) -> None:
    """Write the missing shards, and list all of them in ``cache.json``."""
    rows = _rows(sides)
    size = record["shard_rows"]
    starts = range(0, len(sides), size)
    stored = {} if before is None else {shard["file"]: shard for shard in before["shards"]}
    shards: list[Record | None] = []
    for number in range(len(starts)):
        shard = stored.get(_name(number))
        if shard is not None and not is_whole(folder / shard["file"], shard["sha256"]):
            say(f"{folder / shard['file']} is missing or damaged and is computed again")
            shard = None
        shards.append(shard)
    if record["states"] != "none":
        _write_head(folder, before, record, teacher, say)
    done = all(shard is not None for shard in shards)
    if not done:
        positions = sum(len(side.places(with_eos=True)) for side in sides)
        each = 8 * record["k"] + 16 * len(record["temperatures"]) + 20
        if record["head"] is not None:
            each = record["head"]["width"] * STATES[record["states"]].itemsize
        mebibytes = positions * each / 2**20
        say(
            f"caching {len(sides)} distinct rows, {positions} positions, {mebibytes:,.1f} MiB: "
            f"{folder}"
        )
    bar = tqdm(total=len(sides), desc="caching the teacher", unit="row", disable=done or None)
    with bar:
        for number, start in enumerate(starts):
            group = sides[start : start + size]
            if shards[number] is None:
                tensors = _shard_tensors(teacher, group, record, bar)
                shards[number] = {
                    "file": _name(number),
                    "sha256": _save_shard(folder / _name(number), tensors),
                    "rows": rows[start : start + size],
                }
                record["shards"] = [shard for shard in shards if shard is not None]
                _save(folder, record)
            else:
                bar.update(len(group))
    record.update(shards=shards, finished=True)
    _save(folder, record)


def _write_head(
    folder: Path,
    before: Record | None,
    record: Record,
    teacher: LazyTeacher,
    say: Callable[[str], None],
) -> None:
    """Write what makes logits of hidden states, unless it is there, and enter it in the record."""
    path, known = folder / HEAD_FILE, (before or {}).get("head")
    if known is None or not is_whole(path, known["sha256"]):
        if known is not None:
            say(f"{path} is missing or damaged and is written again")
        head = teacher.logits().head()
        tensors = {"weight": head.weight, "bias": head.bias}
        known = {
            "file": HEAD_FILE,
            "sha256": _save_shard(
                path,
                {
                    name: one.detach().cpu().contiguous()
                    for name, one in tensors.items()
                    if one is not None
                },
            ),
            "width": head.weight.shape[1],
            "scale": head.scale,
            "softcap": head.softcap,
        }
    record["head"] = known


def _shard_tensors(
    teacher: LazyTeacher, group: Sequence[EncodedSide], record: Record, bar: Any
) -> dict[str, Tensor]:
    batch_size = teacher.config.batch_size
    columns: dict[str, list[Tensor]] = {}
    for start in range(0, len(group), batch_size):
        sides = group[start : start + batch_size]
        kept = teacher.kept(sides, record)
        # Of a nan, or of an infinity that is no mask, nothing else is left.
        if not kept["log_normalizers" if record["head"] is None else "hidden"].isfinite().all():
            raise ModelError(
                f"logits of the teacher {teacher.config.teacher} are nan or infinite; look for "
                "such values in its weights, or load it in float32"
            )
        for name, value in kept.items():
            columns.setdefault(name, []).append(value)
        bar.update(len(sides))
    return {name: torch.cat(values) for name, values in columns.items()}


def _name(number: int) -> str:
    return f"logits-{number:05d}.safetensors"


def _save_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise OutputError(
            f"cannot write {path}: {cause}; make room, then repeat the command: it goes on behind "
            "the last shard"
        ) from error
    return file_sha256(path)


def _save(folder: Path, record: Record) -> None:
    try:
        write_record(folder, record)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder / CACHE_FILE}: {error.strerror or error}; make room, then "
            "repeat the command"
        ) from error


class LazyTeacher:
    """A teacher, loaded when it is first queried.

    Args:
        config: Names it, its dtype and the size of a batch.
        tokenizer: Its tokenizer.
        device: The device it runs on.
        say: Prints one line of progress.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.tokenizer, self.device, self.say = config, tokenizer, device, say
        self._model: PreTrainedModel | None = None
        self._logits: ModelLogits | None = None

    def model(self) -> PreTrainedModel:
        """The model itself."""
        if self._model is None:
            self.say(f"loading the teacher: {self.config.teacher}")
            self._model = load_teacher(self.config, self.device)
            check_token_ids(self._model, self.tokenizer)
        return self._model

    def with_tokenizer(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, as `TeacherTexts.complete` takes them."""
        return self.model(), self.tokenizer

    def logits(self) -> ModelLogits:
        """What takes its hidden states and its head apart.

        Raises:
            ModelError: If that cannot be done.
        """
        if self._logits is None:
            self._logits = ModelLogits(self.model())
        if self._logits.why_whole is not None:
            raise ModelError(
                f"hidden states of the teacher {self.config.teacher} do not tell its logits "
                f"({self._logits.why_whole}); cache it without --states"
            )
        return self._logits

    @torch.no_grad()
    def kept(self, sides: Sequence[EncodedSide], record: dict[str, Any]) -> dict[str, Tensor]:
        """What a cache keeps at the answer tokens of a batch of rows.

        Args:
            sides: The rows.
            record: The query: ``states``, or ``vocab_size``, ``k`` and ``temperatures``.

        Shape:
            As `TopK`, with (N,) in front: all positions, one row after another; or hidden states
            (N, H).
        """
        model = self.model()
        inputs, labels = padded_sides(sides, padding_id(self.tokenizer), with_eos=False)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        # Behind the last answer token the model says how likely the text ends: nothing more need
        # be read for it.
        targets = torch.full_like(labels, IGNORE_INDEX)
        for row, side in enumerate(sides):
            places = side.places(with_eos=True)
            ids = side.answer_ids if side.eos_id is None else [*side.answer_ids, side.eos_id]
            targets[row, places] = torch.tensor(ids)[places]
        targets = targets.to(self.device)
        mask = targets != IGNORE_INDEX
        if record["states"] != "none":
            hidden = self.logits().hidden(model, inputs, labels.shape[1])
            return {"hidden": hidden[mask].to(STATES[record["states"]]).cpu()}
        logits = last_logits(model, model, inputs, labels.shape[1])
        kept = TopK.of(
            DenseLogits(logits, mask=mask, vocab_size=record["vocab_size"]),
            targets,
            record["k"],
            record["temperatures"],
        )
        # 4 bytes are enough for any vocabulary, and twice as many make the file a third larger.
        return {
            name: value[mask].to(torch.int32 if name.endswith("ids") else torch.float32).cpu()
            for name, value in kept.tensors().items()
        }
