"""A cache whose writing was killed again and again ends as one that was not, and asks no more."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ctkd.distill.teachers.cache import TeacherCache
from tests.distill.tiny_caches import CachePlace

ROOT = Path(__file__).parents[3]
SHARD_ROWS = 3
KILLS = 4
GROUP = 4

DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import ctkd.ops.cpu  # so that no attempt has to
from transformers import LlamaForCausalLM
from ctkd.distill.teachers import cache_writing
from ctkd.distill.teachers import texts as teacher_texts
from ctkd.distill.teachers.cache_writing import LazyTeacher
from ctkd.distill.teachers.cache_writing import write_cache
from ctkd.distill.config import TrainConfig
from ctkd.distill.teachers.cache import row_key
from tests.distill.tiny_caches import CachePlace

place = Path(sys.argv[1])
teacher_texts._GROUP = {group}

def write(*words):
    os.write(out, (" ".join(map(str, words)) + "\\n").encode())

def child(name, attempt):
    top_k, save, generate = LazyTeacher.top_k, cache_writing._save, teacher_texts.generate
    append = teacher_texts.TeacherTexts._append

    def asking(self, sides, record):
        for side in sides:
            write(attempt, "asked", row_key(side))
        time.sleep(0.01)
        return top_k(self, sides, record)

    def saving(folder, record):
        time.sleep(0.01)
        save(folder, record)
        for shard in record["shards"]:
            for key, _ in shard["rows"]:
                write(attempt, "kept", key)

    def answering(model, tokenizer, prompts, **settings):
        for prompt in prompts:
            write(attempt, "asked", "prompt-" + "-".join(map(str, prompt)))
        answering.last = prompts
        time.sleep(0.01)
        return generate(model, tokenizer, prompts, **settings)

    def appending(self, texts):
        append(self, texts)
        for prompt in answering.last:
            write(attempt, "kept", "prompt-" + "-".join(map(str, prompt)))

    LazyTeacher.top_k, cache_writing._save, teacher_texts.generate = asking, saving, answering
    teacher_texts.TeacherTexts._append = appending
    config = CachePlace.__new__(CachePlace)
    config.folder, config.rows = place, place / "rows.jsonl"
    config.student, config.teacher = place / "student", place / "teacher"
    config.cache(name, k=6, shard_rows={rows}, texts="all", say=lambda line: None)

chance = random.Random(7)
plan = [("straight", 0, 0), *(("killed", attempt, {kills}) for attempt in range({kills} + 1))]
for name, attempt, kills in plan:
    out = os.open(place / f"{name}.log", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    size = os.fstat(out).st_size
    pid = os.fork()
    if not pid:
        try:
            child(name, attempt)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if attempt < kills:
        # Somewhere within the next quarter or so of what is to be done.
        until = size + chance.randrange(1, 3000)
        while os.fstat(out).st_size < until and os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ) is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def driven(place: CachePlace) -> list[int]:
    """How each attempt ended: one that is left alone, and those that are killed."""
    script = place.folder / "driver.py"
    program = DRIVER.replace("{group}", str(GROUP)).replace("{rows}", str(SHARD_ROWS))
    script.write_text(program.replace("{kills}", str(KILLS)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    done = subprocess.run(
        [sys.executable, str(script), str(place.folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line) for line in done.stdout.split()]


def logged(place: CachePlace, name: str) -> list[list[str]]:
    """What all attempts asked and kept."""
    return [line.split() for line in (place.folder / f"{name}.log").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_cache_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    place = CachePlace(tmp_path)
    first, *ends = driven(place)
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
