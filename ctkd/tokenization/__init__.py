"""Two tokenizers: the bytes of their tokens, aligned texts, and maps between vocabularies."""

from ctkd.tokenization.alignment import Aligner, Alignment
from ctkd.tokenization.pair import TokenizerPair
from ctkd.tokenization.token_bytes import TokenBytes

__all__ = ["Aligner", "Alignment", "TokenBytes", "TokenizerPair"]
