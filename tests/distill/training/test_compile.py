"""A student whose training steps `torch.compile` compiles is trained as it is without."""

from functools import partial

import torch

from ctkd.distill.training import run
from tests.distill.tiny_runs import Workplace, finish, weights


def test_a_compiled_student_is_trained_the_same(tmp_path, monkeypatch):
    """The backend runs its graphs as they are, for it takes seconds less than others."""
    place = Workplace(tmp_path)
    # Steps of one shape, so that one graph serves both.
    options = ["--batch-size", "20", "--learning-rate", "0.01", "--measure", "nothing"]
    options += ["--loss", "shared_kl", "--teacher-memory", "0"]
    finish(*place.train("plain", *options))
    arguments, compiler, compiled = run.TrainingArguments, torch.compile, []

    def keep(model, **settings):
        compiled.append((model, settings["backend"]))
        return compiler(model, **settings)

    monkeypatch.setattr(torch, "compile", keep)
    # Only a figure for torch's log.
    guards = "torch._dynamo.guards.profile_guard_manager"
    monkeypatch.setattr(guards, lambda *_: 0.0, raising=False)
    monkeypatch.setattr(run, "TrainingArguments", partial(arguments, torch_compile_backend="eager"))
    torch.compiler.reset()
    said = finish(*place.train("compiled", *options, "--torch_compile")).stderr
    torch.compiler.reset()
    assert [backend for _, backend in compiled] == ["eager"]
    assert "logits of the student: all at once: the model is compiled\n" in said
    assert "logits of the teacher: a block at a time, from the head\n" in said
    ours, theirs = (weights(tmp_path / name) for name in ("compiled", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    before = weights(place.student)
    assert max(float((ours[name] - one).abs().max()) for name, one in before.items()) > 1e-3
