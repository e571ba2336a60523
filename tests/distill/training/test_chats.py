"""Conversations on the command line: trained on, measured, cached, resumed, compared."""

import json
import signal

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctkd.batch import Side
from ctkd.distill.config import CacheSettings, TrainConfig
from ctkd.distill.data.collator import padded_sides, padding_id, stored_side
from ctkd.distill.data.encoding import encode_examples
from ctkd.distill.data.layouts import read_rows
from ctkd.distill.data.prompts import PromptForm
from ctkd.distill.data.tasks import examples
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.teachers.cache_writing import write_cache
from ctkd.distill.teachers.memory import KnownStates, TeacherMemory
from ctkd.distill.training import CrossTokenizerTrainer, Distiller
from ctkd.errors import DataError, SettingError
from ctkd.registry import get_loss
from tests.distill import tiny
from tests.distill.tiny import CHATML, GEMMA
from tests.distill.tiny_runs import Workplace, finish, record, weights
from tests.distill.training.test_resume import same, signaled
from tests.distill.training.test_trainer import arguments


def conversation(number: int) -> list[dict[str, str]]:
    """One to three exchanges, every other time with a system's message in front."""
    messages = [{"role": "system", "content": "Cat"}] if number % 2 else []
    for turn in range(1 + number % 3):
        answer = tiny.TEXTS[(2 * number + turn) % 4][: 7 + number % 5].strip()
        messages += [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": answer},
        ]
    return messages


class Chats(Workplace):
    """A workplace whose models chat in templates of two kinds, and conversations."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        for path, size, template, special, hidden in (
            (self.student, 280, CHATML, ["<|im_start|>", "<|im_end|>"], 16),
            (self.teacher, 330, GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], 24),
        ):
            tokenizer = tiny.tokenizer(size)
            tokenizer.add_special_tokens({"extra_special_tokens": special})
            tokenizer.bos_token = special[0]
            tokenizer.chat_template = template
            tokenizer.save_pretrained(path)
            tiny.model(len(tokenizer), hidden, hidden=hidden).save_pretrained(path)
        self.held_out = folder / "held_out.jsonl"
        for path, numbers in ((self.rows, range(10)), (self.held_out, range(10, 14))):
            rows = [{"id": f"c{n}", "messages": conversation(n)} for n in numbers]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(self, output: str, *options: str) -> list[str]:
        held_out = ("--task", "chat", "--eval-data", str(self.held_out))
        return super().train(output, *held_out, "--max-steps", "4", *options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Chats(tmp_path_factory.mktemp("chats"))


def plain_cross_entropy(folder, path) -> float:
    """Over assistants' tokens and what ends their turns, as users of transformers compute it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor([encoded["input_ids"]])
        labels = torch.full_like(ids, -100)
        end = 0
        for message in messages:
            start = text.index(message["content"], end)
            end = start + len(message["content"])
            if message["role"] != "assistant":
                continue
            stop = end + len("<|im_end|>")
            for place, (first, last) in enumerate(encoded["offset_mapping"]):
                if start <= first and last <= stop:
                    labels[0, place] = ids[0, place]
        with torch.no_grad():
            logits = model(ids).logits
        total += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_it_is_trained_as_transformers_would_score_it(place):
    result = finish(*place.train("uld", "--loss", "uld", "--learning-rate", "0.01"))
    assert "the teacher's chat template has no messages of a system" in result.stderr
    folder = place.folder / "uld"
    results = record(folder)["results"]
    assert results["student before"]["n"] == 4
    assert results["losses after"]["ce"] < results["losses before"]["ce"]
    for name, model in (("losses before", place.student), ("losses after", folder)):
        expected = plain_cross_entropy(model, place.held_out)
        assert results[name]["ce"] == pytest.approx(expected, rel=1e-5)
    # What it was trained on is known from its folder.
    shown = finish("evaluate", str(folder), "--data", str(place.held_out), "--device", "cpu",
                   "--max-new-tokens", "3").stdout  # fmt: skip
    bits = f"{results['student after']['given_bits_per_byte']:.4g}"
    assert bits in shown


def test_a_cache_and_a_resumed_run_train_the_same(place, monkeypatch):
    kept = place.folder / "cache"
    options = ("--loss", "alm", "--score-eos")
    live, cached, resumed = (place.folder / name for name in ("live", "cached", "resumed"))
    finish(*place.train("live", *options))
    words = place.train("cached", *options)
    at = words.index("--data")
    asked = ["--student", str(place.student), "--teacher", str(place.teacher), *words[at : at + 2]]
    asked += ["--eval-data", str(place.held_out), "--task", "chat", "--device", "cpu"]
    finish("cache", *asked, "--k", "0", "--max-new-tokens", "3", "--output", str(kept))
    finish(*words, "--teacher-cache", str(kept))
    ours, theirs = weights(live), weights(cached)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert record(live)["results"]["teacher"] == pytest.approx(record(cached)["results"]["teacher"])

    options = ("--teacher-cache", str(kept), "--output", str(resumed))
    signaled(monkeypatch, signal.SIGINT, [*words, *options], of=4)
    finish(*words, *options, "--resume")
    assert same(cached, resumed)


def test_stored_teachers_answer_at_the_scored_tokens_of_conversations(place):
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (place.student, place.teacher)]
    model = AutoModelForCausalLM.from_pretrained(place.teacher, dtype=torch.float32).eval()
    rows = read_rows(str(place.rows), "chat", say=print)
    form, pad = PromptForm(template="chat"), padding_id(tokenizers[1])
    encoded = encode_examples(
        examples(rows, "chat"), *tokenizers, max_length=128, student_form=form, teacher_form=form
    )
    sides = [row.teacher for row in encoded.rows]
    assert any("." in side.kinds for side in sides)
    logits, width = ModelLogits(model), len(tokenizers[1])
    settings = TrainConfig(
        loss="uld", student=str(place.student), teacher=str(place.teacher), data=str(place.rows),
        eval_data=str(place.held_out), task="chat", device="cpu", max_new_tokens=3,
    )  # fmt: skip
    cache = write_cache(
        settings, place.folder / "states", CacheSettings(states="float32", texts="none"), say=print
    )
    for with_eos in (False, True):
        inputs, labels = padded_sides(sides, pad, with_eos=with_eos)
        with torch.no_grad():
            whole = model(**inputs).logits[:, -labels.shape[1] :]
        live = Side.from_causal_lm(whole, labels, vocab_size=width)
        positions = int(live.mask.sum(1).max())
        memories = [
            TeacherMemory(logits, sides, pad_id=pad, score_eos=score_eos, known=known)
            for score_eos in {with_eos, True}
            for known in (None, KnownStates(place.folder / "rows"))
        ]
        for stored in (cache, *memories):
            kept = stored.batch(sides, positions, with_eos=with_eos)
            side = stored_side(stored, kept, labels)
            assert torch.equal(side.mask, live.mask[:, :positions])
            assert torch.equal(side.token_ids, live.token_ids[:, :positions])
            found, expected = (
                one.logits.log_probs(one.token_ids.unsqueeze(-1))[one.mask] for one in (side, live)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_in_a_loop_of_ones_own_they_are_what_they_are_to_the_command(place, tmp_path):
    """Rows in each layout, the values of a `Distiller`, and those of the trainer."""
    finish(*place.train("command", "--loss", "alm", "--max-steps", "1"))
    expected = record(place.folder / "command")["results"]["losses before"]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (place.student, place.teacher)]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (place.student, place.teacher)
    )
    rows = [json.loads(line) for line in place.held_out.read_text().splitlines()]
    distiller = Distiller("alm", *tokenizers)
    batches = [distiller.collate(rows[:1]), distiller.collate(rows[1:])]
    counts = distiller.counts(*batches)
    with torch.no_grad():
        parts = [
            distiller.loss(
                student(**distiller.student_inputs(batch)),
                teacher(**distiller.teacher_inputs(batch)),
                batch,
                counts=counts,
            ).parts
            for batch in batches
        ]
    run = CrossTokenizerTrainer(
        student,
        arguments(tmp_path),
        loss=get_loss("alm"),
        teacher=teacher,
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
    )
    evaluated = run.evaluate()
    assert {"ce", "kd"} <= parts[0].keys()
    for name in parts[0]:
        for value in (sum(float(one[name]) for one in parts), evaluated[f"eval_{name}"]):
            assert value == pytest.approx(expected[name], rel=1e-5), name

    # ShareGPT's names, and prompts of which nothing is scored.
    names = {"role": "from", "content": "value"}
    shared = [
        {"conversations": [{names[k]: one[k] for k in names} for one in row["messages"]]}
        for row in rows
    ]
    assert distiller.encode(shared).rows[1].student == distiller.encode(rows).rows[1].student
    split = [{"prompt": one["messages"][:-1], "completion": one["messages"][-1:]} for one in rows]
    (last,) = distiller.encode(split).rows[1].student.answers
    assert last == distiller.encode(rows).rows[1].student.answers[-1]
    refused = {"messages": [*conversation(0)[:1], *conversation(0)]}
    for row, message in (
        ({"messages": [{"role": "user", "content": "Who?"}]}, "row 2 has no answer of an assistan"),
        ({"id": "x", **refused}, r"row 2 \(id 'x'\): the teacher's chat template .* alternate"),
        ({"text": "cat"}, r"row 2 \(text 'cat'\) has no messages, which the first row has"),
    ):
        with pytest.raises(DataError, match=message):
            distiller.collate([rows[0], row])
    assert "left out 1 of 2 conversations" in distiller.encode([rows[0], refused]).report()
    with pytest.raises(SettingError, match="leave the templates of both sides at chat"):
        Distiller("alm", *tokenizers, student_template="plain").collate(rows)
