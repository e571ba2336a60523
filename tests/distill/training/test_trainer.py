"""The trainer's loss is that of the whole optimizer step, however the step is split."""

import sys
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import ctkd
from ctkd.distill.models import ModelLogits
from ctkd.distill.training.trainer import LOSS_FILE, CrossTokenizerTrainer
from ctkd.errors import BatchError, SettingError
from ctkd.logits import HeadLogits
from ctkd.loss import LossOutput
from tests.distill.tiny import Setup
from tests.distill.training.ranks import of_two


def arguments(folder, **settings) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "data_seed": 0,
        "logging_nan_inf_filter": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **settings})


def trainer(setup, folder, loss="uld", *, with_teacher=True, weights=None, **settings):
    chosen = ctkd.get_loss(loss) if isinstance(loss, str) else loss
    return CrossTokenizerTrainer(
        setup.student,
        arguments(folder, **settings),
        loss=chosen if with_teacher else None,
        teacher=setup.teacher if with_teacher else None,
        weights=weights,
        student_vocab_size=len(setup.student_tokenizer),
        teacher_vocab_size=len(setup.teacher_tokenizer),
        data_collator=setup.collator,
        train_dataset=setup.rows,
        eval_dataset=setup.rows,
        processing_class=setup.student_tokenizer,
    )


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(first, second, tolerance=1e-12) -> bool:
    return all(torch.allclose(first[name], second[name], 0, tolerance) for name in first)


@pytest.mark.parametrize("loss", ["uld", "multilevelot"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_step_is_the_same_however_it_is_split(tmp_path, loss, batch_size):
    whole, split = Setup(), Setup()
    before = weights_of(whole.student)
    trainer(whole, tmp_path, loss, per_device_train_batch_size=6).train()
    trainer(
        split,
        tmp_path,
        loss,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=6 // batch_size,
    ).train()
    assert not same_weights(before, weights_of(whole.student), 1e-6)
    assert same_weights(weights_of(whole.student), weights_of(split.student))


def by_hand(setup, row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of cross-entropy, its tokens, and ULD's sum of one unpadded row."""
    student, teacher = row.student, row.teacher
    ids = torch.tensor([[*student.prompt_ids, *student.answer_ids, student.eos_id]])
    start, size = len(student.prompt_ids), len(student.answer_ids)
    logits = setup.student(ids).logits[0]
    ce = F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
    teacher_ids = torch.tensor([[*teacher.prompt_ids, *teacher.answer_ids]])
    teacher_logits = setup.teacher(teacher_ids).logits[0, len(teacher.prompt_ids) - 1 : -1]
    student_logits = logits[start - 1 : start - 1 + size, : len(setup.student_tokenizer)]
    n = min(size, len(teacher.answer_ids))
    p = student_logits.softmax(-1).sort(-1, descending=True).values[:n]
    q = teacher_logits.softmax(-1).sort(-1, descending=True).values[:n]
    q = F.pad(q, (0, max(0, p.shape[1] - q.shape[1])))
    p = F.pad(p, (0, q.shape[1] - p.shape[1]))
    return ce, torch.tensor(size + 1), (p - q).abs().sum(), torch.tensor(size)


def test_the_gradient_is_that_of_a_loop_over_unpadded_rows(tmp_path):
    setup, other = Setup(), Setup()
    run = trainer(
        setup,
        tmp_path,
        weights=ctkd.Weights(0.7, 1.3),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    run.train()
    rows = [torch.stack(by_hand(other, row)) for row in other.rows]
    ce, tokens, kd, units = torch.stack(rows).sum(0)
    loss = 0.7 * ce / tokens + 1.3 * kd / units
    loss.backward()
    for name, parameter in other.student.named_parameters():
        moved = parameter - 0.1 * parameter.grad
        assert torch.allclose(setup.student.get_parameter(name), moved, 0, 1e-10), name
    log = run.state.log_history[0]
    assert log["ce"] == pytest.approx(float((ce / tokens).detach()), rel=1e-9)
    assert log["kd"] == pytest.approx(float((kd / units).detach()), rel=1e-9)
    assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_parts_are_logged_and_sum_to_the_loss(tmp_path):
    run = trainer(Setup(), tmp_path, "multilevelot", per_device_train_batch_size=2, max_steps=2)
    run.train()
    log = run.state.log_history[1]
    parts = [log[f"kd/{name}"] for name in ("had", "sl", "sd")]
    assert sum(parts) == pytest.approx(log["kd"], rel=1e-6)


def test_evaluation_does_not_depend_on_its_batches(tmp_path):
    setup = Setup()
    small = trainer(setup, tmp_path, "multilevelot", per_device_eval_batch_size=1).evaluate()
    large = trainer(setup, tmp_path, "multilevelot", per_device_eval_batch_size=6).evaluate()
    for name in ("eval_ce", "eval_kd", "eval_kd/had", "eval_kd/sd", "eval_loss"):
        assert small[name] == pytest.approx(large[name], rel=1e-9), name


def test_the_teacher_stays_as_it_was(tmp_path):
    setup = Setup()
    setup.teacher.train()
    before = weights_of(setup.teacher)
    run = trainer(setup, tmp_path, max_steps=2)
    run.train()
    assert same_weights(before, weights_of(setup.teacher), 0)
    assert not setup.teacher.training
    assert all(not p.requires_grad and p.grad is None for p in setup.teacher.parameters())
    assert not any("teacher" in name for name, _ in run.model.named_parameters())


def test_without_a_loss_it_is_cross_entropy_alone(tmp_path):
    setup = Setup()
    run = trainer(setup, tmp_path, with_teacher=False, per_device_train_batch_size=6)
    run.train()
    log = run.state.log_history[0]
    assert log["loss"] == pytest.approx(log["ce"], rel=1e-4)
    assert "kd" not in log


def test_logits_are_computed_only_where_answers_are_scored(tmp_path):
    setup = Setup()
    seen = []
    setup.student.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    trainer(setup, tmp_path, per_device_train_batch_size=6).train()
    longest = max(len(row.student.answer_ids) + 1 for row in setup.rows)
    assert seen == [longest + 1]


def test_all_curves_of_tensorboard_go_into_the_folder_of_the_run(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, log_dir=None):
            self.log_dir = log_dir

        def add_scalar(self, name, *_):
            written.append((self.log_dir, name))

        add_text = flush = close = lambda self, *_: None

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    others = []

    class Other(TrainerCallback):
        def on_log(self, *_, logs, **__):
            others.extend(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "other", Other)
    run = trainer(Setup(), tmp_path, report_to=["tensorboard", "other"])
    run.evaluate()
    run.train()
    run.evaluate()
    assert {folder for folder, _ in written} == {str(tmp_path / "tensorboard")}
    names = [name for _, name in written]
    assert names.count("eval/kd") == 2 and "train/kd" in names
    assert others.count("eval_kd") == 2 and "kd" in others
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    written.clear()
    trainer(Setup(), tmp_path, report_to="tensorboard").evaluate()
    assert {folder for folder, _ in written} == {str(tmp_path / "elsewhere")}


def test_resuming_gives_the_same_weights(tmp_path):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
    settings |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
    straight, stopped = Setup(), Setup()
    trainer(straight, tmp_path / "a", **settings).train()
    saving = {**settings, "save_strategy": "steps", "save_steps": 2}
    trainer(stopped, tmp_path / "b", **saving).train()
    again = Setup()
    trainer(again, tmp_path / "b", **saving).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
    )
    assert same_weights(weights_of(straight.student), weights_of(again.student), 0)


class Learned(ctkd.losses.ULD):
    """ULD times a number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, batch):
        output = super().forward(batch)
        value = output.value * self.scale
        return LossOutput(value, output.count, {"uld": value.detach()})


def test_a_losss_own_parameters_are_trained_saved_and_restored(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    setup, loss = Setup(), Learned()
    run = trainer(setup, tmp_path, loss, **settings)
    run.train()
    assert loss.scale.item() != 2.0
    run.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / LOSS_FILE)["scale"] == loss.scale
    # The student's own file is the student's alone, whoever writes it.
    setup.student.save_pretrained(tmp_path / "by hand")
    for name in ("saved", "by hand"):
        held = load_file(tmp_path / name / "model.safetensors")
        assert not [one for one in held if "loss" in one]
    checkpoint = tmp_path / "checkpoint-2"
    assert load_file(checkpoint / LOSS_FILE)["scale"] == loss.scale
    reloaded, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert isinstance(reloaded, type(setup.student))
    restored = Learned()
    trainer(Setup(), tmp_path, restored, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert restored.scale.item() == loss.scale.item()


def test_arguments_that_train_wrongly_are_refused(tmp_path):
    for changes, message in (
        ({"include_for_metrics": ["loss"]}, r"\(include_for_metrics=\['loss'\]\) would have no"),
        ({"label_smoothing_factor": 0.1}, r"\(label_smoothing_factor=0.1\) would have no effect"),
        ({"bf16_full_eval": True}, r"\(bf16_full_eval=True\) would have no effect"),
        ({"train_sampling_strategy": "group_by_length"}, "asks each row for its length"),
        ({"metric_for_best_model": "eval_kd"}, "of kd lower is better, and transformers takes the"),
    ):
        with pytest.raises(SettingError, match=message):
            trainer(Setup(), tmp_path, **changes)
    settings = {"metric_for_best_model": "ce", "greater_is_better": False}
    trainer(Setup(), tmp_path, **settings, train_sampling_strategy="sequential")


def test_predictions_are_the_student_s_logits(tmp_path):
    setup = Setup()
    run = trainer(setup, tmp_path, "uld")
    found = run.predict(run.train_dataset)
    assert run.compute_metrics is None and found.metrics["test_ce"] > 0
    batch = run.data_collator(list(run.train_dataset))
    with torch.no_grad():
        logits = setup.student(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, -batch["labels"].shape[1] :]
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    ours, kept = (torch.from_numpy(one) for one in (found.predictions, found.label_ids))
    assert len(ours) == len(run.train_dataset)
    values = F.cross_entropy(ours[:, :-1].flatten(0, 1), kept[:, 1:].flatten())
    torch.testing.assert_close(values, expected.to(values.dtype), rtol=1e-5, atol=1e-6)


def test_a_loss_without_a_teacher_is_refused(tmp_path):
    setup = Setup()
    with pytest.raises(SettingError, match="give both or neither"):
        CrossTokenizerTrainer(setup.student, arguments(tmp_path), loss=ctkd.get_loss("uld"))
    with pytest.raises(SettingError, match="what ctkd.get_loss returns, got str 'uld'"):
        CrossTokenizerTrainer(setup.student, arguments(tmp_path), loss="uld", teacher=setup.teacher)


def test_a_loss_on_hidden_states_is_refused(tmp_path):
    loss = ctkd.get_loss("uld")
    loss.needs = frozenset({"hidden"})
    with pytest.raises(SettingError, match="the loss 'ULD' needs hidden, which ctkd does not give"):
        trainer(Setup(), tmp_path, loss)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    settings = arguments(tmp_path)
    assert settings.device.type == "cpu"  # the state of the process is settled here
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="not distributed"):
        CrossTokenizerTrainer(Setup().student, settings)


def one_rank(folder: str, found: str) -> None:
    """What each of two processes does."""
    setup = Setup()
    run = trainer(setup, folder, "multilevelot", per_device_train_batch_size=3)
    run.train()
    assert run.args.world_size == 2
    if run.args.process_index == 0:
        log = run.state.log_history[0]
        torch.save({"weights": setup.student.state_dict(), "log": log}, found)

    # What does not fill the ranks' last batches: a whole epoch of training, and evaluations.
    for count in (5, 7):
        setup = Setup(count)
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
        run = trainer(setup, folder, "alm", num_train_epochs=1, max_steps=-1, **sizes)
        run.compute_metrics = lambda prediction: {"rows": len(prediction.label_ids)}
        run.train()
        metrics = run.evaluate()
        assert metrics["eval_rows"] == count
        if run.args.process_index == 0:
            weights = setup.student.state_dict()
            torch.save({"weights": weights, "metrics": metrics}, f"{found}.{count}")

    part = slice(3 * run.args.process_index, 3 * run.args.process_index + 3)
    own = own_gradients(part)
    if run.args.process_index == 0:
        torch.save(own, f"{found}.own")


def own_gradients(part: slice) -> dict[str, object]:
    """What a rank finds in loops of one's own, each rank with a part of the rows."""
    found: dict[str, object] = {}
    setup = Setup()
    reader = ModelLogits(DistributedDataParallel(setup.student))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        own_step(setup, reader, part)
    found["kind"] = type(reader(torch.tensor([[2, 3]]))).__name__
    found["warned"] = len(warned)
    found["ddp"] = {name: p.grad.clone() for name, p in setup.student.named_parameters()}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ModelLogits(setup.student)(torch.tensor([[2, 3]]))
    found["warning"] = str(warned[0].message)
    setup = Setup()
    fully_shard(setup.student)
    try:
        HeadLogits(torch.zeros(1, 2, 16).double(), setup.student.lm_head.weight)
    except BatchError as error:
        found["refused"] = str(error)
    reader = ModelLogits(setup.student)
    own_step(setup, reader, part)
    found["whole"] = reader.why_whole
    found["fsdp"] = {name: p.grad.full_tensor() for name, p in setup.student.named_parameters()}
    return found


def own_step(setup, reader, part) -> None:
    """The gradient of a loop of one's own on a part of the rows, padded on the right."""
    sides = {}
    for name, read in (("student", reader), ("teacher", lambda ids: setup.teacher(ids).logits)):
        texts = [getattr(row, name) for row in setup.rows[part]]
        ids = [torch.tensor([*text.prompt_ids, *text.answer_ids]) for text in texts]
        labels = [one.clone() for one in ids]
        for text, one in zip(texts, labels, strict=True):
            one[: len(text.prompt_ids)] = -100
        sides[f"{name}_logits"] = read(pad_sequence(ids, batch_first=True, padding_value=1))
        sides[f"{name}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    batch = ctkd.Batch.from_causal_lm(
        **sides,
        student_vocab_size=len(setup.student_tokenizer),
        teacher_vocab_size=len(setup.teacher_tokenizer),
    )
    output = ctkd.get_loss("uld")(batch)
    (output.value * output.count).backward()


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path, forks):
    single = Setup()
    run = trainer(single, tmp_path / "one", "multilevelot", per_device_train_batch_size=6)
    run.train()
    said = of_two(forks, one_rank, str(tmp_path / "two"), str(tmp_path / "r.pt"), output=tmp_path)
    assert all(one.endswith("exit code 0") for one in said), said
    found = torch.load(tmp_path / "r.pt", weights_only=False)
    assert same_weights(weights_of(single.student), found["weights"], 1e-10)
    log = run.state.log_history[0]
    for name in ("ce", "kd", "kd/sd"):
        assert found["log"][name] == pytest.approx(log[name], rel=1e-9), name
    for count in (5, 7):
        single = Setup(count)
        sizes = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "max_steps": -1}
        run = trainer(single, tmp_path / "one", "alm", **sizes)
        run.train()
        found = torch.load(tmp_path / f"r.pt.{count}", weights_only=False)
        assert same_weights(weights_of(single.student), found["weights"], 1e-10)
        metrics = run.evaluate()
        for name in ("eval_ce", "eval_kd"):
            assert found["metrics"][name] == pytest.approx(metrics[name], rel=1e-9), name
    found = torch.load(tmp_path / "r.pt.own", weights_only=False)
    single = Setup()
    own_step(single, lambda ids: single.student(ids).logits, slice(0, 6))
    for name, parameter in single.student.named_parameters():
        for way in ("ddp", "fsdp"):
            # Gradients are averaged over the ranks.
            assert torch.allclose(2 * found[way][name], parameter.grad, 0, 1e-10), (way, name)
    assert (found["kind"], found["warned"]) == ("HeadLogits", 0)
    assert "2 processes train this model, but nothing reduces its gradients" in found["warning"]
    assert found["whole"] == "the weight of its head is not a plain tensor"
    assert "the head's weight is a DTensor" in found["refused"]
    assert "give the logits that the model itself computes" in found["refused"]
