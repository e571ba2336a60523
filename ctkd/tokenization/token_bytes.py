"""The bytes of each token of a tokenizer.

Two tokenizers spell the same text in different strings (``Ġcafé`` is written ``ĠcafÃ©`` by one and
``▁café`` by the other), but the bytes under the strings agree. Everything in ctkd that compares
two tokenizers compares bytes.

What this module does not do: it never looks at a text. A tokenizer that changes the text before
cutting it (lower case, Unicode normalisation, a leading space) gives ids whose bytes are those of
the changed text; whoever needs the bytes of the original compares the two.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ctkd.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Role", "TokenBytes"]

Role = Literal["text", "bos", "eos", "pad", "other"]

_Spell = Callable[[str], bytes]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"


@dataclass(frozen=True, slots=True, eq=False)
class TokenBytes:
    r"""A table from token id to the bytes the token stands for and the role it plays.

    How the bytes are found:

    - byte-level BPE (GPT-2, Llama 3, Qwen, everything converted from tiktoken): the alphabet that
      writes each byte as a printable character is undone; added tokens are taken as written.
    - SentencePiece and Metaspace (Llama 2, Gemma, T5): ``▁`` is a space, ``<0x0A>`` is one byte.
      These tables are not one to one: a byte piece and a character may have the same bytes, and a
      literal ``▁`` in a text comes back as a space.
    - WordPiece (BERT): ``##x`` continues a word, any other token is preceded by a space. This
      loses information: "it's" comes back as " it ' s", and an upper-case letter does not come
      back at all where the tokenizer lower-cases.
    - end-of-word marks (``</w>``, and a missing ``@@``) become a space after the word. This loses
      information in the same way.

    Special tokens have no bytes. A token is special when the tokenizer flags it so, or names it
    as its bos, eos, pad, unk or the like. A token that is both eos and something else (``pad_token
    = eos_token`` is common) has the role "eos".

    Args:
        bytes_of: The bytes of each id, empty for special tokens and for ids without a token.
        roles: The role of each id; "other" is a special token that is none of bos, eos, pad, or
            an id without a token.
        tokens: Each id as the tokenizer writes it (``Ġcafé`` as ``ĠcafÃ©``), empty for an id
            without a token; () if that is not known.

    Example:
        >>> table = TokenBytes((b"", b"caf", b"\xc3", b"\xa9"), ("eos", "text", "text", "text"))
        >>> table.decode([1, 2, 3, 0]).decode()
        'café'
        >>> len(table)
        4
    """

    bytes_of: tuple[bytes, ...]
    roles: tuple[Role, ...]
    tokens: tuple[str, ...] = ()

    @classmethod
    def from_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase") -> "TokenBytes":
        """Read the table off a tokenizer that transformers loaded, fast or slow.

        The table covers ``range(len(tokenizer))``, and further ids if the vocabulary has holes.

        Raises:
            ModelError: If the tokenizer spells its tokens in a way this module does not know.
        """
        vocab: dict[str, int] = tokenizer.get_vocab()
        size = max(len(tokenizer), max(vocab.values(), default=-1) + 1)
        tokens: list[str | bytes | None] = tokenizer.convert_ids_to_tokens(list(range(size)))
        added = tokenizer.added_tokens_decoder
        named = {
            tokenizer.pad_token_id: "pad",
            tokenizer.bos_token_id: "bos",
            tokenizer.eos_token_id: "eos",
        }
        special = {index for index, token in added.items() if token.special}
        special.update(tokenizer.all_special_ids)
        spell, literal_added = _spelling(tokenizer, tokens)
        bytes_of: list[bytes] = []
        roles: list[Role] = []
        for index, token in enumerate(tokens):
            if token is None or index in special:
                bytes_of.append(b"")
                roles.append(named.get(index, "other"))  # type: ignore[arg-type]
                continue
            roles.append("text")
            if isinstance(token, bytes):
                bytes_of.append(token)
            elif literal_added and index in added:
                bytes_of.append(token.encode())
            else:
                bytes_of.append(spell(token))
        return cls(tuple(bytes_of), tuple(roles), tuple(map(_written, tokens)))

    def __len__(self) -> int:
        return len(self.bytes_of)

    def first(self, size: int) -> "TokenBytes":
        """Keep the first ids only: those that a narrower model knows."""
        if size >= len(self):
            return self
        return TokenBytes(self.bytes_of[:size], self.roles[:size], self.tokens[:size])

    def decode(self, ids: Iterable[int]) -> bytes:
        """Join the bytes of some ids; special tokens contribute nothing.

        Raises:
            DataError: If an id is not in the table.
        """
        pieces = []
        for index in ids:
            if not 0 <= index < len(self.bytes_of):
                raise DataError(
                    f"token id {index} is outside this tokenizer's 0 to {len(self.bytes_of) - 1}; "
                    "the ids come from another tokenizer"
                )
            pieces.append(self.bytes_of[index])
        return b"".join(pieces)


def _written(token: str | bytes | None) -> str:
    return token.decode("utf-8", "surrogateescape") if isinstance(token, bytes) else token or ""


def _byte_alphabet() -> dict[str, int]:
    """Undo byte-level BPE's alphabet: bytes that print stand for themselves, others for 256 up."""
    alphabet = {}
    unprintable = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(256 + unprintable)] = byte
            unprintable += 1
    return alphabet


def _byte_level(token: str, alphabet: dict[str, int] = _byte_alphabet()) -> bytes:  # noqa: B008
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # such a token is matched as written, so it is its own text
        return token.encode()


def _is_byte(token: str) -> bool:
    return len(token) == 1 and ord(token) < 256


def _single_byte(token: str) -> bytes:
    return bytes([ord(token)]) if _is_byte(token) else token.encode()


def _through(steps: list[Callable[[str], str | bytes]]) -> _Spell:
    def spell(token: str) -> bytes:
        piece: str | bytes = token
        for step in steps:
            if isinstance(piece, bytes):
                break
            piece = step(piece)
        return piece if isinstance(piece, bytes) else piece.encode()

    return spell


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _metaspace(token: str, mark: str = _SPACE_MARK) -> str:
    return token.replace(mark, " ")


def _word_start(token: str, prefix: str) -> str:
    continues = token.startswith(prefix) and token != prefix
    return token[len(prefix) :] if continues else " " + token


def _word_end(token: str, suffix: str) -> str:
    return token[: -len(suffix)] + " " if token.endswith(suffix) else token


def _word_unfinished(token: str, suffix: str = "@@") -> str:
    unfinished = token.endswith(suffix) and token != suffix
    return token[: -len(suffix)] if unfinished else token + " "


def _spelling(
    tokenizer: "PreTrainedTokenizerBase", tokens: list[str | bytes | None]
) -> tuple[_Spell, bool]:
    """Find how tokens are spelled, and whether added tokens are taken as written."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _fast_spelling(tokenizer, backend, tokens)
    if hasattr(tokenizer, "byte_decoder"):
        return _byte_level, True
    if any(isinstance(token, bytes) for token in tokens):  # some tokenizers of remote code
        return str.encode, True
    strings = [token for token in tokens if isinstance(token, str)]
    if getattr(tokenizer, "_utf_vocab_size", None) == 256 and sum(map(_is_byte, strings)) >= 256:
        return _single_byte, True
    spell = _by_marks(strings)
    if spell is None:
        raise ModelError(
            f"{type(tokenizer).__name__} spells its tokens in a way ctkd cannot turn into bytes; "
            "expected byte-level BPE, SentencePiece, WordPiece or BPE with end-of-word marks; "
            "load a fast version of the tokenizer, or choose another model"
        )
    return spell, False


def _fast_spelling(
    tokenizer: "PreTrainedTokenizerBase", backend: Any, tokens: list[str | bytes | None]
) -> tuple[_Spell, bool]:
    if backend.decoder is None:
        if any(part["type"] == "ByteLevel" for part in _parts(tokenizer, backend.pre_tokenizer)):
            return _byte_level, True
        spell = _by_marks([token for token in tokens if isinstance(token, str)])
        return spell or _through([lambda token: " " + token]), False
    steps: list[Callable[[str], str | bytes]] = []
    byte_level = False
    if getattr(backend.model, "byte_fallback", False):
        steps.append(_byte_fallback)
    for part in _parts(tokenizer, backend.decoder):
        kind = part["type"]
        if kind == "ByteLevel":
            steps.append(_byte_level)
            byte_level = True
        elif kind == "ByteFallback":
            steps.append(_byte_fallback)
        elif kind == "Metaspace":
            steps.append(partial(_metaspace, mark=part["replacement"]))
        elif kind == "WordPiece":
            steps.append(partial(_word_start, prefix=part["prefix"]))
        elif kind == "BPEDecoder":
            steps.append(partial(_word_end, suffix=part["suffix"]))
        elif kind == "Replace":
            steps.append(_replacement(tokenizer, part["pattern"], part["content"]))
        elif kind not in ("Fuse", "Strip"):  # these act on a whole text, not on a token
            raise ModelError(
                f"{type(tokenizer).__name__} has a decoder of type {kind}, which ctkd cannot turn "
                "into bytes; choose a model whose tokenizer is a byte-level, SentencePiece or "
                "WordPiece one"
            )
    return _through(steps), byte_level


def _parts(tokenizer: "PreTrainedTokenizerBase", component: Any) -> list[dict[str, Any]]:
    """List the steps of a decoder or pre-tokenizer, a sequence being taken apart."""
    if component is None:
        return []
    try:
        state = json.loads(component.__getstate__())
    except Exception as error:  # tokenizers raises a bare Exception for components in Python
        raise ModelError(
            f"{type(tokenizer).__name__} has a step written in Python, which ctkd cannot read "
            f"({str(error).splitlines()[0]}); choose a model with a serializable tokenizer"
        ) from error
    pending = [state]
    parts = []
    while pending:
        part = pending.pop(0)
        inner = part.get("decoders") or part.get("pretokenizers")
        if part["type"] == "Sequence":
            pending = [*(inner or []), *pending]
        else:
            parts.append(part)
    return parts


def _replacement(
    tokenizer: "PreTrainedTokenizerBase", pattern: dict[str, str], content: str
) -> Callable[[str], str]:
    if "String" in pattern:
        return lambda token: token.replace(pattern["String"], content)
    try:
        compiled = re.compile(pattern["Regex"])
    except re.error as error:
        raise ModelError(
            f"{type(tokenizer).__name__} has a decoder that replaces {pattern['Regex']!r}, which "
            f"Python cannot read as a pattern ({error}); choose a model with a plainer tokenizer"
        ) from error
    return lambda token: compiled.sub(lambda _: content, token)


def _by_marks(tokens: list[str]) -> _Spell | None:
    """Guess from the marks that occur most in a vocabulary; None if there are none."""
    counted: list[tuple[int, _Spell]] = [
        (
            sum(token.startswith(_SPACE_MARK) for token in tokens),
            _through([_byte_fallback, _metaspace]),
        ),
        (
            sum(token.startswith("##") and len(token) > 2 for token in tokens),
            _through([partial(_word_start, prefix="##")]),
        ),
        (
            sum(token.endswith("</w>") for token in tokens),
            _through([partial(_word_end, suffix="</w>")]),
        ),
        (
            sum(token.endswith("@@") and len(token) > 2 for token in tokens),
            _through([_word_unfinished]),
        ),
    ]
    count, spell = max(counted, key=lambda one: one[0])
    return spell if count else None
