"""Divergence on the tokens that both vocabularies have, where both have read the same bytes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.chunks import align_positions, chunks_on_both_sides
from ctkd.divergences import LOG_FLOOR, jsd, kl, reverse_kl
from ctkd.errors import SettingError
from ctkd.logits import map_rows
from ctkd.loss import Loss, LossOutput, Measured, Paper, Weights, average
from ctkd.ops import RowLoss
from ctkd.registry import register
from ctkd.settings import check_choice, check_positive
from ctkd.tokenizers import Pair, check_sizes

__all__ = [
    "SharedKL",
    "columns_outside",
    "shared_log_probs",
]

_DIVERGENCES = {"forward": kl, "reverse": reverse_kl, "jsd": jsd}
# The weight of the teacher with which `jsd` is each of them.
_BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}

# The log of a sum of nothing but zeros has no gradient. This is as good as minus infinity; being a
# power of two, it is scaled without rounding, so that rows of nothing else are still even.
_LOWEST_LOGIT = -(2.0**100)


def columns_outside(ids: Tensor, size: int) -> Tensor:
    """Columns of a vocabulary that are not among some ids, ascending.

    Example:
        >>> columns_outside(torch.tensor([3, 0]), 5)
        tensor([1, 2, 4])
    """
    outside = torch.ones(size, dtype=torch.bool)
    outside[ids] = False
    return outside.nonzero().squeeze(-1)


def shared_log_probs(logits: Tensor, shared: Tensor, others: Tensor | None) -> Tensor:
    r"""Log-probabilities of the shared tokens and of "any other token" as one more class.

    .. math:: \log s_i = x_i - \log \sum_j e^{x_j}, \quad \log s_{rest} = \log
        \sum_{j \notin M} e^{x_j} - \log \sum_j e^{x_j}

    Without ``others`` the first sum goes over the shared tokens alone.

    Shape:
        (N, V) gives (N, M + 1), or (N, M) without ``others``.

    Args:
        logits: Rows of one model.
        shared: Columns of the shared tokens, (M,).
        others: All other columns, (V - M,).

    Example:
        >>> logits = torch.tensor([[0.2, 0.2, 0.6]]).log()
        >>> shared_log_probs(logits, torch.tensor([2, 0]), torch.tensor([1])).exp()
        tensor([[0.6000, 0.2000, 0.2000]])
        >>> shared_log_probs(logits, torch.tensor([2, 0]), None).exp()
        tensor([[0.7500, 0.2500]])
    """
    logits = logits.clamp_min(_LOWEST_LOGIT)
    classes = logits[:, shared]
    if others is not None:
        rest = logits[:, others].logsumexp(-1, keepdim=True)
        classes = torch.cat([classes, rest], dim=-1)
    return classes.log_softmax(-1)


@register("shared_kl")
class SharedKL(Loss):
    r"""Compares the probabilities of shared tokens at the first position of each chunk.

    .. math::
        L = \frac{1}{C} \sum_c D(t_c, s_c), \quad
        D = \sum_{i \in M} t_{c,i} \log \frac{t_{c,i}}{s_{c,i}}

    M holds the tokens that both vocabularies have, as equal bytes or an equal role, and C counts
    the chunks that both sides have. At the first token of a chunk both models have read the same
    bytes, so t and s answer one question. What each model thinks of its other tokens is either
    left out or put into one class.

    Shape:
        Student (B, S, V), teacher (B, T, W), C chunks with an id on both sides. The later
        positions of a chunk of several tokens are not compared.

    Args:
        pair: The two tokenizers.
        rest: ``"renormalize"`` divides both sides by their probability on M: how much the
            student puts on M is left free. ``"class"`` keeps the probabilities and adds one class
            that holds the rest of each side, so that it is matched too. If M is a whole
            vocabulary, a side has no rest, and ``"class"`` is ``"renormalize"``.
        direction: ``"forward"`` is KL(t || s), ``"reverse"`` is KL(s || t), ``"jsd"`` is their
            Jensen-Shannon divergence with beta 0.5.
        temperature: Divides both models' logits, above 0. The value is not multiplied by its
            square.

    Raises:
        SettingError: If a setting lies outside its range, or the vocabularies share no token.
        BatchError: If the batch has no chunks, or a side's logits are not as wide as its
            tokenizer is long.

    Example:
        One chunk, t = (0.5, 0.5) and s = (0.25, 0.75) on the two shared tokens after
        renormalizing: 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75).

        >>> import ctkd, ctkd.tokenizers
        >>> class Tokens(ctkd.tokenizers.PlaceholderPair):
        ...     student_size, teacher_size = 3, 2
        ...     def shared_ids(self):
        ...         return torch.tensor([0, 2]), torch.tensor([1, 0])
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.2, 0.2, 0.6], [0.0, 0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     student_chunk_ids=torch.tensor([[-1, 0]]),
        ...     teacher_logits=torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 0]]),
        ...     teacher_chunk_ids=torch.tensor([[-1, 0]]),
        ... )
        >>> ctkd.get_loss("shared_kl", pair=Tokens())(batch).value
        tensor(0.1438)

    Stored teacher:
        Needs whole rows, and refuses a cache that holds less: a shared token that is not stored
        would get an even share of what is left, however likely it was.

    Differs from the paper:
        SimCT compares at the same positions, but adds to M the multi-token units of the text,
        scored by mean log-probability, and takes the reverse KL on text that the student wrote.
        This is its point of departure, the comparison on shared tokens alone, with the forward KL
        by default; ``direction="reverse"`` is the paper's. ``rest="class"`` is not in it. The
        paper gives no weight of a cross-entropy; 1 and 1 are a neutral choice.

    References:
        Sun et al., "SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy
        Distillation", arXiv:2605.07711, the shared-vocabulary form.
    """

    paper = Paper(
        "SimCT: Recovering Lost Supervision for Cross-Tokenizer On-Policy Distillation",
        "2605.07711",
        "shared-vocabulary form",
    )
    matches = "probabilities of shared tokens at the start of each chunk"
    unit = "chunk"
    needs = frozenset({"chunks", "pair"})
    default_weights = Weights(ce=1.0, kd=1.0)
    measured = Measured(
        kd=1.0, difference=-0.0803, low=-0.0904, high=-0.0702, share=0.095, at_default=-0.0934
    )

    student_ids: Tensor
    teacher_ids: Tensor
    student_others: Tensor
    teacher_others: Tensor

    def __init__(
        self,
        *,
        pair: Pair,
        rest: str = "renormalize",
        direction: str = "forward",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if rest == "renormalise":
            warnings.warn(
                "rest='renormalise' is spelled 'renormalize'; the former spelling will go",
                DeprecationWarning,
                stacklevel=2,
            )
            rest = "renormalize"
        check_choice("rest", rest, ("renormalize", "class"))
        check_choice("direction", direction, tuple(_BETAS))
        check_positive("temperature", temperature)
        self.rest = rest
        self.direction = direction
        self.temperature = temperature
        self.teacher_temperatures = (temperature,)
        self.student_size = pair.student_size
        self.teacher_size = pair.teacher_size
        student_ids, teacher_ids = pair.shared_ids()
        if not student_ids.shape[0]:
            raise SettingError(
                "shared_kl compares tokens that both vocabularies have, but these tokenizers share "
                "none; use a loss that needs no shared tokens, such as uld or alm"
            )
        # Columns in ascending order are read and written faster.
        order = student_ids.argsort()
        student_ids, teacher_ids = student_ids[order], teacher_ids[order]
        for name, ids in (
            ("student_ids", student_ids),
            ("teacher_ids", teacher_ids),
            ("student_others", columns_outside(student_ids, pair.student_size)),
            ("teacher_others", columns_outside(teacher_ids, pair.teacher_size)),
        ):
            self.register_buffer(name, ids, persistent=False)

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.student_size, self.teacher_size)
        student_others, teacher_others = self._others()
        settings = {
            "student_ids": self.student_ids,
            "teacher_ids": self.teacher_ids,
            "student_others": student_others,
            "teacher_others": teacher_others,
            "temperature": float(self.temperature),
            "beta": _BETAS[self.direction],
            "lowest_logit": _LOWEST_LOGIT,
            "log_floor": LOG_FLOOR,
        }
        aligned = align_positions(batch, "chunk")
        values = map_rows(
            batch.student.logits,
            batch.teacher.logits,
            aligned.flattened(batch),
            RowLoss("shared_kl", self._divergence, settings=settings),
            teacher_temperature=self.temperature,
        ).values
        sums = values.view(batch.student.mask.shape[0], batch.num_chunks).sum(1)
        return average({"shared_kl": sums}, aligned.valid.sum())

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Divergence of the classes of rows, (n,)."""
        student_others, teacher_others = self._others()
        student = student_logits / self.temperature
        teacher = teacher_logits / self.temperature
        return _DIVERGENCES[self.direction](
            shared_log_probs(student, self.student_ids, student_others),
            shared_log_probs(teacher, self.teacher_ids, teacher_others),
        )

    def _others(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Columns of the class of the rest of both sides, if there is one."""
        if self.rest == "class" and self.student_others.numel() and self.teacher_others.numel():
            return self.student_others, self.teacher_others
        return None, None

    def extra_repr(self) -> str:
        return (
            f"rest={self.rest!r}, direction={self.direction!r}, temperature={self.temperature}, "
            f"shared={self.student_ids.shape[0]}"
        )
