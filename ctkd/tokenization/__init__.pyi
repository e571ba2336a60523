"""The names of the package, each imported when it is first asked for."""

from .alignment import Aligner as Aligner
from .alignment import Alignment as Alignment
from .pair import TokenizerPair as TokenizerPair
from .token_bytes import TokenBytes as TokenBytes
