"""A run that is killed ten times, at random moments, ends with the weights of one that is not."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.distill.tiny_runs import record
from tests.distill.training.killed import STAGES
from tests.forks import python

ROOT = Path(__file__).parents[3]
KILLS = len(STAGES)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_that_is_killed_ten_times_ends_like_one_that_is_not(place):
    words = place.train("killed", "--loss", "uld", "--learning-rate", "0.01")
    done = subprocess.run(
        [*python(), "-m", "tests.distill.training.killed", str(place.folder), *words],
        cwd=ROOT,
        # Compiled loops would be read anew in each process.
        env={
            **os.environ,
            "CTKD_BACKEND": "reference",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert KILLS >= 10
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["killed"] * KILLS + [
        "ended"
    ]
    straight, killed = place.folder / "straight", place.folder / "killed"

    said = [(place.folder / f"killed-{number}.log").read_text() for number in range(KILLS + 1)]
    assert [re.findall(r"^killed in (\w+)", text, re.MULTILINE) for text in said[:-1]] == [
        [name] for name in STAGES
    ]
    went_on_from = {int(one) for text in said for one in re.findall(r"from checkpoint-(\d+)", text)}
    assert len(went_on_from) > 2
    assert min(went_on_from) > 0

    name = "model.safetensors"
    assert (straight / name).read_bytes() == (killed / name).read_bytes()
    assert (straight / name).read_bytes() != (place.student / name).read_bytes()
    assert sorted(path.name for path in killed.rglob("*")) == sorted(
        path.name for path in straight.rglob("*")
    )
    results = record(killed)["results"]
    assert "finished" in results
    for stage in ("losses before", "losses after", "student before", "student after", "steps"):
        assert results[stage] == record(straight)["results"][stage]
