"""The model that is made from nothing."""

import torch

from ctkd.distill.config import UNTRAINED
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
