"""A cache whose writing was killed again and again ends as one that was not, and asks no more."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from ctkd.distill.teachers import cache_writing
from ctkd.distill.teachers import texts as teacher_texts
from ctkd.distill.teachers.cache import TeacherCache, row_key
from ctkd.distill.teachers.cache_writing import LazyTeacher
from tests.distill.tiny_caches import CachePlace

SHARD_ROWS = 3
KILLS = 4
GROUP = 4


def write_watched(place: Path, name: str, attempt: int) -> None:
    """Write a cache, slowly, and log what is asked and what is kept."""
    teacher_texts._GROUP = GROUP
    log = os.open(place / f"{name}.log", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    kept, save, generate = LazyTeacher.kept, cache_writing._save, teacher_texts.generate
    append = teacher_texts.TeacherTexts._append

    def write(*words: object) -> None:
        os.write(log, (" ".join(map(str, (attempt, *words))) + "\n").encode())

    def asking(self, sides, record):
        for side in sides:
            write("asked", row_key(side))
        time.sleep(0.01)
        return kept(self, sides, record)

    def saving(folder, record):
        time.sleep(0.01)
        save(folder, record)
        for shard in record["shards"]:
            for key, _ in shard["rows"]:
                write("kept", key)

    def answering(model, tokenizer, prompts, **settings):
        for prompt in prompts:
            write("asked", "prompt-" + "-".join(map(str, prompt)))
        answering.last = prompts
        time.sleep(0.01)
        return generate(model, tokenizer, prompts, **settings)

    def appending(self, texts):
        append(self, texts)
        for prompt in answering.last:
            write("kept", "prompt-" + "-".join(map(str, prompt)))

    LazyTeacher.kept, cache_writing._save, teacher_texts.generate = asking, saving, answering
    teacher_texts.TeacherTexts._append = appending
    config = CachePlace.__new__(CachePlace)
    config.folder, config.rows = place, place / "rows.jsonl"
    config.student, config.teacher = place / "student", place / "teacher"
    config.cache(name, k=6, shard_rows=SHARD_ROWS, texts="all", say=lambda line: None)


def drive(folder: str) -> None:
    """Fork each attempt, kill those that are to be killed, and write down how each ended."""
    place, chance, ends = Path(folder), random.Random(7), []
    for name, attempt, kills in [
        ("straight", 0, 0),
        *(("killed", attempt, KILLS) for attempt in range(KILLS + 1)),
    ]:
        log = place / f"{name}.log"
        log.touch()
        size = log.stat().st_size
        child = os.fork()
        if child == 0:
            write_watched(place, name, attempt)
            os._exit(0)
        if attempt < kills:
            # Somewhere within the next quarter or so of what is to be done.
            until = size + chance.randrange(1, 3000)
            while (
                log.stat().st_size < until
                and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.001)
            time.sleep(chance.random() * 0.02)
            os.kill(child, signal.SIGKILL)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    (place / "ends").write_text(json.dumps(ends))


def logged(place: CachePlace, name: str) -> list[list[str]]:
    """What all attempts asked and kept."""
    return [line.split() for line in (place.folder / f"{name}.log").read_text().splitlines()]


@pytest.mark.slow
def test_a_cache_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path, forks):
    place, output = CachePlace(tmp_path), tmp_path / "output"
    assert forks.run(drive, str(tmp_path), output=output) == 0, output.read_text()
    first, *ends = json.loads((tmp_path / "ends").read_text())
    assert (first, ends[-1]) == (0, 0)
    assert ends.count(-9) >= KILLS // 2, ends
    straight_log, log = logged(place, "straight"), logged(place, "killed")

    straight, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("straight", "killed")
    )
    assert straight.keys() == killed.keys()
    texts = [files.pop("texts.jsonl") for files in (straight, killed)]
    assert straight == killed
    ours, theirs = (
        {(e := json.loads(line))["prompt"]: e for line in t.splitlines()} for t in texts
    )
    assert ours == theirs
    assert len(ours) == 20

    cache = TeacherCache.open(tmp_path / "killed")
    shard_of = {
        key: number
        for number, shard in enumerate(cache.record["shards"])
        for key, _ in shard["rows"]
    }
    assert len(shard_of) == 20
    kept: set[str] = set()
    for attempt in range(len(ends)):
        mine = [words[1:] for words in log if words[0] == str(attempt)]
        asked = [key for what, key in mine if what == "asked"]
        assert len(asked) == len(set(asked))
        assert not kept & set(asked), "what was kept is asked again"
        now = {key for what, key in mine if what == "kept"}
        lost = set(asked) - now
        if attempt == len(ends) - 1:
            assert not lost
        rows = {key for key in lost if key in shard_of}
        assert len({shard_of[key] for key in rows}) <= 1
        assert len(rows) <= SHARD_ROWS
        assert len(lost - rows) <= GROUP
        kept |= now
    counts = Counter(words[2] for words in log if words[1] == "asked")
    assert len(counts) == 40
    assert max(counts.values()) > 1, "no attempt was interrupted within its work"
    assert sum(1 for words in straight_log if words[1] == "asked") == 40
