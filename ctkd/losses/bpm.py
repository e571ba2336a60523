"""Byte-prefix matching: the teacher's tokens, each cut to the student token that begins it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch
from ctkd.chunks import chunk_positions, chunks_on_both_sides, flat_positions, pick
from ctkd.divergences import LOG_FLOOR
from ctkd.errors import SettingError
from ctkd.logits import map_rows
from ctkd.loss import Loss, LossOutput, Paper, Weights, average, masked_sum
from ctkd.losses.shared_kl import _LOWEST_LOGIT
from ctkd.registry import register
from ctkd.settings import check_choice, check_positive
from ctkd.tokenizers import Pair, check_sizes

__all__ = ["BPM", "LEAST_MASS", "class_probs"]

LEAST_MASS = 1e-4
"""Teacher's probability of going on at all, below which nothing is compared inside a token."""


def class_probs(probs: Tensor, classes: Tensor, size: int) -> Tensor:
    r"""Probabilities of classes of tokens.

    .. math:: p_c = \sum_{v : class(v) = c} q_v

    Shape:
        (N, W) and (N, W) give (N, size).

    Args:
        probs: q.
        classes: Class of each token, from 0 to size - 1.
        size: Number of classes.

    Example:
        >>> class_probs(torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[1, 0, 1]]), 2)
        tensor([[0.2000, 0.8000]])
    """
    # scatter_add is atomic on CUDA, so in no order; this sorts first.
    rows = torch.arange(probs.shape[0], device=probs.device).unsqueeze(1)
    sums = probs.new_zeros(probs.shape[0], size)
    return sums.index_put_((rows, classes), probs, accumulate=True)


@register("bpm")
class BPM(Loss):
    r"""Matches the teacher's distribution over the student tokens that begin its own.

    .. math::
        L = \frac{1}{C} \sum_c \sum_{i \in c} \sum_u t_i(u) \log \frac{t_i(u)}{s_i(u)}, \quad
        t_i(u) = \frac{1}{m_i} \sum_{v = r_i w, \phi(w) = u} q_c(v)

    phi(w) is the longest student token that begins the bytes w; a special token goes to the
    student's of its role. C counts the chunks that both sides have, q_c is the teacher's row at
    the first token of a chunk, s_i the student's at token i of it, and r_i are the bytes that the
    student has read since the chunk began. m is the probability of all teacher tokens that count.

    At the first token r is empty: both models have read the same bytes, and every teacher token
    counts. One more class holds the rest of both sides: the teacher's probability on tokens that no
    student token begins, and the student's on tokens that are no phi(v).

    Later the student may be inside the teacher's first token: r is the beginning of it. Then
    those teacher tokens count that begin with r and go on with a w that some student token begins;
    s is the whole row. Where m is at most `LEAST_MASS`, and at all other positions, nothing is
    compared. ``parts`` tells the two apart: ``root`` and ``inside``.

    Shape:
        Student (B, S, V), teacher (B, T, W), C chunks with an id on both sides, which
        ``count`` counts.

    Args:
        pair: The two tokenizers.
        rest: ``"class"`` compares the rest of both sides as one more class. ``"renormalize"``
            divides both sides by their probability without it, so that the student's on its
            other tokens is left free. If a side has no rest, ``"class"`` is ``"renormalize"``.
        conditional: Compare inside teacher tokens as well. It waits for the ids and looks them up
            on the CPU.
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
        Choices of ours, where the definition we had leaves room: what the rest is on the student's
        side, and that there is none where a side has none; ``rest="renormalize"``; that inside
        tokens the teacher's row at the beginning of the chunk alone is used, so that nothing is
        compared inside its second token; `LEAST_MASS`; one sum per chunk, so that chunks of many
        student tokens weigh more; the temperature, and the neutral weights 1 and 1.

        A student token that begins no teacher token, such as a longer word, is no phi(v).
        ``"class"`` counts it as rest, which the teacher hardly ever expects, and pulls it down.

    References:
        Byte-prefix matching, arXiv:2607.22334: projection to the longest prefix, and
        conditional targets inside longer teacher tokens.
    """

    paper = Paper("Byte-prefix matching", "2607.22334", "longest prefixes, conditional targets")
    matches = "teacher's tokens, cut to the student token that begins them"
    unit = "chunk"
    needs = frozenset({"chunks", "pair"})
    default_weights = Weights(ce=1.0, kd=1.0)

    ranks: Tensor
    prefix_ids: Tensor
    in_image: Tensor
    whole: Tensor
    behind: Tensor

    def __init__(
        self,
        *,
        pair: Pair,
        rest: str = "class",
        conditional: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("rest", rest, ("class", "renormalize"))
        check_positive("temperature", temperature)
        self.rest = rest
        self.conditional = conditional
        self.temperature = temperature
        self.teacher_temperatures = (temperature,)
        self.student_size = pair.student_size
        self.teacher_size = pair.teacher_size
        self._continuations = pair.continuations if conditional else None
        ranks, prefix_ids = pair.teacher_ranks(), pair.prefix_student_ids()
        in_image = torch.zeros(pair.student_size, dtype=torch.bool)
        in_image[prefix_ids[prefix_ids >= 0]] = True
        if not in_image.any():
            raise SettingError(
                "bpm compares teacher tokens with the student tokens that begin them, but no "
                "student token begins any of these; use a loss that needs no such tokens, such as "
                "uld or alm"
            )
        self._image_size = int(in_image.sum())
        self._has_rest = (
            rest == "class" and not bool(in_image.all()) and bool((prefix_ids < 0).any())
        )
        for name, values in (
            ("ranks", ranks),
            ("prefix_ids", prefix_ids[ranks.argsort()]),
            ("in_image", in_image),
            ("whole", torch.tensor([0, pair.teacher_size, 0])),
            ("behind", torch.tensor([0, 0, pair.teacher_size])),
        ):
            self.register_buffer(name, values, persistent=False)

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.student_size, self.teacher_size)
        positions = chunk_positions(batch)
        is_root = positions.is_first
        ranges, student_ids = self.whole * is_root.unsqueeze(-1), self.prefix_ids
        if self._continuations is not None:
            tokens = pick(batch.teacher.token_ids.unsqueeze(-1), positions.teacher.clamp_min(0))
            within = self._continuations(
                batch.student.token_ids, positions.chunk_ids, tokens.squeeze(-1)
            )
            # Their places come behind those of whole tokens.
            ranges = torch.where(is_root.unsqueeze(-1), ranges, within.ranges + self.behind)
            student_ids = torch.cat([student_ids, within.student_ids])
        numbers = torch.arange(is_root.shape[1], device=is_root.device).expand_as(is_root)
        values = map_rows(
            batch.student.logits,
            batch.teacher.logits,
            flat_positions(batch, numbers, positions.teacher, ranges[..., 1] > ranges[..., 0]),
            partial(self._divergence, torch.where(student_ids < 0, self.student_size, student_ids)),
            per_row=ranges.flatten(0, 1),
            teacher_temperature=self.temperature,
        ).values.view(is_root.shape)
        sums = {"root": masked_sum(values, is_root)}
        if self.conditional:
            sums["inside"] = masked_sum(values, ~is_root)
        return average(sums, is_root.sum())

    def _divergence(
        self, student_ids: Tensor, student_logits: Tensor, teacher_logits: Tensor, ranges: Tensor
    ) -> Tensor:
        """Divergence of the classes of rows, (n,)."""
        width = self.student_size
        first, last, shift = ranges.unsqueeze(-1).unbind(1)
        is_root = shift == 0
        classes = student_ids[(self.ranks + shift).clamp_(0, student_ids.shape[0] - 1)]
        # The last class, at the width, is the rest; it counts at the beginning of a chunk.
        kept = (self.ranks >= first) & (self.ranks < last)
        kept &= classes < width + (is_root & self._has_rest)
        teacher = teacher_logits / self.temperature
        target = class_probs(
            teacher.masked_fill(~kept, _LOWEST_LOGIT).softmax(-1), classes, width + 1
        )
        student = student_logits / self.temperature
        if not self._has_rest:
            student = student.masked_fill(is_root & ~self.in_image, -torch.inf)
        log_probs = student.log_softmax(-1).clamp_min(LOG_FLOOR)
        values = F.kl_div(log_probs, target[:, :width], reduction="none").sum(-1)
        if self._has_rest:
            rest = log_probs.masked_fill(self.in_image, _LOWEST_LOGIT).logsumexp(-1)
            values = values + F.kl_div(rest, target[:, width], reduction="none")
        if not self.conditional:
            return values
        mass = teacher.softmax(-1).masked_fill_(~kept, 0.0).sum(-1)
        return values.masked_fill((mass <= LEAST_MASS) & ~is_root.squeeze(-1), 0.0)

    def extra_repr(self) -> str:
        return (
            f"rest={self.rest!r}, conditional={self.conditional}, temperature={self.temperature}, "
            f"image={self._image_size}"
        )
