"""Maps from the tokens of one vocabulary to those of another.

Three maps: the tokens both have (`shared_ids`, one to one), MinED's map (`nearest_student_ids`,
arXiv 2401.10491), which sends every teacher token to the student token that is spelled most like
it, and BPM's (`prefix_student_ids`, arXiv 2607.22334), which sends it to the longest student token
that begins it; `continuations` has the same for what is left of a token. All compare what tokens
stand for, so that markers (``Ġ``, ``▁``) do not count. None looks at what tokens mean: ``▁hat``
goes to ``Ġcat``.
"""

import hashlib
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ctkd import cache_folder
from ctkd.errors import ModelError
from ctkd.tokenization.token_bytes import TokenBytes
from ctkd.tokenizers import Continuations

__all__ = [
    "Prefixes",
    "continuations",
    "fingerprint",
    "load_or_compute",
    "nearest_student_ids",
    "prefix_student_ids",
    "shared_ids",
    "token_texts",
]

_FORMAT = 1  # to be raised whenever the same tables give another map
_NAMED_ROLES = ("bos", "eos", "pad")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_QUERIES_AT_ONCE = 2048
_DISTANCES_AT_ONCE = 1 << 24
_SHOW_AFTER_S = 2.0
_FAR = 1 << 40


def fingerprint(table: TokenBytes) -> str:
    """SHA-256 of everything in a table; equal tables have equal fingerprints.

    Example:
        >>> fingerprint(TokenBytes((b"a",), ("text",)))[:8]
        'de64cb05'
    """
    digest = hashlib.sha256()
    for pieces in (
        table.bytes_of,
        [role.encode() for role in table.roles],
        [token.encode("utf-8", "surrogatepass") for token in table.tokens],
    ):
        digest.update(len(pieces).to_bytes(8, "little"))
        digest.update(np.fromiter(map(len, pieces), "<u4", len(pieces)).tobytes())
        digest.update(b"".join(pieces))
    return digest.hexdigest()


def token_texts(table: TokenBytes) -> list[str]:
    r"""Spell each token as text: its bytes as UTF-8, or a special token as it is written.

    Bytes that are not UTF-8 become lone surrogates, one each, so different bytes are different
    texts. A special token whose spelling is not known has the empty text.

    Example:
        >>> table = TokenBytes((b" a", b"\xc3", b""), ("text", "text", "eos"), ("Ġa", "Ã", "</s>"))
        >>> token_texts(table)
        [' a', '\udcc3', '</s>']
    """
    spelled = table.tokens or ("",) * len(table)
    return [
        piece.decode("utf-8", "surrogateescape") if role == "text" else token
        for piece, role, token in zip(table.bytes_of, table.roles, spelled, strict=True)
    ]


def shared_ids(student: TokenBytes, teacher: TokenBytes) -> tuple[Tensor, Tensor]:
    """Pair the tokens that both vocabularies have, each at most once.

    Text tokens pair when their bytes are equal; special tokens when both are bos, both eos or
    both pad. Where several tokens have the same bytes, the one that is not a byte piece
    (``<0x0A>``) counts, then the lower id.

    Shape:
        Returns (M,) student ids, ascending, and (M,) teacher ids, int64 on the CPU.

    Example:
        >>> student = TokenBytes((b"a", b"b", b""), ("text", "text", "eos"))
        >>> teacher = TokenBytes((b"", b"b", b"c", b"b"), ("eos", "text", "text", "text"))
        >>> [ids.tolist() for ids in shared_ids(student, teacher)]
        [[1, 2], [1, 0]]
    """
    student_index, teacher_index = _meanings(student), _meanings(teacher)
    pairs = sorted(
        (index, teacher_index[meaning])
        for meaning, index in student_index.items()
        if meaning in teacher_index
    )
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0].clone(), table[:, 1].clone()


def prefix_student_ids(student: TokenBytes, teacher: TokenBytes) -> Tensor:
    """Map every teacher token to the longest student token that its bytes begin with.

    A token begins itself. bos, eos and pad go to the student's bos, eos and pad; other special
    tokens, and those that no student token begins, go nowhere. Of several student tokens with the
    same bytes the one that `shared_ids` pairs is the answer.

    Shape:
        Returns (W,) int64 student ids on the CPU, -1 for none.

    Example:
        >>> student = TokenBytes((b" ", b" wal", b"k", b""), ("text", "text", "text", "eos"))
        >>> teacher = TokenBytes((b" walk", b" the", b"x", b""), ("text", "text", "text", "eos"))
        >>> prefix_student_ids(student, teacher).tolist()
        [1, 0, -1, 3]
    """
    index_of, prefixes = _meanings(student), Prefixes(student)
    answers = [
        prefixes.longest_of(piece) if role == "text" else index_of.get((role, b""), -1)
        for piece, role in zip(teacher.bytes_of, teacher.roles, strict=True)
    ]
    return torch.tensor(answers, dtype=torch.int64)


def continuations(student: TokenBytes, teacher: TokenBytes) -> Continuations:
    """Find what may follow where the student has read the beginning of a teacher token.

    All longer teacher tokens of text that begin with those bytes may follow, if a student token
    begins what is left of them; the longest one counts, as in `prefix_student_ids`.

    Example:
        The student has read "wa" of "walk": "walk" and "was" may follow, and "lk" begins what is
        left of the first, "s" that of the second.

        >>> student = TokenBytes((b"wa", b"lk", b"s", b"l"), ("text",) * 4)
        >>> teacher = TokenBytes((b"walk", b"was", b"wa", b"x"), ("text",) * 4)
        >>> found = continuations(student, teacher)
        >>> first, last = found.ranges[found.begins[0] + 2]
        >>> found.teacher_ids[first:last].tolist(), found.student_ids[first:last].tolist()
        ([0, 1], [1, 2])
    """
    prefixes = Prefixes(student)
    # Beginnings of tokens by number; -1 stands for nothing and for a whole token.
    numbers: dict[bytes, int] = {}
    begins: list[int] = []
    read: list[int] = []
    entries: list[tuple[int, int, int]] = []
    lengths = [
        len(piece) if role == "text" else 0
        for piece, role in zip(teacher.bytes_of, teacher.roles, strict=True)
    ]
    for token, (piece, length) in enumerate(zip(teacher.bytes_of, lengths, strict=True)):
        begins.append(len(read))
        read.append(-1)
        for cut in range(1, length):
            number = numbers.setdefault(piece[:cut], len(numbers))
            read.append(number)
            follows = prefixes.longest_of(piece[cut:])
            if follows >= 0:
                entries.append((number, follows, token))
        read.append(-1)
    table = np.array(sorted(entries), dtype=np.int64).reshape(-1, 3)
    # Behind the last number there is nothing, which is what -1 finds.
    ends = np.searchsorted(table[:, 0], np.arange(len(numbers) + 2))
    ranges = np.stack([ends[:-1], ends[1:]], axis=1)[read]
    return Continuations(
        *(torch.tensor(one) for one in (list(map(len, student.bytes_of)), lengths, begins)),
        *map(torch.from_numpy, (ranges, table[:, 2].copy(), table[:, 1].copy())),
    )


def nearest_student_ids(student: TokenBytes, teacher: TokenBytes, *, progress: bool) -> Tensor:
    """Map every teacher token to the student token spelled most like it (MinED's map).

    A token with the same bytes comes first, bos, eos and pad go to the student's bos, eos and
    pad. Else the least Levenshtein distance between the texts of the tokens counts, then the lower
    id. Text goes to text tokens only, special tokens to any token. Of several student tokens with
    one text only the one that is not a byte piece, then the lowest id, is ever an answer.

    Shape:
        Returns (W,) int64 student ids on the CPU.

    Args:
        student: the vocabulary that is mapped to.
        teacher: the vocabulary whose tokens are mapped.
        progress: whether to show a bar on stderr if it takes long.

    Raises:
        ModelError: If the student has no text tokens.

    Example:
        >>> student = TokenBytes((b" the", b" on"), ("text", "text"))
        >>> teacher = TokenBytes((b" dog", b" the"), ("text", "text"))
        >>> nearest_student_ids(student, teacher, progress=False).tolist()
        [1, 0]
    """
    student_texts, teacher_texts = token_texts(student), token_texts(teacher)
    text_answers: dict[str, int] = {}
    any_answers: dict[str, int] = {}
    for index in _preferred_first(student):
        if text := student_texts[index]:
            any_answers.setdefault(text, index)
            if student.roles[index] == "text":
                text_answers.setdefault(text, index)
    if not text_answers:
        raise ModelError(
            "the student's tokenizer has no text tokens, so no teacher token can be mapped to "
            "one; check that its vocabulary is complete"
        )
    by_role = {meaning: index for meaning, index in _meanings(student).items() if meaning[0]}
    answers = np.full(len(teacher), -1, dtype=np.int64)
    open_ids: dict[bool, list[int]] = {True: [], False: []}
    for index, (text, role) in enumerate(zip(teacher_texts, teacher.roles, strict=True)):
        is_text = role == "text"
        known = text_answers.get(text) if is_text else by_role.get((role, b""))
        if known is None:
            open_ids[is_text].append(index)
        else:
            answers[index] = known
    searches = [
        (ids, _Search(candidates, [teacher_texts[index] for index in ids]))
        for ids, candidates in ((open_ids[True], text_answers), (open_ids[False], any_answers))
    ]
    with tqdm(
        desc="nearest tokens",
        total=sum(search.size for _, search in searches),
        unit="token",
        mininterval=1.0,
        delay=_SHOW_AFTER_S,
        disable=None if progress else True,
    ) as bar:
        for ids, search in searches:
            answers[ids] = search.run(bar)
    return torch.from_numpy(answers)


def load_or_compute(student: TokenBytes, teacher: TokenBytes, *, progress: bool) -> Tensor:
    """Return `nearest_student_ids`, from the cache folder if it has been computed before.

    Shape:
        Returns (W,) int64 student ids on the CPU.

    Args:
        student: the vocabulary that is mapped to.
        teacher: the vocabulary whose tokens are mapped.
        progress: whether to show a bar on stderr if it takes long.

    Raises:
        ModelError: If the student has no text tokens, or the cache folder cannot be written.
    """
    names = f"{_FORMAT} {fingerprint(student)} {fingerprint(teacher)}"
    key = hashlib.sha256(names.encode()).hexdigest()[:32]
    folder = cache_folder.cache_dir() / "vocabulary_maps" / key
    if (cached := _read(folder, student, teacher)) is not None:
        return cached
    with cache_folder.locked(folder):
        if (cached := _read(folder, student, teacher)) is not None:
            return cached
        if folder.exists():
            cache_folder.say(f"the vocabulary map in {folder} is damaged; computing it again")
            shutil.rmtree(folder)
        answers = nearest_student_ids(student, teacher, progress=progress)
        with cache_folder.building(folder) as partial:
            save_file({"student_ids": answers}, partial / "map.safetensors")
    return answers


def _read(folder: Path, student: TokenBytes, teacher: TokenBytes) -> Tensor | None:
    """Return the map of a folder; None if it is not there or cannot be one of these tables."""
    try:
        ids = load_file(folder / "map.safetensors").get("student_ids")
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
    if ids is None or ids.dtype != torch.int64 or ids.shape != (len(teacher),):
        return None
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(student):
        return None
    return ids


class Prefixes:
    """Text tokens of a vocabulary, looked up by what they begin.

    Args:
        table: the vocabulary.

    Example:
        >>> Prefixes(TokenBytes((b"a", b"ab"), ("text", "text"))).longest_of(b"abc")
        1
    """

    def __init__(self, table: TokenBytes):
        self._index = {
            piece: index for (role, piece), index in _meanings(table).items() if not role
        }
        self._longest = max(map(len, self._index), default=0)

    def longest_of(self, piece: bytes) -> int:
        """Id of the longest token that some bytes begin with, or -1."""
        # Most begin with a long one: this is faster than any order of all tokens.
        for length in range(min(len(piece), self._longest), 0, -1):
            if (found := self._index.get(piece[:length])) is not None:
                return found
        return -1


def _preferred_first(table: TokenBytes) -> list[int]:
    """All ids, lowest first, those of byte pieces last."""
    if not table.tokens:
        return list(range(len(table)))
    ordinary: list[int] = []
    byte_pieces: list[int] = []
    for index, (token, piece) in enumerate(zip(table.tokens, table.bytes_of, strict=True)):
        is_byte_piece = len(piece) == 1 and len(token) == 6 and _BYTE_PIECE.fullmatch(token)
        (byte_pieces if is_byte_piece else ordinary).append(index)
    return ordinary + byte_pieces


def _meanings(table: TokenBytes) -> dict[tuple[str, bytes], int]:
    """The preferred id of each (role, bytes); the role is empty for text, the bytes for others."""
    index_of: dict[tuple[str, bytes], int] = {}
    for index in _preferred_first(table):
        role, piece = table.roles[index], table.bytes_of[index]
        if role in _NAMED_ROLES:
            index_of.setdefault((role, b""), index)
        elif role == "text" and piece:
            index_of.setdefault(("", piece), index)
    return index_of


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Candidates of one length, by ascending id."""

    length: int
    ids: np.ndarray
    texts: list[str]


class _Search:
    """The nearest candidates of many texts, exactly, with most distances never computed.

    Three facts save the work:

    - Characters that no candidate has differ from everything, so all of them are written as one;
      texts that are then equal (most of the foreign scripts) are looked up once.
    - A distance is at least the difference of the lengths, so candidates are tried by that
      difference, and a text is done once its best distance is smaller.
    - At equality a candidate can only tie, which matters to lower ids only.
    """

    def __init__(self, candidates: dict[str, int], queries: Sequence[str]):
        known = set().union(*candidates)
        blank = next(mark for mark in map(chr, range(0x110000)) if mark not in known)
        foreign = set().union(*queries) - known
        blanked = str.maketrans(dict.fromkeys(foreign, blank))
        row_of: dict[str, int] = {}
        self.rows = [row_of.setdefault(text.translate(blanked), len(row_of)) for text in queries]
        self.size = len(row_of)
        self._by_length = _grouped(row_of.items())
        self._groups = _grouped(candidates.items())

    def run(self, bar: "tqdm") -> np.ndarray:
        """Return the id of the nearest candidate of each query."""
        nearest = np.full(self.size, -1, dtype=np.int64)
        for queries in self._by_length:
            groups = sorted(self._groups, key=lambda group: abs(group.length - queries.length))
            for start in range(0, len(queries.texts), _QUERIES_AT_ONCE):
                block = slice(start, start + _QUERIES_AT_ONCE)
                found = _nearest(queries.texts[block], queries.length, groups)
                nearest[queries.ids[block]] = found
                bar.update(len(found))
        return nearest[self.rows]


def _grouped(index_of: Iterable[tuple[str, int]]) -> list[_Candidates]:
    of_length: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
    for text, index in index_of:
        of_length[len(text)].append((index, text))
    groups = []
    for length, members in sorted(of_length.items()):
        members.sort()
        ids = np.array([index for index, _ in members], dtype=np.int64)
        groups.append(_Candidates(length, ids, [text for _, text in members]))
    return groups


def _nearest(queries: list[str], length: int, groups: list[_Candidates]) -> np.ndarray:
    """Find the ids nearest to texts of one length; groups by ascending difference of length."""
    best = np.full(len(queries), _FAR, dtype=np.int64)
    best_id = np.full(len(queries), _FAR, dtype=np.int64)
    for group in groups:
        gap = abs(group.length - length)
        undecided = np.flatnonzero((best > gap) | ((best == gap) & (best_id > group.ids[0])))
        for rows in _blocks(undecided, len(group.texts)):
            # Not uint8: a distance above 255 would wrap around.
            distances = cdist(
                [queries[row] for row in rows],
                group.texts,
                scorer=Levenshtein.distance,
                dtype=np.uint16,
                workers=-1,
            )
            column = distances.argmin(axis=1)
            distance = distances[np.arange(len(rows)), column].astype(np.int64)
            candidate = group.ids[column]
            nearer = (distance < best[rows]) | (
                (distance == best[rows]) & (candidate < best_id[rows])
            )
            best[rows[nearer]] = distance[nearer]
            best_id[rows[nearer]] = candidate[nearer]
    return best_id


def _blocks(rows: np.ndarray, columns: int) -> Iterator[np.ndarray]:
    """Cut rows so that one block of distances takes at most 32 MiB."""
    height = max(1, _DISTANCES_AT_ONCE // columns)
    for start in range(0, len(rows), height):
        yield rows[start : start + height]
