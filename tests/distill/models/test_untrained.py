"""The model that is made from nothing."""

import filecmp
import hashlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctkd.distill.config import UNTRAINED
from ctkd.distill.data.pydocs import read_pydocs
from ctkd.distill.models.from_config import prepare_student
from ctkd.distill.models.loading import load_model, load_tokenizer, resolve


def test_it_is_made_once_and_alike_and_leaves_the_state_of_random_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "first"))
    state = torch.get_rng_state()
    model, tokenizer = load_model(UNTRAINED), load_tokenizer(UNTRAINED)
    assert torch.equal(state, torch.get_rng_state())
    assert model.num_parameters() == 2_114_880
    assert len(tokenizer) == model.get_output_embeddings().weight.shape[0] == 4096
    text = "Größe: 時間, an\tindented\n\n    line"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    made = resolve(UNTRAINED)
    assert resolve(UNTRAINED) == made
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "second"))
    again = load_model(UNTRAINED)
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert load_tokenizer(UNTRAINED).get_vocab() == tokenizer.get_vocab()
    # As a configuration it stands for its shape alone.
    same, other = (prepare_student(UNTRAINED, [text], seed) for seed in (0, 1))
    assert load_tokenizer(str(same)).get_vocab() != tokenizer.get_vocab()
    drawn = [load_model(str(one)).get_input_embeddings().weight for one in (same, other)]
    assert torch.equal(drawn[0], model.get_input_embeddings().weight)
    assert drawn[0].shape == drawn[1].shape and not torch.equal(*drawn)


def test_its_files_are_those_that_earlier_versions_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path))
    shape = {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    texts = [row["text"] for row in read_pydocs("train")]
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=pieces, **ends).save_pretrained(tmp_path / "recipe")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **ids, **shape)).save_pretrained(
        tmp_path / "recipe"
    )
    made = tmp_path / "models" / resolve(UNTRAINED).rpartition("/")[2]
    name = hashlib.sha256(repr((texts, shape, 4096)).encode()).hexdigest()[:16]
    assert made.name == f"pocket-llama-{name}"
    files = sorted(one.name for one in made.iterdir())
    assert files == sorted(one.name for one in (tmp_path / "recipe").iterdir())
    assert filecmp.cmpfiles(made, tmp_path / "recipe", files, shallow=False)[0] == files
