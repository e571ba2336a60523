"""Models below adapters and compilers, and models that read the padding of a row."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import ctkd
from ctkd.distill.models.generation import generate
from ctkd.distill.models.loading import (
    accepts_position_ids,
    below_wrappers,
    evaluating,
    last_logits,
    reads_padding,
    supports_logits_to_keep,
)
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import ModelError
from tests.distill import tiny
from tests.distill.training.test_trainer import Setup, arguments

# What peft says of its own, and of a setting that it mends by itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
SIZES = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "tie_word_embeddings": False},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


def small(kind: str, vocabulary: int = 40) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **SIZES[kind])
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(kind: str, *, head: bool = False, vocabulary: int = 40) -> nn.Module:
    """A model with adapters that do something."""
    targets = TARGETS[kind] + ["lm_head"] * head
    model = get_peft_model(small(kind, vocabulary), LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def behind_padding(count: int, padding: int) -> dict[str, Tensor]:
    ids = torch.cat([torch.zeros(padding, dtype=torch.long), torch.arange(1, 1 + count)])
    mask = (torch.arange(count + padding) >= padding).long()
    positions = (mask.cumsum(0) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.unsqueeze(0) for name, value in inputs.items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("head", [False, True])
def test_a_row_of_an_adapted_model_does_not_depend_on_its_padding(kind, head):
    model = adapted(kind, head=head)
    assert accepts_position_ids(model) and supports_logits_to_keep(model)
    plain, padded = (last_logits(model, model, behind_padding(5, n), 5) for n in (0, 7))
    torch.testing.assert_close(plain, padded, rtol=1e-4, atol=1e-5)
    assert not reads_padding(model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("head", [False, True])
def test_logits_of_an_adapted_model_are_its_own(kind, head):
    model = adapted(kind, head=head)
    reader = ModelLogits(model)
    # An adapter on the head makes it another layer, which is not taken apart.
    assert (reader.why_whole is None) == (not head)
    inputs = behind_padding(5, 2)
    found = reader.read(model, inputs, 5)
    everything = torch.arange(40).view(1, 1, -1)
    wanted = model(**inputs).logits[:, -5:].log_softmax(-1)
    torch.testing.assert_close(found.log_probs(everything), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, small(kind)(**inputs).logits[:, -5:].log_softmax(-1))


def test_what_is_compiled_is_looked_through():
    model = small("gpt2")
    compiled = torch.compile(model, backend="eager")
    assert below_wrappers(compiled) is model
    assert accepts_position_ids(compiled)
    assert ModelLogits(compiled).why_whole == "the model is compiled"
    outside = torch.compile(adapted("gpt2"), backend="eager")
    assert below_wrappers(outside).lm_head is not None
    assert ModelLogits(outside).why_whole == "the model is compiled"


def test_a_wrapper_whose_gradients_are_reduced_otherwise_gets_whole_logits():
    reader = ModelLogits(torch.nn.DataParallel(small("gpt2")))
    assert reader.why_whole == "the model is wrapped in DataParallel"
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(reader(ids).tensor, reader.model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "expected"), [("gpt2", False), ("llama", False), ("mamba", False), ("rwkv", True)]
)
def test_models_that_read_padding_are_known(kind, expected):
    model = small(kind).train()
    model.get_input_embeddings().eval()
    assert reads_padding(model) == expected
    assert model.training and not model.get_input_embeddings().training


def test_a_student_that_reads_padding_is_refused_but_row_by_row(tmp_path):
    setup = Setup()
    student = small("rwkv", len(setup.student_tokenizer))
    given = {"data_collator": setup.collator, "train_dataset": setup.rows}
    with pytest.raises(ModelError, match=r"the student \(RwkvForCausalLM\) reads the padding"):
        CrossTokenizerTrainer(student, arguments(tmp_path), **given)
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    CrossTokenizerTrainer(student, arguments(tmp_path, **sizes), **given).train()
    with pytest.raises(ModelError, match=r"the teacher \(RwkvForCausalLM\) reads the padding"):
        CrossTokenizerTrainer(
            setup.student,
            arguments(tmp_path),
            loss=ctkd.get_loss("uld"),
            teacher=small("rwkv", len(setup.teacher_tokenizer)),
            **given,
        )


def test_answers_of_a_model_that_reads_padding_do_not_depend_on_the_batch():
    tokenizer = tiny.tokenizer(280)
    model = small("rwkv", len(tokenizer))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [3]]
    together = generate(model, tokenizer, prompts, max_new_tokens=5, stop_at_newline=False)
    alone = [
        generate(model, tokenizer, [prompt], max_new_tokens=5, stop_at_newline=False)[0]
        for prompt in prompts
    ]
    assert together == alone


def test_modules_come_back_as_they_were():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
