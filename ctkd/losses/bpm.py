"""Byte-prefix matching: the teacher's tokens, each cut to the student token that begins it."""

from __future__ import annotations

import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.chunks import align_positions, chunks_on_both_sides
from ctkd.divergences import kl
from ctkd.errors import SettingError
from ctkd.logits import map_rows
from ctkd.loss import Loss, LossOutput, Paper, Weights, average
from ctkd.losses.shared_kl import columns_outside, shared_log_probs
from ctkd.registry import register
from ctkd.settings import check_choice, check_positive
from ctkd.tokenizers import Pair, check_sizes

__all__ = ["BPM", "projected_probs"]


def projected_probs(probs: Tensor, classes: Tensor, size: int) -> Tensor:
    r"""Probabilities of classes of tokens.

    .. math:: p_c = \sum_{v : class(v) = c} q_v

    Shape:
        (N, W) and (W,) give (N, size).

    Args:
        probs: q.
        classes: Class of each token, from 0 to size - 1.
        size: Number of classes.

    Example:
        >>> projected_probs(torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([1, 0, 1]), 2)
        tensor([[0.2000, 0.8000]])
    """
    return probs.new_zeros(probs.shape[0], size).index_add(1, classes, probs)


@register("bpm")
class BPM(Loss):
    r"""Matches the teacher's distribution over the student tokens that begin its own.

    .. math::
        L = \frac{1}{C} \sum_c \sum_{u \in I \cup \{rest\}} t_{c,u} \log \frac{t_{c,u}}{s_{c,u}},
        \quad t_{c,u} = \sum_{v : \varphi(v) = u} q_{c,v}

    \varphi(v) is the longest student token whose bytes are a prefix of those of teacher token v; a
    special token goes to the student's of its role. I is the image of \varphi, and C counts the
    chunks that both sides have. q and s are the models' distributions at the first token of a
    chunk, where both have read the same bytes. The rest of the teacher is its probability on tokens
    that no student token begins, that of the student its probability outside I.

    Shape:
        Student (B, S, V), teacher (B, T, W), C chunks with an id on both sides. The later
        positions of a chunk of several tokens are not compared.

    Args:
        pair: The two tokenizers.
        rest: ``"class"`` compares the rest of both sides as one more class. ``"renormalize"``
            divides both sides by their probability without it, so that the student's on tokens
            outside I is left free. If a side has no rest, ``"class"`` is ``"renormalize"``.
        temperature: Divides both models' logits, above 0. The value is not multiplied by its
            square.

    Raises:
        SettingError: If a setting lies outside its range, or no student token begins any of the
            teacher's.
        BatchError: If the batch has no chunks, or a side's logits are not as wide as its
            tokenizer is long.

    Example:
        The student's " wa" begins the teacher's " walk" and " was", so t = (0.75, 0.25) on " wa"
        and eos. The teacher has no rest, so that the student's "x" is left out: s = (2/3, 1/3).
        0.75 log(0.75 / (2/3)) + 0.25 log(0.25 / (1/3)).

        >>> import ctkd
        >>> from ctkd.tokenization import TokenBytes, TokenizerPair
        >>> student = TokenBytes((b" wa", b"x", b""), ("text", "text", "eos"))
        >>> teacher = TokenBytes((b" walk", b" was", b""), ("text", "text", "eos"))
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 2]]),
        ...     student_chunk_ids=torch.tensor([[-1, 0]]),
        ...     teacher_logits=torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 2]]),
        ...     teacher_chunk_ids=torch.tensor([[-1, 0]]),
        ... )
        >>> ctkd.get_loss("bpm", pair=TokenizerPair(student, teacher))(batch).value
        tensor(0.0164)

    Stored teacher:
        Needs whole rows, and refuses a cache that holds less: the tokens that are not stored may
        all begin with one student token.

    Differs from the paper:
        These are choices of ours where its definition leaves room: the class of the rest on the
        student's side, its absence where a side has none, ``rest="renormalize"``, the temperature,
        the mean over chunks and the neutral weights 1 and 1. A student token longer than every
        teacher token that begins it is in no image: ``"class"`` counts it as rest, which the
        teacher hardly ever expects, and so pulls it down. At later positions of a chunk, inside a
        longer teacher token, the paper goes on with conditional targets: that is left out.

    References:
        Byte-prefix matching, arXiv:2607.22334, projection by the longest prefix.
    """

    paper = Paper("Byte-prefix matching", "2607.22334", "projection by the longest prefix")
    matches = "teacher's tokens, cut to the student token that begins them, per chunk"
    unit = "chunk"
    needs = frozenset({"chunks", "pair"})
    default_weights = Weights(ce=1.0, kd=1.0)

    student_ids: Tensor
    student_others: Tensor
    teacher_ids: Tensor
    classes: Tensor

    def __init__(self, *, pair: Pair, rest: str = "class", temperature: float = 1.0) -> None:
        super().__init__()
        check_choice("rest", rest, ("class", "renormalize"))
        check_positive("temperature", temperature)
        self.rest = rest
        self.temperature = temperature
        self.teacher_temperatures = (temperature,)
        self.student_size = pair.student_size
        self.teacher_size = pair.teacher_size
        prefix_ids = pair.prefix_student_ids()
        mapped = (prefix_ids >= 0).nonzero().squeeze(-1)
        if not mapped.numel():
            raise SettingError(
                "bpm compares teacher tokens with the student tokens that begin them, but no "
                "student token begins any of these; use a loss that needs no such tokens, such as "
                "uld or alm"
            )
        student_ids, classes = torch.unique(prefix_ids[mapped], return_inverse=True)
        student_others = columns_outside(student_ids, pair.student_size)
        self._has_rest = rest == "class" and bool(
            student_others.numel() and mapped.numel() < pair.teacher_size
        )
        if self._has_rest:
            every = torch.full((pair.teacher_size,), student_ids.shape[0])
            every[mapped] = classes
            mapped, classes = torch.arange(pair.teacher_size), every
        for name, ids in (
            ("student_ids", student_ids),
            ("student_others", student_others),
            ("teacher_ids", mapped),
            ("classes", classes),
        ):
            self.register_buffer(name, ids, persistent=False)

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.student_size, self.teacher_size)
        aligned = align_positions(batch, "chunk")
        values = map_rows(
            batch.student.logits,
            batch.teacher.logits,
            aligned.flattened(batch),
            self._divergence,
            teacher_temperature=self.temperature,
        ).values
        sums = values.view(aligned.valid.shape).sum(1)
        return average({"bpm": sums}, aligned.valid.sum())

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Divergence of the classes of rows, (n,)."""
        student_others = self.student_others if self._has_rest else None
        student = student_logits / self.temperature
        teacher = (teacher_logits[:, self.teacher_ids] / self.temperature).softmax(-1)
        size = self.student_ids.shape[0] + self._has_rest
        return kl(
            shared_log_probs(student, self.student_ids, student_others),
            projected_probs(teacher, self.classes, size).log(),
        )

    def extra_repr(self) -> str:
        return (
            f"rest={self.rest!r}, temperature={self.temperature}, image={self.student_ids.shape[0]}"
        )
