"""What would spoil or lose a run is said before it, or stops it with what is good still there."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ctkd
from ctkd import registry
from ctkd.distill.training import run as training
from ctkd.distill.training.output_folder import alone
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.loss import LossOutput, Paper, Weights
from tests.distill.tiny_runs import error_of, finish, invoke, record, weights

EVERY_STEP = ["--save-steps", "1", "--measure", "nothing"]


def copied(model, folder):
    shutil.copytree(model, folder)
    return folder


def spoil(model, folder, value: float):
    """A copy of a model with one weight replaced."""
    copied(model, folder)
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"][0] = value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def steps_of(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_settings_of_generation_that_cannot_be_saved(place, tmp_path):
    student = copied(place.student, tmp_path / "student")
    settings = json.loads((student / "generation_config.json").read_text())
    settings |= {"temperature": 0.6, "top_p": 0.9}
    (student / "generation_config.json").write_text(json.dumps(settings))
    words = ["--student", str(student), "--measure", "nothing"]
    shown = finish(*place.train("sampling", *words))
    assert "temperature, top_p for generation have no effect without do_sample" in shown.stderr
    saved = json.loads((place.folder / "sampling" / "generation_config.json").read_text())
    assert not {"temperature", "top_p"} & set(saved)
    # What was trained can be trained on.
    again = ["--student", str(place.folder / "sampling"), "--measure", "nothing"]
    assert "no effect" not in finish(*place.train("sampling-again", *again)).stderr


def test_what_cannot_be_saved_is_found_before_the_first_step(place, monkeypatch):
    def refuse(self, folder, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PretrainedConfig.save_pretrained", refuse)
    monkeypatch.setattr(CrossTokenizerTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    said = error_of(invoke(*place.train("unsaved", "--measure", "nothing")))
    assert said.startswith(f"cannot write {place.folder / 'unsaved'}: ")
    assert "No space left on device; make room" in said


def test_a_disk_that_is_too_small_is_found_before_the_first_step(place, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    monkeypatch.setattr(CrossTokenizerTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    said = error_of(invoke(*place.train("too-small", "--measure", "nothing")))
    assert "there are only 0.0 MB left for" in said


@pytest.mark.parametrize("way", ["--resume", "--overwrite"])
def test_two_processes_in_one_folder(place, way):
    folder = place.folder / f"shared{way}"
    finish(*place.train(folder.name, "--measure", "nothing"))
    before = record(folder)
    # Not finished any more, so that there is something to do.
    del before["results"]["finished"]
    (folder / "ctkd.json").write_text(json.dumps(before))
    with alone(folder):
        said = error_of(invoke(*place.train(folder.name, "--measure", "nothing", way)))
    assert said == f"another process works in {folder}; wait for it, or choose another --output"
    assert record(folder) == before
    assert weights(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_with_a_spoilt_weight(place, tmp_path, value):
    teacher = spoil(place.teacher, tmp_path / "teacher", value)
    words = place.train(f"teacher-{value}", "--teacher", str(teacher), *EVERY_STEP)
    said = error_of(invoke(*words))
    assert said.startswith("at step 1 the teacher's logits are nan or infinite; look for such")
    folder = place.folder / f"teacher-{value}"
    assert "finished" not in record(folder)["results"]
    assert not list(folder.rglob("*.safetensors"))


def test_a_student_with_a_spoilt_weight(place, tmp_path):
    student = spoil(place.student, tmp_path / "student", float("nan"))
    said = error_of(invoke(*place.train("spoilt", "--student", str(student), *EVERY_STEP)))
    assert said.startswith("at step 1 the student's logits are nan or infinite: its weights may")


def test_a_student_that_diverges(place):
    options = ["--learning-rate", "1e30", "--max-steps", "9", *EVERY_STEP]
    said = error_of(invoke(*place.train("diverging", *options)))
    assert "training has diverged; lower the learning rate" in said
    folder = place.folder / "diverging"
    assert "finished" not in record(folder)["results"]
    json.loads((folder / "ctkd.json").read_text(), parse_constant=pytest.fail)
    for name in steps_of(folder):
        held = load_file(folder / name / "model.safetensors")
        assert all(value.isfinite().all() for value in held.values()), name


def test_weights_that_diverged_in_the_last_step_are_not_kept(place, monkeypatch):
    train = CrossTokenizerTrainer.train

    def last_step_fails(self, *arguments, **settings):
        train(self, *arguments, **settings)
        with torch.no_grad():
            next(self.model.parameters())[0] = torch.nan

    monkeypatch.setattr(CrossTokenizerTrainer, "train", last_step_fails)
    said = error_of(invoke(*place.train("last-step", *EVERY_STEP)))
    assert said.startswith("after step 2 the student's model.embed_tokens.weight is nan or inf")
    folder = place.folder / "last-step"
    assert steps_of(folder) == ["checkpoint-1", "checkpoint-2"]
    assert not (folder / "model.safetensors").exists()


def test_a_loss_that_is_nan_for_good_logits(place, monkeypatch):
    class Broken(ctkd.Loss):
        """A loss that divides by 0."""

        paper = Paper("None", "2026", "0000.00000")
        matches = "nothing"
        default_weights = Weights(1.0, 1.0)

        def forward(self, batch):
            count = batch.student.mask.sum()
            value = batch.student.logits.log_probs(batch.student.token_ids.unsqueeze(-1)).sum()
            return LossOutput(value * torch.nan, count, {"broken": value * torch.nan})

        def units(self, batch):
            return batch.student.mask.sum()

    monkeypatch.setitem(registry._losses, "broken", Broken)
    said = error_of(invoke(*place.train("broken", "--loss", "broken", *EVERY_STEP)))
    assert said.startswith("at step 1 the loss Broken is nan or infinite, though the logits of")

    class Detached(Broken):
        """A loss of which nothing can be learned."""

        def forward(self, batch):
            output = super().forward(batch)
            value = output.value.detach().nan_to_num()
            return LossOutput(value, output.count, {"broken": value})

    monkeypatch.setitem(registry._losses, "broken", Detached)
    said = error_of(invoke(*place.train("detached", "--loss", "broken", *EVERY_STEP)))
    assert said.startswith("the value of the loss Detached has no gradient, so nothing would be")


def test_a_held_out_loss_that_is_nan_is_no_result(place, tmp_path):
    teacher = spoil(place.teacher, tmp_path / "teacher", float("nan"))
    words = ["evaluate", str(place.student), "--loss", "uld", "--teacher", str(teacher)]
    words += ["--data", str(place.rows), "--task", "text", "--max-new-tokens", "3"]
    said = error_of(invoke(*words, "--device", "cpu", "--format", "json"))
    assert "the teacher's logits are nan or infinite" in said


def test_what_is_called_like_a_checkpoint_and_is_none_survives_a_run(place):
    folder = place.folder / "foreign"
    words = place.train("foreign", "--save-steps", "1", "--max-steps", "3", "--measure", "nothing")
    finish(*words)
    before = record(folder)
    del before["results"]["finished"]
    (folder / "ctkd.json").write_text(json.dumps(before))
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"years of work")
    (folder / "checkpoint-2").write_text("a file")
    (folder / "checkpoint-best").symlink_to(place.teacher)
    shown = finish(*words, "--resume")
    for number in (1, 2):
        assert f"checkpoint-{number} is none of this run's, so step {number} is not kept" in (
            shown.stderr
        )
    assert steps_of(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-best"]
    assert (folder / "checkpoint-1" / "model.safetensors").read_bytes() == b"years of work"
    assert "finished" in record(folder)["results"]


def test_a_spoilt_teacher_is_not_cached(place, tmp_path):
    teacher = spoil(place.teacher, tmp_path / "teacher", float("nan"))
    folder = tmp_path / "cache"
    words = ["cache", "--student", str(place.student), "--teacher", str(teacher)]
    words += ["--data", str(place.rows), "--task", "text", "--k", "8", "--device", "cpu"]
    words += ["--max-new-tokens", "3", "--output", str(folder)]
    said = error_of(invoke(*words))
    assert f"logits of the teacher {teacher} are nan or infinite" in said
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("what", ["data", "eval_data"])
def test_a_run_does_not_go_on_with_other_rows(place, tmp_path, what, monkeypatch):
    files = {"data": tmp_path / "rows.jsonl", "eval_data": tmp_path / "held-out.jsonl"}
    for path in files.values():
        shutil.copy(place.rows, path)
    folder = place.folder / f"changed-{what}"
    words = place.train(folder.name, "--data", str(files["data"]), "--measure", "nothing")
    words += ["--eval-data", str(files["eval_data"])]

    def stopped(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_train_from", stopped)
        error_of(invoke(*words))
    text, times = files[what].read_text(), files[what].stat()
    files[what].write_text(text.replace("the mat", "the hat", 1))
    os.utime(files[what], ns=(times.st_atime_ns, times.st_mtime_ns))
    said = error_of(invoke(*words, "--resume"))
    split = {"data": "training", "eval_data": "held-out"}[what]
    assert said.startswith(f"the {split} rows are others than those that {folder} was begun with")
    files[what].write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(training, "source_fingerprint", lambda name: f"{name}, edited")
        said = error_of(invoke(*words, "--resume"))
    assert said.startswith("the file of the loss multilevelot was edited since")
    finish(*words, "--resume")
    files[what].write_text(text.replace("the mat", "the hat", 1))
    finish(*words, "--overwrite")
