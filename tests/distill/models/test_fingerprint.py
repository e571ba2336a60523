"""A model's fingerprint is that of what it answers with."""

import hashlib

import pytest

from ctkd.distill.models import fingerprint as module
from ctkd.distill.models.fingerprint import file_sha256, model_fingerprint
from ctkd.errors import ModelError
from tests.distill.tiny_runs import save


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model", vocabulary=280, padded=0, hidden=8, seed=1)
    return tmp_path / "model"


def test_a_files_hash_is_that_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    for content in (b"", b"seven b", b"more than one chunk of bytes"):
        (tmp_path / "file").write_bytes(content)
        assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_copy_is_the_same_model(folder, tmp_path):
    save(tmp_path / "copy", vocabulary=280, padded=0, hidden=8, seed=1)
    assert model_fingerprint(str(folder)) == model_fingerprint(str(tmp_path / "copy"))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_answers_depend_on_counts(folder, name):
    before = model_fingerprint(str(folder))
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert model_fingerprint(str(folder)) != before


def test_other_names_of_the_same_bytes_count(folder):
    before = model_fingerprint(str(folder))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert model_fingerprint(str(folder)) != before


@pytest.mark.parametrize("name", ["training_args.bin", "ctkd_loss.safetensors", "notes.txt"])
def test_what_else_lies_there_does_not(folder, name):
    before = model_fingerprint(str(folder))
    (folder / name).write_bytes(b"anything")
    assert model_fingerprint(str(folder)) == before


def test_a_folder_without_weights_has_none(folder):
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match="holds no weights; give a folder of a saved model"):
        model_fingerprint(str(folder))
    with pytest.raises(ModelError, match="there is no folder"):
        model_fingerprint("./none")


def test_a_hub_model_is_told_by_its_commit(tmp_path, monkeypatch):
    commit = tmp_path / "snapshots" / "abc123"
    monkeypatch.setattr(module, "sources", lambda name: [name])
    for found, expected in ((str(commit / "config.json"), "a/b@abc123"), (None, "a/b")):
        monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_, found=found: found)
        assert model_fingerprint("a/b") == expected
