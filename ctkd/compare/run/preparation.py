"""Work done once, before any run: fetch, split, query the teacher, check the losses."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ctkd.compare.plan.config import TOP_K, CompareConfig
from ctkd.compare.plan.jobs import digest
from ctkd.compare.plan.methods import SEQKD, Method
from ctkd.compare.plan.splits import COLUMNS, CutRows, Splits, cut_rows, prepare_splits
from ctkd.compare.run.folder import ROWS_FOLDER, ComparisonFolder
from ctkd.distill.config import CacheSettings, TrainConfig
from ctkd.distill.data.tasks import get_task
from ctkd.distill.models.fingerprint import model_fingerprint
from ctkd.distill.models.loading import (
    check_token_ids,
    head_width,
    load_model,
    load_tokenizer,
    resolve,
)
from ctkd.distill.options import default_of
from ctkd.distill.preparing import (
    Forms,
    Models,
    answerable,
    answered_by_teacher,
    check_student,
    encode,
    teacher_form,
    teacher_precision,
    with_student,
)
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.cache_writing import write_cache
from ctkd.errors import DataError, OutputError, SettingError
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes
from ctkd.tokenization.vocabulary_map import fingerprint

__all__ = ["Prepared", "prepare"]

TEACHER_FOLDER = "teacher"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Inputs of all runs.

    Args:
        splits: The rows.
        students: The student that runs begin from, by seed, as `resolve` takes it.
        student_tokenizer, teacher_tokenizer: Of each side.
        fingerprints: Of the "student" and the "teacher", as the results depend on them.
        cache: The teacher's answers, in logits and in texts; None if neither is needed.
        teacher_logits: How losses see the teacher, for a person.
        teacher_texts: What the teacher wrote to each test prompt; None if the task asks nothing.
    """

    splits: Splits
    students: dict[int, str]
    student_tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    fingerprints: dict[str, str]
    cache: Path | None
    teacher_logits: str
    teacher_texts: list[str] | None


def prepare(config: CompareConfig, folder: ComparisonFolder, say: Say) -> Prepared:
    """Do all that no run needs to do again; what is there already is only looked up.

    Raises:
        CtkdError: If something that was given cannot be used. Nothing was trained then.
    """
    base = config.base
    check_student(base)
    with _timed("fetching models", folder):
        for name in (base.student, base.teacher):
            if name != base.student_config:
                resolve(name)
    cut = cut_rows(config, say)
    students = _students(config, cut, folder, say)
    if base.student_config is not None:
        # What the first seed's student reads, all of them read.
        made = {"student": students[base.seed], "student_config": None}
        rate = base.learning_rate
        config = replace(config, common={**config.common, **made, "learning_rate": rate})
        base = config.base
    models = _models(base)
    pair, tokenizer = models.pair, models.teacher_tokenizer
    if pair is None or tokenizer is None:
        raise SettingError("a comparison needs the tokenizers of both sides")
    _check_needs(config, pair)
    splits = prepare_splits(config, cut, models, folder.path / ROWS_FOLDER, say)
    folder.check_same("data", splits.fingerprints())
    tokenizers = {
        "student": _tokenizer_fingerprint(models.student_tokenizer, pair.student_bytes),
        "teacher": _tokenizer_fingerprint(tokenizer, pair.teacher_bytes),
    }
    folder.check_same("tokenizers", tokenizers)
    cache = None
    if not config.is_live or get_task(base.task).answered:
        with _timed("teacher cache", folder):
            cache = _cache(config, splits, folder, say)
        cache.check_teacher(base.teacher, pair.teacher_bytes)
        _check_rows(config, cache, models, splits)
        with _timed("vocabulary maps", folder):
            _check_losses(config, cache, models, pair)
    fingerprints = {
        "student": model_fingerprint(base.student),
        "teacher": model_fingerprint(base.teacher) if cache is None else cache.fingerprint,
    }
    folder.check_same("models", fingerprints)
    texts = None
    if cache is not None and get_task(base.task).answered:
        texts = _teacher_texts(config, cache, tokenizer, splits)
    student_tokenizer = models.student_tokenizer
    del models, pair
    gc.collect()
    return Prepared(
        splits=splits,
        students=students,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=tokenizer,
        fingerprints=fingerprints,
        cache=None if cache is None else cache.path,
        teacher_logits=_told(config, cache),
        teacher_texts=texts,
    )


def _students(
    config: CompareConfig, cut: CutRows, folder: ComparisonFolder, say: Say
) -> dict[int, str]:
    """The student of each seed: one for all, unless its weights are drawn."""
    base = config.base
    if base.student_config is None:
        return dict.fromkeys(config.seed_values, base.student)
    training = [row.example for row in cut.train]
    with _timed("making students", folder):
        return {
            seed: with_student(replace(base, seed=seed), training, say).student
            for seed in config.seed_values
        }


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, table: TokenBytes) -> str:
    """SHA-256 of what decides how a text is read: tokens, ends, chat template, and a probe."""
    return digest(
        {
            "tokens": fingerprint(table),
            "ends": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
            "chat template": tokenizer.chat_template,
            "probe": tokenizer("Two words, 12 times.").input_ids,
        }
    )


def _check_rows(config: CompareConfig, cache: TeacherCache, models: Models, splits: Splits) -> None:
    """Refuse a cache of other rows, or without the texts that a method is trained on.

    Else a run would find it out after hours of others.
    """
    teacher_base = config.teacher_base
    forms = Forms.of(teacher_base, splits.train.examples)
    if config.cache is not None and not config.is_live:
        for split, what in ((splits.train, "training"), (splits.curve, "held-out")):
            encoded = encode(
                teacher_base, models, list(split.examples), forms, what, lambda line: None
            )
            cache.check_rows(encoded.rows, what)
    if _teaches_in_words(config):
        chosen, prompts = answerable(
            teacher_base, models, splits.train.examples, forms, "training", lambda line: None
        )
        answered_by_teacher(chosen, prompts, cache.texts, lambda line: None)


def _teacher_texts(
    config: CompareConfig,
    cache: TeacherCache,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
) -> list[str]:
    """What the teacher wrote to each test prompt.

    Raises:
        SettingError: If its answers are of another length.
        DataError: If some are missing.
    """
    most = config.base.max_new_tokens
    if cache.record["max_new_tokens"] != most:
        raise SettingError(
            f"the teacher cache {cache.path} holds answers of {cache.record['max_new_tokens']} "
            f"tokens, but max_new_tokens is {most}; give the same"
        )
    form = teacher_form(config.teacher_base, splits.train.examples)
    prompts = form.ids(tokenizer, splits.test.examples, side="teacher")
    texts = [cache.texts.text(prompt) for prompt in prompts]
    if None in texts:
        raise DataError(
            f"the teacher cache {cache.path} lacks the teacher's answers to "
            f"{texts.count(None)} of {len(texts)} test prompts; make it with `ctkd cache --texts "
            "held-out` and the same options, or leave it out"
        )
    return [text or "" for text in texts]


@contextmanager
def _timed(name: str, folder: ComparisonFolder) -> Iterator[None]:
    started = time.perf_counter()
    finished = False
    try:
        yield
        finished = True
    finally:
        folder.spent(name, time.perf_counter() - started, finished=finished)


def _models(base: TrainConfig) -> Models:
    """Both tokenizers, and the student for the lengths and ids that it can read."""
    student_tokenizer = load_tokenizer(base.student)
    student = load_model(base.student)
    check_token_ids(student, student_tokenizer)
    teacher_tokenizer = load_tokenizer(base.teacher)
    pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
    return Models(student, student_tokenizer, None, teacher_tokenizer, pair)


def _cache(
    config: CompareConfig, splits: Splits, folder: ComparisonFolder, say: Say
) -> TeacherCache:
    if config.cache is not None:
        return TeacherCache.open(config.cache, say=say)
    texts: Literal["none", "held-out", "all"] = "held-out"
    if not get_task(config.base.task).answered:
        texts = "none"
    elif _teaches_in_words(config):
        texts = "all"
    teacher_base = config.train_config(
        Method(name="uld", loss="uld"),
        {},
        config.seed_values[0],
        data=str(splits.train.path),
        eval_data=str(splits.held_out.path),
        columns=dict(COLUMNS),
        eval_limit=len(splits.held_out.examples),
    )
    return write_cache(
        teacher_base,
        folder.path / TEACHER_FOLDER,
        CacheSettings(
            # A live teacher gives its logits itself; only its texts are kept.
            k=0 if config.is_live else config.top_k or TOP_K,
            temperatures=_temperatures(config, folder),
            texts=texts,
        ),
        say=say,
    )


def _teaches_in_words(config: CompareConfig) -> bool:
    return any(method.loss == SEQKD for method in config.methods)


def _told(config: CompareConfig, cache: TeacherCache | None) -> str:
    """A description of the teacher's logits, for a person."""
    if cache is None or config.is_live:
        return f"live, asked in {teacher_precision(config.base)}"
    return f"{cache.kept}, cached, asked in {cache.record['dtype']}"


def _temperatures(config: CompareConfig, folder: ComparisonFolder) -> list[float]:
    """Temperatures of the cache: the usual ones, and those at which some loss queries the teacher.

    Raises:
        OutputError: If a loss was added that asks for another than the cache was made for.
    """
    usual = list(default_of(CacheSettings, "temperatures"))
    if config.is_live:
        # It gives its logits itself, at any temperature.
        return usual
    queried = {float(one) for _, loss in config.made_losses() for one in loss.teacher_temperatures}
    kept: list[float] = folder.record.get("temperatures") or sorted({*usual, *queried})
    if queried <= set(kept):
        folder.keep("temperatures", kept)
        return kept
    missing = ", ".join(f"{one:g}" for one in sorted(queried - set(kept)))
    raise OutputError(
        f"the teacher cache in {folder.path} was not made for temperature {missing}, which a "
        "method asks for; choose another --output for a comparison with it"
    )


def _check_needs(config: CompareConfig, pair: TokenizerPair) -> None:
    """Refuse, before the teacher is asked about every row, what no such cache can serve."""
    if config.is_live or config.cache is not None:
        return
    size, top_k = pair.teacher_size, config.top_k or TOP_K
    for name, loss in config.made_losses():
        if loss.teacher_needs == "rows" and top_k < size:
            raise SettingError(
                f"{name} needs whole rows of the teacher's logits, and a cache of the top "
                f"{top_k} does not hold them; compare with --live-teacher, or keep all of "
                f"them with --top-k {size}"
            )


def _check_losses(
    config: CompareConfig, cache: TeacherCache, models: Models, pair: TokenizerPair
) -> None:
    """Build each loss once, for what it keeps on disk, and ask whether the cache serves it."""
    if models.student is None:
        return
    narrowed = pair.narrowed(head_width(models.student), cache.teacher_width)
    for name, loss in config.made_losses(narrowed):
        if not config.is_live:
            if loss.teacher_needs == "rows" and cache.k < cache.vocab_size:
                raise SettingError(
                    f"{name} needs whole rows of the teacher's logits, but {cache.path} keeps "
                    f"{cache.k} of {cache.vocab_size} entries; compare with --live-teacher"
                )
            cache.check_serves(loss, name)
