"""The page that ``ctkd doctor`` prints.

It only writes down what was measured. Colors are terminal codes, which click leaves away
where the output is no terminal; everything that a color says is also there in characters.
"""

import unicodedata
from collections.abc import Iterable, Sequence

import click

from ctkd.distill.data.rows import names_of
from ctkd.distill.evaluation.doctor import DoctorReport, LossAdvice
from ctkd.distill.printable import printable, visible
from ctkd.tokenization.answer_facts import AlignedRow, AnswerFacts, Piece
from ctkd.tokenization.doctor import (
    Examination,
    Head,
    NamedToken,
    SideFacts,
    Verdict,
    percent,
)
from ctkd.tokenization.kind_audit import KindAudit

__all__ = ["doctor_page"]

_WIDTH = 100
_LABEL = 22
_COLUMN = 28
_CHUNK_COLORS = ("cyan", "yellow", "green", "magenta", "blue")
_LEVEL_COLORS = {"good": "green", "careful": "yellow", "unsuited": "red"}
_SHAPES = 4


def doctor_page(report: DoctorReport) -> str:
    """Everything that was measured, on a page for the terminal."""
    examination, losses, verdict = report.examination, report.losses, report.verdict
    request = report.request
    title = f"{request.student} learns from {request.teacher}, on {names_of(request.data)}"
    lines = [click.style(printable(title), bold=True)]
    lines += [_heading("VOCABULARIES", "student", "teacher"), *_vocabularies(examination)]
    lines += [_heading("SPECIAL TOKENS", "student", "teacher"), *_special(examination)]
    lines += [_heading("KINDS OF TEXT", "tokens, student : teacher", "cut into, student:teacher")]
    lines += map(_kind, examination.kinds)
    if examination.numerals_split_on_one_side:
        note = "numerals are whole tokens on one side, digits on the other: no token pairs there"
        lines.append(_warning(note))
    lines += [_heading(f"ANSWERS ({examination.answers.answers})"), *_answers(examination.answers)]
    lines += [_heading("LOSSES"), *_losses(losses)]
    if report.first is not None:
        lines.append(
            f"  try {report.first.name} first: of those that suit best it helped most where all "
            "were compared, of other models (ctkd losses)"
        )
    return "\n".join([*lines, *_verdict(examination, losses, verdict)])


def _heading(*columns: str) -> str:
    return click.style(_cells(columns), bold=True)


def _row(label: str, *columns: str) -> str:
    return _cells((f"  {label}", *columns))


def _line(label: str, text: str) -> str:
    return _padded(f"  {label}", _LABEL) + text


def _warning(text: str) -> str:
    return click.style(f"  ! {printable(text)}", fg="yellow")


def _cells(columns: Sequence[str]) -> str:
    widths = [_LABEL, *[_COLUMN] * (len(columns) - 1)]
    cells = [_padded(cell, width) for cell, width in zip(columns, widths, strict=True)]
    return "".join(cells).rstrip()


def _padded(text: str, width: int) -> str:
    return text + " " * max(width - _columns(text), 1)


def _columns(text: str) -> int:
    """The columns of the terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        for sign in text
    )


def _vocabularies(examination: Examination) -> list[str]:
    sides, answers = (examination.student, examination.teacher), examination.answers
    shared, spelled = examination.overlap.shared, examination.overlap.spelled_alike
    weighted = (answers.student_shared, answers.teacher_shared)
    return [
        _row("tokens", *(f"{side.size:,}" for side in sides)),
        _row("kind", *(side.kind for side in sides)),
        _row("head", *(_head(side.head) for side in sides)),
        _row("the other has", *(_of(shared, side) for side in sides)) + "  same bytes",
        _row("", *(_of(spelled, side) for side in sides)) + "  same spelling",
        _row("of answers' tokens", *map(percent, weighted)) + "  same bytes",
    ]


def _of(count: int, side: SideFacts) -> str:
    return f"{count:,} ({percent(count / max(side.size, 1))})"


def _head(head: Head) -> str:
    if head.width is None:
        return "unknown"
    if head.outside is not None:
        return f"{head.width:,}: TOO NARROW"
    notes = [f"{head.spare_columns:,} unused"] if head.spare_columns else []
    notes += [f"{head.spare_special:,} special beyond"] if head.spare_special else []
    return f"{head.width:,}" + (f" ({', '.join(notes)})" if notes else "")


def _special(examination: Examination) -> list[str]:
    sides = (examination.student, examination.teacher)
    lines = [
        _row(name.upper(), *(_token(getattr(side, name)) for side in sides))
        for name in ("bos", "eos", "pad")
    ]
    added = [
        " ".join([*map(visible, side.leading), "TEXT", *map(visible, side.trailing)])
        for side in sides
    ]
    lines.append(_row("what a text becomes", *added))
    lines.append(_row("chat template", *("yes" if side.chat_template else "no" for side in sides)))
    return lines + [_warning(asymmetry) for asymmetry in examination.asymmetries]


def _token(token: NamedToken | None) -> str:
    return "none" if token is None else f"{visible(token.token)} {token.id}"


def _kind(kind: KindAudit) -> str:
    probes = []
    for probe in kind.probes:
        counts = [
            f"{len(pieces)}" + ("" if exact else "?")
            for pieces, exact in (
                (probe.student, probe.student_exact),
                (probe.teacher, probe.teacher_exact),
            )
        ]
        probes.append(f"{visible(probe.text)} {':'.join(counts)}")
    tokens = f"{kind.student_tokens:,} : {kind.teacher_tokens:,}"
    row = _row(kind.name, tokens, "   ".join(probes))
    lost = any(not (probe.student_exact and probe.teacher_exact) for probe in kind.probes)
    return row + ("   (? = not spelled exactly)" if lost else "")


def _answers(facts: AnswerFacts) -> list[str]:
    shapes = list(facts.chunk_shapes.items())
    total = max(facts.chunks, 1)
    shares = [f"{shape} {percent(count / total)}" for shape, count in shapes[:_SHAPES]]
    if rest := sum(count for _, count in shapes[_SHAPES:]):
        shares.append(f"other {percent(rest / total)}")
    ours, theirs = (
        f"{tokens / facts.answers:.1f}" for tokens in (facts.student_tokens, facts.teacher_tokens)
    )
    lines = [
        _line(
            "coverage",
            f"{percent(facts.coverage)} of the bytes in chunks; {percent(facts.one_to_one)} of "
            f"{facts.chunks:,} chunks one token to one token",
        ),
        _line("tokens per answer", f"student {ours}, teacher {theirs}"),
        _line("tokens per chunk", f"student:teacher  {'   '.join(shares) or 'no chunks'}"),
        _line(
            "paired by index",
            f"{percent(facts.in_step)} of {facts.paired_by_index:,} positions in step; "
            f"{percent(facts.in_step_behind_first)} behind the first token",
        ),
    ]
    if facts.student_numerals_shared is not None and facts.teacher_numerals_shared is not None:
        lines.append(
            _line(
                "numerals shared",
                f"{percent(facts.student_numerals_shared)} of {facts.student_numerals:,} student "
                f"and {percent(facts.teacher_numerals_shared)} of {facts.teacher_numerals:,} "
                "teacher tokens with a digit",
            )
        )
    if facts.differing:
        lines.append(_warning(f"the two sides spell {facts.differing} of the answers differently"))
    lines += [
        _fitted(
            f'    row {printable(row.id)}: student "{visible(row.student)}", '
            f'teacher "{visible(row.teacher)}"'
        )
        for row in facts.differing_rows
    ]
    if not facts.worst:
        return [*lines, _line("worst rows", "none: every answer is one to one")]
    lines.append(_line("worst rows", "[chunk]  token|token  {in no chunk}"))
    for worst in facts.worst:
        lines += _aligned(worst)
    return lines


def _aligned(row: AlignedRow) -> list[str]:
    start = _first_to_show(row)
    label = _fitted(f"  {visible(row.id)}", _LABEL - 10)
    return [
        _padded(label, _LABEL - 10) + "student   " + _pieces(row.student, start),
        _padded(f"  {percent(row.coverage)}", _LABEL - 10)
        + "teacher   "
        + _pieces(row.teacher, start),
    ]


def _first_to_show(row: AlignedRow) -> int:
    """Two chunks before the first that is not one to one."""
    sizes = [[piece.chunk for piece in side] for side in (row.student, row.teacher)]
    for chunk in range(max(map(len, sizes))):
        if any(side.count(chunk) != 1 for side in sizes):
            return max(chunk - 2, 0)
    return 0


def _pieces(side: Sequence[Piece], start: int) -> str:
    """Write tokens in their chunks, from one chunk on, as far as the line goes."""
    first = next((at for at, piece in enumerate(side) if piece.chunk >= start), 0)
    width = _WIDTH - _LABEL - 2
    shown = "… " if first else ""
    width -= len(shown)
    for chunk, pieces in _runs(side[first:]):
        opening, closing = "[]" if chunk >= 0 else "{}"
        text = opening + "|".join(visible(piece) for piece in pieces) + closing
        if _columns(text) > width:
            return shown + (click.style(_fitted(text, max(width, 1)), fg=_color(chunk)))
        shown += click.style(text, fg=_color(chunk))
        width -= _columns(text)
    return shown


def _runs(side: Iterable[Piece]) -> list[tuple[int, list[str]]]:
    runs: list[tuple[int, list[str]]] = []
    for piece in side:
        if not runs or runs[-1][0] != piece.chunk:
            runs.append((piece.chunk, []))
        runs[-1][1].append(piece.text)
    return runs


def _color(chunk: int) -> str:
    return _CHUNK_COLORS[chunk % len(_CHUNK_COLORS)] if chunk >= 0 else "red"


def _losses(losses: Sequence[LossAdvice]) -> list[str]:
    width = max((len(loss.name) for loss in losses), default=0) + 4
    return [
        _padded(f"  {loss.name}", width)
        + click.style(f"{loss.suits:10}", fg=_LEVEL_COLORS[loss.suits])
        + printable(loss.reason)
        for loss in losses
    ]


def _verdict(examination: Examination, losses: Sequence[LossAdvice], verdict: Verdict) -> list[str]:
    thresholds = verdict.thresholds
    if verdict.sound:
        known = all(
            side.head.width is not None for side in (examination.student, examination.teacher)
        )
        unsuited = [printable(loss.name) for loss in losses if loss.suits == "unsuited"]
        text = (
            f"SOUND{_but_not_with(unsuited)}: at least {percent(thresholds.min_coverage)} of the "
            f"bytes in chunks and {percent(thresholds.min_one_to_one)} of the chunks one to one; "
            + ("heads wide enough" if known else "heads not looked at, for want of a config.json")
        )
        return [click.style(text, fg="green", bold=True)]
    return [
        click.style("UNSOUND", fg="red", bold=True),
        *(f"  - {printable(reason)}" for reason in verdict.reasons),
    ]


def _but_not_with(names: Sequence[str]) -> str:
    if not names:
        return ""
    *others, last = names
    return f", but not with {', '.join(others)}{' or ' if others else ''}{last}"


def _fitted(text: str, width: int = _WIDTH) -> str:
    """Cut a text to so many columns."""
    if _columns(text) <= width:
        return text
    while text and _columns(text) > width - 1:
        text = text[:-1]
    return text + "…"
