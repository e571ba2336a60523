"""What the benchmarks of losses measure, and on which inputs.

Rows of logits have the shape that a trained model's have: most columns normal, a few far above.
Every token is a chunk of its own on both sides, the worst case: a pair of rows at every token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import ctkd
from baselines.as_published import PUBLISHED
from baselines.trl_uld import HOW_TO_INSTALL, is_installed
from ctkd.testing.inputs import TinyPair

UNIT = "cross-entropy"
STORED = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Vocabularies(NamedTuple):
    """Sizes of two vocabularies, and which part of the narrower one both have."""

    name: str
    student: int
    teacher: int
    shared: float

    def __str__(self) -> str:
        return f"{self.student:,} / {self.teacher:,}"


VOCABULARIES = {
    "wide": Vocabularies("wide", 151_936, 128_256, 0.85),
    "narrow": Vocabularies("narrow", 50_257, 32_000, 0.5),
}

TINY = Vocabularies("80:60", 80, 60, 0.5)


class VocabulariesType(click.ParamType):
    """A pair of vocabularies by its name, or two sizes, V:W, with half of the narrower shared."""

    name = "wide|narrow|V:W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Vocabularies:
        if isinstance(value, Vocabularies):
            return value
        if value in VOCABULARIES:
            return VOCABULARIES[value]
        sizes = value.split(":")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 2 for size in sizes):
            self.fail(
                f"{value!r} is neither {' nor '.join(VOCABULARIES)}, nor two sizes above 2 such "
                "as 300:200",
                param,
                ctx,
            )
        return Vocabularies(value, int(sizes[0]), int(sizes[1]), 0.5)


class SharingPair(TinyPair):
    """Two tokenizers that share a part of the narrower vocabulary, in random order.

    Teacher tokens that the student lacks have any student token as their nearest.
    """

    def __init__(self, vocabularies: Vocabularies, seed: int = 0) -> None:
        super().__init__(vocabularies.student, vocabularies.teacher)
        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(vocabularies.shared * min(self.sizes)))
        ours, theirs = (torch.randperm(size, generator=generator)[:count] for size in self.sizes)
        self.shared = ours, theirs
        self.nearest = torch.randint(self.sizes[0], (self.sizes[1],), generator=generator)
        self.nearest[theirs] = ours

    def nearest_student_ids(self) -> Tensor:
        return self.nearest


def peaked_logits(
    sequences: int, tokens: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Logits of which a few in each row stand far above the others."""
    device = generator.device
    logits = torch.empty(sequences, tokens, columns, dtype=dtype, device=device)
    logits.normal_(0.0, 3.0, generator=generator)
    peaks = min(8, columns)
    size = sequences, tokens, peaks
    ids = torch.randint(columns, size, generator=generator, device=device)
    heights = 15.0 + 9.0 * torch.rand(size, generator=generator, device=device)
    return logits.scatter_(2, ids, heights.to(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What two models said of the same B texts of S tokens each, one to one."""

    student_logits: Tensor
    student_labels: Tensor
    teacher_labels: Tensor
    chunk_ids: Tensor
    pair: SharingPair
    teacher_logits: Tensor | None
    stored: ctkd.TopK | None

    @classmethod
    def make(
        cls,
        vocabularies: Vocabularies,
        *,
        sequences: int = 4,
        tokens: int = 64,
        dtype: torch.dtype = torch.float32,
        live: bool = True,
        stored: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> "Inputs":
        """Draw both sides.

        Args:
            vocabularies: Their sizes.
            sequences: B.
            tokens: S, scored in every sequence.
            dtype: Of the logits.
            live: Keep the teacher's logits.
            stored: Keep the largest entries of its rows.
            seed: Of the random numbers.
            device: Where they are drawn, and stay.
        """
        generator = torch.Generator(device).manual_seed(seed)
        size = sequences, tokens
        labels = [
            torch.randint(columns, size, generator=generator, device=device)
            for columns in (vocabularies.student, vocabularies.teacher)
        ]
        # One sequence at a time, so that the whole tensor is never there where it is not kept.
        kept = []
        teacher_logits = None
        if live:
            teacher_logits = peaked_logits(*size, vocabularies.teacher, dtype, generator)
        for row in range(sequences if stored else 0):
            if teacher_logits is None:
                logits = peaked_logits(1, tokens, vocabularies.teacher, dtype, generator)
            else:
                logits = teacher_logits[row : row + 1]
            kept.append(
                ctkd.TopK.of(
                    ctkd.DenseLogits(logits),
                    labels[1][row : row + 1],
                    min(STORED, vocabularies.teacher),
                )
            )
            del logits
        student_logits = peaked_logits(*size, vocabularies.student, dtype, generator)
        return cls(
            student_logits=student_logits.requires_grad_(),
            student_labels=labels[0],
            teacher_labels=labels[1],
            chunk_ids=torch.arange(tokens, device=device).expand(size),
            pair=SharingPair(vocabularies, seed),
            teacher_logits=teacher_logits,
            stored=_joined(kept) if kept else None,
        )

    def clear(self) -> None:
        """Forget the gradient."""
        self.student_logits.grad = None

    def batch(self, *, stored: bool) -> ctkd.Batch:
        """Both sides from raw logits and labels, with a live or a stored teacher."""
        student = ctkd.Side.from_encoder_decoder(
            self.student_logits, self.student_labels, chunk_ids=self.chunk_ids
        )
        if stored:
            logits = ctkd.TopKLogits(self.stored)
            teacher = ctkd.Side(
                logits=logits,
                token_ids=self.teacher_labels,
                mask=logits.mask,
                chunk_ids=self.chunk_ids,
            )
        else:
            teacher = ctkd.Side.from_encoder_decoder(
                self.teacher_logits, self.teacher_labels, chunk_ids=self.chunk_ids
            )
        return ctkd.Batch(student=student, teacher=teacher, num_chunks=self.chunk_ids.shape[1])


def _joined(kept: list[ctkd.TopK]) -> ctkd.TopK:
    """Sequences stored one by one, as one batch."""
    parts = [one.tensors() for one in kept]
    return kept[0].with_tensors(
        {name: torch.cat([one[name] for one in parts]) for name in parts[0]}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of a table: a loss of the package, a published one, or the unit.

    Args:
        label: Its name there.
        loss: The registered name; empty for what is not of the package.
        stored: Whether the teacher is a stored one.
        settings: Of the loss.
        bar: The largest ratio to cross-entropy that is good enough; None where none is set.
    """

    label: str
    loss: str = ""
    stored: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    bar: float | None = None

    @property
    def uses_trl(self) -> bool:
        return not self.loss and "TRL" in self.label

    def on(self, inputs: Inputs) -> Callable[[], Tensor]:
        """The whole of it on some inputs: batch, forward, backward. Returns the value."""
        if self.loss:
            loss = ctkd.get_loss(self.loss, pair=inputs.pair, **self.settings)
            loss = loss.to(inputs.student_labels.device)

            def value() -> Tensor:
                return loss(inputs.batch(stored=self.stored)).value
        elif self.label == UNIT:

            def value() -> Tensor:
                logits = inputs.student_logits
                return F.cross_entropy(
                    logits.view(-1, logits.shape[-1]), inputs.student_labels.view(-1)
                )
        else:
            published = PUBLISHED[self.label]

            def value() -> Tensor:
                return published(
                    inputs.student_logits,
                    inputs.student_labels,
                    inputs.teacher_logits,
                    inputs.teacher_labels,
                )

        def run() -> Tensor:
            found = value()
            found.backward()
            return found.detach()

        return run

    def refusal(self, dtype: torch.dtype) -> str:
        """Why a published loss cannot take logits of a dtype here; empty if it can."""
        if not self.loss and self.label != UNIT:
            try:
                self.on(Inputs.make(TINY, sequences=1, tokens=2, dtype=dtype, stored=False))()
            # Either is what torch raises where an operator has no kernel for a dtype.
            except (NotImplementedError, RuntimeError) as error:
                return str(error).partition("\n")[0]
        return ""


_BARS = {"multilevelot": 1.7, "uld": 6.0} | dict.fromkeys(
    ("mined", "alm", "gold", "shared_kl"), 2.5
)


def all_measured() -> list[Measured]:
    """The unit, every registered loss with a live teacher, some with a stored one, the published.

    TRL's is left out, with a word, where TRL is not installed.
    """
    lines = [Measured(label=UNIT)]
    for name in ctkd.list_losses():
        lines.append(Measured(label=name, loss=name, bar=_BARS.get(name)))
        if name == "multilevelot":
            lines.append(Measured(label=f"{name}, stored", loss=name, stored=True, bar=1.2))
        if name == "uld":
            top_k = {"top_k": STORED}
            short = f"{name} top_k={STORED}"
            lines += [
                Measured(label=f"{name}, stored", loss=name, stored=True),
                Measured(label=short, loss=name, settings=top_k, bar=2.0),
                Measured(label=f"{short}, stored", loss=name, settings=top_k, stored=True, bar=2.0),
            ]
    lines += [Measured(label=name) for name in PUBLISHED]
    if not is_installed():
        click.echo(f"without uld, TRL: {HOW_TO_INSTALL}", err=True)
        lines = [line for line in lines if not line.uses_trl]
    return lines


def chosen(names: tuple[str, ...]) -> list[Measured]:
    """Those of `all_measured` whose label or loss is among the names, and the unit; all if none.

    Raises:
        BadParameter: If a name fits nothing.
    """
    lines = all_measured()
    for name in names:
        if not any(name in (line.label, line.loss) for line in lines):
            labels = ", ".join(repr(line.label) for line in lines)
            raise click.BadParameter(f"nothing is called {name!r}; there are {labels}")
    if not names:
        return lines
    return [line for line in lines if {line.label, line.loss} & {*names, UNIT}]
