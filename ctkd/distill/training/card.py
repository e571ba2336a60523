"""The model card of a finished run: ``README.md``, as the hub shows it, from ``ctkd.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from yaml import YAMLError

from ctkd.distill.config import SFT, UNTRAINED, TrainConfig
from ctkd.distill.data.encoding import EncodedExamples
from ctkd.distill.data.rows import Source, is_embedded, paths_of
from ctkd.distill.data.tasks import Example, get_task
from ctkd.distill.models.adapters import is_adapted
from ctkd.distill.models.checks import quiet
from ctkd.distill.models.packaged import PACKAGED
from ctkd.distill.preparing import Forms, Models
from ctkd.distill.training.measuring import losses_table, metrics_table
from ctkd.distill.training.output_folder import FREE, RECORD, OutputFolder
from ctkd.errors import SettingError
from ctkd.registry import describe

__all__ = ["CARD", "card_text", "facts_of_run", "model_facts", "model_in_words", "write_card"]

CARD = "README.md"


def model_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Architecture, sizes and whether there are adapters, of a model that is loaded."""
    below = model.get_base_model() if is_adapted(model) else model
    weights = list(model.parameters())
    return {
        "architecture": type(below).__name__,
        "parameters": sum(one.numel() for one in weights),
        "trained": sum(one.numel() for one in weights if one.requires_grad),
        "vocabulary": len(tokenizer),
        "adapters": is_adapted(model),
        "encoder-decoder": bool(model.config.is_encoder_decoder),
    }


def model_in_words(facts: Mapping[str, Any]) -> str:
    """What `model_facts` found, in a line."""
    words = f"{facts['architecture']}, {facts['parameters']:,} parameters"
    if facts["adapters"]:
        words += f" with those of adapters, {facts['trained']:,} of them trained"
    return f"{words}, {facts['vocabulary']:,} tokens"


def facts_of_run(
    config: TrainConfig,
    models: Models,
    forms: Forms,
    training: EncodedExamples,
    held_out: EncodedExamples,
) -> dict[str, Any]:
    """What the card says of a run beyond its settings and results; it goes into ``ctkd.json``."""
    facts: dict[str, Any] = {"rows": len(training), "held-out rows": len(held_out)}
    for side, model, tokenizer in (
        ("student", models.student, models.student_tokenizer),
        ("teacher", models.teacher, models.teacher_tokenizer),
    ):
        if model is not None and tokenizer is not None:
            facts[side] = model_facts(model, tokenizer)
    facts["form"] = _shown_form(config, forms, models.student_tokenizer)
    return facts


def _shown_form(config: TrainConfig, forms: Forms, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts and answers as the student reads them, with names of fields in place of data."""
    task, form = get_task(config.task), forms.student
    # Without the space in front only where every side is asked in a chat.
    asked = [forms.student, *([forms.teacher] if config.distils else [])]
    chats = [one.template == "chat" for one in asked]
    end = form.end_id(tokenizer)
    behind = "" if end is None else tokenizer.convert_ids_to_tokens(end)
    target = "assistant" if task.is_chat else task.target
    shown = []
    for body in ["{user}"] if task.is_chat else task.bodies.values():
        example = Example(id="", prompt=body, answer="", references=("",), group="")
        prompt = form.chat_text(tokenizer, example) if chats[0] else form.plain_text(example)
        space = "" if all(chats) else task.answer_prefix
        shown.append(f"{prompt}{space}{{{target}}}{behind}")
    return shown


def write_card(folder: OutputFolder, say: Callable[[str], None]) -> None:
    """Write the card of a run that has done all else, unless somebody else wrote one."""
    path = folder.path / CARD
    if path.is_file() and _digest(path.read_bytes()) != folder.record.get("card"):
        say(f"note: {path} is none that ctkd wrote, so it stays, and there is no model card")
        return
    content = card_text(folder).encode(errors="backslashreplace")
    # First, so that one that was cut short by a kill is known for its own.
    folder.record["card"] = _digest(content)
    folder.write()
    partial = folder.path / f".{CARD}.partial"
    partial.write_bytes(content)
    os.replace(partial, path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def card_text(folder: OutputFolder) -> str:
    """The card: settings of a model page of the hub, and what a reader of it needs to know."""
    settings = folder.record["settings"]
    config = TrainConfig.from_mapping(settings)
    name = config.hub_model_id or folder.path.resolve().name
    adapters = folder.record["facts"]["student"]["adapters"] and not config.lora_merge
    sections = [
        f"# {name.rpartition('/')[2]}",
        _what_it_is(config),
        _settings(config, folder),
        "## Results",
        _results(config, folder.results),
        "## Data",
        _data(config, folder),
        "## How to use it",
        _usage(config, name, folder.record["facts"], adapters=adapters),
        "## How to measure it",
        _measuring(config, name, adapters=adapters),
        "## How to repeat it",
        f"```sh\n{_command(config, folder)}\n```",
        _versions(folder),
        "## Licenses and limits",
        _limits(config, adapters=adapters),
    ]
    apart = folder.record["facts"]["student"]["encoder-decoder"]
    front = _front_matter(config, adapters=adapters, apart=apart).to_yaml()
    return f"---\n{front}\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(config: TrainConfig, *, adapters: bool, apart: bool) -> ModelCardData:
    student = _origin(config.student, config.student_config)
    teacher = _origin(config.teacher) if config.needs_teacher else {}
    base = student.get("base_model")
    if adapters and Path(config.student).expanduser().exists():
        # They belong to that folder, not to what it was made from.
        base = None
    license = {name: one for name, one in student.items() if name.startswith("license")}
    if "license" in teacher and teacher["license"] != student.get("license"):
        # Two sets of terms, of which a reader must know: see the last section.
        license = {}
    english = all(is_embedded(one) for one in (config.data, config.eval_data) if one is not None)
    more: dict[str, Any] = dict(license)
    if base is not None:
        more["base_model_relation"] = "adapter" if adapters else "finetune"
    return ModelCardData(
        library_name="peft" if adapters else "transformers",
        # The hub has none for encoder-decoders any more.
        pipeline_tag=None if apart else "text-generation",
        base_model=base,
        language="en" if english else None,
        datasets=_hub_data(config) or None,
        tags=["ctkd", *(["distillation", config.loss] if config.needs_teacher else [SFT])],
        **more,
    )


def _origin(name: str, from_config: str | None = None) -> dict[str, Any]:
    """Hub id and license of a model, as far as its name, or the card in its folder, tells them."""
    if from_config is not None or name == UNTRAINED:
        return {}
    if name in PACKAGED:
        model = PACKAGED[name]
        return {"base_model": model.hub_id, "license": model.hub_license}
    folder = Path(name).expanduser()
    if not folder.exists():
        return {"base_model": name}
    found: dict[str, Any] = {}
    with quiet(), suppress(OSError, ValueError, YAMLError):
        card = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
        for one in ("base_model", "license", "license_name", "license_link"):
            value = card.get(one)
            if isinstance(value, str) and not _is_place(value):
                found[one] = value
    return found


def _hub_data(config: TrainConfig) -> list[str]:
    """The hub ids among the data, without revision and split."""
    sources = [
        one
        for given in (config.data, config.eval_data)
        for one in ([given] if isinstance(given, str) else given or [])
        if not is_embedded(one) and not is_embedded(one.partition(":")[0]) and not _is_place(one)
    ]
    return list(dict.fromkeys(one.partition(":")[0].partition("@")[0] for one in sources))


def _is_place(name: str) -> bool:
    """Tell a file or folder of this machine from the name of something that anyone can fetch."""
    return bool(paths_of(name)) or name.startswith((".", "~")) or Path(name).is_absolute()


def _shown(source: Source) -> str:
    """Sources in code, those that lie on this machine without the folders above them."""
    return ", ".join(f"`{one}`" for one in _names(source))


def _names(source: Source) -> list[str]:
    every = [source] if isinstance(source, str) else list(source)
    return [
        Path(os.path.abspath(Path(one).expanduser())).name if _is_place(one) else one
        for one in every
    ]


def _what_it_is(config: TrainConfig) -> str:
    student = _shown(config.student)
    if config.student_config is not None or config.student == UNTRAINED:
        student += " (from random weights)"
    if not config.needs_teacher:
        return f"{student}, fine-tuned with cross-entropy by ctkd."
    teacher = _shown(config.teacher)
    answers = f" on answers that {teacher} wrote" if config.answers == "teacher" else ""
    if not config.distils:
        return f"{student}, trained with cross-entropy{answers} by ctkd (seqkd)."
    loss = describe(config.loss)
    paper = f", of *{loss.paper.title}*" if loss.paper.arxiv != "none" else ""
    if paper and loss.paper.arxiv:
        paper += f" ([{loss.paper.arxiv}](https://arxiv.org/abs/{loss.paper.arxiv}))"
    return (
        f"{student}, distilled from {teacher}{answers} by ctkd. "
        f"The loss is `{config.loss}`{paper}: {loss.matches}."
    )


def _settings(config: TrainConfig, folder: OutputFolder) -> str:
    facts, results = folder.record["facts"], folder.results
    weights = config.weights()
    rows = [
        (side, ": ".join([_shown(name), *([model_in_words(facts[side])] if side in facts else [])]))
        for side, name in (("student", config.student), ("teacher", config.teacher))
        if side == "student" or config.needs_teacher
    ]
    objective = f"{weights.ce:g} x cross-entropy"
    if config.distils:
        chosen = {**describe(config.loss).settings, **config.loss_options}
        given = ", ".join(f"{name}={_yaml(value)}" for name, value in chosen.items())
        objective += f" + {weights.kd:g} x {config.loss}" + (f" ({given})" if given else "")
    rows += [
        ("loss", objective),
        ("steps", f"{results['steps']}, of {_rows_a_step(config, folder)} rows"),
        (
            "optimizer",
            f"AdamW, learning rate {config.learning_rate:g} (linear, {config.warmup:.0%} warm-up), "
            f"weight decay {config.weight_decay:g}",
        ),
        ("precision", config.dtype),
        ("seed", str(config.seed)),
    ]
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _rows_a_step(config: TrainConfig, folder: OutputFolder) -> int:
    return config.batch_size * config.grad_accumulation * _processes(folder)


def _processes(folder: OutputFolder) -> int:
    count: int = folder.record.get("processes", 1)
    return count


def _results(config: TrainConfig, results: Mapping[str, Any]) -> str:
    if not {"student before", "student after"} <= results.keys():
        return "Nothing was measured in this run."
    text = [metrics_table(dict(results), "github")]
    if {"losses before", "losses after"} <= results.keys():
        text.append(losses_table(dict(results), config.loss, "github"))
    notes = "Of bits per byte and of losses less is better."
    if get_task(config.task).answered:
        notes = "F1, exact match and Rouge-LSum are in percent. " + notes
    if "control" in results:
        notes += " The control is the same training without the loss."
    text.append(f"{notes} One seed; how far another would differ is not known.")
    return "\n\n".join(text)


def _data(config: TrainConfig, folder: OutputFolder) -> str:
    facts, count = folder.record["facts"], folder.record["facts"]["rows"]
    if config.streaming:
        count = folder.results["steps"] * _rows_a_step(config, folder)
    how, unit = "streamed from" if config.streaming else "of", get_task(config.task).unit
    text = f"Trained on {count:,} {unit} {how} {_shown(config.data)}, task `{config.task}`. "
    held_out = f"{facts['held-out rows']:,} {unit}"
    if config.eval_data is not None:
        return text + f"Held out: {held_out} of {_shown(config.eval_data)}."
    if is_embedded(config.data):
        return text + f"Held out: {held_out} of its test split."
    if config.streaming:
        return text + f"Held out: {held_out}, the first; no row about the same was trained on."
    by = "" if get_task(config.task).is_chat else ", whole passages at a time"
    return text + f"Held out: {held_out}, cut off with seed {config.seed}{by}."


def _usage(config: TrainConfig, name: str, facts: Mapping[str, Any], *, adapters: bool) -> str:
    apart = facts["student"]["encoder-decoder"]
    kind = f"Auto{'Peft' if adapters else ''}ModelFor{'Seq2SeqLM' if apart else 'CausalLM'}"
    imports = f"from transformers import {kind}, AutoTokenizer"
    if adapters:
        imports = f"from peft import {kind}\nfrom transformers import AutoTokenizer"
    load = (
        f"{imports}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = {kind}.from_pretrained("{name}")\n'
        'prompt = "..."  # in the form below\n'
    )
    if config.student_template == "chat":
        load += (
            'turns = [{"role": "user", "content": prompt}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
        )
    else:
        load += 'inputs = tokenizer(prompt, return_tensors="pt")\n'
    answer = "0" if apart else "0, inputs.input_ids.shape[1] :"
    load += (
        f"ids = model.generate(**inputs, max_new_tokens=64)[{answer}]\n"
        "print(tokenizer.decode(ids, skip_special_tokens=True))"
    )
    kind_of_prompt = (
        "in its chat template" if config.student_template == "chat" else "as plain text"
    )
    trained = f"It was trained on prompts and answers {kind_of_prompt}"
    if apart:
        trained += ", of which its encoder reads the prompts and its decoder writes the answers"
    parts = [f"```python\n{load}\n```", f"{trained}:"]
    return "\n\n".join([*parts, *(f"````text\n{form}\n````" for form in facts["form"])])


def _measuring(config: TrainConfig, name: str, *, adapters: bool) -> str:
    arguments = f"pretrained={name}"
    if adapters:
        (below,) = _names(config.student)
        below = _origin(config.student).get("base_model", below)
        arguments = f"pretrained={below},peft={name},tokenizer={name}"
    chat = " --apply_chat_template" if config.student_template == "chat" else ""
    harness = (
        f"lm-eval run --model hf --model_args {arguments} --tasks TASKS --batch_size auto{chat}"
    )
    own = f"ctkd evaluate {name} --data ROWS --task {config.task}"
    return f"```sh\n{harness}\n{own}\n```"


def _command(config: TrainConfig, folder: OutputFolder) -> str:
    """The command that repeats a run, without what is a default; places are names alone."""
    settings = {name: value for name, value in config.as_dict().items() if name not in FREE}
    if "chat" in (config.student_template, config.teacher_template):
        settings["date"] = folder.record["date"]
    whole = TrainConfig(**settings)
    for name in list(settings):
        fewer = {one: value for one, value in settings.items() if one != name}
        with suppress(SettingError):
            if TrainConfig(**fewer) == whole:
                settings = fewer
    fields = {one.name: one for one in dataclasses.fields(TrainConfig)}
    words = [_option(fields[name], value) for name, value in settings.items()]
    processes = _processes(folder)
    launcher = f"torchrun --nproc_per_node {processes} -m " if processes > 1 else ""
    return " \\\n    ".join([f"{launcher}ctkd train", *words])


def _option(field: dataclasses.Field[Any], value: Any) -> str:
    flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag.removeprefix('--')}"
    if isinstance(value, dict):
        values = [f"{name}={_yaml(one)}" for name, one in value.items()]
    elif isinstance(value, str | list) and field.name != "lora_target":
        values = _names(value)
    else:
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
    return " ".join(f"{flag} {shlex.quote(one)}" for one in values)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _versions(folder: OutputFolder) -> str:
    environment = folder.record["environment"]
    ended = folder.results.get("finished", date.today().isoformat())[:10]
    versions = ", ".join(
        f"{name} {environment[name]}"
        for name in ("ctkd", "torch", "transformers", "peft")
        if name in environment
    )
    return (
        f"Trained with {versions} on {environment['device']}, finished on "
        f"{ended}. Files and folders are named without their place; all "
        f"settings and results are in `{RECORD}`, which is not sent to the hub."
    )


def _limits(config: TrainConfig, *, adapters: bool) -> str:
    lines = []
    terms = _origin(config.student, config.student_config)
    if "license" in terms:
        lines.append(f"The student it began as is under `{_license(terms)}`.")
    elif config.student_config is not None or config.student == UNTRAINED:
        lines.append("It began from random weights, which have no license of their own.")
    else:
        lines.append(f"The terms of {_shown(config.student)}, which are not known here, apply.")
    if config.needs_teacher:
        terms = _origin(config.teacher)
        whose = (
            f"The teacher is under `{_license(terms)}`"
            if "license" in terms
            else (f"The license of the teacher {_shown(config.teacher)} is not known here")
        )
        lines.append(f"{whose}: its terms may reach models that learned from its output.")
    lines.append("The terms of the data apply to what was learned from them.")
    if adapters and _is_place(config.student) | (config.student in PACKAGED):
        lines.append(
            "`adapter_config.json` names the model below by its place on the machine of the "
            "training: elsewhere, write your own there."
        )
    if config.student in PACKAGED or config.teacher in PACKAGED and config.needs_teacher:
        lines.append("Packaged models are 4-bit conversions of those of the hub, unpacked.")
    lines.append(
        "It was measured on the rows above and on nothing else, not for facts, bias or safety."
    )
    return "\n".join(f"- {line}" for line in lines)


def _license(terms: Mapping[str, Any]) -> str:
    return str(terms.get("license_name", terms["license"]))
