"""Approximate likelihood matching: how likely both models find the same stretch of text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ctkd.batch import Batch, Side
from ctkd.chunks import chunk_sums, chunk_table, chunks_on_both_sides
from ctkd.errors import SettingError
from ctkd.loss import Loss, LossOutput, Measured, Paper, TeacherNeed, Weights, average, masked_sum
from ctkd.registry import register
from ctkd.settings import check_flag, check_positive
from ctkd.tokenizers import Pair, check_sizes

__all__ = ["ALM", "binary_kl", "log1mexp"]

_EPSILON = 1e-6
_LOG_HALF = -0.6931471805599453


def log1mexp(log_probs: Tensor) -> Tensor:
    r"""Logs of the complements, ``log(1 - exp(x))``, exact near 0 and far below it.

    Not to be differentiated: one of its branches may be infinite where the other is taken.

    Shape:
        Any, below 0, to the same.

    Example:
        >>> log1mexp(torch.tensor([-1e-6, -50.0], dtype=torch.float64))
        tensor([-1.3816e+01, -1.9287e-22], dtype=torch.float64)
    """
    exact_near_0 = (-torch.expm1(log_probs)).log()
    return torch.where(log_probs > _LOG_HALF, exact_near_0, torch.log1p(-log_probs.exp()))


def binary_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    r"""Divergence of two coins, KL(teacher || student), from the log-probabilities of heads.

    .. math:: e^a (a - b) + (1 - e^a) \left( \log(1 - e^a) - \log(1 - e^b) \right)

    a is the teacher's and b the student's. Equal coins cancel to 0, nearby ones to rounding
    errors: give it float64. The derivative is (1 - e^a) / (1 - e^b) - 1 by b; by a there is none.

    Shape:
        (...) and (...) give (...), at least 0. All below 0.

    Example:
        >>> half, quarter = torch.tensor([0.5, 0.25]).log()
        >>> binary_kl(quarter, half), binary_kl(half, half)
        (tensor(0.1438), tensor(0.))
    """
    divergence: Tensor = _BinaryKL.apply(student_log_probs, teacher_log_probs)  # type: ignore[no-untyped-call]
    return divergence


class _BinaryKL(torch.autograd.Function):
    """`binary_kl`, by operations some of which have no finite derivative where it has one."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        probs = teacher.exp()
        # Where the teacher rules heads out, its log is infinite.
        heads = (probs * (teacher - student)).masked_fill_(probs == 0, 0.0)
        of_teacher, of_student = log1mexp(torch.stack([teacher, student])).unbind()
        return heads - torch.expm1(teacher) * (of_teacher - of_student)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        return gradient * (torch.expm1(teacher) / torch.expm1(student) - 1.0), None


@register("alm")
class ALM(Loss):
    r"""Matches the likelihood of each chunk of text, as the outcome of a coin flip.

    .. math::
        L = \frac{1}{\sum_b C_b} \sum_{b, c} \mathrm{KL}\left(
            e^{a_c / \tau - \epsilon} \,\|\, e^{b_c / \tau - \epsilon} \right), \quad
        a_c = \sum_{j \in c} \log q_j, \quad b_c = \sum_{i \in c} \log p_i

    p and q are the probabilities that student and teacher give to the tokens of the text, a chunk
    is the smallest span that both cut out whole, and KL is between two coins (`binary_kl`), with
    epsilon = 1e-6. It is 0 exactly where both find every chunk equally likely.

    At large temperatures the gradient with respect to b_c tends to (a_c / b_c - 1) / temperature.
    ``default_weights`` therefore weigh the loss by 100, the default temperature, which gives b_c a
    gradient of order 1, as cross-entropy gives the log-probability of a token. For another
    temperature set the weight to that temperature.

    Shape:
        Student (B, S, V), teacher (B, T, W), both with chunk ids. ``count`` is the number of
        chunks that both sides score.

    Args:
        temperature: Divides the chunks' log-likelihoods, above 0.
        debias: Add to both sides of a chunk the log-probability that a new word begins after it,
            so that models which would have cut the text otherwise are compared on the text alone.
            It is read at the scored position after the chunk's last token; a chunk that has none
            on one of the sides goes without. With several answers in one text, the last chunk of
            one reads it at the first token of the next.
        pair: The two tokenizers. Only ``debias`` needs it.

    Raises:
        SettingError: If the temperature is not above 0, or ``debias`` is set without ``pair`` or
            with a tokenizer in which no token begins a word.
        BatchError: If the batch has no chunk ids, or with ``debias`` if the logits have more or
            fewer columns than the tokenizers have tokens.

    Example:
        One chunk: the student's two tokens have probability 1/2 each, the teacher's one 1/2.

        >>> import ctkd
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.zeros(1, 3, 2),
        ...     student_labels=torch.tensor([[-100, 0, 1]]),
        ...     student_chunk_ids=torch.tensor([[-1, 0, 0]]),
        ...     teacher_logits=torch.zeros(1, 2, 2),
        ...     teacher_labels=torch.tensor([[-100, 1]]),
        ...     teacher_chunk_ids=torch.tensor([[-1, 0]]),
        ...     num_chunks=1,
        ... )
        >>> round(float(ctkd.get_loss("alm", temperature=1.0)(batch).value), 4)
        0.1438

    Stored teacher:
        Needs the observed tokens alone: nothing is lost with k = 0. ``debias`` needs whole rows.

    Differs from the paper:
        The paper minimizes the cross-entropy of the coins; this is that minus the teacher's own
        entropy, which has the same gradient and is 0 at equality. The paper merges neighbouring
        chunks until the teacher finds the boundary between them likely enough; here chunks are
        those of the text, because the count must not depend on logits. Its hidden-state loss and
        its weighting by gradient norms are not part of this.

    References:
        Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood
        Matching", arXiv:2503.20083, section 3.
    """

    paper = Paper(
        "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
        "2503.20083",
        "binarized f-divergence of chunk likelihoods, sec. 3",
    )
    matches = "likelihood of each chunk of text"
    unit = "chunk"
    needs = frozenset({"chunks"})
    teacher_needs: TeacherNeed = "observed"
    default_weights = Weights(ce=1.0, kd=100.0)
    measured = Measured(
        kd=10.0, difference=-0.0051, low=-0.0104, high=0.0002, share=0.006, at_default=0.0079
    )

    student_starts: Tensor
    teacher_starts: Tensor

    def __init__(
        self, *, temperature: float = 100.0, debias: bool = False, pair: Pair | None = None
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature
        check_flag("debias", debias)
        self.debias = debias
        if not debias:
            return
        if pair is None:
            raise SettingError(
                "debias=True needs to know which tokens begin a word: pass "
                "pair=ctkd.tokenization.TokenizerPair(student_tokenizer, teacher_tokenizer)"
            )
        self.needs = frozenset({"chunks", "pair"})
        self.teacher_needs = "rows"
        for side, starts in zip(("student", "teacher"), pair.word_starts(), strict=True):
            if not starts.any():
                raise SettingError(
                    f"debias=True needs tokens that begin a word, but the {side}'s tokenizer has "
                    "none; leave debias out"
                )
            self.register_buffer(f"{side}_starts", starts, persistent=False)

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        student, student_sizes = _chunk_log_likelihoods(batch.student, batch.num_chunks)
        with torch.no_grad():
            teacher, teacher_sizes = _chunk_log_likelihoods(batch.teacher, batch.num_chunks)
        present = (student_sizes > 0) & (teacher_sizes > 0)
        if self.debias:
            check_sizes(batch, self.student_starts.shape[0], self.teacher_starts.shape[0])
            followed, student_next = _following_positions(batch.student, batch.num_chunks)
            also_followed, teacher_next = _following_positions(batch.teacher, batch.num_chunks)
            valid = present & followed & also_followed
            student = student + _boundaries(batch.student, student_next, valid, self.student_starts)
            with torch.no_grad():
                teacher = teacher + _boundaries(
                    batch.teacher, teacher_next, valid, self.teacher_starts
                )
        # A likelihood of exactly 1 has no finite log of its complement.
        values = binary_kl(
            student / self.temperature - _EPSILON, teacher / self.temperature - _EPSILON
        )
        sums = masked_sum(values, present).to(batch.student.logits.dtype)
        return average({"alm": sums}, present.sum())

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, debias={self.debias}"


def _chunk_log_likelihoods(side: Side, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each chunk and its tokens, (B, C).

    In float64: in float32 the coins of two good models cannot be told apart.
    """
    (log_probs,) = side.logits.log_probs_at(side.token_ids.unsqueeze(-1), (1.0,))
    return chunk_sums(side, log_probs.squeeze(-1), num_chunks, dtype=torch.float64)


def _following_positions(side: Side, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Flags of chunks whose last position a scored one follows, and these positions, at most S."""
    following = (chunk_table(side, num_chunks).last + 1).clamp_max(side.mask.shape[1])
    return F.pad(side.mask, (0, 1)).gather(1, following), following


def _boundaries(side: Side, following: Tensor, valid: Tensor, starts: Tensor) -> Tensor:
    """Log-probability that a word begins after each chunk, (B, C); 0 where that is not valid."""
    size = side.mask.shape[1]
    following = following.masked_fill(~valid, size)
    queried = F.pad(torch.zeros_like(side.mask), (0, 1)).scatter(1, following, True)[:, :size]
    # Reading the other rows would cost as much as reading these.
    return F.pad(side.logits.masked(queried).log_mass(starts), (0, 1)).gather(1, following)
