"""Small tokenizers of every common kind, trained on a few lines when a test asks for one."""

import functools
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

TEXTS = (
    "The river Nile flows north through eleven countries, and its delta is in Egypt.",
    "Context: The treaty was signed at Münster in 1648.\nQuestion: When was it?\nAnswer: 1648",
    "In Paris the café opens at 7; the museum, at 9:30. It's 12 % cheaper!",
    "def add(a, b):\n    return a + b\n",
    "Der Fluß fließt nach Süden. Ça va? Où est la gare? niño, señor.",
)
HARD_STRINGS = (
    "The Nile flows north.",
    " Paris",
    "  two spaces,   three,\ttab\n\n\nlines\r\n",
    "trailing space ",
    "naïve café, Fluß",
    "e\u0301 decomposed, \u00e9 composed",
    "日本語のテキスト",
    "مرحبا بالعالم",
    "👩\u200d👩\u200d👧\u200d👦 family, 🇫🇷 flag",
    "\u0000\u0001\u007f\u0085\u00ad\u00a0 controls",
    "\ufeffbyte order mark \u2028 separator",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "Ġ and Ċ are not spaces here",
    "<0x41> is not a byte, ## is not a mark",
    "12345 + 67890 = 80235",
)


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@functools.cache
def byte_level(*, prefix_space: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind; pad is eos, as in SmolLM2; two added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|unused|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("übung")])
    return wrapped(tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>")


def _byte_fallback_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *byte_pieces],
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # Training makes the byte pieces special tokens; in real tokenizers they are plain ones.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:4]
    return Tokenizer.from_str(json.dumps(state))


_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@functools.cache
def gemma_like() -> PreTrainedTokenizerFast:
    """No added space, byte fallback, bos in front by default, whitespace runs as added tokens."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.decoder = decoders.Sequence(_SPACES)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return wrapped(tokenizer, **_NAMES)


@functools.cache
def metaspace(scheme: str = "first") -> PreTrainedTokenizerFast:
    """Llama 2's kind in transformers 5: a space before the text unless it has one."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([*_SPACES, decoders.Strip(" ", 1, 0)])
    return wrapped(tokenizer, **_NAMES)


@functools.cache
def prepending() -> PreTrainedTokenizerFast:
    """Phi-3's kind: a space before every text, also before one that begins with a space."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([*_SPACES, decoders.Strip(" ", 1, 0)])
    return wrapped(tokenizer, **_NAMES)


@functools.cache
def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: no byte fallback, so that it lacks characters; eos behind by default."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.token_to_id("<eos>"))]
    )
    return wrapped(tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


@functools.cache
def wordpiece(*, decoder: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if decoder:
        tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    return wrapped(
        tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        eos_token="[SEP]",
    )


@functools.cache
def end_of_word() -> PreTrainedTokenizerFast:
    """The first GPT's kind."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def words(decoder: decoders.Decoder | None = None) -> PreTrainedTokenizerFast:
    """Whole words only, with a decoder of choice."""
    vocabulary = {"<eos>": 0, "the": 1, "Nile": 2, "flows": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return wrapped(tokenizer, eos_token="<eos>")


def slow_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer in Python on a SentencePiece model that adds a space and has byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return SentencePieceBackend(
        vocab_file=str(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byt5() -> PreTrainedTokenizerBase:
    return ByT5Tokenizer()
