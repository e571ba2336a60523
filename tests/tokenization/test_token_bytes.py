import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctkd.errors import DataError, ModelError
from ctkd.tokenization.token_bytes import TokenBytes, _byte_alphabet
from tests.tokenization import real_tokenizers
from tests.tokenization import trained_tokenizers as trained


def spelled(tokenizer, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return TokenBytes.from_tokenizer(tokenizer).decode(ids).decode()


class InPython(PreTrainedTokenizer):
    """A slow tokenizer that is nothing but a list of tokens."""

    def __init__(self, tokens: list, **kwargs):
        self.tokens = tokens
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def get_vocab(self) -> dict:
        return {token: index for index, token in enumerate(self.tokens)}

    def _convert_id_to_token(self, index: int):
        return self.tokens[index] if index < len(self.tokens) else None

    def _convert_token_to_id(self, token) -> int:
        return self.tokens.index(token) if token in self.tokens else None


@pytest.mark.parametrize("kind", [trained.byte_level, trained.gemma_like, trained.byt5])
def test_tokenizers_that_add_nothing_spell_every_text(kind):
    tokenizer = kind()
    for text in trained.HARD_STRINGS:
        assert spelled(tokenizer, text) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained.byte_level(prefix_space=True),
        lambda: trained.metaspace("first"),
        lambda: trained.metaspace("always"),
    ],
    ids=["byte-level", "metaspace first", "metaspace always"],
)
def test_a_space_is_added_to_a_text_without_one(make):
    tokenizer = make()
    for text in trained.HARD_STRINGS:
        assert spelled(tokenizer, text) == (text if text.startswith(" ") else " " + text)


def test_a_space_is_added_to_every_text(tmp_path):
    tokenizers = (trained.prepending(), trained.slow_sentencepiece(tmp_path))
    for text in trained.HARD_STRINGS:
        assert [spelled(tokenizer, text) for tokenizer in tokenizers] == [" " + text] * 2


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="utf-8")))
def test_byte_level_spells_any_text(text):
    assert spelled(trained.byte_level(), text) == text


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁")))
def test_byte_fallback_spells_any_text_without_its_mark(text):
    assert spelled(trained.gemma_like(), text) == text


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_a_character_cut_apart_is_joined_again(text):
    tokenizer = trained.byte_level()
    table = TokenBytes.from_tokenizer(tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert b"".join(table.decode([index]) for index in ids) == text.encode()


def test_the_mark_itself_comes_back_as_a_space():
    assert spelled(trained.gemma_like(), "a▁b") == "a b"


def test_the_byte_alphabet_is_gpt2s():
    assert _byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_wordpiece_loses_what_the_docstring_says():
    for tokenizer in (trained.wordpiece(), trained.wordpiece(decoder=False)):
        assert spelled(tokenizer, "It's in Paris.") == " It ' s in Paris ."
        assert spelled(tokenizer, "flowsnorth") == " flowsnorth"  # pieces continue a word


def test_end_of_word_marks_are_spaces():
    assert spelled(trained.end_of_word(), "In Paris") == "In Paris "


def test_unigram_spells_what_it_has_characters_for():
    assert spelled(trained.unigram(), " In Paris") == " In Paris"
    assert spelled(trained.unigram(), " 日In") == " In"


def test_added_tokens_are_taken_as_written():
    tokenizer = trained.byte_level()
    assert spelled(tokenizer, "a<tool>übung b") == "a<tool>übung b"
    table = TokenBytes.from_tokenizer(tokenizer)
    assert table.bytes_of[tokenizer.convert_tokens_to_ids("übung")] == "übung".encode()
    whitespace = trained.gemma_like()
    assert TokenBytes.from_tokenizer(whitespace).bytes_of[len(whitespace) - 1] == b"\n\n"


def test_special_tokens_have_a_role_and_no_bytes():
    tokenizer = trained.byte_level()
    table = TokenBytes.from_tokenizer(tokenizer)
    assert len(table) == len(tokenizer)
    assert table.roles[:4] == ("other", "bos", "eos", "text")  # eos is the padding, too
    assert table.bytes_of[:3] == (b"", b"", b"")
    assert 0 not in tokenizer.all_special_ids  # found by its flag alone
    ids = [1, *tokenizer("Paris")["input_ids"], 2]
    assert table.decode(ids) == b"Paris"
    assert TokenBytes.from_tokenizer(trained.gemma_like()).roles[:4] == (
        "pad",
        "eos",
        "bos",
        "other",
    )


def test_ids_without_a_token_are_covered():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    tokenizer.decoder = decoders.ByteLevel()
    table = TokenBytes.from_tokenizer(trained.wrapped(tokenizer))
    assert table.bytes_of == (b"a", b"", b"", b"", b"", b"b")
    assert table.roles == ("text", *["other"] * 4, "text")


@pytest.mark.parametrize("index", [-1, 402, 10**6])
def test_an_id_of_another_tokenizer_is_refused(index):
    table = TokenBytes.from_tokenizer(trained.byte_level())
    with pytest.raises(DataError, match=rf"token id {index} is outside this tokenizer's 0 to 401"):
        table.decode([3, index])


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (None, [b"", b" the", b" Nile", b" flows"]),
        (decoders.Replace(Regex("l.w"), "_"), [b"", b"the", b"Nile", b"f_s"]),
        (decoders.Sequence([decoders.Sequence([]), decoders.Replace("Ni", "")]), None),
    ],
)
def test_decoders_are_followed_step_by_step(decoder, expected):
    expected = expected or [b"", b"the", b"le", b"flows"]
    assert list(TokenBytes.from_tokenizer(trained.words(decoder)).bytes_of) == expected


def test_a_byte_level_tokenizer_without_decoder_is_known_by_its_pre_tokenizer():
    tokenizer = Tokenizer(models.BPE({"Ġa": 0, "Ã": 1, "©": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()])
    table = TokenBytes.from_tokenizer(trained.wrapped(tokenizer))
    assert table.bytes_of == (b" a", b"\xc3", b"\xa9")


class Custom:
    def decode_chain(self, tokens):
        return tokens


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (decoders.CTC(), "decoder of type CTC"),
        (decoders.Decoder.custom(Custom()), "a step written in Python"),
        (decoders.Replace(Regex(r"\p{L}"), ""), "cannot read as a pattern"),
    ],
)
def test_a_decoder_that_cannot_be_undone_is_refused_in_one_line(decoder, message):
    tokenizer = trained.words()
    tokenizer.backend_tokenizer.decoder = decoder
    with pytest.raises(ModelError, match=message) as caught:
        TokenBytes.from_tokenizer(tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁a", "b", "<0x0A>"], (b" a", b"b", b"\n")),
        (["▁▁▁a", "b▁c▁"], (b"   a", b"b c ")),
        (["a", "##b", "##"], (b" a", b"b", b" ##")),
        (["a", "b</w>"], (b"a", b"b ")),
        (["a@@", "b", "@@"], (b"a", b"b ", b"@@ ")),
        ([b"\xc3", b"\xa9"], (b"\xc3", b"\xa9")),
    ],
    ids=["spaces", "several spaces", "wordpiece", "end of word", "unfinished", "bytes"],
)
def test_slow_tokenizers_are_known_by_their_marks(tokens, expected):
    table = TokenBytes.from_tokenizer(InPython([*tokens, "<s>"], eos_token="<s>"))
    assert table.bytes_of == (*expected, b"")
    assert table.roles[-1] == "eos"


def test_slow_byte_level_tokenizers_are_known_by_their_byte_decoder():
    tokenizer = InPython(["Ġa", "Ã"])
    tokenizer.byte_decoder = {}
    assert TokenBytes.from_tokenizer(tokenizer).bytes_of == (b" a", b"\xc3")


def test_a_slow_tokenizer_without_marks_is_refused():
    with pytest.raises(ModelError, match="InPython spells its tokens in a way ctkd cannot"):
        TokenBytes.from_tokenizer(InPython(["a", "b"]))


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_packaged_models_spell_every_text(name):
    tokenizer, table = real_tokenizers.packaged(name), real_tokenizers.table(name)
    assert len(table) == len(tokenizer)
    assert table.roles[tokenizer.eos_token_id] == "eos"
    for text in trained.HARD_STRINGS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert table.decode(ids).decode() == text
