import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors.torch import save_file

from baselines import bpm, mined_maps
from ctkd import cache_folder
from ctkd.errors import ModelError
from ctkd.tokenization import vocabulary_map
from ctkd.tokenization.token_bytes import TokenBytes
from ctkd.tokenization.vocabulary_map import (
    continuations,
    fingerprint,
    load_or_compute,
    nearest_student_ids,
    prefix_student_ids,
    shared_ids,
    token_texts,
)
from tests.golden import golden_values
from tests.tokenization import real_tokenizers
from tests.tokenization import trained_tokenizers as trained


def table(tokens: list[str], special: dict[str, str] | None = None) -> TokenBytes:
    """Tokens with markers; `special` gives the role of some, `<0xNN>` is a byte piece."""
    roles = [(special or {}).get(token, "text") for token in tokens]
    bytes_of = [
        b""
        if role != "text"
        else bytes([int(token[3:5], 16)])
        if token.startswith("<0x")
        else token.replace("▁", " ").replace("Ġ", " ").encode()
        for token, role in zip(tokens, roles, strict=True)
    ]
    return TokenBytes(tuple(bytes_of), tuple(roles), tuple(tokens))


def oracle(table: TokenBytes) -> mined_maps.Vocabulary:
    return mined_maps.Vocabulary(table.bytes_of, table.roles, table.tokens)


def nearest(student: TokenBytes, teacher: TokenBytes) -> list[int]:
    found = nearest_student_ids(student, teacher, progress=False)
    assert found.dtype == torch.int64
    assert found.shape == (len(teacher),)
    return found.tolist()


def shared(student: TokenBytes, teacher: TokenBytes) -> list[tuple[int, int]]:
    student_ids, teacher_ids = shared_ids(student, teacher)
    assert student_ids.dtype == teacher_ids.dtype == torch.int64
    return list(zip(student_ids.tolist(), teacher_ids.tolist(), strict=True))


def test_the_map_of_the_released_code():
    golden = golden_values.load("mined")["vocab"]
    student = table(golden["student"], {"<eos>": "eos"})
    teacher = table(golden["teacher"], {"</s>": "eos"})
    ids = nearest(student, teacher)
    assert ids == golden["teacher_to_student_ids"]
    names = [token.replace("▁", "Ġ") for token in golden["teacher"]]
    assert {name: golden["student"][i] for name, i in zip(names, ids, strict=True)} == golden[
        "token_mapping"
    ]


ALPHABET = "ab é日\U0001f600本яж"
PIECES = st.one_of(
    st.text(ALPHABET, max_size=7).map(str.encode),
    st.text("ab ", max_size=4).map(str.encode),
    st.binary(min_size=1, max_size=3),
)


@st.composite
def vocabularies(draw):
    bytes_of, roles, tokens = [], [], []
    for piece in draw(st.lists(PIECES, min_size=1, max_size=14)):
        bytes_of.append(piece)
        roles.append("text")
        is_byte = len(piece) == 1 and draw(st.booleans())
        tokens.append(f"<0x{piece[0]:02X}>" if is_byte else "as the tokenizer writes it")
    for role in draw(st.lists(st.sampled_from(["bos", "eos", "pad", "other"]), max_size=4)):
        where = draw(st.integers(0, len(roles)))
        bytes_of.insert(where, b"")
        roles.insert(where, role)
        tokens.insert(where, draw(st.sampled_from(["<a>", "<b>", "ab", "", "[SEP]"])))
    return TokenBytes(tuple(bytes_of), tuple(roles), tuple(tokens))


@settings(deadline=None, max_examples=300)
@given(vocabularies(), vocabularies())
def test_all_maps_agree_with_exhaustive_comparison(student, teacher):
    assert shared(student, teacher) == mined_maps.shared(oracle(student), oracle(teacher))
    # The oracle takes the first of several: byte pieces come last.
    order = sorted(range(len(student)), key=oracle(student).rank)
    ours, theirs = (list(zip(one.roles, one.bytes_of, strict=True)) for one in (student, teacher))
    found = bpm.longest_prefixes([ours[index] for index in order], theirs)
    expected = [order[index] if index >= 0 else -1 for index in found]
    assert prefix_student_ids(student, teacher).tolist() == expected
    lengths, other_lengths, begins, ranges, others, follow = (
        one.tolist() for one in continuations(student, teacher)
    )
    assert lengths == list(map(len, student.bytes_of))
    texts = [piece if role == "text" else b"" for role, piece in theirs]
    parts = sorted({piece[cut:] for piece in texts for cut in range(len(piece))})
    found = bpm.longest_prefixes([ours[one] for one in order], [("text", one) for one in parts])
    first_of = {part: order[one] for part, one in zip(parts, found, strict=True) if one >= 0}
    for token, piece in enumerate(texts):
        assert other_lengths[token] == len(piece)
        for read in range(len(piece) + 1):
            longer = [
                (first_of[one[read:]], other)
                for other, one in enumerate(texts)
                if 0 < read < len(piece) and one.startswith(piece[:read]) and one[read:] in first_of
            ]
            start, end = ranges[begins[token] + read]
            assert list(zip(follow[start:end], others[start:end], strict=True)) == sorted(longer)
    if any(b and r == "text" for b, r in zip(student.bytes_of, student.roles, strict=True)):
        assert nearest(student, teacher) == mined_maps.nearest(oracle(student), oracle(teacher))


@pytest.mark.parametrize("seed", range(4))
def test_larger_vocabularies_agree_in_any_blocks(monkeypatch, seed):
    draw = random.Random(seed)

    def vocabulary(size: int, letters: str, longest: int) -> TokenBytes:
        words = ["".join(draw.choices(letters, k=draw.randint(1, longest))) for _ in range(size)]
        return TokenBytes(tuple(word.encode() for word in words), ("text",) * size, ("x",) * size)

    student = vocabulary(60, "abc ", 4 + 3 * seed)
    teacher = vocabulary(60, "abcd日本 ", 9)
    expected = mined_maps.nearest(oracle(student), oracle(teacher))
    for queries, distances in ((2048, 1 << 24), (3, 4)):
        monkeypatch.setattr(vocabulary_map, "_QUERIES_AT_ONCE", queries)
        monkeypatch.setattr(vocabulary_map, "_DISTANCES_AT_ONCE", distances)
        assert nearest(student, teacher) == expected, queries


@pytest.mark.parametrize(
    ("student", "teacher", "answers"),
    [
        (["bbb", "ab", "abcd"], ["abc"], [1]),  # both at 1: the lower id
        (["abcd", "bbb", "ab"], ["abc"], [0]),
        (["xxx", "ab", "yyy"], ["q"], [1]),  # nothing in common: the shortest
        (["xxx", "yy", "z"], ["日本語"], [0]),  # nothing in common: the first not longer
        (["longer", "xxxx", "yyyy"], ["日本"], [1]),
        (["Ġa", "日"], ["▁日", "▁b", "本"], [0, 0, 1]),  # a space is one character
        (["<0x0A>", "\n", "x"], ["\n", "<0x0A>", "\n\n"], [1, 1, 1]),
        (["<0x41>", "b"], ["A", "A!"], [0, 0]),
        (["b", "a", "a"], ["a", "ac"], [1, 1]),
        (["x" * 3, "y" * 300], ["y" * 44, "z" * 300], [0, 0]),  # 256 = 0 in eight bits
    ],
)
def test_who_is_nearest(student, teacher, answers):
    assert nearest(table(student), table(teacher)) == answers
    assert mined_maps.nearest(oracle(table(student)), oracle(table(teacher))) == answers


def test_special_tokens_go_by_role_and_then_by_spelling():
    roles = dict.fromkeys(["<tool_call>", "<tool_cal>"], "other")
    roles |= {"<s>": "bos", "<e>": "eos", "<p>": "pad"}
    student = table(["tool_calls", "<e>", "<s>", "<tool_cal>"], roles)
    teacher = table(["<s>", "<e>", "<p>", "<tool_call>", "tool_call"], roles)
    # No pad of the student: the nearest spelling. Text never goes to a special token.
    assert nearest(student, teacher) == [2, 1, 1, 3, 0]
    assert shared(student, teacher) == [(1, 1), (2, 0)]
    unnamed = TokenBytes(teacher.bytes_of, teacher.roles)
    assert nearest(student, unnamed)[:2] == [2, 1]
    assert token_texts(unnamed) == ["", "", "", "", "tool_call"]


def test_nothing_in_common():
    student, teacher = table(["a", "b"]), table(["<e>", "日"], {"<e>": "eos"})
    assert shared(student, teacher) == []
    assert nearest(student, teacher) == [0, 0]
    assert nearest(student, TokenBytes((), ())) == []
    assert shared(TokenBytes((), ()), teacher) == []


def test_a_student_without_text_is_refused():
    with pytest.raises(ModelError, match="the student's tokenizer has no text tokens"):
        nearest(table(["<e>"], {"<e>": "eos"}), table(["a"]))


def test_real_kinds_of_tokenizers():
    student = TokenBytes.from_tokenizer(trained.byte_level())
    teacher = TokenBytes.from_tokenizer(trained.gemma_like())
    ids = nearest(student, teacher)
    assert teacher.tokens[4:6] == ("<0x00>", "<0x01>")
    for i, j in shared(student, teacher):
        assert ids[j] == i
        assert student.bytes_of[i] == teacher.bytes_of[j]
    names = {token: index for index, token in enumerate(teacher.tokens)}
    assert student.tokens[ids[names["▁fl"]]] == "Ġfl"
    assert student.bytes_of[ids[names["é"]]] in ("é".encode(), b"\xc3", b"\xa9")
    eos = student.roles.index("eos")
    assert ids[names["<eos>"]] == eos
    # Gemma's kind has a letter and a byte piece of the same byte: the letter pairs.
    paired = {j for _, j in shared(student, teacher)}
    assert names["a"] in paired and names["<0x61>"] not in paired
    assert ids[names["<0x61>"]] == ids[names["a"]]


def test_published_vocabularies_agree_with_all_distances():
    student = TokenBytes.from_tokenizer(real_tokenizers.gpt2())
    whole = TokenBytes.from_tokenizer(real_tokenizers.deepseek())
    assert token_texts(student)[-1] == "<|endoftext|>"
    chosen = random.Random(0).sample(range(len(whole)), 600)
    teacher = TokenBytes(
        *[
            tuple(column[i] for i in chosen)
            for column in (whole.bytes_of, whole.roles, whole.tokens)
        ]
    )
    candidates = token_texts(student)[:-1]  # all but the special one
    places = [place for place, role in enumerate(teacher.roles) if role == "text"]
    queries = [token_texts(teacher)[place] for place in places]
    distances = cdist(queries, candidates, scorer=Levenshtein.distance, dtype=np.uint16)
    ids = nearest(student, teacher)
    assert [ids[place] for place in places] == distances.argmin(axis=1).tolist()
    assert len(set(distances.min(axis=1))) > 4


def test_a_fingerprint_tells_tables_apart():
    tables = [
        TokenBytes((), ()),
        TokenBytes((b"ab", b"c"), ("text", "text")),
        TokenBytes((b"a", b"bc"), ("text", "text")),
        TokenBytes((b"a", b"bc"), ("text", "other")),
        TokenBytes((b"a", b"bc"), ("text", "other"), ("a", "bc")),
        TokenBytes((b"a", b"bc"), ("text", "other"), ("ab", "c")),
        TokenBytes((b"a", b"bc"), ("text", "other"), ("ab", "\udcc3")),
    ]
    assert len({fingerprint(table) for table in tables}) == len(tables)
    assert fingerprint(tables[1]) == fingerprint(TokenBytes((b"ab", b"c"), ("text", "text")))


@pytest.fixture
def searches(monkeypatch, tmp_path) -> list[int]:
    """A fresh cache, and one entry for each map that is computed."""
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []

    def counted(student, teacher, *, progress):
        calls.append(len(teacher))
        return nearest_student_ids(student, teacher, progress=progress)

    monkeypatch.setattr(vocabulary_map, "nearest_student_ids", counted)
    return calls


STUDENT, TEACHER = table(["cat", "dog"]), table(["hat", "dot", "cat"])


def test_a_map_is_computed_once_for_each_pair(searches):
    for _ in range(2):
        found = load_or_compute(STUDENT, TEACHER, progress=False)
        assert found.tolist() == [0, 1, 0]
        assert found.dtype == torch.int64
    assert len(searches) == 1
    assert load_or_compute(TEACHER, STUDENT, progress=False).tolist() == [2, 1]
    assert len(searches) == 2
    folders = [p for p in (cache_folder.cache_dir() / "vocabulary_maps").iterdir() if p.is_dir()]
    assert [[file.name for file in folder.iterdir()] for folder in folders] == [
        ["map.safetensors"],
        ["map.safetensors"],
    ]


OTHER = table(["dot", "hat", "cat"])


@pytest.mark.parametrize(
    "answers",
    [
        [(STUDENT, TEACHER, [0, 1, 0]), (STUDENT, OTHER, [1, 0, 0])],
        [(TEACHER, STUDENT, [2, 1]), (OTHER, STUDENT, [2, 0])],
    ],
    ids=["teacher", "student"],
)
def test_a_map_of_another_vocabulary_is_computed_anew(searches, answers):
    """Also where it is as large, so that the kept one would pass for its map."""
    for student, teacher, expected in answers:
        assert load_or_compute(student, teacher, progress=False).tolist() == expected
    assert len(searches) == 2


def test_a_new_format_is_computed_anew(searches, monkeypatch):
    load_or_compute(STUDENT, TEACHER, progress=False)
    monkeypatch.setattr(vocabulary_map, "_FORMAT", 0)
    load_or_compute(STUDENT, TEACHER, progress=False)
    assert len(searches) == 2


@pytest.mark.parametrize(
    "contents",
    [
        None,
        b"",
        b"half a file",
        {"student_ids": torch.tensor([0, 1])},
        {"student_ids": torch.tensor([0, 1, 2])},
        {"student_ids": torch.tensor([0, -1, 1])},
        {"student_ids": torch.tensor([0, 1, 0], dtype=torch.int32)},
        {"other": torch.tensor([0, 1, 0])},
    ],
    ids=["gone", "empty", "torn", "short", "too large", "negative", "int32", "name"],
)
def test_a_damaged_file_is_replaced(searches, contents, capsys):
    load_or_compute(STUDENT, TEACHER, progress=False)
    (file,) = cache_folder.cache_dir().rglob("map.safetensors")
    assert capsys.readouterr().err == ""
    if contents is None:
        file.unlink()
    elif isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        save_file(contents, file)
    assert load_or_compute(STUDENT, TEACHER, progress=False).tolist() == [0, 1, 0]
    assert capsys.readouterr().err == (
        f"the vocabulary map in {file.parent} is damaged; computing it again\n"
    )
    assert load_or_compute(STUDENT, TEACHER, progress=False).tolist() == [0, 1, 0]
    assert len(searches) == 2


def test_a_map_cut_short_leaves_nothing(searches, monkeypatch):
    def cut_short(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(vocabulary_map, "save_file", cut_short)
        with pytest.raises(KeyboardInterrupt):
            load_or_compute(STUDENT, TEACHER, progress=False)
    assert not list(cache_folder.cache_dir().rglob("*.safetensors"))
    assert load_or_compute(STUDENT, TEACHER, progress=False).tolist() == [0, 1, 0]


def test_an_unwritable_cache_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot write to the cache folder"):
        load_or_compute(STUDENT, TEACHER, progress=False)


def test_a_long_search_shows_a_bar_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(vocabulary_map, "_SHOW_AFTER_S", 0)
    nearest_student_ids(STUDENT, TEACHER, progress=False)
    assert capsys.readouterr() == ("", "")
    nearest_student_ids(STUDENT, TEACHER, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    nearest_student_ids(STUDENT, TEACHER, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "nearest tokens: 100%" in err and "2/2" in err
