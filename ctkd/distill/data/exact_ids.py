"""Ids that spell a text exactly, also from tokenizers that put a space in front of every text."""

from transformers import PreTrainedTokenizerBase

from ctkd.errors import DataError
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["check_unicode", "exact_ids", "tokenized"]


def check_unicode(text: str, what: str, where: str) -> None:
    """Refuse half a surrogate pair, which a Python string can hold and no tokenizer can read.

    Args:
        text: The text to look at.
        what: What an error message calls the text.
        where: What it calls the example.

    Raises:
        DataError: If the text is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the {what} is not valid Unicode (half a surrogate pair at character "
            f"{error.start + 1}); repair it or remove the row"
        ) from error


def tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = False
) -> list[list[int]]:
    """Tokenize texts one by one: never cut or padded, whatever the tokenizer is set to.

    Args:
        tokenizer: The tokenizer.
        texts: What to tokenize.
        special: Whether to add the special tokens that the tokenizer puts around a text.
    """
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def exact_ids(
    tokenizer: PreTrainedTokenizerBase,
    token_bytes: TokenBytes,
    text: str,
    ids: list[int],
) -> list[int] | None:
    """Return ids whose bytes are exactly those of the text, None if there are none.

    SentencePiece tokenizers that put a space before every text spell "Paris" as " Paris". If so,
    the text is tokenized without its own leading space, or behind a line break or a colon whose ids
    are taken away again, whichever spells the text.

    Args:
        tokenizer: The tokenizer.
        token_bytes: Its byte table.
        text: What to spell.
        ids: What the tokenizer makes of the text, without special tokens.
    """
    wanted = text.encode()
    spelled = token_bytes.decode(ids)
    if spelled == wanted:
        return ids
    if spelled != b" " + wanted:
        return None
    if text.startswith(" "):
        (without,) = tokenized(tokenizer, [text[1:]])
        if token_bytes.decode(without) == wanted:
            return without
    if token_bytes.decode(ids[1:]) == wanted:
        return ids[1:]
    for anchor in ("\n", ":"):
        (behind,) = tokenized(tokenizer, [anchor + text])
        for start in range(1, len(behind)):
            if token_bytes.decode(behind[start:]) == wanted:
                return behind[start:]
    return None
