"""Alignment of any text and of any ids, against what a chunk is and against the plain walk."""

import functools
import itertools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import alignment as walk
from ctkd.tokenization.alignment import Aligner
from ctkd.tokenization.token_bytes import TokenBytes
from tests.tokenization import real_tokenizers as real
from tests.tokenization import trained_tokenizers as trained

REAL = {
    "gpt2": real.gpt2,
    "deepseek": real.deepseek,
    "mistral-v1": lambda: real.mistral("v1"),
    "mistral-v3": lambda: real.mistral("v3"),
}
MODELS = {"smollm2": "smollm2-135m-instruct", "gemma": "gemma-3-270m"}
TRAINED = {
    "byte-level": trained.byte_level,
    "byte-level-nfc": lambda: trained.byte_level(nfc=True),
    "gemma-like": trained.gemma_like,
    "metaspace": trained.metaspace,
    "prepending": trained.prepending,
    "unigram": trained.unigram,
    "wordpiece": trained.wordpiece,
    "end-of-word": trained.end_of_word,
}
aligner = functools.cache(Aligner)


@functools.cache
def loaded(name):
    if name in MODELS:
        return real.packaged(MODELS[name]), real.table(MODELS[name])
    tokenizer = (REAL | TRAINED)[name]()
    return tokenizer, TokenBytes.from_tokenizer(tokenizer)


ALPHABETS = [
    "aeiou\u0301\u0308\u0327\u0323\u0342\u200d\u0f71\u0f74",  # combining marks, in any order
    "\U0001f468\U0001f469\U0001f466\U0001f3fd\U0001f3fb\u200d\ufe0f\u2764\U0001f1eb\U0001f1f7",
    "日本語中文字汉字漢한국어\u1112\u1161\u11ab、。ｱｶﾞ",
    "שלום مرحبا بالعالم \u0651\u064b\u200f\u202e",
    " \t\n\r\u00a0\u2003\u3000\u2028\u0085",
    "0123456789.,-+٣४",
    "▁ ĠĊ##@<0x4>/",
]
FRAGMENTS = [
    *trained.HARD_STRINGS,
    *trained.TEXTS,
    "    ",
    "\n\n\n",
    "▁▁",
    "1234567890123",
    "\U0001f469\u200d\U0001f680",
    "don't",
    "<|endoftext|>",
    "</s>",
]
FORMS = ("NFC", "NFD", None)


@st.composite
def adversarial_texts(draw):
    pieces = draw(
        st.lists(
            st.one_of(
                st.sampled_from(FRAGMENTS),
                *(st.text(alphabet, max_size=12) for alphabet in ALPHABETS),
                st.text(st.characters(codec="utf-8"), max_size=8),
            ),
            max_size=5,
        )
    )
    text = "".join(pieces)
    form = draw(st.sampled_from(FORMS))
    return text if form is None else unicodedata.normalize(form, text)


batches = st.lists(adversarial_texts(), min_size=1, max_size=6)


def check_row(aligned, row, tables, ids):
    """What chunks are, in words other than the aligner's and the walk's."""
    chunk_ids = [
        side[row, : len(row_ids)].tolist()
        for side, row_ids in zip(
            (aligned.student_chunk_ids, aligned.teacher_chunk_ids), ids, strict=True
        )
    ]
    count = int(aligned.chunks[row])
    members = []
    for table, numbers, row_ids in zip(tables, chunk_ids, ids, strict=True):
        chunks = [[] for _ in range(count)]
        for number, token in zip(numbers, row_ids, strict=True):
            if number >= 0:
                chunks[number].append(table.bytes_of[token])
        assert all(chunks), "chunks are numbered without gaps"
        members.append(chunks)
    for ours, theirs in zip(*members, strict=True):
        assert b"".join(ours) == b"".join(theirs)
        cuts = [set(itertools.accumulate(map(len, side))) for side in (ours, theirs)]
        assert len(cuts[0] & cuts[1]) == 1, "a common end lies inside"
    texts = [
        table.decode(i for i in side if i >= 0) for table, side in zip(tables, ids, strict=True)
    ]
    covered = b"".join(itertools.chain.from_iterable(members[0]))
    assert len(covered) == aligned.covered_bytes[row]
    assert [int(aligned.student_bytes[row]), int(aligned.teacher_bytes[row])] == [*map(len, texts)]
    differences = {difference.row: difference for difference in aligned.differences}
    assert (row in differences) == (texts[0] != texts[1])
    if row not in differences:
        assert covered == texts[0]
        assert aligned.row_coverage[row] == 1


def check_batch(tables, student_ids, teacher_ids):
    aligned = aligner(*tables).align(student_ids, teacher_ids)
    differences = {difference.row: difference for difference in aligned.differences}
    for row, ids in enumerate(zip(student_ids, teacher_ids, strict=True)):
        check_row(aligned, row, tables, ids)
        expected = walk.align(tables[0], ids[0], tables[1], ids[1])
        for side, chunks, length in (
            (aligned.student_chunk_ids, expected.student, len(ids[0])),
            (aligned.teacher_chunk_ids, expected.teacher, len(ids[1])),
        ):
            assert side[row].tolist() == chunks + [-1] * (side.shape[1] - length)
        assert aligned.chunks[row] == expected.chunks
        assert aligned.one_to_one[row] == expected.one_to_one
        assert aligned.covered_bytes[row] == expected.covered_bytes
        if row in differences:
            assert (differences[row].student, differences[row].teacher) == expected.middles
        else:
            assert expected.middles == (b"", b"")
    assert aligned.num_chunks == max(aligned.chunks.tolist(), default=0)
    return aligned


def in_a_ring(names):
    """Each is once the student and once the teacher."""
    names = [*names]
    return list(zip(names, [*names[1:], names[0]], strict=True))


def check_texts(student, teacher, texts):
    (student_tokenizer, student_table), (teacher_tokenizer, teacher_table) = (
        loaded(student),
        loaded(teacher),
    )
    return check_batch(
        (student_table, teacher_table),
        student_tokenizer(texts)["input_ids"],
        teacher_tokenizer(texts)["input_ids"],
    )


@pytest.mark.parametrize(("student", "teacher"), in_a_ring(REAL))
@settings(deadline=None, max_examples=40)
@given(texts=batches)
def test_real_tokenizers_on_adversarial_texts(student, teacher, texts):
    aligned = check_texts(student, teacher, texts)
    if {student, teacher} == {"gpt2", "deepseek"}:  # neither changes a text
        changed = [row for row, text in enumerate(texts) if "<|endoftext|>" in text]
        assert [difference.row for difference in aligned.differences] == changed


@pytest.mark.models
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("smollm2", "gemma"), ("gemma", "smollm2"), ("gemma", "gpt2"), ("mistral-v3", "smollm2")],
)
@settings(deadline=None, max_examples=15)
@given(texts=batches)
def test_packaged_models_on_adversarial_texts(student, teacher, texts):
    check_texts(student, teacher, texts)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(name, "gpt2") if number % 2 else ("mistral-v1", name) for number, name in enumerate(TRAINED)],
)
@settings(deadline=None, max_examples=15)
@given(texts=batches)
def test_tokenizers_of_every_kind_on_adversarial_texts(student, teacher, texts):
    check_texts(student, teacher, texts)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gpt2", "deepseek"), ("deepseek", "mistral-v3"), ("mistral-v1", "gpt2")],
)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_ids_that_were_tampered_with(student, teacher, data):
    """As generation does: tokens are missing, doubled, other ones; specials are in between."""
    texts = data.draw(batches)
    ids = []
    for name in (student, teacher):
        tokenizer, table = loaded(name)
        side = [list(row) for row in tokenizer(texts)["input_ids"]]
        any_id = st.one_of(
            st.integers(-100, len(table) - 1),
            st.sampled_from([tokenizer.bos_token_id, tokenizer.eos_token_id, -100]),
        )
        for row in side:
            for _ in range(data.draw(st.integers(0, 3))):
                at = data.draw(st.integers(0, len(row)))
                row[at : at + data.draw(st.integers(0, 2))] = data.draw(
                    st.lists(any_id, max_size=2)
                )
        ids.append(side)
    check_batch((loaded(student)[1], loaded(teacher)[1]), *ids)


# All short strings of two letters, and two tokens of each role: texts agree and differ often.
_LETTERS = [bytes(word) for size in (1, 2, 3) for word in itertools.product(b"ab", repeat=size)]
_ROLES = ("bos", "eos", "pad", "other")
TINY = TokenBytes((*_LETTERS, *[b""] * 9), (*["text"] * len(_LETTERS), *_ROLES, *_ROLES, "text"))
TINY_IDS = st.integers(-1, len(TINY) - 1)
SPECIALS = st.integers(len(_LETTERS) - 1, len(TINY) - 1).map(
    lambda index: -100 if index < len(_LETTERS) else index
)


@st.composite
def two_cuts(draw):
    """One text cut twice, then perhaps changed on one side, with specials strewn in."""
    text = draw(st.lists(st.sampled_from(b"ab"), max_size=12).map(bytes))
    sides = []
    for _ in range(2):
        letters = bytearray(text)
        if draw(st.booleans()):
            at = draw(st.integers(0, len(letters)))
            letters[at : at + draw(st.integers(0, 2))] = draw(
                st.lists(st.sampled_from(b"ab"), max_size=2).map(bytes)
            )
        row = []
        while letters:
            size = draw(st.integers(1, min(3, len(letters))))
            row.append(_LETTERS.index(bytes(letters[:size])))
            del letters[:size]
        for _ in range(draw(st.integers(0, 4))):
            row.insert(draw(st.integers(0, len(row))), draw(SPECIALS))
        sides.append(row)
    return tuple(sides)


@settings(deadline=None, max_examples=250)
@given(st.lists(two_cuts(), max_size=5))
def test_small_texts_cut_twice(rows):
    check_batch((TINY, TINY), [row[0] for row in rows], [row[1] for row in rows])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.lists(TINY_IDS, max_size=9), st.lists(TINY_IDS, max_size=9)), max_size=5)
)
def test_ids_at_random(rows):
    check_batch((TINY, TINY), [row[0] for row in rows], [row[1] for row in rows])
