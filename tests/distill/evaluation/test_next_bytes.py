"""Next bytes against loops over the vocabulary."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from ctkd.distill.evaluation.next_bytes import (
    Branches,
    byte_masses,
    divergence,
    next_byte_divergence,
)
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.errors import DataError, ModelError
from ctkd.tokenization.token_bytes import TokenBytes
from tests.distill.tiny import Setup
from tests.distill.tiny_runs import Workplace, invoke

ALPHABET = b"\xff\xfea\x00"


def random_side(generator, text, size):
    """A vocabulary of pieces with bytes up to 255, a random tokenization, and logits."""
    pieces = {bytes([one]) for one in ALPHABET}
    while len(pieces) < size:
        pieces.add(bytes(generator.choices(ALPHABET, k=generator.randint(1, 4))))
    # One without bytes, and two that have the same.
    bytes_of = (b"", *pieces, b"a")
    table = TokenBytes(bytes_of, ("eos", *["text"] * (len(pieces) + 1)))
    ids, place = [], 0
    while place < len(text):
        fitting = [i for i, one in enumerate(bytes_of) if one and text[place:].startswith(one)]
        ids.append(generator.choice(fitting))
        place += len(bytes_of[ids[-1]])
    rows = [[generator.gauss(0, 4) for _ in bytes_of] for _ in ids]
    return table, ids, torch.tensor(rows, dtype=torch.float64)


def looped(table, ids, rows):
    masses, starts = [], []
    for index, row in zip(ids, rows.softmax(-1).tolist(), strict=True):
        piece = table.bytes_of[index]
        for depth in range(len(piece)):
            found = {}
            for one, prob in zip(table.bytes_of, row, strict=True):
                if len(one) > depth and one[:depth] == piece[:depth]:
                    found[one[depth]] = found.get(one[depth], 0.0) + prob
            masses.append(found)
            starts.append(depth == 0)
    return masses, starts


def test_masses_and_divergence_are_those_of_loops():
    for seed in range(8):
        check_against_loops(random.Random(seed))


def check_against_loops(generator):
    text = bytes(generator.choices(ALPHABET, k=12))
    sides = [random_side(generator, text, size) for size in (12, 40)]
    found, expected = [], []
    for table, ids, rows in sides:
        masses = byte_masses(rows, ids, table, Branches(table.bytes_of))
        loops, starts = looped(table, ids, rows)
        for got, wanted in zip(masses.log_masses, loops, strict=True):
            assert {int(one) for one in np.nonzero(~np.isnan(got))[0]} == set(wanted)
            for byte, mass in wanted.items():
                assert math.exp(got[byte]) == pytest.approx(mass, rel=1e-12)
        assert masses.starts.tolist() == starts
        found.append(masses)
        expected.append((loops, starts))
    bits = []
    for theirs, ours in zip(expected[0][0], expected[1][0], strict=True):
        common = theirs.keys() & ours.keys()
        t, s = ({b: one[b] / sum(one[c] for c in common) for b in common} for one in (theirs, ours))
        bits.append(sum(t[b] * math.log2(t[b] / s[b]) for b in common))
    both = [one and other for one, other in zip(expected[0][1], expected[1][1], strict=True)]
    answer = divergence(*found)
    assert answer.bytes == 12 and answer.start_bytes == sum(both)
    assert answer.total == pytest.approx(sum(bits), rel=1e-10)
    assert answer.starts == pytest.approx(
        sum(b for b, one in zip(bits, both, strict=True) if one), rel=1e-10
    )
    assert divergence(found[0], found[0]).total == 0.0


def test_small_masses_are_not_lost_and_nan_is_no_match():
    table = TokenBytes((b"a", b"b", b"ba", b"bb"), ("text",) * 4)
    branches = Branches(table.bytes_of)

    def masses(*logits, text=2):
        rows = torch.tensor([logits], dtype=torch.float64)
        return byte_masses(rows, [text], table, branches)

    flat = masses(0.0, 0.0, 0.0, 0.0)
    sharp = masses(0.0, -5000.0, -3000.0, -2000.0)
    assert sharp.log_masses[0, ord("b")] == pytest.approx(-2000.0)
    # 1/4 and 3/4 against 1 and e^-2000; then 1/2 each against e^-1000 and 1.
    first = 0.25 * math.log2(0.25) + 0.75 * (math.log2(0.75) + 2000 / math.log(2))
    second = -1.0 + 0.5 * 1000 / math.log(2)
    assert divergence(flat, sharp).total == pytest.approx(first + second, rel=1e-12)
    assert divergence(sharp, flat).total == pytest.approx(math.log2(4) + 1.0, rel=1e-12)
    ruled_out = masses(0.0, 0.0, -math.inf, 0.0)
    assert divergence(flat, ruled_out).total == math.inf
    assert divergence(ruled_out, flat).total < math.inf
    with pytest.raises(ModelError, match="logits are no numbers"):
        masses(0.0, math.nan, 0.0, 0.0)


def test_a_model_expects_what_its_own_teacher_expects():
    setup = Setup(5)
    student, teacher = (ModelLogits(one) for one in (setup.student, setup.teacher))
    tokenizers = setup.student_tokenizer, setup.teacher_tokenizer

    def measure(rows, batch_size):
        return next_byte_divergence(
            teacher, tokenizers[1], student, tokenizers[0], rows, batch_size=batch_size
        ).summary()

    alone, together = measure(setup.rows, 1), measure(setup.rows, 3)
    assert alone == pytest.approx(together, rel=1e-9)
    assert alone["next_byte_divergence"] > 0.0 and 0.0 < alone["next_byte_starts"] < 1.0
    same = [replace(row, teacher=row.student) for row in setup.rows]
    itself = next_byte_divergence(student, tokenizers[0], student, tokenizers[0], same).summary()
    assert itself["next_byte_divergence"] == pytest.approx(0.0, abs=1e-12)
    # Answers of as many bytes that are others.
    ids = setup.rows[1].teacher.answer_ids
    assert len(set(ids)) > 1
    other = replace(setup.rows[1], teacher=replace(setup.rows[1].teacher, answer_ids=ids[::-1]))
    assert measure([setup.rows[0], other], 2) == pytest.approx(measure(setup.rows[:1], 2))
    with pytest.raises(DataError, match="no row has the same bytes"):
        measure([other], 1)


def test_the_command_measures_it(tmp_path):
    place = Workplace(tmp_path)
    words = place.evaluate("--next-bytes", "--format", "json", "--limit", "3")
    found = invoke(words[0], str(place.student), *words[1:], "--teacher", str(place.teacher))
    assert found.exit_code == 0, found.output
    other = json.loads(found.stdout)
    assert other["next_byte_divergence"] > 0.0 and "kd" not in other
    found = invoke(words[0], str(place.student), *words[1:], "--teacher", str(place.student))
    assert json.loads(found.stdout)["next_byte_divergence"] == pytest.approx(0.0, abs=1e-9)
    found = invoke(*words, "--predictions", str(place.rows))
    assert found.exit_code == 1 and "--next-bytes belongs to a model" in found.stderr
