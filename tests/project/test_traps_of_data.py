"""Faults that live in other projects' handling of texts, ids and labels, each with a test.

The faults of losses are in `test_traps`.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainingArguments

import ctkd
from ctkd.batch import Batch, Side
from ctkd.distill.data.collator import Collator, padding_id
from ctkd.distill.data.encoding import EncodedExample, EncodedSide, encode_examples
from ctkd.distill.data.prompts import PLAIN, PromptForm
from ctkd.distill.data.tasks import Example
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import BatchError, DataError, SettingError
from ctkd.tokenization import TokenBytes, TokenizerPair
from tests.distill import tiny
from tests.ragged_batches import loss_and_gradient, ragged_inputs
from tests.tokenization import trained_tokenizers as trained

FOREIGN = " Der Fluß fließt nach Süden. Ça va, niño? naïve café 日本語 👩\u200d👧"


def examples(*answers: str) -> list[Example]:
    return [
        Example(id=f"e{n}", prompt=f"Question {n}:", answer=a, references=(a,), group=a)
        for n, a in enumerate(answers)
    ]


def spelled(table: TokenBytes, side: EncodedSide) -> dict[int, bytes]:
    """The bytes of every chunk of an answer."""
    found: dict[int, bytes] = {}
    for index, chunk in zip(side.answer_ids, side.chunk_ids, strict=True):
        found[chunk] = found.get(chunk, b"") + table.bytes_of[index]
    return found


def collated(
    rows: list[EncodedExample], sides: tuple, score_eos: bool = False
) -> dict[str, Tensor]:
    pads = [padding_id(tokenizer) for tokenizer in sides]
    return Collator(student_pad_id=pads[0], teacher_pad_id=pads[1], score_eos=score_eos)(rows)


def train(setup: tiny.Setup, folder, loss: ctkd.Loss, **settings: Any) -> None:
    """One optimizer step of plain SGD over all rows, on distillation alone."""
    defaults = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    defaults |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    defaults |= {"remove_unused_columns": False, "use_cpu": True, "data_seed": 0}
    CrossTokenizerTrainer(
        setup.student,
        TrainingArguments(output_dir=str(folder), **{**defaults, **settings}),
        loss=loss,
        teacher=setup.teacher,
        weights=ctkd.Weights(0.0, 1.0),
        student_vocab_size=len(setup.student_tokenizer),
        teacher_vocab_size=len(setup.teacher_tokenizer),
        data_collator=setup.collator,
        train_dataset=setup.rows,
    ).train()


def test_student_ids_to_the_teacher(tmp_path):
    """Elsewhere the teacher gets the student's ids and says nothing; here it gets its own."""
    setup = tiny.Setup()
    calls: dict[str, list[list[int]]] = {"student": [], "teacher": []}

    def recorder(name: str):
        def record(module, args, kwargs):
            for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
                calls[name].append(ids[mask.bool()].tolist())

        return record

    for name in calls:
        getattr(setup, name).register_forward_pre_hook(recorder(name), with_kwargs=True)
    train(setup, tmp_path, ctkd.get_loss("uld"), per_device_train_batch_size=6)
    texts = sorted(f"{one.prompt}{one.answer}" for one in tiny.examples())
    for name in calls:
        tokenizer = getattr(setup, f"{name}_tokenizer")
        assert sorted(tokenizer.decode(i, skip_special_tokens=True) for i in calls[name]) == texts
        sides = [getattr(row, name) for row in setup.rows]
        eos = [0] if name == "student" else []  # the teacher reads no end that is not scored
        assert sorted(calls[name]) == sorted([*s.prompt_ids, *s.answer_ids, *eos] for s in sides)
    assert not {tuple(ids) for ids in calls["student"]} & {tuple(ids) for ids in calls["teacher"]}


@pytest.mark.parametrize("bos_on", ["student", "teacher"])
def test_bos_on_one_side_only(bos_on):
    """Elsewhere a bos that one side lacks moves all pairs by one; here it stands apart."""
    with_bos, without = trained.gemma_like(), trained.byte_level()
    tokenizers = (with_bos, without) if bos_on == "student" else (without, with_bos)
    rows = encode_examples(examples(FOREIGN, " Paris"), *tokenizers, max_length=300).rows
    pair = TokenizerPair(*tokenizers)
    for row in rows:
        sides = (row.student, row.teacher)
        for side, tokenizer in zip(sides, tokenizers, strict=True):
            ids = [*side.prompt_ids, *side.answer_ids]
            found = [place for place, one in enumerate(ids) if one == tokenizer.bos_token_id]
            assert found == ([0] if tokenizer is with_bos else [])
        assert spelled(pair.student_bytes, sides[0]) == spelled(pair.teacher_bytes, sides[1])
        whole = pair.align(*[[[*side.prompt_ids, *side.answer_ids]] for side in sides])
        assert whole.coverage == 1.0
        ours, theirs = whole.student_chunk_ids[0], whole.teacher_chunk_ids[0]
        marked = ours if bos_on == "student" else theirs
        assert marked[0] == -1 and (marked[1:] >= 0).all()
        assert ours.max() == theirs.max() > 0


@pytest.mark.parametrize("score_eos", [True, False])
def test_eos_masked_when_pad_is_eos(score_eos):
    """Elsewhere masking the padding masks the eos of the same id; here positions are masked."""
    tokenizer = trained.byte_level()
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    sides = (tokenizer, trained.gemma_like())
    asked = examples(" Paris", FOREIGN, " a")
    rows = encode_examples(asked, *sides, max_length=300, score_eos=score_eos).rows
    batch = collated(rows, sides, score_eos)
    labels, size = batch["labels"], batch["labels"].shape[1]
    assert ((labels == eos).sum(1) == 1).all()  # cross-entropy always learns to stop
    assert (batch["attention_mask"][:, -size:][labels == eos] == 1).all()
    assert (batch["input_ids"] == eos).sum() > 2 * len(rows)  # there is padding
    for prefix, name, side in (("", "student", sides[0]), ("teacher_", "teacher", sides[1])):
        labels = batch[f"{prefix}distill_labels"]
        assert ((labels == side.eos_token_id).sum(1) == int(score_eos)).all()
        scored = Side.from_causal_lm(torch.zeros(*labels.shape, len(side)), labels)
        lengths = [len(getattr(row, name).answer_ids) + score_eos for row in rows]
        assert scored.mask.sum(1).tolist() == lengths


@pytest.mark.parametrize("name", ["uld", "multilevelot", "alm", "gold", "shared_kl"])
def test_left_vs_right_padding(name):
    """Elsewhere a loss knows one side of padding only; here left, right and both agree."""
    setup = tiny.Setup(score_eos=True)
    pair = TokenizerPair(setup.student_tokenizer, setup.teacher_tokenizer)
    loss = ctkd.get_loss(name, pair=pair)
    both = setup.collator(setup.rows)
    values = []
    for layout in ("both", "left", "right"):
        inputs: dict[str, Any] = {}
        for side, prefix in (("student", ""), ("teacher", "teacher_")):
            model, tokenizer = getattr(setup, side), getattr(setup, f"{side}_tokenizer")
            names = ("input_ids", "attention_mask", "position_ids")
            fields = [both[prefix + one] for one in names]
            size = fields[0].shape[1]
            for key, fill in (("distill_labels", -100), ("distill_chunk_ids", -1)):
                before = size - both[prefix + key].shape[1]
                fields.append(F.pad(both[prefix + key], (before, 0), value=fill))
            if layout != "both":  # all real tokens go to one end
                order = fields[1].argsort(dim=1, stable=True, descending=layout == "right")
                fields = [field.gather(1, order) for field in fields]
                assert fields[1][:, 0 if layout == "right" else -1].all()
            with torch.no_grad():
                logits = model(**dict(zip(names, fields[:3], strict=True))).logits
            inputs |= {f"{side}_logits": logits, f"{side}_vocab_size": len(tokenizer)}
            inputs |= {f"{side}_labels": fields[3], f"{side}_chunk_ids": fields[4]}
        values.append(float(loss(Batch.from_causal_lm(**inputs)).value))
    assert values[0] > 0
    assert values == pytest.approx([values[0]] * 3, rel=1e-10)


@pytest.mark.parametrize("name", ["alm", "gold", "shared_kl", "uld"])
def test_multi_turn_masks(name):
    """Elsewhere only one run of labels works; here each turn counts, and the hole does not."""
    setup = tiny.Setup()
    pair = TokenizerPair(setup.student_tokenizer, setup.teacher_tokenizer)
    turns = [("User: where?", "-"), (" the mat in the rain", "1")]
    turns += [(" User: when?", "-"), (" all night until the morning", "2")]
    labels: dict[str, dict[str, Tensor]] = {}
    inputs: dict[str, Any] = {}
    for side in ("student", "teacher"):
        tokenizer = getattr(setup, f"{side}_tokenizer")
        pieces = [(tokenizer.encode(text), turn) for text, turn in turns]
        ids = torch.tensor([[index for piece, _ in pieces for index in piece]])
        of_token = [turn for piece, turn in pieces for _ in piece]
        labels[side] = {
            scored: ids.masked_fill(torch.tensor([[turn not in scored for turn in of_token]]), -100)
            for scored in ("12", "1", "2")
        }
        with torch.no_grad():
            inputs[f"{side}_logits"] = getattr(setup, side)(ids).logits
        inputs[f"{side}_vocab_size"] = len(tokenizer)
    loss = ctkd.get_loss(name, pair=pair, **({"pairing": "chunk"} if name == "uld" else {}))
    chunks = pair.align(labels["student"]["12"], labels["teacher"]["12"])
    for side in labels:
        found = getattr(chunks, f"{side}_chunk_ids")
        inputs[f"{side}_chunk_ids"] = found
        first, second = (set(found[labels[side][turn] >= 0].tolist()) for turn in "12")
        assert first and second and not first & second  # no chunk reaches over the hole
    totals = {}
    for scored in ("12", "1", "2"):
        both = {f"{side}_labels": labels[side][scored] for side in labels}
        value, count, _ = loss_and_gradient(loss, {**inputs, **both})
        assert count > 0 and value > 0
        totals[scored] = torch.stack([value * count, count])
    torch.testing.assert_close(totals["12"], totals["1"] + totals["2"], rtol=1e-12, atol=1e-15)


def test_multi_byte_characters_split_over_tokens():
    """Elsewhere tokens are decoded one by one to U+FFFD and never match; here bytes are joined."""
    student, teacher = tiny.tokenizer(280), trained.gemma_like()
    pair = TokenizerPair(student, teacher)
    text = " Der Fluß fließt nach Süden. Ça va, niño? Où est le café?"  # characters of the teacher
    for answer in (text, FOREIGN):
        row = encode_examples(examples(answer), student, teacher, max_length=200).rows[0]
        assert sum("\ufffd" in student.decode([index]) for index in row.student.answer_ids) > 10
        ours = spelled(pair.student_bytes, row.student)
        assert ours == spelled(pair.teacher_bytes, row.teacher)
        assert b"".join(ours.values()) == answer.encode()
        if answer == text:
            assert all(piece.decode() for piece in ours.values())
    for size in range(len(row.student.prompt_ids) + 3, 60, 3):
        cut = encode_examples(examples(FOREIGN), student, teacher, max_length=size, on_long="cut")
        assert FOREIGN.startswith(student.decode(cut.rows[0].student.answer_ids))


def test_raw_string_vocabulary_match():
    """Elsewhere vocabularies are matched as strings, so that Ġthe is not ▁the; here as bytes."""
    student, teacher = trained.byte_level(), trained.gemma_like()
    pair = TokenizerPair(student, teacher)
    shared = set(zip(*[ids.tolist() for ids in pair.shared_ids()], strict=True))
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    by_string = {(ours[token], theirs[token]) for token in ours.keys() & theirs.keys()}
    spaces = [(ours[t], theirs["▁" + t[1:]]) for t in ours if t[0] == "Ġ" and "▁" + t[1:] in theirs]
    assert len(spaces) > 1 and set(spaces) <= shared and not set(spaces) & by_string
    assert (ours["Ã"], theirs["<0xC3>"]) in shared
    # The other way round: the character é writes the byte 0xE9 here and é itself there.
    assert (ours["é"], theirs["é"]) in by_string - shared
    for index, other in shared:
        assert pair.student_bytes.bytes_of[index] == pair.teacher_bytes.bytes_of[other]


def test_empty_overlap(monkeypatch, tmp_path):
    """Elsewhere no shared token gives 0/0 or nothing to learn; here a value or a clear refusal."""
    monkeypatch.setenv("CTKD_CACHE", str(tmp_path))
    ours = TokenBytes((b"a", b"b", b"ab"), ("text",) * 3)
    strangers = TokenizerPair(ours, TokenBytes((b"x", b"xy"), ("text",) * 2), progress=False)
    assert [len(ids) for ids in strangers.shared_ids()] == [0, 0]
    for name in ctkd.list_losses():
        if name in ("bpm", "shared_kl"):
            with pytest.raises(SettingError, match=r"share none|begins any of these"):
                ctkd.get_loss(name, pair=strangers)
            continue
        loss = ctkd.get_loss(name, pair=strangers)
        value, _, gradient = loss_and_gradient(loss, ragged_inputs(0, V=3, W=2))
        assert value.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0, name
    with pytest.raises(SettingError, match="share no token"):
        ctkd.get_loss("gold", pair=strangers, matched_weight=1.0, unmatched_weight=0.0)


@pytest.mark.parametrize("name", ["alm", "bpm", "gold", "shared_kl"])
def test_grad_accumulation_normalization(tmp_path, name):
    """Elsewhere micro-batches are averaged as if equal; here all chunks of a step weigh alike."""
    moved = []
    for batch_size in (6, 3, 1):
        setup = tiny.Setup()
        pair = TokenizerPair(setup.student_tokenizer, setup.teacher_tokenizer)
        assert len({max(row.student.chunk_ids) for row in setup.rows}) > 2  # unequal counts
        before = setup.student.lm_head.weight.detach().clone()
        loss = ctkd.get_loss(name, pair=pair)
        split = {"per_device_train_batch_size": batch_size}
        split["gradient_accumulation_steps"] = 6 // batch_size
        train(setup, tmp_path, loss, learning_rate=10.0, **split)
        moved.append(setup.student.lm_head.weight.detach() - before)
    assert moved[0].abs().max() > 1e-4
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("longer", ["student", "teacher"])
@pytest.mark.parametrize("on_long", ["drop", "cut", "refuse"])
def test_truncation_of_one_side_only(on_long, longer):
    """Elsewhere one side is cut and the other not; here both are, at one byte, or neither."""
    coarse, fine = tiny.tokenizer(330), tiny.tokenizer(262)
    sides = (fine, coarse) if longer == "student" else (coarse, fine)
    rows = examples(" the mat", " the bridge until the morning train in the rain")
    full = encode_examples(rows, *sides, max_length=200).rows
    lengths = [len(one.prompt_ids + one.answer_ids) for one in (full[1].student, full[1].teacher)]
    limit = min(lengths) + 2
    assert lengths[longer == "teacher"] > limit
    if on_long == "refuse":
        with pytest.raises(DataError, match="example e1 is longer than"):
            encode_examples(rows, *sides, max_length=limit, on_long=on_long)
        return
    encoded = encode_examples(rows, *sides, max_length=limit, on_long=on_long)
    assert encoded.rows[0] == full[0]
    if on_long == "drop":
        assert [row.id for row in encoded.rows] == ["e0"] and encoded.too_long[0].startswith("e1 ")
        return
    row = encoded.rows[1]
    assert row.cut and encoded.cut[0].startswith("e1 ")
    both = zip(sides, (row.student, row.teacher), strict=True)
    texts = [tokenizer.decode(side.answer_ids) for tokenizer, side in both]
    assert texts[0] == texts[1] != "" and rows[1].answer.startswith(texts[0])
    for name in ("student", "teacher"):
        side, whole = getattr(row, name), getattr(full[1], name)
        assert side.prompt_ids == whole.prompt_ids and side.eos_id is None
        assert len(side.prompt_ids) + len(side.answer_ids) <= limit
    batch = collated(encoded.rows, sides)
    assert (batch["labels"][1] != 0).all()  # a text that was cut does not end there


@pytest.mark.parametrize("teacher_form", [PromptForm(template="chat"), PLAIN])
def test_teacher_reading_student_chat_markers(teacher_form):
    """Elsewhere the teacher reads the student's template as text; here each side its own form."""
    sides = []
    for size, (user, reply) in ((280, ("<|user|>", "<|reply|>")), (330, ("[ASK]", "[/ASK]"))):
        tokenizer = tiny.tokenizer(size)
        tokenizer.add_special_tokens({"additional_special_tokens": [user, reply]})
        turns = "{% for turn in messages %}" + user + "{{ turn['content'] }}{% endfor %}"
        tokenizer.chat_template = turns + reply
        sides.append(tokenizer)
    chat = PromptForm(template="chat")
    row = encode_examples(
        examples(" the mat"), *sides, max_length=99, student_form=chat, teacher_form=teacher_form
    ).rows[0]
    both = teacher_form.template == "chat"
    assert sides[0].decode(row.student.prompt_ids) == "<|user|>Question 0:<|reply|>"
    expected = "[ASK]Question 0:[/ASK]" if both else "Question 0:"
    assert sides[1].decode(row.teacher.prompt_ids) == expected
    answer = "the mat" if both else " the mat"
    found = zip(sides, (row.student.answer_ids, row.teacher.answer_ids), strict=True)
    assert [tokenizer.decode(ids) for tokenizer, ids in found] == [answer] * 2


def test_one_giant_group():
    """Elsewhere one difference merges the rest of a text into one group; here chunks stay small."""
    student, teacher = trained.byte_level(nfc=True), trained.gemma_like()
    pair = TokenizerPair(student, teacher)
    page = " ".join([*trained.TEXTS, FOREIGN]) * 20
    for text, changed in ((page, 0), (page + "e\u0301" + page, 1)):  # the student's NFC changes it
        ids = [one.encode(text, add_special_tokens=False) for one in (student, teacher)]
        found = pair.align(*[[one] for one in ids])
        assert found.coverage > 0.999 and len(found.differences) == changed
        for chunks in (found.student_chunk_ids[0], found.teacher_chunk_ids[0]):
            sizes = torch.bincount(chunks[chunks >= 0])
            assert len(chunks) > 2500 and sizes.max() <= 8 and sizes.double().mean() < 2.5
            assert (chunks == -1).sum() <= 4 * changed
        if not changed:  # no chunk could be cut further
            ours, theirs = (
                set(itertools.accumulate(len(table.bytes_of[index]) for index in one))
                for table, one in zip((pair.student_bytes, pair.teacher_bytes), ids, strict=True)
            )
            assert int(found.chunks) == len(ours & theirs)


def test_silent_vocabulary_collapse():
    """Elsewhere an id outside a table is clamped to the last one; here it is an error."""
    student, teacher = tiny.tokenizer(280), tiny.tokenizer(330)
    pair = TokenizerPair(student, teacher)
    for ours, theirs in (([[len(student)]], [[5]]), ([[5]], [[len(teacher)]])):
        with pytest.raises(DataError, match="is not one of this tokenizer's"):
            pair.align(ours, theirs)
        ids = [torch.tensor(ours), torch.tensor(theirs)]
        with pytest.raises(DataError, match="another tokenizer"):
            pair.match_positions(*ids, *[torch.ones_like(one).bool() for one in ids])
    swapped = TokenizerPair(teacher, student)
    with pytest.raises(DataError, match="come from another tokenizer"):
        encode_examples(tiny.examples(), student, teacher, max_length=64, pair=swapped)
    inputs = ragged_inputs(0)  # a student of 11 tokens whose head has 13 columns
    inputs["student_labels"][0, 2] = 11
    with pytest.raises(BatchError, match="belong to another model's tokenizer"):
        ctkd.get_loss("alm")(Batch.from_causal_lm(**inputs))
    for name in ("gold", "shared_kl"):
        with pytest.raises(BatchError, match="its tokenizer has 280 tokens"):
            loss = ctkd.get_loss(name, pair=TokenizerPair(student, student))
            loss(Batch.from_causal_lm(**ragged_inputs(0)))


@pytest.mark.parametrize("score_eos", [True, False])
def test_label_counts_differ(score_eos):
    """Elsewhere one side is given other labels than the other; here both score the same bytes."""
    kinds = [trained.byte_level(), trained.gemma_like(), trained.metaspace(), trained.prepending()]
    answers = [FOREIGN, " Paris", "\n\nMünster", " 12345 + 67890 = 80235", " two  spaces ", "\t"]
    counts = set()
    for student, teacher in itertools.permutations(kinds, 2):
        pair = TokenizerPair(student, teacher)
        rows = encode_examples(
            examples(*answers), student, teacher, max_length=300, score_eos=score_eos, pair=pair
        ).rows
        batch = collated(rows, (student, teacher), score_eos)
        for number, answer in enumerate(answers):
            texts = []
            for table, prefix in ((pair.student_bytes, ""), (pair.teacher_bytes, "teacher_")):
                labels = batch[f"{prefix}distill_labels"][number]
                ids = labels[labels >= 0].tolist()
                texts.append(table.decode(ids))
                counts.add(len(ids))
                assert [table.roles[i] for i in ids].count("eos") == score_eos
            assert texts == [answer.encode()] * 2
    assert len(counts) > len(answers)
