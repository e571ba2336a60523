"""One process whose peak of memory `benchmarks.loss_memory` reads: it runs one loss, once.

Every such process first runs all losses on tiny inputs, so that code that is loaded when it is
first used counts for none of them.
"""

from collections.abc import Callable

import click
import torch
from torch import Tensor

import ctkd
from baselines.as_published import PUBLISHED
from benchmarks.loss_inputs import (
    DTYPES,
    TINY,
    Inputs,
    Measured,
    SharingPair,
    Vocabularies,
    VocabulariesType,
    all_measured,
)
from benchmarks.measuring import print_peak
from ctkd.distill.devices import PeakMemory, give_back_freed_memory


def warm_up(lines: list[Measured], dtype: torch.dtype, *, trl: bool) -> None:
    """Run everything once on tiny inputs."""
    inputs = Inputs.make(TINY, tokens=4, dtype=dtype)
    for line in lines:
        if line.uses_trl <= trl and not line.refusal(dtype):
            line.on(inputs)()


class Heads:
    """Hidden states and heads of two models, the student's to be differentiated into."""

    def __init__(
        self,
        vocabularies: Vocabularies,
        sequences: int,
        tokens: int,
        hidden: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.pair = SharingPair(vocabularies)
        self.chunk_ids = torch.arange(tokens, device=device).expand(sequences, tokens)
        self.weights, self.hidden, self.labels = [], [], []
        for columns in (vocabularies.student, vocabularies.teacher):
            weight = torch.empty(columns, hidden, dtype=dtype, device=device)
            weight.normal_(0.0, 3.0 / hidden**0.5, generator=generator)
            states = torch.empty(sequences, tokens, hidden, dtype=dtype, device=device)
            states.normal_(generator=generator)
            size = sequences, tokens
            labels = torch.randint(columns, size, generator=generator, device=device)
            # A logit far above the others, as a trained model's.
            states += 2.0 * weight[labels.roll(1, dims=1)]
            self.weights.append(weight)
            self.hidden.append(states)
            self.labels.append(labels)
        self.weights[0].requires_grad_()
        self.hidden[0].requires_grad_()

    def in_blocks(self, name: str) -> Tensor:
        """A loss of the package, on heads of which the logits are never whole."""
        sides = [
            ctkd.Side.from_encoder_decoder(
                ctkd.HeadLogits(hidden, weight), labels, chunk_ids=self.chunk_ids
            )
            for hidden, weight, labels in zip(self.hidden, self.weights, self.labels, strict=True)
        ]
        loss = ctkd.get_loss(name, pair=self.pair).to(self.chunk_ids.device)
        return loss(ctkd.Batch(student=sides[0], teacher=sides[1])).value

    def on_logits(self, name: str) -> Tensor:
        """A published loss, on all logits of both sides."""
        student_logits = self.hidden[0] @ self.weights[0].T
        with torch.no_grad():
            teacher_logits = self.hidden[1] @ self.weights[1].T
        return PUBLISHED[name](student_logits, self.labels[0], teacher_logits, self.labels[1])


@click.command()
@click.argument("label")
@click.option("--pair", "vocabularies", required=True, type=VocabulariesType())
@click.option("--dtype", required=True, type=click.Choice(list(DTYPES)))
@click.option("--sequences", required=True, type=click.IntRange(min=1))
@click.option("--tokens", required=True, type=click.IntRange(min=1))
@click.option("--hidden", type=click.IntRange(min=1), help="From hidden states of so many entries.")
@click.option("--hold", is_flag=True, help="Only hold the inputs and the gradient.")
def main(
    label: str,
    vocabularies: Vocabularies,
    dtype: str,
    sequences: int,
    tokens: int,
    hidden: int | None,
    hold: bool,
) -> None:
    """Run one loss once, forward and backward, and print the most memory this process held."""
    lines = all_measured()
    (line,) = (one for one in lines if one.label == label)
    warm_up(lines, DTYPES[dtype], trl=line.uses_trl)
    size = sequences, tokens
    if hidden is None:
        inputs = Inputs.make(
            vocabularies,
            sequences=sequences,
            tokens=tokens,
            dtype=DTYPES[dtype],
            live=not line.stored,
            stored=line.stored,
        )
        leaf, run = inputs.student_logits, line.on(inputs)
    else:
        heads = Heads(vocabularies, *size, hidden, DTYPES[dtype])
        leaf, run = heads.weights[0], _on_heads(heads, line)
    give_back_freed_memory()
    # From here on: torch draws narrow floats by way of wide ones.
    peak = PeakMemory(leaf.device)
    if hold:
        # What is not written to is not resident.
        leaf.grad = torch.ones_like(leaf)
    else:
        run()
    print_peak(peak)


def _on_heads(heads: Heads, line: Measured) -> Callable[[], None]:
    value = heads.in_blocks if line.loss else heads.on_logits
    return lambda: value(line.loss or line.label).backward()


if __name__ == "__main__":
    main()
