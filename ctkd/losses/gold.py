"""General logit distillation: shared tokens one by one, all others by rank, chunk by chunk."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ctkd.batch import Batch, Side
from ctkd.chunks import chunk_sums, chunk_tables, chunks_on_both_sides, flat_positions
from ctkd.divergences import LOG_FLOOR, jsd, sorted_l1
from ctkd.errors import SettingError
from ctkd.logits import map_rows
from ctkd.loss import Loss, LossOutput, Measured, Paper, Weights, average
from ctkd.losses.shared_kl import columns_outside
from ctkd.ops import RowLoss
from ctkd.registry import register
from ctkd.settings import check_choice, check_positive, check_weight
from ctkd.tokenizers import Pair, check_sizes

__all__ = ["GOLD"]


@register("gold")
class GOLD(Loss):
    r"""Compares one distribution per chunk: shared tokens one by one, all others by rank.

    .. math::
        L = \frac{1}{C} \sum_c w_m\, JSD_\beta\!\left(v^T_c[M], v^S_c[M]\right)
            + w_u \sum_k \left| v^T_c[\overline M]_{(k)} - v^S_c[\overline M]_{(k)} \right|

    M holds the tokens that both vocabularies have, C counts the chunks that both sides have, and
    v are probabilities, over M not renormalized. The divergence is `ctkd.divergences.jsd`; (k) is
    the k-th largest, and the narrower side is padded with zeros. By default w_m = \|M\| / W.

    A chunk has several tokens where the tokenizers cut differently, and ``merging`` says which
    distribution stands for it. The default takes the first position, where both models have read
    the same bytes and are asked one question. The other two multiply a whole row by the
    probability of tokens that were observed. The product is right for the observed token alone; it
    does not sum to 1, and shrinks the chunk's influence by that probability.

    Shape:
        Student (B, S, V), teacher (B, T, W), C chunks with an id on both sides.

    Args:
        pair: The two tokenizers.
        beta: Weight of the teacher in the mixture of the divergence, from 0 to 1. 0 is the
            forward KL, 1 the reverse KL.
        student_temperature: Divides the student's logits, above 0.
        teacher_temperature: Divides the teacher's logits, above 0.
        merging: With P_k the row of the chunk's k-th token, p_k that token's probability and n
            tokens, v is P_1 for ``"first"``, P_1 p_2 ... p_n for ``"observed"`` and
            p_1 ... p_{n-1} P_n for ``"bayesian"``. The last two also need the gradient of p, and
            with it memory for one more gradient of the student's logits.
        matched_weight: w_m, at least 0. Given together with ``unmatched_weight`` or not at all.
        unmatched_weight: w_u, at least 0. Default 1 - w_m.

    Raises:
        SettingError: If a setting lies outside its range, one weight is given without the other,
            or nothing is left to compare.
        BatchError: If the batch has no chunks, or a side's logits are not as wide as its
            tokenizer is long.

    Example:
        One chunk, v = (0.6 | 0.4) and (0.6 | 0.2, 0.2), the shared token before the bar. The
        first term is 0, w_u = 1 - 1 / 3: 2 / 3 (0.2 + 0.2).

        >>> import ctkd, ctkd.tokenizers
        >>> class Tokens(ctkd.tokenizers.PlaceholderPair):
        ...     student_size, teacher_size = 2, 3
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.tensor([[[0.6, 0.4], [0.0, 0.0]]]).log(),
        ...     student_labels=torch.tensor([[-100, 1]]),
        ...     student_chunk_ids=torch.tensor([[-1, 0]]),
        ...     teacher_logits=torch.tensor([[[0.6, 0.2, 0.2], [0.0, 0.0, 0.0]]]).log(),
        ...     teacher_labels=torch.tensor([[-100, 0]]),
        ...     teacher_chunk_ids=torch.tensor([[-1, 0]]),
        ... )
        >>> ctkd.get_loss("gold", pair=Tokens())(batch).value
        tensor(0.2667)

    Stored teacher:
        Needs whole rows, and refuses a cache that holds less: a shared token that is not stored
        would get an even share of what is left, however likely it was.

    Known failure:
        Where the teacher's probability is on tokens in M and the student's on tokens outside it,
        both terms push the latter down, also if they spell the same text. Numbers are the case
        that hurts: a student with tokens such as "2024" beside a teacher that writes digit by
        digit unlearns them. Losses on the likelihood of chunks do not, see `ALM`.

    Differs from the paper:
        The method is published as code and as an article without formulas. The released code
        merges as ``"observed"`` on rows that are one position late (each row is the one that
        predicts the next token); here every row is the one that predicts its token. It averages
        over the chunks of a sequence and then over sequences, keeps a last chunk whose two texts
        differ, cuts probabilities off at 1e-8, and leaves the second term out if one side has no
        token outside M. At beta 0 and 1 it takes the KL without the terms -t + s of
        `ctkd.divergences.kl`, which over M alone is not smallest where the two sides are equal.

    References:
        Patiño et al., "Unlocking On-Policy Distillation for Any Model Family" (General On-policy
        Logit Distillation), Hugging Face, 2025; it extends arXiv:2402.12030, whose closed form is
        the second term. The failure: X-Token, arXiv:2605.21699, appendix.
    """

    paper = Paper(
        "Unlocking On-Policy Distillation for Any Model Family (GOLD), extending ULD",
        "2402.12030",
        "hybrid loss; closed form of W1 for the rest",
    )
    matches = "shared tokens one by one, other tokens by rank, per chunk"
    unit = "chunk"
    needs = frozenset({"chunks", "pair"})
    default_weights = Weights(ce=0.0, kd=1.0)
    measured = Measured(
        kd=0.3, difference=-0.0046, low=-0.0099, high=0.0006, share=0.005, at_default=0.0003
    )

    student_columns: Tensor
    teacher_columns: Tensor

    def __init__(
        self,
        *,
        pair: Pair,
        beta: float = 0.5,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        merging: str = "first",
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
    ) -> None:
        super().__init__()
        check_weight("beta", beta)
        if beta > 1:
            raise SettingError(f"beta must be a number from 0 to 1, got {beta!r}")
        check_positive("student_temperature", student_temperature)
        check_positive("teacher_temperature", teacher_temperature)
        check_choice("merging", merging, ("first", "observed", "bayesian"))
        self.beta = beta
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_temperatures = (teacher_temperature,)
        self.merging = merging
        self.matched_weight = matched_weight
        self.unmatched_weight = unmatched_weight
        self.student_size = pair.student_size
        self.teacher_size = pair.teacher_size
        student_ids, teacher_ids = pair.shared_ids()
        # Columns in ascending order are read and written faster.
        order = student_ids.argsort()
        student_ids, teacher_ids = student_ids[order], teacher_ids[order]
        self.shared = student_ids.shape[0]
        for name, ids, size in (
            ("student_columns", student_ids, pair.student_size),
            ("teacher_columns", teacher_ids, pair.teacher_size),
        ):
            columns = torch.cat([ids, columns_outside(ids, size)])
            self.register_buffer(name, columns, persistent=False)
        self._weights = self._checked_weights()

    def _checked_weights(self) -> tuple[float, float]:
        """w_m and w_u."""
        matched, unmatched = self.matched_weight, self.unmatched_weight
        if matched is None and unmatched is None:
            share = self.shared / self.teacher_size
            return share, 1.0 - share
        if matched is None or unmatched is None:
            raise SettingError(
                "matched_weight and unmatched_weight must be given together or not at all, "
                f"got {matched!r} and {unmatched!r}"
            )
        check_weight("matched_weight", matched)
        check_weight("unmatched_weight", unmatched)
        if matched == 0 and unmatched == 0:
            raise SettingError("matched_weight or unmatched_weight must be above 0, got 0 and 0")
        if self.shared == 0 and unmatched == 0:
            raise SettingError(
                "these tokenizers share no token, so unmatched_weight must be above 0, got 0"
            )
        return matched, unmatched

    def units(self, batch: Batch) -> Tensor:
        return chunks_on_both_sides(batch).sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.student_size, self.teacher_size)
        student_chunks, teacher_chunks = chunk_tables(batch)
        both = student_chunks.shared_with(teacher_chunks)
        student_positions, teacher_positions = (
            one.last if self.merging == "bayesian" else one.first
            for one in (student_chunks, teacher_chunks)
        )
        log_scales = None
        if self.merging != "first":
            student_scale = _log_likelihood_of_others(
                batch.student, student_positions, self.student_temperature
            )
            with torch.no_grad():
                teacher_scale = _log_likelihood_of_others(
                    batch.teacher, teacher_positions, self.teacher_temperature
                )
            log_scales = torch.stack([student_scale, teacher_scale], dim=-1).flatten(0, 1)
        settings = {
            "student_columns": self.student_columns,
            "teacher_columns": self.teacher_columns,
            "shared": self.shared,
            "student_temperature": float(self.student_temperature),
            "teacher_temperature": float(self.teacher_temperature),
            "beta": float(self.beta),
            "matched_weight": float(self._weights[0]),
            "unmatched_weight": float(self._weights[1]),
            "log_floor": LOG_FLOOR,
        }
        values, parts = map_rows(
            batch.student.logits,
            batch.teacher.logits,
            flat_positions(batch, teacher_positions, ~both, student_positions),
            RowLoss("gold", self._terms, parts=2, settings=settings),
            per_row=log_scales,
            teacher_temperature=self.teacher_temperature,
        )
        count = both.sum()
        matched, unmatched = parts.view(*both.shape, 2).sum(1).unbind(-1)
        value = average({"gold": values.view(both.shape).sum(1)}, count).value
        return LossOutput(
            value, count, average({"matched": matched, "unmatched": unmatched}, count).parts
        )

    def _terms(
        self, student_logits: Tensor, teacher_logits: Tensor, log_scales: Tensor | None = None
    ) -> Tensor:
        """Both weighted terms of rows, (n, 2)."""
        student = (student_logits / self.student_temperature).log_softmax(-1)
        teacher = (teacher_logits / self.teacher_temperature).log_softmax(-1)
        if log_scales is not None:
            student, teacher = student + log_scales[:, :1], teacher + log_scales[:, 1:]
        student, teacher = student[:, self.student_columns], teacher[:, self.teacher_columns]
        matched_weight, unmatched_weight = self._weights
        terms = [student.new_zeros(student.shape[0])] * 2
        # A weight of 0 leaves a term out, whatever it is.
        if matched_weight:
            matched = jsd(student[:, : self.shared], teacher[:, : self.shared], beta=self.beta)
            terms[0] = matched_weight * matched
        if unmatched_weight:
            unmatched = sorted_l1(student[:, self.shared :].exp(), teacher[:, self.shared :].exp())
            terms[1] = unmatched_weight * unmatched
        return torch.stack(terms, dim=-1)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, student_temperature={self.student_temperature}, "
            f"teacher_temperature={self.teacher_temperature}, merging={self.merging!r}, "
            f"matched_weight={self.matched_weight}, unmatched_weight={self.unmatched_weight}, "
            f"shared={self.shared}"
        )


def _log_likelihood_of_others(side: Side, compared: Tensor, temperature: float) -> Tensor:
    """Log-likelihood of each chunk's tokens but that at the compared position, (B, C)."""
    log_probs = side.logits.log_probs(side.token_ids.unsqueeze(-1), temperature=temperature)
    # `chunk_tables` has refused a batch without chunks.
    chunk_ids = cast(Tensor, side.chunk_ids).clamp_min(0)
    position = torch.arange(chunk_ids.shape[1], device=chunk_ids.device)
    is_compared = compared.gather(1, chunk_ids) == position
    others = log_probs.squeeze(-1).clamp_min(LOG_FLOOR).masked_fill(is_compared, 0.0)
    return chunk_sums(side, others, compared.shape[1])[0]
