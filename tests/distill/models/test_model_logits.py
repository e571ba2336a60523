"""Logits of real architectures, a block at a time, are the model's own."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
)

from ctkd.batch import Side
from ctkd.distill.models.loading import last_logits
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.logits import DenseLogits, HeadLogits

WORDS, LENGTH = 37, 7
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma 2": Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.0625),
    "gpt 2": GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0
    ),
    "phi, with a bias": PhiConfig(**{**SMALL, "num_key_value_heads": None}),
}
HEADS = {"gemma 2": (1.0, 0.5), "granite": (0.25, None), "cohere": (0.0625, None)}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }


def labels() -> torch.Tensor:
    found = torch.randint(WORDS, (2, 4), generator=torch.Generator().manual_seed(2))
    found[0, 2:] = -100
    return found


def gradients(model: PreTrainedModel, logits) -> dict[str, torch.Tensor]:
    side = Side.from_causal_lm(logits, labels())
    ids = torch.tensor([0, 3, 5]).view(1, 1, 3).expand(2, 1, 3)
    answers = side.logits.log_probs_at(ids, (1.0, 2.0))
    (answers[0].sum() - 0.3 * answers[1].square().sum()).backward()
    found = {name: one.grad for name, one in model.named_parameters()}
    model.zero_grad()
    assert all(one is not None for one in found.values())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_at_a_time_they_are_the_model_s_own(name):
    model = build(name)
    reader = ModelLogits(model)
    assert reader.why_whole is None
    logits = reader.read(model, inputs(), 4)
    assert isinstance(logits, HeadLogits)
    assert (logits.source.scale, logits.source.softcap) == HEADS.get(name, (1.0, None))
    whole = DenseLogits(last_logits(model, model, inputs(), 4))
    everything = torch.arange(WORDS).view(1, 1, -1).expand(2, 1, -1)
    torch.testing.assert_close(
        logits.log_probs(everything), whole.log_probs(everything), rtol=1e-9, atol=1e-9
    )
    found, expected = gradients(model, logits), gradients(model, whole)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-8, atol=1e-10)


def test_trying_it_out_changes_nothing():
    model = build("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heard = []
    model.register_forward_hook(lambda *_: heard.append("the model"))
    state = torch.get_rng_state()
    ModelLogits(model)
    assert model.training
    assert not heard and not model.base_model._forward_hooks
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Shifted(nn.Linear):
    """A head that is no plain linear layer."""

    def forward(self, hidden):
        return super().forward(hidden) + 1.0


def test_a_head_that_is_more_than_a_layer_is_left_whole():
    model = build("llama")
    layer = Shifted(16, WORDS, bias=False, dtype=torch.float64)
    model.set_output_embeddings(layer)
    reader = ModelLogits(model)
    assert reader.why_whole == "its head is Shifted, not a plain linear layer"
    assert isinstance(reader.read(model, inputs(), 4), DenseLogits)


def test_a_head_that_says_something_else_is_left_whole(monkeypatch):
    model = build("llama")
    forward = type(model).forward

    def squared(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * output.logits.abs()
        return output

    squared.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(type(model), "forward", squared)
    assert "more than a linear layer" in ModelLogits(model).why_whole


def test_two_forms_that_cannot_be_told_apart_yet_are_left_whole():
    model = build("gemma 2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-9)
    assert "more than a linear layer" in ModelLogits(model).why_whole


def test_a_hook_on_the_head_and_a_refusal_leave_it_whole():
    model = build("llama")
    assert ModelLogits(model, refuse="for a reason").why_whole == "for a reason"
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    assert ModelLogits(model).why_whole == "its head is changed by hooks"
