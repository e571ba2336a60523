"""What the README promises: nothing that comes with models, data or caches is run."""

import json
import pickle
import shutil
from contextlib import suppress

import pytest
import torch

from ctkd.distill.data.prompts import PromptForm
from ctkd.distill.data.rows import load_rows
from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.errors import ModelError
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace, error_of, finish, invoke


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("security"))


@pytest.fixture
def trap(tmp_path):
    """A file that exists only if something was run."""
    path = tmp_path / "trap"
    yield path
    assert not path.exists()


@pytest.fixture
def model(place, tmp_path):
    shutil.copytree(place.student, tmp_path / "model")
    return tmp_path / "model"


def test_the_payload_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "found"))).close()
    assert (tmp_path / "found").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_pickle_of_a_model_is_run(model, trap, name):
    (model / "model.safetensors").unlink()
    torch.save({"weight": Payload(trap)}, model / name)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(model))


def test_no_code_that_ships_with_a_model_is_run(model, trap):
    (model / "custom.py").write_text(
        f"open({str(trap)!r}, 'w')\nclass Model: pass\nConfig = Model\n"
    )
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    # A known type goes on as what it is, one that only the code knows is refused.
    assert type(load_model(str(model))).__name__ == "LlamaForCausalLM"
    changed = {**config, "auto_map": own, "model_type": "custom"}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError):
        load_model(str(model))


def test_no_code_that_ships_with_a_tokenizer_is_run(model, trap):
    (model / "custom.py").write_text(f"open({str(trap)!r}, 'w')\nclass Own: pass\n")
    path = model / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["custom.Own", "custom.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    # Whether it is taken for what it otherwise is, or refused.
    with suppress(ModelError):
        load_tokenizer(str(model))
    assert not trap.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__class__() }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template):
    tokenizer = tiny.tokenizer(280)
    tokenizer.chat_template = template
    (example,) = tiny.examples(1)
    with pytest.raises(ModelError, match="chat template cannot write this prompt"):
        PromptForm(template="chat").chat_text(tokenizer, example)


@pytest.mark.parametrize("suffix", ["pkl", "pt", "bin", "py"])
def test_data_that_could_hold_code_are_not_read(place, tmp_path, trap, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(pickle.dumps(Payload(trap)))
    words = place.train("coded", "--data", str(path), "--measure", "nothing")
    assert str(path) in error_of(invoke(*words))


def test_a_cell_is_text(place, tmp_path, trap):
    path = tmp_path / "rows.csv"
    call = f"[open({str(trap)!r}, 'w')]"
    rows = [f'"What is {n}?","{call}"' for n in range(20)]
    path.write_text("\n".join(["prompt,answer", *rows]) + "\n")
    finish(*place.train("cells", "--data", str(path), "--measure", "nothing"))
    assert not trap.exists()
    (row, *_) = load_rows(str(path))
    assert row["answer"] == call
