"""Models and tokenizers small enough to train in a test, and texts for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.tasks import Example

# Chat templates: one that writes whatever comes, and one that knows no system and trims.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

TEXTS = [
    "The cat sat on the mat.",
    "A dog ran after the cat in the rain.",
    "Rain fell on the old stone bridge all night.",
    "Nobody crossed the bridge until the morning train.",
]
ANSWERS = [" the mat", " in the rain", " all night", " until the morning", " nobody", " the cat"]


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with about this many words; sizes differ in how they cut text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def model(vocabulary: int, seed: int = 0, *, hidden: int = 16) -> LlamaForCausalLM:
    """A Llama of two small layers with random weights, in float64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).double().eval()


def examples(count: int = 6) -> list[Example]:
    """Prompts and answers of different lengths."""
    return [
        Example(
            id=str(number),
            prompt=f"{TEXTS[number % len(TEXTS)]} {'Well? ' * (number % 3)}Answer:",
            answer=ANSWERS[number % len(ANSWERS)],
            references=(ANSWERS[number % len(ANSWERS)].strip(),),
            group=str(number % len(TEXTS)),
        )
        for number in range(count)
    ]


class Setup:
    """A student and a teacher with two tokenizers, and encoded examples for both."""

    def __init__(self, count: int = 6, *, score_eos: bool = False) -> None:
        self.student_tokenizer = tokenizer(280)
        self.teacher_tokenizer = tokenizer(330)
        # The student's head is wider than its tokenizer, as padded heads are.
        self.student = model(len(self.student_tokenizer) + 6, seed=1)
        self.teacher = model(len(self.teacher_tokenizer), seed=2, hidden=24)
        self.rows = encode_examples(
            examples(count),
            self.student_tokenizer,
            self.teacher_tokenizer,
            max_length=64,
            score_eos=score_eos,
        ).rows
        self.collator = Collator(
            student_pad_id=padding_id(self.student_tokenizer),
            teacher_pad_id=padding_id(self.teacher_tokenizer),
            score_eos=score_eos,
        )
