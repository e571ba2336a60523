"""Alignments one can check by hand, and what is refused."""

import numpy as np
import pytest
import torch

from ctkd.distill.data.rows import Rows
from ctkd.distill.data.tasks import examples
from ctkd.errors import BatchError, DataError
from ctkd.tokenization.alignment import Aligner, Difference
from ctkd.tokenization.token_bytes import TokenBytes
from tests.tokenization import real_tokenizers as real
from tests.tokenization import trained_tokenizers as trained

SPECIAL = {"<bos>": "bos", "<eos>": "eos", "<pad>": "pad", "<other>": "other"}


def aligned_rows(*rows):
    """Align rows of tokens written out, each token having an id of its own."""
    words = [sorted({word for row in rows for word in row[side]}) for side in (0, 1)]
    tables = [
        TokenBytes(
            tuple(b"" if word in SPECIAL else word.encode("latin-1") for word in side),
            tuple(SPECIAL.get(word, "text") for word in side),
        )
        for side in words
    ]
    ids = [[[words[side].index(word) for word in row[side]] for row in rows] for side in (0, 1)]
    return Aligner(*tables).align(*ids)


def aligned(student, teacher):
    found = aligned_rows((student, teacher))
    return found.student_chunk_ids[0].tolist(), found.teacher_chunk_ids[0].tolist()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (["ab", "c"], ["ab", "c"], ([0, 1], [0, 1])),
        (["ab", "c"], ["a", "bc"], ([0, 0], [0, 0])),
        (["ab", "c", "d"], ["a", "b", "cd"], ([0, 1, 1], [0, 0, 1])),
        (["abcd"], ["a", "b", "c", "d"], ([0], [0, 0, 0, 0])),
        ([], [], ([], [])),
        (["\xc3", "\xa9", "s"], ["\xc3\xa9s"], ([0, 0, 0], [0])),
        (["\xf0\x9f", "\x98\x80"], ["\xf0\x9f", "\x98", "\x80"], ([0, 1], [0, 1, 1])),
    ],
    ids=["same", "one chunk", "two chunks", "many to one", "empty", "é", "emoji"],
)
def test_equal_texts(student, teacher, expected):
    assert aligned(student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (["<bos>", "a", "<eos>"], ["<bos>", "a", "<eos>"], ([0, 1, 2], [0, 1, 2])),
        (["<bos>", "a"], ["a", "<eos>"], ([-1, 0], [0, -1])),
        (["<bos>", "a"], ["<eos>", "a"], ([-1, 0], [-1, 0])),
        (["a", "<bos>"], ["<bos>", "a"], ([0, -1], [-1, 0])),
        (["<bos>", "<bos>", "a"], ["<bos>", "a"], ([0, -1, 1], [0, 1])),
        (["a", "<eos>", "<bos>", "b"], ["a", "<eos>", "<bos>", "b"], ([0, 1, 2, 3], [0, 1, 2, 3])),
        (["a", "<eos>", "<bos>"], ["a", "<bos>", "<eos>"], ([0, 1, 2], [0, 2, 1])),
        (["<pad>", "a", "<other>"], ["<pad>", "a", "<other>"], ([-1, 0, -1], [-1, 0, -1])),
        (["a", "<eos>", "b"], ["ab"], ([0, -1, 0], [0])),
        (["a", "<eos>", "b"], ["ab", "<eos>"], ([0, -1, 0], [0, -1])),
        (["a", "", "b"], ["a", "b", ""], ([0, -1, 1], [0, 1, -1])),
        (["<bos>", "<eos>"], ["<bos>", "<eos>"], ([0, 1], [0, 1])),
    ],
)
def test_special_tokens_pair_by_role_and_place(student, teacher, expected):
    assert aligned(student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # A space in front of one text alone, as a token and inside one.
        ([" ", "Hi", "!"], ["Hi", "!"], ([-1, 0, 1], [0, 1])),
        ([" Hi", "!"], ["Hi", "!"], ([-1, 0], [-1, 0])),
        # One text is the other's beginning: the ends of sequence still correspond.
        (["ab", "c", "<eos>"], ["ab", "<eos>"], ([0, -1, 1], [0, 1])),
        # The middle differs; what overlaps it has no chunk.
        (["a", "bx", "cd"], ["a", "by", "c", "d"], ([0, -1, 1], [0, -1, 1, 1])),
        (["a", "b", "x", "cd"], ["ab", "yc", "d"], ([0, 0, -1, -1], [0, -1, -1])),
        # The first common byte of the end is inside a token: the first common cut comes later.
        (["x", "ab", "c"], ["y", "a", "b", "c"], ([-1, 0, 1], [-1, 0, 0, 1])),
        (["xa", "b", "c"], ["y", "a", "bc"], ([-1, 0, 0], [-1, -1, 0])),
        # A common end shares no byte with the common start.
        (["a", "a"], ["a", "a", "a"], ([0, 1], [0, 1, -1])),
        (["a", "b", "a"], ["a"], ([0, -1, -1], [0])),
        # Nothing in common; one text is empty.
        (["a"], ["b"], ([-1], [-1])),
        (["a"], [], ([-1], [])),
        (["<bos>", "a", "<eos>"], ["<bos>", "b", "<eos>"], ([0, -1, 1], [0, -1, 1])),
        # A special token inside the part that differs has no partner.
        (["x", "<eos>", "y", "a"], ["z", "<eos>", "w", "a"], ([-1, -1, -1, 0], [-1, -1, -1, 0])),
        (["a", "<eos>", "b"], ["a", "<eos>", "x", "<eos>", "b"], ([0, 1, 2], [0, 1, -1, -1, 2])),
    ],
)
def test_texts_that_differ(student, teacher, expected):
    assert aligned(student, teacher) == expected


def test_a_token_across_the_place_where_the_other_text_has_more_has_no_chunk():
    assert aligned(["ab", "cd"], ["a", "b", "X", "c", "d"]) == (
        [0, 1],
        [0, 0, -1, 1, 1],
    )
    assert aligned(["a", "bc", "d"], ["a", "b", "X", "c", "d"]) == (
        [0, -1, 1],
        [0, -1, -1, -1, 1],
    )


def test_the_figures_of_a_batch():
    found = aligned_rows(
        (["<bos>", "ab", "c", "d"], ["<bos>", "a", "bc", "d"]),
        (["a", "b", "xx", "c"], ["ab", "y", "c"]),
        ([], []),
        (["a"], []),
    )
    assert found.student_chunk_ids.tolist() == [
        [0, 1, 1, 2],
        [0, 0, -1, 1],
        [-1] * 4,
        [-1] * 4,
    ]
    assert found.teacher_chunk_ids.tolist() == [[0, 1, 1, 2], [0, -1, 1, -1], [-1] * 4, [-1] * 4]
    assert found.chunks.tolist() == [3, 2, 0, 0]
    assert found.num_chunks == 3
    assert found.one_to_one.tolist() == [2, 1, 0, 0]
    assert found.covered_bytes.tolist() == [4, 3, 0, 0]
    assert found.student_bytes.tolist() == [4, 5, 0, 1]
    assert found.teacher_bytes.tolist() == [4, 4, 0, 0]
    assert found.coverage == 7 / 10
    assert found.row_coverage.tolist() == [1, 3 / 5, 1, 0]
    assert found.one_to_one_share == 3 / 5
    assert [(part.row, part.student, part.teacher) for part in found.differences] == [
        (1, b"xx", b"y"),
        (3, b"a", b""),
    ]
    for field in ("student_chunk_ids", "teacher_chunk_ids", "chunks", "one_to_one"):
        assert getattr(found, field).dtype == torch.int64
    for field in ("covered_bytes", "student_bytes", "teacher_bytes"):
        assert getattr(found, field).dtype == torch.int64


def test_the_report_names_the_rows_that_differ():
    assert aligned_rows((["ab"], ["a", "b"]), (["c"], ["c"])).report() == (
        "aligned 2 texts: 100.00% of the bytes in 2 chunks, 50.00% of them one token to one token"
    )
    found = aligned_rows((["a", "b"], ["a"]), *[(["a"], ["c"])] * 3)
    first, second = found.report().splitlines()
    assert first.startswith("aligned 4 texts: 20.00% of the bytes in 1 chunks")
    assert second == (
        "the texts differ in 4 of them: row 0: student b'b', teacher b''; row 1: student b'a', "
        "teacher b'c'; row 2: student b'a', teacher b'c'; ..."
    )
    long = Difference(3, "é".encode() * 20, b"\n")
    assert str(long).endswith(" and 16 more bytes, teacher b'\\n'")


TABLE = TokenBytes((b"a", b"b", b"", b"ab"), ("text", "text", "eos", "text"))


def test_nothing_to_align():
    for ids in ([], torch.zeros(0, 5, dtype=torch.int64), np.zeros((0, 3), dtype=int)):
        found = Aligner(TABLE, TABLE).align(ids, [])
        assert len(found.chunks) == found.num_chunks == 0
        assert (found.coverage, found.one_to_one_share) == (1.0, 0.0)
    found = Aligner(TABLE, TABLE).align(torch.zeros(2, 0, dtype=torch.int64), [[], []])
    assert found.student_chunk_ids.shape == (2, 0)
    assert found.chunks.tolist() == [0, 0]
    assert found.report().startswith("aligned 2 texts: 100.00% of the bytes in 0 chunks")
    empty = TokenBytes((), ())
    assert Aligner(empty, empty).align([[]], [[-1]]).teacher_chunk_ids.tolist() == [[-1]]


def test_labels_are_taken_as_they_are():
    student = torch.tensor([[-100, -100, 0, 1, 2, -100], [3, 2, -100, -100, -100, -100]])
    found = Aligner(TABLE, TABLE).align(student, [[3, 2], (0, -100, 1)])
    assert found.student_chunk_ids.tolist() == [[-1, -1, 0, 0, 1, -1], [0, -1, -1, -1, -1, -1]]
    assert found.teacher_chunk_ids.tolist() == [[0, 1, -1], [0, -1, 0]]
    assert student[0, 0] == -100  # the argument is left alone


def test_every_form_of_ids_gives_the_same():
    rows = [[0, 1], [3, 2]]
    forms = [
        rows,
        tuple(map(tuple, rows)),
        torch.tensor(rows),
        torch.tensor(rows).T.contiguous().T,
        list(torch.tensor(rows)),
        np.array(rows, dtype=np.uint8),
        [np.array(row, dtype=np.int32) for row in rows],
    ]
    for form in forms:
        found = Aligner(TABLE, TABLE).align(form, rows[::-1])
        assert found.student_chunk_ids.tolist() == [[0, 0], [0, -1]]
        assert found.teacher_chunk_ids.tolist() == [[0, -1], [0, 0]]


@pytest.mark.parametrize(
    ("ids", "came"),
    [
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\) and torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32), r"a tensor of shape \(2, 3\) and torch.int32"),
        (torch.zeros(2, dtype=torch.int64), r"a tensor of shape \(2,\) and torch.int64"),
        ([0, 1], "list"),
        (None, "NoneType"),
        (["ab"], "rows of str"),
        ([[0.0, 1.0]], "rows of float"),
        ([[], [True]], "rows of bool"),
        ([[[0], [1]]], "rows of list"),
        ([[[0], [1, 2]]], "list"),
        ([np.array([1], dtype=np.uint64)], "rows of uint64"),
    ],
)
def test_what_is_no_batch_of_ids_is_refused(ids, came):
    with pytest.raises(BatchError, match=f"expected teacher ids as a .* got {came}; convert them"):
        Aligner(TABLE, TABLE).align([[0], [1]], ids)
    with pytest.raises(BatchError, match=f"expected student ids as a .* {came}; convert them"):
        Aligner(TABLE, TABLE).align(ids, [[0], [1]])


def test_both_sides_need_as_many_rows():
    with pytest.raises(BatchError, match="got 1 of the student and 2 of the teacher; give both"):
        Aligner(TABLE, TABLE).align([[0]], [[0], [1]])


@pytest.mark.parametrize("index", [4, 10**6, 2**63 - 1])
def test_ids_of_another_tokenizer_are_refused(index):
    expected = rf"teacher id {index} \(row 1, position 2\) is not one of this tokenizer's 0 to 3"
    with pytest.raises(DataError, match=expected):
        Aligner(TABLE, TABLE).align([[0], [0]], [[0], [0, 1, index]])


def texts_aligned(student, teacher, text):
    tables = [TokenBytes.from_tokenizer(tokenizer) for tokenizer in (student, teacher)]
    ids = [
        [tokenizer(text, add_special_tokens=False)["input_ids"]] for tokenizer in (student, teacher)
    ]
    return Aligner(*tables).align(*ids)


@pytest.mark.parametrize(
    ("make", "text", "ours", "theirs"),
    [
        (lambda: real.mistral("v1"), "a▁b", b" a ", "a▁".encode()),
        (lambda: real.mistral("v1"), "Paris", b" ", b""),
        (lambda: trained.byte_level(nfc=True), "e\u0301!", b"\xc3\xa9", b"e\xcc\x81"),
    ],
    ids=["literal mark", "added space", "normaliser"],
)
def test_a_text_that_a_tokenizer_changes_is_a_difference_and_no_error(make, text, ours, theirs):
    (difference,) = texts_aligned(make(), real.gpt2(), text).differences
    assert (difference.row, difference.student, difference.teacher) == (0, ours, theirs)


def test_rows_of_data_with_half_a_surrogate_pair_do_not_get_here():
    with pytest.raises(DataError, match="half a surrogate pair at character 2"):
        examples(Rows("pasted", [{"prompt": "a\ud800", "answer": "b"}]), "text")
