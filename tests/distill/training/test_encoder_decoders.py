"""Encoder-decoders as students and as teachers, in every command."""

import json
import math
import shutil

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import ctkd
from baselines import multilevelot, uld
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.prompts import PLAIN, PromptForm
from ctkd.distill.data.tasks import Example
from ctkd.distill.evaluation.bits import text_bits
from ctkd.distill.models import ModelLogits
from ctkd.distill.models.generation import generate
from ctkd.distill.models.loading import decoder_start, decoder_start_of, load_model
from ctkd.distill.teachers.memory import TeacherMemory
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import BatchError, DataError, ModelError, SettingError
from ctkd.logits import HeadLogits
from tests.distill import tiny, tiny_encoder_decoders
from tests.distill.tiny_caches import CachePlace
from tests.distill.tiny_runs import error_of, finish, invoke, record, weights
from tests.distill.training.test_cached_training import Doubled, state
from tests.distill.training.test_cached_training import trainer as of_settings
from tests.distill.training.test_trainer import arguments

# What peft says of its own use of transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
KINDS = tiny_encoder_decoders.KINDS
ORACLES = {"uld": uld.loss, "multilevelot": multilevelot.loss}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workplace with one of each kind; those called t5 drop out, as published ones do."""
    place = CachePlace(tmp_path_factory.mktemp("place"), rows=12)
    for kind in KINDS:
        dropout = 0.1 if kind == "t5" else 0.0
        tiny_encoder_decoders.save(place.folder / kind, kind, seed=3, dropout=dropout)
    return place


class Side:
    """A model and its tokenizer, decoder-only or of a kind, and what it says of one row alone."""

    def __init__(self, kind: str, seed: int) -> None:
        if kind == "llama":
            self.tokenizer = tiny.tokenizer(300)
            self.model = tiny.model(len(self.tokenizer), seed)
            self.form = PLAIN
        else:
            self.tokenizer = tiny_encoder_decoders.tokenizer(kind)
            self.model = tiny_encoder_decoders.model(kind, seed)
            self.form = PromptForm(decoder_start=decoder_start_of(self.model))

    def alone(self, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits that predict the answer's tokens and the end, and these tokens."""
        (answer,) = self.tokenizer(example.answer, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        answer = torch.cat([answer, torch.tensor([self.tokenizer.eos_token_id])])
        prompt = self.tokenizer(example.prompt, return_tensors="pt").input_ids
        if not self.form.decoder_start:
            logits = self.model(torch.cat([prompt, answer[None]], 1)).logits[0]
            return logits[prompt.shape[1] - 1 : -1], answer
        begun = torch.tensor(self.form.decoder_start[1:], dtype=torch.int64)
        labels = torch.cat([begun, answer])[None]
        logits = self.model(input_ids=prompt, labels=labels).logits[0]
        return logits[len(begun) :], answer


def test_a_step_is_that_of_the_models_own_logits_row_by_row(tmp_path):
    """Value and gradients of every weight, with all combinations of models."""
    for loss, student_kind, teacher_kind in (
        ("multilevelot", "t5", "llama"),
        ("uld", "mt5", "bart"),
        ("multilevelot", "bart", "t5"),
        ("uld", "llama", "mt5"),
    ):
        examples = tiny.examples(4)
        student, teacher = Side(student_kind, 1), Side(teacher_kind, 2)
        rows = encode_examples(
            examples, student.tokenizer, teacher.tokenizer, max_length=64,
            student_form=student.form, teacher_form=teacher.form,
        ).rows  # fmt: skip
        size, teacher_size = len(student.tokenizer), len(teacher.tokenizer)
        expected = [student.alone(one) for one in examples]
        with torch.no_grad():
            taught = [teacher.alone(one)[0][:-1, :teacher_size] for one in examples]
        ce = torch.cat([F.cross_entropy(*one, reduction="none") for one in expected]).mean()
        kd, _ = ORACLES[loss]([logits[:-1, :size] for logits, _ in expected], taught)
        parameters = dict(student.model.named_parameters())
        wanted = torch.autograd.grad(0.7 * ce + 1.3 * kd, parameters.values())
        ce, kd = ce.detach(), kd.detach()
        before = {name: one.detach().clone() for name, one in parameters.items()}
        run = CrossTokenizerTrainer(
            student.model, arguments(tmp_path, per_device_train_batch_size=4),
            loss=ctkd.get_loss(loss), teacher=teacher.model, weights=ctkd.Weights(0.7, 1.3),
            student_vocab_size=size, teacher_vocab_size=teacher_size,
            data_collator=Collator(
                student_pad_id=padding_id(student.tokenizer),
                teacher_pad_id=padding_id(teacher.tokenizer),
            ),
            train_dataset=rows, processing_class=student.tokenizer,
        )  # fmt: skip
        assert run.student_logits.why_whole is None and run.teacher_logits.why_whole is None
        run.train()
        log = run.state.log_history[0]
        assert log["ce"] == pytest.approx(float(ce), rel=1e-9)
        assert log["kd"] == pytest.approx(float(kd), rel=1e-9)
        for (name, one), gradient in zip(parameters.items(), wanted, strict=True):
            moved = before[name] - 0.1 * gradient
            assert torch.allclose(one, moved, 0, 1e-10), (student_kind, name)


def by_transformers(folder, rows, most: int) -> tuple[float, list[str]]:
    """Mean cross-entropy of answers, and greedy answers, of a folder as transformers loads it."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bits, tokens, answers = 0.0, 0, []
    for row in rows:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        labels = tokenizer(text_target=row["answer"], return_tensors="pt").input_ids
        with torch.no_grad():
            bits += float(model(**prompt, labels=labels).loss) * labels.shape[1]
        tokens += labels.shape[1]
        written = model.generate(**prompt, max_new_tokens=most, do_sample=False, num_beams=1)
        answers.append(tokenizer.decode(written[0], skip_special_tokens=True).strip())
    return bits / tokens, answers


def test_a_student_is_trained_and_read_by_transformers(place):
    """There it has the same cross-entropy and answers, and stopped and resumed the same weights."""
    folder = place.folder / "trained"
    words = place.words(
        "train", "--student", str(place.folder / "t5"), "--output", str(folder), "--save-steps",
        "1", "--max-steps", "2", "--learning-rate", "0.05", "--eval-data", str(place.rows),
        "--keep-checkpoints",
    )  # fmt: skip
    for loss, most in (("uld", "2"), ("alm", "2"), ("multilevelot", "12")):
        said = finish(*words, "--loss", loss, "--overwrite", "--eval-limit", most).stderr
        assert "logits of the student: a block at a time" in said
        results = record(folder)["results"]
        assert results["losses after"]["ce"] < results["losses before"]["ce"] - 0.2
        assert results["losses after"]["kd"] != results["losses before"]["kd"]
    rows = [json.loads(line) for line in place.rows.read_text().splitlines()]
    ce, answers = by_transformers(folder, rows, 3)
    assert results["losses after"]["ce"] == pytest.approx(ce, rel=1e-5)
    lines = (folder / "predictions-student-after.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == answers
    assert len(set(answers)) > 2
    # As a folder of its own it is measured alike.
    shown = finish(*place.evaluate(str(folder), "--output", str(place.folder / "answers")))
    lines = (place.folder / "answers").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == answers
    assert f"{results['student after']['given_bits_per_byte']:.3f}" in shown.stdout

    expected = weights(folder)
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "model.safetensors").unlink()
    kept = record(folder)
    for name in ("finished", "losses after", "student after"):
        del kept["results"][name]
    (folder / "ctkd.json").write_text(json.dumps(kept))
    said = finish(*words, "--loss", "multilevelot", "--resume", "--eval-limit", "12").stderr
    assert "going on from checkpoint-1" in said
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_cached_teacher_teaches_what_the_live_one_does(place, tmp_path):
    """By its largest logits, and by its hidden states."""
    settings = {"teacher": str(place.folder / "t5")}
    whole = place.cache("whole", k=10_000, texts="none", **settings)
    states = place.cache("states", states="float32", texts="none", **settings)
    runs = [
        of_settings(place, tmp_path, "uld", cache, score_eos=True, **settings)
        for cache in (None, Doubled.open(whole.path), Doubled.open(states.path))
    ]
    before = state(runs[0])
    for run in runs:
        run.train()
    live, *cached = map(state, runs)
    assert max((live[one] - before[one]).abs().max() for one in live) > 1e-2
    for run, ours in zip(runs[1:], cached, strict=True):
        assert all(torch.allclose(live[one], ours[one], 0, 1e-6) for one in live)
        numbers, expected = run.state.log_history[0], runs[0].state.log_history[0]
        for name in ("ce", "kd"):
            assert numbers[name] == pytest.approx(expected[name], rel=1e-6)


def test_what_is_remembered_and_written_is_the_model_s_own():
    for kind in KINDS:
        side = Side(kind, 3)
        examples = tiny.examples(5)
        rows = encode_examples(examples, side.tokenizer, max_length=64, student_form=side.form).rows
        sides, logits = [row.student for row in rows], ModelLogits(side.model)
        memory = TeacherMemory(
            logits, sides, pad_id=0, vocab_size=len(side.tokenizer), batch_size=2
        )
        for asked in (logits, memory):
            bits = text_bits(asked, side.tokenizer, examples, sides).bits
            for found, example in zip(bits, examples, strict=True):
                predicted, answer = side.alone(example)
                likelihood = predicted[:-1, : len(side.tokenizer)].log_softmax(-1)
                nats = -likelihood.gather(1, answer[:-1, None]).sum()
                assert found == pytest.approx(float(nats.detach()) / math.log(2), rel=1e-9)
        prompts = side.form.ids(side.tokenizer, examples)
        written = generate(side.model, side.tokenizer, prompts, max_new_tokens=4, batch_size=3)
        assert len({one.text for one in written}) > 1
        for one, prompt in zip(written, prompts, strict=True):
            ids = side.model.generate(
                torch.tensor([prompt]), max_new_tokens=4 + len(side.form.decoder_start) - 1
            )[0]
            assert one.text == side.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_each_command_takes_them(place):
    """Evaluation against a teacher, the doctor, and a run on a teacher's answers."""
    t5, bart = str(place.folder / "t5"), str(place.folder / "bart")
    shown = finish(*place.evaluate(t5, "--teacher", bart, "--loss", "alm", "--next-bytes")).stdout
    assert "next_byte_divergence" in shown and "kd/alm" in shown
    finish(
        "doctor", "--student", t5, "--teacher", bart, "--data", str(place.rows), "--task", "text"
    )
    said = finish(
        *place.words("train", "--teacher", t5, "--answers", "teacher", "--loss", "uld"),
        "--output", str(place.folder / "taught"), "--epochs", "2", "--batch-size", "6",
        "--eval-limit", "2",
    ).stderr  # fmt: skip
    assert "rows, read once; their hidden states" in said


def test_adapters_of_a_student(place):
    """In peft and merged they are the same model."""
    words = place.words(
        "train", "--student", str(place.folder / "mt5"), "--loss", "uld", "--lora-rank", "2",
        "--max-steps", "2", "--learning-rate", "0.01", "--eval-limit", "2",
    )  # fmt: skip
    adapter, whole = place.folder / "adapter", place.folder / "merged"
    finish(*words, "--output", str(adapter))
    finish(*words, "--output", str(whole), "--lora-merge")
    assert all("lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    models = [
        AutoPeftModelForSeq2SeqLM.from_pretrained(adapter, dtype=torch.float32).eval(),
        load_model(str(adapter)),
        load_model(str(whole)),
        load_model(str(place.folder / "mt5")),
    ]
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        first, *others, before = [one(input_ids=ids, labels=ids).logits for one in models]
    change = (first - before).abs().max()
    assert change > 1e-4
    # Merging rounds each weight once, of which logits of 10 show more than their own rounding.
    for other in others:
        assert (other - first).abs().max() < 1e-3 * change


def test_a_student_of_random_weights(place, tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path))
    settings = json.loads((place.folder / "t5" / "config.json").read_text())
    del settings["decoder_start_token_id"]
    source = tmp_path / "small.json"
    source.write_text(json.dumps({**settings, "vocab_size": 270}))
    words = [
        "train", "--student-config", str(source), "--teacher", str(place.teacher), "--data",
        str(place.rows), "--task", "text", "--max-steps", "1", "--loss", "uld", "--output",
        str(tmp_path / "run"), "--device", "cpu", "--max-new-tokens", "3",
        "--eval-limit", "2",
    ]  # fmt: skip
    finish(*words)
    made = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert made.get_output_embeddings().weight.shape == (270, 16)
    assert decoder_start(str(tmp_path / "run")) == (0,)


def test_what_cannot_be_done_is_refused(place, tmp_path):
    t5 = str(place.folder / "t5")
    words = place.words("train", "--student", t5, "--output", str(tmp_path / "run"))
    lm = ("--task", "lm", "--column", "text=prompt")
    assert "has no prompt, which the student's encoder would read" in error_of(
        invoke(*words, "--loss", "uld", *lm)
    )
    with pytest.raises(DataError, match="example 1 has no prompt.*task lm has none of"):
        PromptForm(decoder_start=(0,)).ids(
            tiny_encoder_decoders.tokenizer("t5"),
            [Example(id="1", prompt="", answer="a", references=("a",), group="1")],
        )
    bare = tmp_path / "bare"
    shutil.copytree(place.folder / "bart", bare)
    assert decoder_start(str(bare)) == (1, 3)
    # Without a file of its own, generation is as the model's configuration says.
    (bare / "generation_config.json").unlink()
    assert decoder_start(str(bare)) == decoder_start_of(load_model(str(bare))) == (1,)
    settings = json.loads((bare / "config.json").read_text())
    unknown = {**settings, "decoder_start_token_id": None, "bos_token_id": None}
    (bare / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(ModelError, match="does not say which token its decoder begins with"):
        decoder_start(str(bare))
    model, tokenizer = load_model(t5), tiny_encoder_decoders.tokenizer("t5")
    with pytest.raises(BatchError, match="is an encoder-decoder, but the rows were encoded for a"):
        ModelLogits(model)(torch.tensor([[5, 6]]))
    with pytest.raises(BatchError, match="is a decoder-only model, but the rows were encoded"):
        ModelLogits(tiny.model(9))(torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[5, 6]]))
    found = ModelLogits(model)(torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[0, 6, 7]]))
    assert isinstance(found, HeadLogits) and found.shape[:2] == (1, 3)
    bart = tiny_encoder_decoders.model("bart")
    assert generate(bart, tokenizer, [[5] * 64], max_new_tokens=3)
    with pytest.raises(SettingError, match="max_new_tokens 63 is more than the 62 tokens"):
        generate(bart, tokenizer, [[5]], max_new_tokens=63)
    with pytest.raises(DataError, match="has 65 tokens, but the model has room for 64"):
        generate(bart, tokenizer, [[5] * 65], max_new_tokens=3)


def test_encoder_and_decoder_count_apart(tmp_path):
    tokenizer = tiny_encoder_decoders.tokenizer("bart")
    form = PromptForm(decoder_start=(1, 3))
    (example,) = tiny.examples(1)
    (row,) = encode_examples([example], tokenizer, max_length=64, student_form=form).rows
    assert row.student.prompt_ids == tokenizer(example.prompt).input_ids
    most = len(row.student.prompt_ids)
    assert most > 2 + len(row.student.answer_ids) + 1 and row.student.decoder_start == (1, 3)
    encode_examples([example], tokenizer, max_length=most, student_form=form)
    with pytest.raises(DataError, match=f"first is 0 \\(student {most}\\)"):
        encode_examples([example], tokenizer, max_length=most - 1, student_form=form)
