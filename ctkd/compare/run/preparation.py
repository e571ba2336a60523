"""Work done once, before any run: fetch, split, query the teacher, check the losses."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctkd.compare.plan.config import CompareConfig
from ctkd.compare.plan.methods import SEQKD, Method
from ctkd.compare.plan.splits import COLUMNS, Splits, prepare_splits
from ctkd.compare.run.folder import ROWS_FOLDER, ComparisonFolder
from ctkd.distill.config import CacheSettings, TrainConfig
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
    encode,
    teacher_dtype,
)
from ctkd.distill.teachers.cache import TeacherCache
from ctkd.distill.teachers.cache_writing import write_cache
from ctkd.errors import DataError, OutputError, SettingError
from ctkd.loss import Loss
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenizers import Pair

__all__ = ["Prepared", "prepare"]

TEACHER_FOLDER = "teacher"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Inputs of all runs.

    Args:
        splits: The rows.
        student_tokenizer: The student's.
        fingerprints: Of the "student" and the "teacher", as the results depend on them.
        cache: The teacher's answers, in logits and in texts.
        teacher_logits: How losses see the teacher, for a person.
        teacher_texts: What the teacher wrote to each test prompt.
    """

    splits: Splits
    student_tokenizer: PreTrainedTokenizerBase
    fingerprints: dict[str, str]
    cache: Path
    teacher_logits: str
    teacher_texts: list[str]


def prepare(config: CompareConfig, folder: ComparisonFolder, say: Say) -> Prepared:
    """Do all that no run needs to do again; what is there already is only looked up.

    Raises:
        CtkdError: If something that was given cannot be used. Nothing was trained then.
    """
    base = config.base
    with _timed("fetching models", folder):
        for name in (base.student, base.teacher):
            resolve(name)
    models = _models(base)
    _check_needs(config, models)
    splits = prepare_splits(config, models, folder.path / ROWS_FOLDER, say)
    folder.check_same("data", splits.fingerprints())
    with _timed("teacher cache", folder):
        cache = _cache(config, splits, folder, say)
    pair = models.pair
    tokenizer = models.teacher_tokenizer
    if pair is None or tokenizer is None:
        raise SettingError("a comparison needs the tokenizers of both sides")
    cache.check_teacher(base.teacher, pair.teacher_bytes)
    if cache.record["max_new_tokens"] != base.max_new_tokens:
        raise SettingError(
            f"the teacher cache {cache.path} holds answers of {cache.record['max_new_tokens']} "
            f"tokens, but max_new_tokens is {base.max_new_tokens}; give the same"
        )
    teacher_base = config.teacher_base
    forms = Forms.of(teacher_base, splits.train.examples)
    if config.cache is not None and not config.live_teacher:
        for split, what in ((splits.train, "training"), (splits.curve, "held-out")):
            encoded = encode(
                teacher_base, models, list(split.examples), forms, what, lambda line: None
            )
            cache.check_rows(encoded.rows, what)
    if _teaches_in_words(config):
        # Else a run would find out, after hours of others, that the cache lacks training texts.
        chosen, prompts = answerable(
            teacher_base, models, splits.train.examples, forms, "training", lambda line: None
        )
        answered_by_teacher(chosen, prompts, cache.texts, lambda line: None)
    prompts = forms.teacher.ids(tokenizer, splits.test.examples, side="teacher")
    texts = [cache.texts.text(prompt) for prompt in prompts]
    if None in texts:
        raise DataError(
            f"the teacher cache {cache.path} lacks the teacher's answers to "
            f"{texts.count(None)} of {len(texts)} test prompts; make it with `ctkd cache --texts "
            "held-out` and the same options, or leave it out"
        )
    with _timed("vocabulary maps", folder):
        _check_losses(config, cache, models, pair)
    fingerprints = {"student": model_fingerprint(base.student), "teacher": cache.fingerprint}
    folder.check_same("models", fingerprints)
    del models, pair
    gc.collect()
    return Prepared(
        splits=splits,
        student_tokenizer=load_tokenizer(base.student),
        fingerprints=fingerprints,
        cache=cache.path,
        teacher_logits=_told(config, cache),
        teacher_texts=[text or "" for text in texts],
    )


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
            k=0 if config.live_teacher else config.top_k,
            temperatures=_temperatures(config, folder),
            texts="all" if _teaches_in_words(config) else "held-out",
        ),
        say=say,
    )


def _teaches_in_words(config: CompareConfig) -> bool:
    return any(method.loss == SEQKD for method in config.methods)


def _told(config: CompareConfig, cache: TeacherCache) -> str:
    """A description of the teacher's logits, for a person."""
    if config.live_teacher:
        return f"live, asked in {str(teacher_dtype(config.base)).removeprefix('torch.')}"
    kept = "all" if cache.k == cache.vocab_size else f"top {cache.k}"
    return f"{kept} of {cache.vocab_size}, cached, asked in {cache.record['dtype']}"


def _losses(config: CompareConfig, pair: Pair | None) -> Iterator[tuple[str, Loss]]:
    """Every loss of every trial, with a name for messages."""
    for method in config.methods:
        for varied in method.points() if method.distils else []:
            loss = config.train_config(method, varied, config.seed_values[0]).make_loss(pair)
            if loss is not None:
                yield method.name, loss


def _temperatures(config: CompareConfig, folder: ComparisonFolder) -> list[float]:
    """Temperatures of the cache: the usual ones, and those at which some loss queries the teacher.

    Raises:
        OutputError: If a loss was added that asks for another than the cache was made for.
    """
    usual = list(default_of(CacheSettings, "temperatures"))
    if config.live_teacher:
        # It gives its logits itself, at any temperature.
        return usual
    queried = {float(one) for _, loss in _losses(config, None) for one in loss.teacher_temperatures}
    kept: list[float] = folder.record.get("temperatures") or sorted({*usual, *queried})
    if queried <= set(kept):
        folder.keep("temperatures", kept)
        return kept
    missing = ", ".join(f"{one:g}" for one in sorted(queried - set(kept)))
    raise OutputError(
        f"the teacher cache in {folder.path} was not made for temperature {missing}, which a "
        "method asks for; choose another --output for a comparison with it"
    )


def _check_needs(config: CompareConfig, models: Models) -> None:
    """Refuse, before the teacher is asked about every row, what no such cache can serve."""
    if config.live_teacher or config.cache is not None or models.pair is None:
        return
    size = models.pair.teacher_size
    for name, loss in _losses(config, None):
        if loss.teacher_needs == "rows" and config.top_k < size:
            raise SettingError(
                f"{name} needs whole rows of the teacher's logits, and a cache of the top "
                f"{config.top_k} does not hold them; compare with --live-teacher, or keep all of "
                f"them with --top-k {size}"
            )


def _check_losses(
    config: CompareConfig, cache: TeacherCache, models: Models, pair: TokenizerPair
) -> None:
    """Build each loss once, for what it keeps on disk, and ask whether the cache serves it."""
    if models.student is None:
        return
    narrowed = pair.narrowed(head_width(models.student), cache.teacher_width)
    for name, loss in _losses(config, narrowed):
        if not config.live_teacher:
            if loss.teacher_needs == "rows" and cache.k < cache.vocab_size:
                raise SettingError(
                    f"{name} needs whole rows of the teacher's logits, but {cache.path} keeps "
                    f"{cache.k} of {cache.vocab_size} entries; compare with --live-teacher"
                )
            cache.check_serves(loss, name)
