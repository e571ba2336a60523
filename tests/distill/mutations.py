"""Files damaged at random, as disks, transfers and editors do it."""

import random
import re
from collections.abc import Iterator

# What makes readers stumble: kinds, sizes, depths, ends of text and of lines.
_TOKENS = [
    b"null", b"true", b"0", b"-1", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"[]", b"{}", b'""',
    b'"', b"'", b",", b"\n", b"\r\n", b"\t", b"\0", b"\\", b"\\u0000", b"\\ud800", b"\xff\xfe",
    b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b'"x": 1, ', "é".encode(), b"../../etc",
]  # fmt: skip
_VALUE = re.compile(rb'"[^"\n]*"|-?\d[\d.e+-]*|true|false|null')


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """So many damaged forms of a file's content, none of them equal to it."""
    chance = random.Random(seed)
    while count:
        damaged = content
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            damaged = chance.choice(_WAYS)(damaged, chance)
        if damaged != content:
            count -= 1
            yield damaged


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(len(content) + 1)
    length = chance.choice((1, 2, 8, 64, len(content)))
    return start, min(start + chance.randint(1, length or 1), len(content))


def _flipped(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return content
    place = chance.randrange(len(content))
    flipped = bytes([content[place] ^ 1 << chance.randrange(8)])
    return content[:place] + flipped + content[place + 1 :]


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _without(content: bytes, chance: random.Random) -> bytes:
    start, stop = _span(content, chance)
    return content[:start] + content[stop:]


def _twice(content: bytes, chance: random.Random) -> bytes:
    start, stop = _span(content, chance)
    return content[:stop] + content[start:]


def _swapped(content: bytes, chance: random.Random) -> bytes:
    first, middle = sorted((_span(content, chance)[0], _span(content, chance)[0]))
    stop = min(middle + (middle - first), len(content))
    return content[:first] + content[middle:stop] + content[first:middle] + content[stop:]


def _with_token(content: bytes, chance: random.Random) -> bytes:
    start, _ = _span(content, chance)
    return content[:start] + chance.choice(_TOKENS) + content[start:]


def _with_noise(content: bytes, chance: random.Random) -> bytes:
    start, _ = _span(content, chance)
    return content[:start] + chance.randbytes(chance.choice((1, 4, 100))) + content[start:]


def _another_value(content: bytes, chance: random.Random) -> bytes:
    values = list(_VALUE.finditer(content))
    if not values:
        return content
    one, other = chance.choice(values), chance.choice(values)
    new = chance.choice((chance.choice(_TOKENS), other[0]))
    return content[: one.start()] + new + content[one.end() :]


_WAYS = (_flipped, _cut, _without, _twice, _swapped, _with_token, _with_noise, _another_value)
