import numpy as np
import pytest
import torch

from baselines import mined_maps
from ctkd.errors import BatchError, DataError
from ctkd.tokenization import Aligner, TokenBytes, TokenizerPair, vocabulary_map
from tests.golden import golden_values
from tests.tokenization import trained_tokenizers as trained

SPECIAL = ("<s>", "</s>", "<pad>", "<sep>")
ROLES = ("bos", "eos", "pad", "other")


def table(words: list[str], special: tuple[str, ...] = SPECIAL) -> TokenBytes:
    """The four special tokens, then words."""
    return TokenBytes(
        (b"",) * 4 + tuple(word.encode() for word in words),
        ROLES + ("text",) * len(words),
        (*special, *words),
    )


@pytest.mark.parametrize(
    "case", golden_values.load("mined")["dtw"], ids=lambda case: "+".join(case["student_tokens"])
)
def test_single_matches_are_those_of_the_released_code(case):
    student, teacher = (
        [token.replace("Ġ", " ").replace("▁", " ") for token in case[f"{side}_tokens"]]
        for side in ("student", "teacher")
    )
    expected = [found[0] if len(found) == 1 else -1 for found in case["student_to_teacher"]]
    pair = TokenizerPair(table(student), table(teacher))
    ids = [torch.arange(4, 4 + len(words))[None] for words in (student, teacher)]
    matches = pair.match_positions(*ids, *[torch.ones_like(i, dtype=torch.bool) for i in ids])
    assert matches.dtype == torch.int64
    assert matches.tolist() == [expected]


@pytest.mark.parametrize(
    ("special", "matches"),
    [(0, [0, 1, -1]), (1, [0, 1, -1]), (2, [0, 1, -1]), (3, [-1, 2, 3])],
    ids=ROLES,
)
def test_special_tokens_match_by_role_or_by_spelling(special, matches):
    # By spelling alone, zzzz goes with z rather than with q.
    words = [" x", " y", " z"]
    pair = TokenizerPair(table(words, ("zzzz",) * 4), table(words, ("q",) * 4))
    student_ids, teacher_ids = torch.tensor([[4, special, 5]]), torch.tensor([[4, special, 6, 5]])
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (student_ids, teacher_ids)]
    assert pair.match_positions(student_ids, teacher_ids, *masks).tolist() == [matches]


def by_hand(pair: TokenizerPair, student: list[int], teacher: list[int]) -> list[int]:
    """Matches of one sequence, from the textbook."""
    sides = (pair.student_bytes, pair.teacher_bytes)
    s, t = (mined_maps.Vocabulary(side.bytes_of, side.roles, side.tokens) for side in sides)

    def cost(i: int, j: int) -> float:
        if s.roles[j] == t.roles[i] and s.roles[j] in ("bos", "eos", "pad"):
            return 0
        return mined_maps.levenshtein(t.text(i).removeprefix(" "), s.text(j).removeprefix(" "))

    _, path = mined_maps.warp([[cost(i, j) for j in student] for i in teacher])
    found = [[i for i, j in path if j == column] for column in range(len(student))]
    return [rows[0] if len(rows) == 1 else -1 for rows in found]


def test_masked_batches_of_random_tokens_agree_with_the_textbook():
    words = [" the", " a", "b", "abc", " cat", "cats", "日本", "\n", " ab"]
    pair = TokenizerPair(
        table(words), table(words[::-1] + ["zz"], ("<bos>", "<eos>", "<p>", "<sep>"))
    )
    rs = np.random.RandomState(0)
    student_ids = torch.from_numpy(rs.randint(0, pair.student_size, (12, 9)))
    teacher_ids = torch.from_numpy(rs.randint(0, pair.teacher_size, (12, 11)))
    student_mask, teacher_mask = (
        torch.from_numpy(rs.rand(*ids.shape) < 0.7) for ids in (student_ids, teacher_ids)
    )
    student_ids[~student_mask] = -100  # what is not scored is not looked at
    teacher_ids[~teacher_mask] = 10**6
    matches = pair.match_positions(student_ids, teacher_ids, student_mask, teacher_mask)
    assert matches.shape == student_ids.shape
    assert (matches[~student_mask] == -1).all()
    for row in range(12):
        places = teacher_mask[row].nonzero()[:, 0].tolist()
        expected = [
            places[found] if found >= 0 else -1
            for found in by_hand(
                pair,
                student_ids[row][student_mask[row]].tolist(),
                teacher_ids[row][teacher_mask[row]].tolist(),
            )
        ]
        assert matches[row][student_mask[row]].tolist() == expected
    assert (matches[student_mask] == -1).any()  # both kinds occur


def test_nothing_scored_matches_nothing():
    pair = TokenizerPair(table([" a"]), table([" a"]))
    ids = torch.full((3, 2), 4)
    mask = torch.tensor([[False, False], [True, True], [False, True]])
    other = torch.tensor([[True, True], [False, False], [True, False]])
    assert pair.match_positions(ids, ids, mask, other).tolist() == [[-1, -1], [-1, -1], [-1, 0]]
    empty = torch.zeros(2, 0, dtype=torch.int64)
    matches = pair.match_positions(empty, ids[:2], empty.bool(), other[:2])
    assert matches.shape == (2, 0)


def test_meta_tensors_give_a_shape():
    pair = TokenizerPair(table([]), table([]))
    with torch.device("meta"):
        student, teacher = torch.zeros(2, 3).long(), torch.zeros(2, 5).long()
    matches = pair.match_positions(student, teacher, student.bool(), teacher.bool())
    assert matches.is_meta
    assert matches.dtype == torch.int64
    assert matches.shape == (2, 3)


@pytest.mark.parametrize("shapes", [((2, 3), (1, 3)), ((2, 3), (2,)), ((3,), (2, 3))])
def test_shapes_that_disagree_are_refused(shapes):
    pair = TokenizerPair(table([]), table([]))
    student, teacher = (torch.zeros(shape).long() for shape in shapes)
    with pytest.raises(BatchError, match=r"expected student ids and mask of one shape \(B, S\)"):
        pair.match_positions(student, teacher, student.bool(), teacher.bool())


@pytest.mark.parametrize("narrow", [0, 1])
def test_a_mask_of_another_shape_is_refused(narrow):
    pair = TokenizerPair(table([]), table([]))
    ids = torch.zeros(2, 3).long()
    masks = [ids.bool(), ids.bool()]
    masks[narrow] = masks[narrow][:, 1:]
    with pytest.raises(BatchError, match=r"got \(2, 3\)"):
        pair.match_positions(ids, ids, *masks)


@pytest.mark.parametrize("wrong", [-100, 5])
@pytest.mark.parametrize("side", [0, 1])
def test_ids_of_another_tokenizer_are_refused(wrong, side):
    pair = TokenizerPair(table([" a"]), table([" b"]))
    ids = [torch.full((1, 2), 4), torch.full((1, 2), 4)]
    ids[side][0, 1] = wrong
    scored = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(DataError, match=f"token id {wrong} is outside this tokenizer's 0 to 4"):
        pair.match_positions(*ids, scored, scored)


def test_word_starts():
    words = [" a", "a ", "\n", "\tb", "b\n", " ", "é"]
    student, teacher = TokenizerPair(table(words), table(words[:1])).word_starts()
    assert student.dtype == torch.bool
    assert student.tolist() == [False, True, False, False] + [
        True, False, True, True, False, True, False,
    ]  # fmt: skip
    assert teacher.tolist() == [False, True, False, False, True]


def test_maps_and_alignment_are_those_of_their_modules(monkeypatch, tmp_path):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path))
    student, teacher = trained.byte_level(), trained.gemma_like()
    pair = TokenizerPair(student, teacher, progress=False)
    student_table, teacher_table = map(TokenBytes.from_tokenizer, (student, teacher))
    assert pair.student_bytes.bytes_of == student_table.bytes_of
    assert (pair.student_size, pair.teacher_size) == (len(student), len(teacher))
    expected = vocabulary_map.nearest_student_ids(student_table, teacher_table, progress=False)
    assert torch.equal(pair.nearest_student_ids(), expected)
    assert pair.nearest_student_ids() is pair.nearest_student_ids()
    assert len(list(tmp_path.rglob("map.safetensors"))) == 1
    for found, shared in zip(
        pair.shared_ids(), vocabulary_map.shared_ids(student_table, teacher_table), strict=True
    ):
        assert torch.equal(found, shared)
    assert pair.shared_ids() is pair.shared_ids()
    ids = [
        tokenizer(trained.TEXTS[0], add_special_tokens=False)["input_ids"]
        for tokenizer in (student, teacher)
    ]
    aligned = pair.align(ids[:1], ids[1:])
    assert aligned.coverage == 1.0
    other = Aligner(student_table, teacher_table).align(ids[:1], ids[1:])
    assert torch.equal(aligned.student_chunk_ids, other.student_chunk_ids)


def test_one_text_matches_itself_throughout():
    tokenizer = trained.gemma_like()
    pair = TokenizerPair(tokenizer, tokenizer)
    ids = torch.tensor([tokenizer(trained.TEXTS[1])["input_ids"]])
    scored = torch.ones_like(ids, dtype=torch.bool)
    assert pair.match_positions(ids, ids, scored, scored).tolist() == [list(range(ids.shape[1]))]
