"""What a run leaves for others, sends to the hub, and says of itself before it is begun."""

import contextlib
import io
import json
import re
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ctkd.cli import main
from ctkd.cli.options import read_settings
from ctkd.distill.config import TrainConfig
from ctkd.distill.models import quantized
from ctkd.distill.preparing import load_teacher
from ctkd.distill.training import hub, run
from ctkd.distill.training.card import CARD, card_text
from ctkd.distill.training.output_folder import OutputFolder
from tests.distill.tiny_runs import Workplace, error_of, finish, invoke, record, weights

# What peft says of its own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
LORA = ("--lora-rank", "2", "--max-steps", "2", "--save-steps", "1")
QUIET = ("--measure", "nothing")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def finished(place):
    """The folder of a run of which nothing was measured."""
    finish(*place.train("finished", *QUIET, "--loss", "sft"))
    return place.folder / "finished"


class Hub:
    """Stands for the hub: a user, and what was sent."""

    def __init__(self, role="write"):
        self.user = {"name": "me", "auth": {"accessToken": {"role": role}}}
        self.made, self.files, self.broken = [], {}, False

    def __call__(self, token):
        assert token == "secret"
        return self

    def whoami(self):
        return self.user

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))
        return Repository(f"https://hub/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        if self.broken:
            raise ConnectionError("the line is dead")
        paths = [str(one.relative_to(folder_path)) for one in folder_path.rglob("*")]
        kept = set(hub_filter(paths, ignore_patterns))
        self.files[repo_id] = {one for one in kept if (folder_path / one).is_file()}


class Repository(str):
    @property
    def repo_id(self):
        return self.removeprefix("https://hub/")


def hub_filter(paths, ignored):
    from huggingface_hub.utils import filter_repo_objects

    return filter_repo_objects(paths, ignore_patterns=ignored)


@pytest.fixture
def online(monkeypatch):
    found = Hub()
    monkeypatch.setattr(hub, "HfApi", found)
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    return found


def blocks(card, kind):
    return re.findall(rf"^```{kind}\n(.*?)\n```$", card.text, re.MULTILINE | re.DOTALL)


def run_snippet(card, monkeypatch, folder):
    """What the card says loads and answers, where its reader has the folder."""
    monkeypatch.chdir(folder)
    names = {"prompt": "The cat sat on"}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        (code,) = blocks(card, "python")
        exec(compile(code, CARD, "exec"), names)
    assert shown.getvalue()
    return names["model"]


def settings_of(command):
    """The settings that a command of the card stands for."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["ctkd", "train"]
    parent = main.make_context("ctkd", words[1:])
    context = main.commands["train"].make_context("train", words[2:], parent=parent)
    return TrainConfig.from_mapping(read_settings(None, context.params, TrainConfig)).as_dict()


def test_the_card_says_what_the_run_was_and_no_place_of_this_machine(place, monkeypatch):
    options = ("--loss-option", "k=3", "--loss-option", "matching=greedy", "--kd-weight", "0.25")
    finish(*place.train("whole", *options))
    folder = place.folder / "whole"
    card, kept = ModelCard.load(folder / CARD), record(folder)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["ctkd", "distillation", "multilevelot"]
    # Nothing is known of models and data of one's own.
    assert not {"base_model", "license", "datasets", "language"} & card.data.to_dict().keys()
    assert str(place.folder) not in card.content and str(place.folder.parent) not in card.content
    after = kept["results"]["student after"]["given_bits_per_byte"]
    for said in ("9,776 parameters", "k=3", "0.25 x multilevelot", "18 rows of `rows.jsonl`",
                 f"{after:.4f}", "teacher |", "{prompt}{answer}<eos>"):  # fmt: skip
        assert re.search(re.escape(said).replace("\\ ", " +"), card.text), said
    # What it loads is what was trained.
    model = run_snippet(card, monkeypatch, place.folder)
    ours = weights(folder)
    theirs = model.state_dict()
    assert all(torch.equal(theirs[name], ours[name].to(theirs[name].dtype)) for name in ours)
    wanted = {**kept["settings"], "output": None, "device": "auto", "logging_steps": 5}
    wanted |= {name: kept["settings"][name].rpartition("/")[2] for name in
               ("student", "teacher", "data")}  # fmt: skip
    *_, command = blocks(card, "sh")
    assert settings_of(command) == wanted


def test_the_card_names_what_the_hub_knows(finished, tmp_path):
    """Of packaged models, hub ids, and of what was made from them."""
    kept = record(finished)

    def data_of(folder=tmp_path, **settings):
        changed = {**kept, "settings": {**kept["settings"], **settings}}
        return ModelCard(card_text(OutputFolder(folder, changed))).data.to_dict()

    smol, gemma = "smollm2-135m-instruct", "gemma-3-270m"
    first = data_of(student=gemma, data=["org/set@main:small:train", "pocketqa"])
    assert (first["base_model"], first["license"]) == ("google/gemma-3-270m", "gemma")
    assert (first["datasets"], first["base_model_relation"]) == (["org/set"], "finetune")
    assert "language" not in first and data_of(data="pocketqa")["language"] == "en"
    # Two sets of terms are not one.
    assert "license" not in data_of(student=smol, teacher=gemma, loss="uld")
    assert data_of(student=smol, teacher=smol, loss="uld")["license"] == "apache-2.0"
    assert data_of(student="org/model", loss="sft")["base_model"] == "org/model"
    # A folder is asked for its own card.
    (tmp_path / CARD).write_text(
        "---\nbase_model: org/first\nlicense: other\nlicense_name: kind\n---\n"
    )
    made = data_of(student=str(tmp_path), loss="sft")
    assert (made["base_model"], made["license_name"]) == ("org/first", "kind")
    (tmp_path / CARD).write_text("---\nbase_model: [\n---\n")
    assert "base_model" not in data_of(student=str(tmp_path), loss="sft")


def test_adapters_have_a_card_for_peft_and_a_reader_s_own_text_stays(place, monkeypatch):
    folder = place.folder / "adapters"
    words = place.train("adapters", *LORA, *QUIET, "--loss", "sft", "--keep-checkpoints")
    finish(*words)
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "peft" and "How to Get Started" not in card.content
    assert str(place.folder) not in card.content
    count = sum(one.numel() for one in load_file(folder / "adapter_model.safetensors").values())
    assert f"{9_776 + count:,} parameters with those of adapters, {count:,} of them" in card.text
    run_snippet(card, monkeypatch, place.folder)
    assert "pretrained=student,peft=adapters,tokenizer=adapters" in card.text

    def stopped():
        kept = record(folder)
        del kept["results"]["finished"]
        (folder / "ctkd.json").write_text(json.dumps(kept))

    # Gone on with, it is written anew, unless somebody has changed it.
    stopped()
    (folder / CARD).unlink()
    finish(*words, "--resume")
    assert ModelCard.load(folder / CARD).content == card.content
    stopped()
    (folder / CARD).write_text("Mine.")
    assert "none that ctkd wrote, so it stays" in finish(*words, "--resume").stderr
    assert (folder / CARD).read_text() == "Mine."


def test_a_run_is_sent_to_the_hub_once_and_nothing_is_lost(place, online):
    words = place.train("sent", *QUIET, "--loss", "sft", "--keep-checkpoints", "--push_to_hub",
                        "--hub_model_id", "me/model", "--hub-private")  # fmt: skip
    online.broken = True
    message = error_of(invoke(*words))
    assert "the line is dead; repeat the command with --resume, or run: hf upload me/mod" in message
    assert "--private --exclude '.*'" in message
    folder = place.folder / "sent"
    assert "finished" in record(folder)["results"]
    (folder / "control").mkdir()
    (folder / "control" / "model.safetensors").touch()
    online.broken = False
    assert "sent to https://hub/me/model" in finish(*words, "--resume").stderr
    assert online.made == [("me/model", True, True)] * 2
    assert online.files.pop("me/model") == {
        "README.md", "config.json", "curves.png", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert '"me/model"' in (folder / CARD).read_text()
    # What was sent is not sent again.
    finish(*words, "--resume")
    assert not online.files and len(online.made) == 2
    assert record(folder)["results"]["pushed"] == "https://hub/me/model"


def test_what_cannot_be_sent_is_refused_before_training(place, online, monkeypatch):
    push = (*QUIET, "--push-to-hub")
    for options, message in (
        (("--hub-model-id", "me/model"), "say how a model is sent to the hub; add push_to_hub"),
        ((*push, "--hub-model-id", "me//model"), "'me//model' is no id of the hub"),
        ((*push, *LORA), "can be loaded nowhere else; send the whole model (lora_merge)"),
    ):
        assert message in error_of(invoke(*place.train("refused", *options)))
    for answer, message in (
        ({"auth": {"accessToken": {"role": "read"}}}, "may only read"),
        (ConnectionError("no route"), "no route; leave push_to_hub out, and upload the folder"),
    ):

        def whoami(answer=answer):
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(online, "whoami", whoami, raising=False)
        assert message in error_of(invoke(*place.train("refused", *push)))
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "set HF_TOKEN" in error_of(invoke(*place.train("refused", *push)))
    assert not (place.folder / "refused").exists()
    shared = ("compare", "--config", str(place.folder / "compare.yaml"))
    (place.folder / "compare.yaml").write_text("push_to_hub: true\n")
    assert "push_to_hub is no setting of a comparison" in error_of(invoke(*shared))


def listing(folder):
    return {one: one.stat().st_mtime_ns for one in sorted(folder.rglob("*"))}


def figures(shown):
    return {line[:15].strip(): line[15:] for line in shown.splitlines()}


def test_a_dry_run_says_what_a_run_would_be_and_leaves_no_trace(place, finished, monkeypatch):
    seen = []
    real = run.measure_costs
    monkeypatch.setattr(run, "measure_costs", lambda *given: seen.append(real(*given)) or seen[-1])
    options = ("--max-steps", "9", "--batch-size", "3", "--grad-accumulation", "2",
               "--save-steps", "4", "--max-length", "46", "--control")  # fmt: skip
    before = listing(place.folder)
    shown = finish(*place.train("dry", *options, "--dry-run"))
    said = figures(shown.stdout)
    assert listing(place.folder) == before
    assert "LlamaForCausalLM, 9,776 parameters, 280 tokens" in said["student"]
    assert "19,560 parameters, 330 tokens" in said["teacher"]
    assert said["training rows"].startswith("15; left out 3 of 18 examples as longer than 46")
    assert "9 of 6 rows, 3.00 epochs" in said["steps"]
    assert "again, without multilevelot" in said["control"] and "dry, new" in said["output"]
    # Weights in float32, with two more of AdamW in each of up to three checkpoints, beside those of
    # a control, which is trained while two are left.
    (costs,) = seen
    assert (costs.saved, costs.checkpoint) == (9_776 * 4, 3 * 9_776 * 4)
    assert costs.disk(TrainConfig(save_steps=4, control=True), 9) == (7 + 9) * 9_776 * 4
    assert costs.disk(TrainConfig(save_steps=9, control=False), 9) == (3 + 1) * 9_776 * 4
    assert costs.step > 0 and costs.memory > 3 * 9_776 * 4
    begun = place.train("finished", "--dry-run")
    assert "exists already; go on with --resume" in error_of(invoke(*begun))


def test_a_dry_run_of_every_kind(place, monkeypatch):
    """A teacher that is asked live, read once or cached, that answers, adapters, and what is begun.

    Nothing is drawn, answered or trained in any of them.
    """
    monkeypatch.setattr(run.RunTrainer, "train", None)
    monkeypatch.setattr(run.TeacherTexts, "complete", None)
    cache = place.folder / "cache"
    rows = ("--data", str(place.rows), "--task", "text")
    models = ("--student", str(place.student), "--teacher", str(place.teacher))
    finish("cache", *models, *rows, "--output", str(cache), "--texts", "none")
    for options, row, said in (
        (("--loss", "sft"), "tokens", "none of the teacher"),
        (("--loss", "sft", "--answers", "teacher"), "teacher", "19,560 parameters"),
        (("--max-steps", "9", "--loss", "uld"), "time", "for the teacher to read all rows once"),
        (("--teacher-cache", str(cache)), "teacher", f"from {cache}, 330 tokens"),
        (LORA, "student", "1,088 of them trained"),
        (("--gradient-checkpointing",), "memory", "at most"),
    ):
        shown = finish(*place.train("kinds", *options, *QUIET, "--dry-run"))
        assert said in figures(shown.stdout)[row], shown.stdout
    assert not (place.folder / "kinds").exists()


def test_a_teacher_of_few_bits_is_another_teacher(place, monkeypatch):
    """In 8 bits it says nearly what it did, in 4 less so, and no cache of it is taken for whole."""
    both = ("--teacher-load-in-4bit", "--teacher-load-in-8bit")
    assert "contradict each other" in error_of(invoke(*place.train("bits", *both)))
    with monkeypatch.context() as without:
        without.setattr(quantized, "is_bitsandbytes_available", lambda: False)
        message = error_of(invoke(*place.train("bits", both[0])))
    assert "weights in 4 bits need bitsandbytes" in message and "pip install" in message
    pytest.importorskip("bitsandbytes")
    shown = finish(*place.train("bits", both[1], "--loss", "uld")).stderr
    assert "logits of the teacher: a block at a time, from the head" in shown
    configs = [TrainConfig(teacher=str(place.teacher), teacher_load_in_8bit=True),
               TrainConfig(teacher=str(place.teacher), teacher_load_in_4bit=True)]  # fmt: skip
    whole = load_teacher(TrainConfig(teacher=str(place.teacher)))
    ids = torch.tensor([[5, 9, 30, 41]])
    errors = []
    with torch.no_grad():
        expected = whole(ids).logits
        for config in configs:
            theirs = load_teacher(config)
            assert type(theirs.lm_head) is torch.nn.Linear
            errors.append(float((theirs(ids).logits - expected).abs().max()))
    assert 0 < errors[0] < errors[1] < float(expected.abs().max())
    cache = place.folder / "rounded"
    models = ("--student", str(place.student), "--teacher", str(place.teacher))
    rows = ("--data", str(place.rows), "--task", "text", "--texts", "none", "--output", str(cache))
    finish("cache", *models, *rows, both[1])
    assert "another dtype (float32, weights in 8 bits, now float32)" in error_of(
        invoke("cache", *models, *rows)
    )
    shown = finish(*place.train("taken", *QUIET, "--teacher-cache", str(cache))).stderr
    assert "asked in float32, weights in 8 bits, a live one would be in float32" in shown
