"""The object for loops of one's own computes what the trainer does, of texts and plain outputs."""

import datasets
import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

import ctkd
from ctkd.distill.data.rows import Rows
from ctkd.distill.data.tasks import examples
from ctkd.distill.models import ModelLogits
from ctkd.distill.training import CrossTokenizerTrainer, Distiller
from ctkd.distill.training.sums import Counts
from ctkd.errors import BatchError, DataError, SettingError
from ctkd.tokenization import TokenizerPair
from tests.distill import tiny
from tests.distill.training.test_trainer import Learned, arguments, same_weights, weights_of

ROWS = [{"prompt": one.prompt, "answer": one.answer} for one in tiny.examples()]
LAYOUTS = {
    "prompt and answer": ROWS,
    "prompt and completion": [
        {"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS
    ],
    "text": [{"text": text} for text in tiny.TEXTS],
}


def distiller_of(setup, loss="multilevelot", **settings) -> Distiller:
    return Distiller(loss, setup.student_tokenizer, setup.teacher_tokenizer, **settings)


def compared(distiller, setup, batch, **settings):
    """What a loop without any framework does."""
    with torch.no_grad():
        teacher_output = setup.teacher(**distiller.teacher_inputs(batch))
    student_output = setup.student(**distiller.student_inputs(batch))
    return distiller.loss(student_output, teacher_output, batch, **settings)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_batch_of_texts_is_that_of_encoded_examples():
    setup = tiny.Setup()
    for name, rows in LAYOUTS.items():
        distiller = distiller_of(setup)
        loader = DataLoader(rows, batch_size=len(rows), collate_fn=distiller.collate)
        (batch,) = send_to_device(list(loader), torch.device("cpu"))
        read = [
            {"prompt": "", "answer": row["text"]} if name == "text" else {
                "prompt": row["prompt"], "answer": row.get("answer", row.get("completion"))
            }
            for row in rows
        ]  # fmt: skip
        wanted = setup.collator(
            tiny.encode_examples(
                examples(Rows("rows", read), "text"),
                setup.student_tokenizer,
                setup.teacher_tokenizer,
                max_length=1024,
            ).rows
        )
        assert batch.keys() == wanted.keys()
        assert all(torch.equal(batch[one], wanted[one]) for one in wanted), name
    ahead = distiller.encode(datasets.Dataset.from_list(rows)).rows
    again = distiller.collate(ahead)
    assert all(torch.equal(again[one], wanted[one]) for one in wanted)


def test_values_and_gradients_are_those_of_the_trainer(tmp_path):
    """Micro-batches of any size, outputs of whatever form, a loss of chunks and vocabularies."""
    setup, other = tiny.Setup(), tiny.Setup()
    pair = TokenizerPair(setup.student_tokenizer, setup.teacher_tokenizer)
    run = CrossTokenizerTrainer(
        other.student,
        arguments(tmp_path, per_device_train_batch_size=6, remove_unused_columns=True),
        loss=ctkd.get_loss("gold", pair=pair),
        teacher=other.teacher,
        weights=ctkd.Weights(0.7, 1.3),
        train_dataset=datasets.Dataset.from_list(LAYOUTS["prompt and completion"]),
        processing_class=setup.student_tokenizer,
        teacher_processing_class=setup.teacher_tokenizer,
    )
    run.train()
    log = run.state.log_history[0]
    distiller = distiller_of(setup, "gold", weights=(0.7, 1.3))
    sizes = [ROWS[:1], ROWS[1:3], ROWS[3:]]
    batches = [distiller.collate(rows) for rows in sizes]
    counts = distiller.counts(*batches)
    outputs = [compared(distiller, setup, batch, counts=counts) for batch in batches]
    for output in outputs:
        output.value.backward()
    split = gradients(setup.student)
    for name, parameter in tiny.Setup().student.named_parameters():
        moved = parameter - 0.1 * split[name]
        assert torch.allclose(other.student.get_parameter(name), moved, 0, 1e-12), name
    whole = distiller.collate(ROWS)
    # Every position, and states of the head, in the place of a model's output.
    inputs = distiller.student_inputs(whole)
    keep = inputs.pop("logits_to_keep")
    teacher_logits = setup.teacher(**distiller.teacher_inputs(whole)).logits
    reader = ModelLogits(setup.student)
    last = reader(**inputs, logits_to_keep=keep)
    assert last.shape[1] == keep < reader(**inputs).shape[1]
    for form in (setup.student(**inputs), setup.student(**inputs).logits, reader(**inputs), last):
        output = distiller.loss(form, teacher_logits, whole)
        output.value.backward()
        found = gradients(setup.student)
        assert all(torch.allclose(found[name], split[name], 0, 1e-12) for name in split)
        assert output.counts == counts
        parts = {name for name in log if name in ("ce", "kd") or name.startswith("kd/")}
        assert output.parts.keys() == parts
        for name in parts:
            value = float(output.parts[name])
            assert value == pytest.approx(log[name], rel=1e-12)
            assert value == pytest.approx(sum(float(one.parts[name]) for one in outputs), rel=1e-12)
        assert float(output.value.detach()) == pytest.approx(log["loss"], rel=1e-4)
    # Alone, each is a mean of its own.
    alone = compared(distiller, setup, batches[0])
    assert alone.counts == distiller.counts(batches[0]) != counts
    assert float(alone.value.detach()) != pytest.approx(float(outputs[0].value.detach()))


def test_without_a_teacher_it_is_cross_entropy():
    setup = tiny.Setup()
    distiller = Distiller(None, setup.student_tokenizer)
    batch = distiller.collate(ROWS)
    output = distiller.loss(setup.student(**distiller.student_inputs(batch)), None, batch)
    both = compared(distiller_of(setup, "uld"), setup, distiller_of(setup).collate(ROWS))
    assert not [name for name in batch if "teacher" in name]
    assert output.parts.keys() == {"ce"} and torch.equal(output.value.detach(), output.parts["ce"])
    assert torch.equal(output.parts["ce"], both.parts["ce"])
    assert output.counts == Counts(both.counts.ce, torch.tensor(0))


def test_bad_rows_and_settings_say_what_is_wrong():
    setup = tiny.Setup()
    long = {"prompt": "Well?", "answer": " nobody" * 9}
    for rows, settings, message in (
        ([ROWS[0], {"prompt": "And?", "answer": None}], {}, r"row 2 \(prompt 'And\?'\) has no ans"),
        ([{"prompt": "a"}], {}, "rows with prompt are of no layout that is known; expec"),
        ([ROWS[0], {"id": 7, **ROWS[0], "prompt": 3}], {}, r"row 2 \(id '7'\): column 'prompt' ho"),
        (
            [ROWS[0], {"text": "a"}],
            {},
            r"row 2 \(text 'a'\) has no prompt, which the first row has",
        ),
        ([{"messages": []}], {}, "row 1 has no answer of an assistant to train on"),
        ([ROWS[0], "text"], {}, "row 2 is str; expected a mapping with prompt and answer"),
        ([{"instruction": "Do", "output": " "}], {}, "has no answers"),
        (
            [{"instruction": "Do", "output": "it"}, {"instruction": "Now", "output": ""}],
            {},
            r"row 2 \(instruction 'Now'\) has a blank output",
        ),
        ([{**ROWS[0], "answer": " <eos>"}], {}, r"row 1 \(prompt .* cannot spell the answer"),
        ([long], {"max_length": 9}, r"row 1 \(prompt 'Well\?'\) is longer than 9 tokens"),
        (
            [ROWS[0], {**long, "prompt": "Well? " * 9}],
            {"max_length": 30, "on_long": "cut"},
            r"of row 2 \(student \d+, teacher \d+; no part of its answer fits\) nothing fits",
        ),
        ([], {}, "at least one"),
    ):
        with pytest.raises((DataError, BatchError), match=message):
            distiller_of(setup, **settings).collate(rows)
    assert distiller_of(setup, max_length=9, on_long="cut").collate([long])["labels"].shape[1] < 9
    assert "left out 1 of 2" in distiller_of(setup, max_length=30).encode([ROWS[0], long]).report()
    for words, settings, message in (
        (("uld", setup.student_tokenizer), {}, "give both or neither"),
        ((None, setup.student_tokenizer), {"on_long": "truncate"}, "on_long must be one of"),
        ((None, setup.student_tokenizer, setup.teacher_tokenizer), {}, "give both or neither"),
        ((Learned(), setup.student_tokenizer, setup.teacher_tokenizer), {"k": 3}, "k would be set"),
        ((3, setup.student_tokenizer, setup.teacher_tokenizer), {}, "a name or what ctkd.get_loss"),
    ):
        with pytest.raises(SettingError, match=message):
            Distiller(*words, **settings)


def test_outputs_of_another_batch_are_refused():
    setup = tiny.Setup()
    distiller = distiller_of(setup, Learned())
    assert [name for name, _ in distiller.named_parameters()] == ["distillation_loss.scale"]
    batch = distiller.collate(ROWS)
    teacher_logits = setup.teacher(**distiller.teacher_inputs(batch)).logits
    student_output = setup.student(**distiller.student_inputs(batch))
    for words, message in (
        ((student_output, teacher_logits[:, 1:], batch), r"positions came for \d+ labels; call"),
        ((student_output, None, batch), "the teacher's output is NoneType; expected"),
        ((student_output, teacher_logits, {"labels": 0}), "has no distill_labels, .*keep all of"),
        ((student_output, teacher_logits[..., :99], batch), "but the logits only 99 columns"),
    ):
        with pytest.raises(BatchError, match=message):
            distiller.loss(*words)
    with pytest.raises(BatchError, match="no teacher_distill_labels, so it says nothing of a teac"):
        distiller.teacher_inputs(Distiller(None, setup.student_tokenizer).collate(ROWS))
    narrow = distiller_of(setup, "gold", teacher_vocab_size=300)
    assert narrow.teacher_vocab_size == narrow.distillation_loss.teacher_size == 300
    assert narrow.student_vocab_size == len(setup.student_tokenizer)


def test_the_trainer_takes_what_trainer_takes(tmp_path):
    setup, other = tiny.Setup(), tiny.Setup()
    tokenizers = {
        "processing_class": setup.student_tokenizer,
        "teacher_processing_class": setup.teacher_tokenizer,
    }
    given = {"loss": ctkd.get_loss("uld"), "teacher": setup.teacher, "eval_dataset": ROWS}

    def correct(prediction):
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}

    optimizer = torch.optim.SGD(setup.student.parameters(), lr=0.3)
    run = CrossTokenizerTrainer(
        setup.student,
        arguments(tmp_path, max_steps=3, per_device_eval_batch_size=4),
        train_dataset=ROWS,
        optimizers=(optimizer, None),
        compute_metrics=correct,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        **tokenizers,
        **given,
    )
    run.train()
    assert run.optimizer.optimizer is optimizer and not same_weights(
        weights_of(setup.student), weights_of(other.student)
    )
    found = run.evaluate()
    distiller = distiller_of(setup, "uld")
    batch = distiller.collate(ROWS)
    logits = setup.student(**distiller.student_inputs(batch)).logits
    mask = batch["labels"][:, 1:] != -100
    right = (logits.argmax(-1)[:, :-1] == batch["labels"][:, 1:])[mask].double().mean()
    assert found["eval_accuracy"] == pytest.approx(float(right)) and right > 0
    expected = compared(distiller, setup, batch)
    assert found["eval_kd"] == pytest.approx(float(expected.parts["kd"]), rel=1e-9)
    assert run.predict(ROWS).predictions.shape == batch["labels"].shape
    alone = CrossTokenizerTrainer(
        setup.student,
        arguments(tmp_path),
        eval_dataset={"all": ROWS},
        processing_class=setup.student_tokenizer,
    )
    assert alone.evaluate()["eval_all_ce"] == pytest.approx(found["eval_ce"], rel=1e-9)
    long = [ROWS[0], {"prompt": "Long?", "answer": " nobody" * 200}]
    with pytest.warns(UserWarning, match="left out 1 of 2 examples as longer than 128 tokens"):
        CrossTokenizerTrainer(
            setup.student, arguments(tmp_path), train_dataset=long, **tokenizers, **given
        )
    given = {**given, "train_dataset": ROWS}
    for settings, message in (
        ({"model_init": tiny.model}, "model_init exchanges the student at each"),
        ({**tokenizers, "data_collator": setup.collator}, "teacher_processing_class makes batches"),
        ({"processing_class": setup.student_tokenizer}, "give teacher_processing_class, or a"),
        ({**tokenizers, "optimizers": (optimizer, None), "peft_config": 1}, "would train none of"),
        (
            {**tokenizers, "optimizers": (optimizer, None), "loss": Learned()},
            "the optimizer lacks the parameters of the loss Learned",
        ),
    ):
        student = None if "model_init" in settings else setup.student
        with pytest.raises(SettingError, match=message):
            CrossTokenizerTrainer(student, arguments(tmp_path), **{**given, **settings})
    bad = [*ROWS, {"prompt": "And?", "answer": ""}]
    with pytest.raises(DataError, match=r"row 7 \(prompt 'And\?'\) has no answer"):
        CrossTokenizerTrainer(
            setup.student,
            arguments(tmp_path),
            **{**given, **tokenizers, "eval_dataset": {"a": ROWS, "b": bad}},
        )
