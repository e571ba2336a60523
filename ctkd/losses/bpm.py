"""Byte-prefix matching: the teacher's tokens, each cut to the student token that begins it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch
from ctkd.chunks import chunk_positions, chunks_on_both_sides, flat_positions, pick
from ctkd.divergences import LOG_FLOOR
from ctkd.errors import SettingError
from ctkd.logits import map_rows
from ctkd.loss import Loss, LossOutput, Measured, Paper, Weights, average
from ctkd.losses.shared_kl import _LOWEST_LOGIT
from ctkd.ops import RowLoss
from ctkd.registry import register
from ctkd.settings import check_choice, check_flag, check_positive
from ctkd.tokenizers import Continuations, Pair, check_sizes

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
    s is the whole row. Where m is at most 1e-4 (`LEAST_MASS`), and at all other positions,
    nothing is compared. ``parts`` tells the two apart: ``root`` and ``inside``.

    Shape:
        Student (B, S, V), teacher (B, T, W), C chunks with an id on both sides, which
        ``count`` counts.

    Args:
        pair: The two tokenizers.
        rest: ``"class"`` compares the rest of both sides as one more class. ``"renormalize"``
            divides both sides by their probability without it, so that the student's on its
            other tokens is left free. If a side has no rest, ``"class"`` is ``"renormalize"``.
        conditional: Compare inside teacher tokens as well. Finding what may follow there takes
            some seconds when the loss is made.
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

        >>> import ctkd, torch
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
    measured = Measured(
        kd=1.0, difference=-0.0939, low=-0.1059, high=-0.082, share=0.111, at_default=-0.1029
    )

    student_lengths: Tensor
    begins: Tensor
    ranges: Tensor
    teacher_ids: Tensor
    student_ids: Tensor
    in_image: Tensor

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
        check_flag("conditional", conditional)
        self.conditional = conditional
        self.temperature = temperature
        self.teacher_temperatures = (temperature,)
        self.student_size = pair.student_size
        self.teacher_size = pair.teacher_size
        prefix_ids = pair.prefix_student_ids()
        in_image = torch.zeros(pair.student_size, dtype=torch.bool)
        in_image[prefix_ids[prefix_ids >= 0]] = True
        if not in_image.any():
            raise SettingError(
                "bpm compares teacher tokens with the student tokens that begin them, but no "
                "student token begins any of these; use a loss that needs no such tokens, such as "
                "uld or alm"
            )
        self._image_size = int(in_image.sum())
        is_left = prefix_ids < 0
        self._has_rest = rest == "class" and not bool(in_image.all()) and bool(is_left.any())
        follow = (
            pair.continuations()
            if conditional
            else Continuations.none(pair.student_size, pair.teacher_size)
        )
        # Where nothing is read yet, all of the teacher's tokens may follow. They come first, by
        # class, and those of the rest behind the others.
        student_ids, teacher_ids = prefix_ids.masked_fill(is_left, pair.student_size).sort(
            stable=True
        )
        compared = pair.teacher_size - int(is_left.sum()) * (not self._has_rest)
        ranges = torch.cat([torch.tensor([[0, compared]]), follow.ranges + pair.teacher_size])
        for name, values in (
            ("student_lengths", follow.student_lengths),
            ("begins", torch.stack([follow.begins + 1, follow.teacher_lengths], dim=-1)),
            ("ranges", ranges),
            ("teacher_ids", torch.cat([teacher_ids, follow.teacher_ids]).to(torch.int32)),
            ("student_ids", torch.cat([student_ids, follow.student_ids]).to(torch.int32)),
            ("in_image", in_image),
        ):
            self.register_buffer(name, values, persistent=False)

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.student_size, self.teacher_size)
        student, teacher = batch.student, batch.teacher
        first, teacher_first = starts = chunk_positions(batch)
        known_first, known_teacher_first = starts.clamp_min(0)
        # Where nothing is scored, ids may be anything.
        tokens = pick(teacher.token_ids.unsqueeze(-1), known_teacher_first).squeeze(-1)
        begins, lengths = self.begins[tokens.clamp(0, self.teacher_size - 1)].unbind(-1)
        ids = student.token_ids.clamp(0, self.student_size - 1)
        ends = F.pad(self.student_lengths[ids].cumsum(1), (1, 0))
        read = ends[:, :-1] - ends.gather(1, known_first)
        is_root = first == torch.arange(first.shape[1], device=first.device)
        # Behind the last byte of a token nothing follows.
        ranges = self.ranges[(begins + read.minimum(lengths)).masked_fill(is_root, 0)]
        left_out = (first < 0) | (ranges[..., 0] >= ranges[..., 1])
        values = map_rows(
            student.logits,
            teacher.logits,
            flat_positions(batch, teacher_first, left_out),
            self._row_loss(),
            per_row=ranges.flatten(0, 1),
            teacher_temperature=self.temperature,
        ).values.view(first.shape)
        inside = values.masked_fill(is_root, 0.0)
        sums = {"root": (values - inside).sum(1)}
        if self.conditional:
            sums["inside"] = inside.sum(1)
        return average(sums, is_root.sum())

    def _row_loss(self) -> RowLoss:
        settings = {
            "teacher_ids": self.teacher_ids,
            "student_ids": self.student_ids,
            "in_image": self.in_image,
            "has_rest": self._has_rest,
            "temperature": float(self.temperature),
            "least_mass": LEAST_MASS,
            "lowest_logit": _LOWEST_LOGIT,
            "log_floor": LOG_FLOOR,
        }
        return RowLoss("bpm", self._divergence, settings=settings)

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor, ranges: Tensor) -> Tensor:
        """Divergence of the classes of rows, (n,)."""
        width = self.student_size
        places = ranges[:, :1] + torch.arange(self.teacher_size, device=ranges.device)
        outside = places >= ranges[:, 1:]
        places = places.clamp_max(self.teacher_ids.shape[0] - 1)
        teacher = teacher_logits.clamp_min(_LOWEST_LOGIT) / self.temperature
        entries = teacher.gather(1, self.teacher_ids[places].to(torch.int64))
        entries = entries.masked_fill(outside, -torch.inf)
        # One class more, at the width, is the rest.
        classes = self.student_ids[places].to(torch.int64).masked_fill(outside, width)
        target = class_probs(entries.softmax(-1), classes, width + 1)
        is_root = ranges[:, :1] == 0
        student = student_logits.clamp_min(_LOWEST_LOGIT) / self.temperature
        if self.conditional:
            mass = (entries.logsumexp(-1) - teacher.logsumexp(-1)).exp().unsqueeze(-1)
            left_out = (mass <= LEAST_MASS) & ~is_root
            # Of a row that is left out, nan has no gradient either.
            student = student.masked_fill(left_out, 0.0)
            target = target.masked_fill(left_out, 0.0)
        if not self._has_rest:
            student = student.masked_fill(is_root & ~self.in_image, -torch.inf)
        log_probs = student.log_softmax(-1)
        terms = F.kl_div(log_probs.clamp_min(LOG_FLOOR), target[:, :width], reduction="none")
        values = terms.sum(-1)
        if self._has_rest:
            rest = log_probs.masked_fill(self.in_image, _LOWEST_LOGIT).logsumexp(-1)
            values = values + F.kl_div(
                rest.clamp_min(LOG_FLOOR), target[:, width], reduction="none"
            )
        return values

    def extra_repr(self) -> str:
        return (
            f"rest={self.rest!r}, conditional={self.conditional}, temperature={self.temperature}, "
            f"image={self._image_size}"
        )
