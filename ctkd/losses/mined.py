"""Minimum edit distance: the teacher's distribution, carried over to the student's vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctkd.batch import Batch
from ctkd.chunks import AlignedPositions, chunk_tables, pick
from ctkd.logits import map_rows
from ctkd.loss import Loss, LossOutput, Measured, Paper, TeacherNeed, Weights, average, masked_sum
from ctkd.ops import kernels_for
from ctkd.registry import register
from ctkd.settings import check_choice, check_count, check_positive
from ctkd.tokenizers import Pair, check_sizes

__all__ = ["MinED", "carried_kl", "first_sources", "fused_target"]


def fused_target(
    teacher_ids: Tensor, log_probs: Tensor, names: Tensor, teacher_of: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The student's target: the teacher's renamed entries where it is paired, else its label.

    Of entries that are given one name the first is kept, the largest; what is kept is
    renormalized.

    Shape:
        ``teacher_ids`` and ``log_probs`` (B, T, K), largest first, ``names`` (W,), ``teacher_of``
        (B, S), -1 for none, and ``labels`` (B, S) give ids and probabilities (B, S, K).

    Example:
        >>> log_probs = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
        >>> ids, probs = fused_target(torch.tensor([[[0, 1, 2]]]), log_probs,
        ...     torch.tensor([4, 4, 2]), torch.tensor([[0, -1]]), torch.tensor([[4, 7]]))
        >>> ids, probs
        (tensor([[[4, 4, 2],
                 [7, 7, 7]]]), tensor([[[0.6667, 0.0000, 0.3333],
                 [1.0000, 0.0000, 0.0000]]]))
    """
    kernels = kernels_for("matched_columns", log_probs)
    if kernels and kernels.serves_target(teacher_ids):
        target: tuple[Tensor, Tensor] = kernels.fused_target(
            teacher_ids, log_probs, names, teacher_of, labels
        )
        return target
    ids = names[teacher_ids]
    in_order, order = ids.sort(dim=-1, stable=True)
    repeated = F.pad(in_order[..., 1:] == in_order[..., :-1], (1, 0))
    repeated = torch.empty_like(repeated).scatter_(-1, order, repeated)
    probs = log_probs.masked_fill(repeated, -torch.inf).softmax(-1)
    place, is_paired = teacher_of.clamp_min(0), (teacher_of >= 0).unsqueeze(-1)
    one_hot = (torch.arange(ids.shape[-1], device=ids.device) == 0).to(probs.dtype)
    return (
        torch.where(is_paired, pick(ids, place), labels.unsqueeze(-1)),
        torch.where(is_paired, pick(probs, place), one_hot),
    )


def first_sources(student_ids: Tensor, student_size: int) -> Tensor:
    """Invert a map from teacher to student tokens: the first that maps to each, or -1.

    Shape:
        (W,) int64 to (V,) int64.

    Example:
        >>> first_sources(torch.tensor([2, 0, 2]), 4)
        tensor([ 1, -1,  0, -1])
    """
    nowhere = student_ids.shape[0]
    teacher_ids = torch.arange(nowhere, device=student_ids.device)
    sources = teacher_ids.new_full((student_size,), nowhere)
    sources = sources.scatter_reduce(0, student_ids, teacher_ids, reduce="amin")
    return sources.masked_fill(sources == nowhere, -1)


def carried_kl(
    student_logits: Tensor, teacher_logits: Tensor, sources: Tensor, temperature: float
) -> Tensor:
    r"""Divergence of the student from the teacher's row, carried over to the student's columns.

    .. math:: \mathrm{KL}\left( \mathrm{softmax}(y_{\sigma(v)} / \tau) \,\|\,
        \mathrm{softmax}(x_v / \tau) \right)

    Student columns without a source have probability 0 on the teacher's side.

    Shape:
        (N, V), (N, W) and (V,) give (N,).

    Example:
        The teacher's columns, in the student's order, are equally likely; the third has none.

        >>> student = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> carried_kl(student, torch.zeros(1, 2), torch.tensor([1, 0, -1]), 1.0).exp()
        tensor([2.])
    """
    carried = teacher_logits[:, sources.clamp_min(0)].masked_fill(sources < 0, -torch.inf)
    target_log_probs = (carried / temperature).log_softmax(-1)
    target_probs = target_log_probs.exp()
    student_log_probs = (student_logits / temperature).log_softmax(-1)
    terms = target_probs * (target_log_probs - student_log_probs)
    return terms.masked_fill(target_probs == 0, 0.0).sum(-1)


@register("mined")
class MinED(Loss):
    r"""Matches the teacher's distribution, its tokens renamed, wherever both predict one token.

    .. math::
        L = \frac{1}{\sum_b S_b} \sum_b \sum_{i \le S_b} \Bigl( -\sum_v d_{b,i}(v)
            \log p_{b,i}(v) \Bigr)

    Where student position i is aligned with teacher position j, d is made of the teacher's k
    largest probabilities at j: each teacher token becomes the student token of the nearest text,
    of several that become the same one the largest is kept, and what is kept is renormalized.
    Elsewhere d is one-hot on the student's own label. ``parts`` tells these apart: ``fused`` and
    ``label``.

    Shape:
        Student (B, S, V), teacher (B, T, W). ``count`` is the student's scored positions.

    Args:
        pair: The two tokenizers.
        k: Entries taken of the teacher's row, at least 1. ``"dense"`` takes all.
        temperature: Above 0. For ``"top_k"`` it divides the teacher's logits before the target is
            renormalized; for ``"dense"`` it divides the logits of both models.
        alignment: ``"chunk"`` aligns positions whose tokens cover the same bytes. ``"dtw"``
            aligns tokens by edit distance, as the paper does, and keeps a pair whose teacher
            token is renamed to the student's; it waits for the ids and works on the CPU.
        form: ``"top_k"`` is the loss above. ``"dense"`` compares whole rows, as in DSKD: each
            student token takes over the logit of the first teacher token renamed to it, those
            without one have probability 0, and the loss is KL(teacher || student), without a
            factor of temperature squared. DSKD's scripts set ``temperature`` to 2.

    Raises:
        SettingError: If a setting lies outside its range.
        BatchError: If the batch has no chunk ids and ``alignment`` is ``"chunk"``, or the logits
            have more or fewer columns than the tokenizers have tokens.

    Example:
        Two positions, both of equally likely tokens. The first is aligned; each of the two
        targets costs log 7.

        >>> import ctkd
        >>> from ctkd.testing import make_pair
        >>> batch = ctkd.Batch.from_causal_lm(
        ...     student_logits=torch.zeros(1, 3, 7),
        ...     student_labels=torch.tensor([[-100, 2, 1]]),
        ...     student_chunk_ids=torch.tensor([[-1, 0, -1]]),
        ...     teacher_logits=torch.tensor([[[5.0, 4.0, -9.0, 5.0, -9.0], [0.0] * 5]]),
        ...     teacher_labels=torch.tensor([[-100, 0]]),
        ...     teacher_chunk_ids=torch.tensor([[-1, 0]]),
        ... )
        >>> output = ctkd.get_loss("mined", pair=make_pair(), k=3)(batch)
        >>> output.value, output.parts["fused"]
        (tensor(1.9459), tensor(0.9730))

    Stored teacher:
        Needs the ``k`` largest entries of each row: nothing is lost where that many are stored, and
        a cache of fewer is refused. ``"dense"`` needs whole rows.

    Differs from the paper:
        The paper's code aligns positions by the tokens they read and puts its one-hot on that same
        token, which the row no longer predicts; here positions are paired, and labelled, by the
        token they predict. Its choice among several teachers, per text, is not part of this, nor
        is the base model's own distribution as a target.

    References:
        Wan et al., "Knowledge Fusion of Large Language Models", arXiv:2401.10491, section 3.3.
        ``"dense"``: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models",
        arXiv:2406.17328, the baseline MinED.
    """

    paper = Paper("Knowledge Fusion of Large Language Models", "2401.10491", "token alignment")
    matches = "teacher's top k, renamed by edit distance, at one-to-one tokens"
    unit = "position"
    needs = frozenset({"chunks", "pair"})
    teacher_needs: TeacherNeed = "top_k"
    default_weights = Weights(ce=0.9, kd=0.1)
    measured = Measured(
        kd=0.01, difference=-0.0042, low=-0.0084, high=-0.0, share=0.005, at_default=-0.0008
    )

    nearest_student_ids: Tensor
    sources: Tensor

    def __init__(
        self,
        *,
        pair: Pair,
        k: int = 10,
        temperature: float = 1.0,
        alignment: str = "chunk",
        form: str = "top_k",
    ) -> None:
        super().__init__()
        check_count("k", k)
        check_positive("temperature", temperature)
        check_choice("alignment", alignment, ("chunk", "dtw"))
        check_choice("form", form, ("top_k", "dense"))
        self.k = k
        self.temperature = temperature
        self.teacher_temperatures = (temperature,)
        self.teacher_entries = k if form == "top_k" else 0
        self.alignment = alignment
        self.form = form
        nearest_student_ids = pair.nearest_student_ids()
        sources = first_sources(nearest_student_ids, pair.student_size)
        self.register_buffer("nearest_student_ids", nearest_student_ids, persistent=False)
        self.register_buffer("sources", sources, persistent=False)
        if form == "dense":
            self.teacher_needs = "rows"
        if alignment == "dtw":
            self.needs = frozenset({"pair"})
            self._match_positions = pair.match_positions

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    def forward(self, batch: Batch) -> LossOutput:
        check_sizes(batch, self.sources.shape[0], self.nearest_student_ids.shape[0])
        aligned = self._aligned(batch)
        teacher_of = aligned.teacher_of_student(batch.student.mask.shape[1])
        paired = teacher_of >= 0
        if self.form == "dense":
            values = self._dense(batch, aligned, paired)
        else:
            values = self._top_k(batch, aligned, teacher_of)
        sums = {
            "fused": masked_sum(values, paired),
            "label": masked_sum(values, batch.student.mask & ~paired),
        }
        return average(sums, self.units(batch))

    def _aligned(self, batch: Batch) -> AlignedPositions:
        student, teacher = batch.student, batch.teacher
        if self.alignment == "chunk":
            ours, theirs = chunk_tables(batch)
            one_to_one = (ours.sizes == 1) & (theirs.sizes == 1)
            return AlignedPositions(ours.first, theirs.first, one_to_one)
        matched = self._match_positions(
            student.token_ids, teacher.token_ids, student.mask, teacher.mask
        )
        positions = matched.clamp_min(0)
        teacher_ids = F.pad(teacher.token_ids, (0, 1)).gather(1, positions)
        renamed = self.nearest_student_ids[teacher_ids]
        everywhere = torch.arange(matched.shape[1], device=matched.device).expand_as(matched)
        valid = student.mask & (matched >= 0) & (renamed == student.token_ids)
        return AlignedPositions(everywhere, positions, valid)

    def _top_k(self, batch: Batch, aligned: AlignedPositions, teacher_of: Tensor) -> Tensor:
        rows, width = batch.teacher.mask.shape
        queried = batch.teacher.mask.new_zeros(rows, width + 1)
        queried = queried.scatter(1, aligned.teacher.masked_fill(~aligned.valid, width), True)
        # Only these rows are used, and finding the largest entries takes a while.
        teacher = batch.teacher.logits.masked(queried[:, :width])
        with torch.no_grad():
            teacher_ids = teacher.top_ids(min(self.k, teacher.shape[2]))
            log_probs = teacher.log_probs(teacher_ids, temperature=self.temperature)
            renamed = teacher_ids, log_probs, self.nearest_student_ids
            ids, probs = fused_target(*renamed, teacher_of, batch.student.token_ids)
        terms = -probs * batch.student.logits.log_probs(ids)
        return terms.masked_fill(probs == 0, 0.0).sum(-1)

    def _dense(self, batch: Batch, aligned: AlignedPositions, paired: Tensor) -> Tensor:
        student = batch.student
        labels = student.token_ids.unsqueeze(-1)
        log_probs = student.logits.log_probs(labels, temperature=self.temperature).squeeze(-1)
        fused = map_rows(
            student.logits,
            batch.teacher.logits,
            aligned.flattened(batch),
            lambda ours, theirs: carried_kl(ours, theirs, self.sources, self.temperature),
            teacher_temperature=self.temperature,
        ).values
        fused = aligned.at_student_positions(fused.view(aligned.valid.shape), paired.shape[1])
        return torch.where(paired, fused, -log_probs)

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, temperature={self.temperature}, alignment={self.alignment!r}, "
            f"form={self.form!r}"
        )
