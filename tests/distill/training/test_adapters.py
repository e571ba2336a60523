"""Low-rank adapters: trained alone, saved apart or merged, read again, and gone on with."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import ctkd
from ctkd.distill.models.adapters import add_lora
from ctkd.distill.models.fingerprint import model_fingerprint
from ctkd.distill.models.loading import load_model, load_tokenizer, most_positions
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import ModelError, SettingError
from tests.distill import tiny
from tests.distill.tiny_runs import Workplace, error_of, finish, invoke, record
from tests.distill.training.test_trainer import arguments

# What peft says of its own use of transformers, and of a setting that it mends by itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True."),
]
LORA = ("--lora-rank", "2", "--lora-dropout", "0.1", "--max-steps", "4", "--save-steps", "2")
IDS = torch.tensor([[5, 9, 30, 41]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def adapter(place):
    """The folder of a finished run."""
    return trained(place, place.student)


def trained(place, student):
    folder = place.folder / f"lora-{student.name}"
    result = finish(*place.train(folder.name, "--student", str(student), *LORA))
    assert " parameters are trained" in result.stderr
    assert "logits of the student: a block at a time" in result.stderr
    return folder


def gpt2(place):
    """A student whose linear layers are of another kind."""
    folder, tokenizer = place.folder / "gpt2", tiny.tokenizer(280)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=2, n_positions=128,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_read_where_its_users_read_it(place, adapter, kind):
    """In peft, in every command, and merged, it is the same model."""
    student = place.student if kind == "llama" else gpt2(place)
    folder = adapter if kind == "llama" else trained(place, student)
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(str(folder))
    assert type(ours) is type(theirs.get_base_model())
    close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(load_model(str(student)))).abs().max() > 1e-4
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.tokenizer(280).get_vocab()
    assert most_positions(str(folder)) == 128
    shown = finish(*place.evaluate(str(folder), "--data", str(place.rows))).stdout
    assert "given_bits_per_byte" in shown
    # Without a tokenizer of its own it has that of its model.
    alone = place.folder / f"alone-{kind}"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, alone)
    assert load_tokenizer(str(alone)).get_vocab() == tiny.tokenizer(280).get_vocab()

    merged = place.folder / f"merged-{kind}"
    finish(*place.train(merged.name, "--student", str(student), *LORA, "--lora-merge"))
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    close(logits(whole), logits(ours))
    both = [record(one)["results"] for one in (merged, folder)]
    for name in ("student after", "losses after"):
        first, second = (results[name] for results in both)
        assert first.keys() == second.keys()
        numbers = [one for one in first if isinstance(first[one], float)]
        assert numbers and all(
            first[one] == pytest.approx(second[one], rel=1e-4) for one in numbers
        )


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(place, adapter):
    folder = place.folder / "stopped"
    shutil.copytree(adapter, folder)
    words = place.train(folder.name, *LORA, "--keep-checkpoints")
    finish(*words, "--overwrite")
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "adapter_model.safetensors").unlink()
    kept = record(folder)
    for name in ("finished", "losses after", "student after"):
        del kept["results"][name]
    (folder / "ctkd.json").write_text(json.dumps(kept))
    assert "going on from checkpoint-2" in finish(*words, "--resume").stderr
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (folder, adapter))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert all("lora_" in name for name in ours)


def test_an_adapter_goes_on_and_teaches(place, adapter):
    """As a student it is trained itself; as a teacher it is its model with it."""
    further, taught = place.folder / f"more-{adapter.name}", f"taught-{adapter.name}"
    finish(*place.train(further.name, "--student", str(adapter), "--loss", "sft"))
    before, after = (load_file(one / "adapter_model.safetensors") for one in (adapter, further))
    assert before.keys() == after.keys() and not all(
        torch.equal(before[n], after[n]) for n in after
    )
    # As TRL spells it.
    of_lora = ("--lora_r", "1", "--lora_target_modules", "q_proj", "--gradient-checkpointing")
    finish(
        *place.train(taught, "--teacher_model_name_or_path", str(adapter), "--control", *of_lora)
    )
    names = load_file(place.folder / taught / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj"}
    assert "control" in record(place.folder / taught)["results"]
    words = place.train("again", "--student", str(adapter), "--lora-rank", "2")
    assert "is an adapter already" in error_of(invoke(*words))


def test_fingerprints_tell_adapters_and_their_models_apart(place, adapter):
    copy = place.folder / f"copy-{adapter.name}"
    shutil.copytree(adapter, copy)
    assert model_fingerprint(str(copy)) == model_fingerprint(str(adapter))
    settings = json.loads((copy / "adapter_config.json").read_text())
    base = settings["base_model_name_or_path"]
    assert model_fingerprint(str(copy)) != model_fingerprint(base)
    settings["lora_alpha"] = 9
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    assert model_fingerprint(str(copy)) != model_fingerprint(str(adapter))


def test_what_cannot_be_adapted_is_refused(place):
    for options, message in (
        (("--lora-alpha", "4"), "lora_alpha belongs to adapters; give a lora_rank, such as 16"),
        (("--lora-merge",), "lora_merge has no adapters to merge"),
        (("--lora-rank", "0"), "lora_rank must be a finite number above 0, got 0"),
        (("--lora-rank", "2", "--lora-dropout", "1"), "lora_dropout must be from 0 to below 1"),
        (("--lora-rank", "2", "--lora-target", "nix"), "its layers are called down_proj, "),
        (("--lora-rank", "2", "--student", "pocket-llama"), "adapters would leave as they are"),
    ):
        assert message in error_of(invoke(*place.train("refused", *options)))
    assert not (place.folder / "refused").exists()


def test_an_adapter_that_cannot_be_read_says_why(place, tmp_path):
    folder = tmp_path / "adapter"
    add_lora(
        load_model(str(place.student)), rank=1, alpha=2, dropout=0.0, targets=[], seed=0
    ).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(place.student)

    def written(**changes):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
        return str(folder)

    for changes, message in (
        ({"base_model_name_or_path": "./gone"}, "is an adapter, whose model cannot be loaded: "),
        ({"base_model_name_or_path": None}, "does not say of which model; write its folder"),
        ({"base_model_name_or_path": str(folder)}, "which lies above it"),
        ({"task_type": "SEQ_CLS"}, "is an adapter for SEQ_CLS, not for text"),
        ({"r": 3}, "cannot load the adapter .*; its files may be damaged"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(written(**changes))
    # Half of its weights are missing, then all of them, then the file.
    written()
    weights = load_file(folder / "adapter_model.safetensors")
    for kept in ([*weights][::2], []):
        save_file({name: weights[name] for name in kept} or {"x": torch.zeros(1)},
                  folder / "adapter_model.safetensors")  # fmt: skip
        with pytest.raises(ModelError, match="Found missing adapter keys"):
            load_model(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="is an adapter without its weights"):
        load_model(str(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="adapter_config.json cannot be read: .*; restore it"):
        load_model(str(folder))
    # Learned prompts are no part of any weight.
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_model(str(place.student)), prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ModelError, match=r"learned \(PROMPT_TUNING\); only adapters that change"):
        load_model(str(tmp_path / "prompts"))


def test_adapters_of_a_weight_that_is_there_twice_stay_apart(place):
    """The embeddings are the head as well: merged into one, the adapter would change the other."""
    for target in ("lm_head", "embed_tokens"):
        words = place.train(f"tied-{target}", *LORA, "--learning-rate", "0.1", "--lora-target",
                            "q_proj", "--lora-target", target)  # fmt: skip
        finish(*words)
        folder = place.folder / f"tied-{target}"
        theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        close(logits(load_model(str(folder))), logits(theirs))
        finish(*place.train(f"more-{target}", "--student", str(folder)))
        refused = invoke(*words, "--lora-merge", "--output", str(place.folder / "none"))
        assert "embeddings and head in one weight" in error_of(refused)


def test_a_vocabulary_that_grew_comes_with_the_adapter(place, tmp_path):
    model, tokenizer = load_model(str(place.student)), load_tokenizer(str(place.student))
    tokenizer.add_tokens([f"<new{number}>" for number in range(20)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    saved = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    get_peft_model(model, saved).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(logits(load_model(str(tmp_path))), logits(theirs))
    finish(*place.train("grown", "--student", str(tmp_path)))


def test_the_model_below_an_adapter_stays_what_it_was(place, tmp_path):
    """Neither exchanged between two starts, nor deleted by a run that is put in its place."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(place.student, base)
    words = ("--student", str(base), *LORA, "--output", str(run), "--keep-checkpoints")
    finish(*place.train("x", *words))
    above = ("--student", str(run), "--loss", "sft", "--output", str(base), "--overwrite")
    assert f"student {base} lies in the output folder" in error_of(
        invoke(*place.train("x", *above))
    )
    kept = record(run)
    del kept["results"]["finished"]
    (run / "ctkd.json").write_text(json.dumps(kept))
    tiny.model(286, seed=9).save_pretrained(base)
    refused = invoke(*place.train("x", *words, "--resume"))
    assert f"{base} has other weights than {run} was begun with" in error_of(refused)


def test_a_model_may_teach_its_own_adapters(tmp_path):
    """It is read without them, and neither they nor their dropout are touched."""
    setup = tiny.Setup()
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    base = setup.student
    expected = tiny.model(base.config.vocab_size, seed=1)
    pair = dict.fromkeys(("student_vocab_size", "teacher_vocab_size"), len(setup.student_tokenizer))
    trainer = CrossTokenizerTrainer(
        base, arguments(tmp_path), peft_config=lora, loss=ctkd.get_loss("uld"), teacher=base,
        data_collator=setup.collator, train_dataset=setup.rows, **pair,
    )  # fmt: skip
    batch = setup.collator(setup.rows)
    own = {f"teacher_{name}": batch[name] for name in batch if not name.startswith("teacher_")}
    trainer.model.train()
    side = trainer._teacher_side(own)
    count = batch["distill_labels"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    raw = expected(**inputs).logits[:, -count:]
    wanted = ctkd.Side.from_causal_lm(
        raw, batch["distill_labels"], vocab_size=len(setup.student_tokenizer)
    )
    ids = wanted.token_ids.unsqueeze(-1)
    close(side.logits.log_probs(ids)[wanted.mask], wanted.logits.log_probs(ids)[wanted.mask])
    # With its adapters it is another model.
    assert (trainer.model.eval()(**inputs).logits[:, -count:] - raw).abs().max() > 1e-4
    trainer.model.train()
    trainer._teacher_side(own)
    assert all(module.training for module in trainer.model.modules())
    trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    biased = LoraConfig(r=2, bias="all", target_modules=["q_proj"])
    other = setup.teacher
    for settings, message in (
        (None, "the student cannot teach itself"),
        (biased, "train biases of the model below them"),
        (biased, "the model has adapters already"),
        ("lora", "peft_config must be one of peft, such as LoraConfig, got str"),
    ):
        student = trainer.model if "already" in message else other
        with pytest.raises(SettingError, match=message):
            CrossTokenizerTrainer(
                student, arguments(tmp_path), peft_config=settings, loss=ctkd.get_loss("uld"),
                teacher=other,
            )  # fmt: skip
