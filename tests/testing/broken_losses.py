"""A loss that passes every check of `ctkd.testing`, and losses that each fail one."""

from dataclasses import replace

import torch
from torch import Tensor

from ctkd.batch import Batch
from ctkd.chunks import align_positions
from ctkd.errors import BatchError
from ctkd.logits import DenseLogits, map_rows
from ctkd.loss import Loss, LossOutput, Paper, Weights, average, masked_sum


class Good(Loss):
    """The squared distance of the three largest probabilities, position by position."""

    paper = Paper("None", "0000.00000", "none")
    matches = "sorted probabilities"
    unit = "position"
    default_weights = Weights(1.0, 1.0)

    def units(self, batch: Batch) -> Tensor:
        return batch.student.mask.sum()

    def probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        student = batch.student.logits.sorted_probs(3)
        return student, batch.teacher.logits.sorted_probs(3).detach()

    def distances(self, batch: Batch) -> Tensor:
        student, teacher = self.probs(batch)
        length = min(student.shape[1], teacher.shape[1])
        return (student[:, :length] - teacher[:, :length]).square().sum(-1)

    def sums(self, batch: Batch) -> Tensor:
        return masked_sum(self.distances(batch), align_positions(batch).valid)

    def forward(self, batch: Batch) -> LossOutput:
        return average({"distance": self.sums(batch)}, self.units(batch))


class ValueOfOneElement(Good):
    def forward(self, batch):
        output = super().forward(batch)
        return LossOutput(output.value.reshape(1), output.count, output.parts)


class ReturnsATensor(Good):
    def forward(self, batch):
        return super().forward(batch).value


class CountIsANumber(Good):
    def forward(self, batch):
        output = super().forward(batch)
        return LossOutput(output.value, int(output.count), output.parts)


class UnitsAreANumber(Good):
    def units(self, batch):
        return int(super().units(batch))

    def forward(self, batch):
        return average({"distance": self.sums(batch)}, super().units(batch))


class CountIsAFloat(Good):
    def units(self, batch):
        return super().units(batch).float()


class AlwaysFloat32(Good):
    def sums(self, batch):
        return super().sums(batch).float()


class OverflowsInHalfPrecision(Good):
    def sums(self, batch):
        tensor = batch.student.logits.tensor
        return super().sums(batch) + (tensor * 60000).square().sum((1, 2)) * 1e-9


class TeacherIsNotDetached(Good):
    def probs(self, batch):
        return batch.student.logits.sorted_probs(3), batch.teacher.logits.sorted_probs(3)


class TeacherStatesAreNotDetached(Good):
    def sums(self, batch):
        return super().sums(batch) + batch.teacher.hidden.square().sum((1, 2))


class IgnoresTheMask(Good):
    def sums(self, batch):
        return batch.student.logits.tensor[..., :7].softmax(-1).square().sum((1, 2))


class FirstPositionOnly(Good):
    def sums(self, batch):
        return masked_sum(self.distances(batch)[:, :1], align_positions(batch).valid[:, :1])


class ReadsThePaddedHead(Good):
    def distances(self, batch):
        side = batch.student
        rows = side.logits.rows.unsqueeze(-1).expand(-1, -1, side.logits.tensor.shape[-1])
        probs = side.logits.tensor.gather(1, rows).softmax(-1)[:, : batch.teacher.mask.shape[1]]
        return super().distances(batch) + probs.square().sum(-1)


class CannotBeDifferentiated(Good):
    def sums(self, batch):
        return super().sums(batch).detach()


class DoesNotUseTheLogits(Good):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def sums(self, batch):
        return super().sums(batch).detach() * self.scale


class _DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class WrongGradient(Good):
    def sums(self, batch):
        return _DoubledGradient.apply(super().sums(batch))


class WritesToTheTeacher(Good):
    def sums(self, batch):
        batch.teacher.logits.tensor[:, -1] = 0.0
        return super().sums(batch)


class WritesToTheStudent(Good):
    def sums(self, batch):
        with torch.no_grad():
            batch.student.logits.tensor.clamp_(max=1.0)
        return super().sums(batch)


class AveragesOverPadding(Good):
    def sums(self, batch):
        return super().sums(batch) / batch.student.mask.shape[1]


class MeanOfSequenceMeans(Good):
    def sums(self, batch):
        means = super().sums(batch) / batch.student.mask.sum(1).clamp_min(1)
        return means / len(means) * self.units(batch)


class DependsOnTheBatch(Good):
    def distances(self, batch):
        distances = super().distances(batch)
        return distances * (1 + distances.detach().mean())


class CountsTheTeacher(Good):
    def units(self, batch):
        return batch.teacher.mask.sum()

    def forward(self, batch):
        return average({"distance": self.sums(batch)}, Good.units(self, batch))


class UnitsLookAtLogits(Good):
    def units(self, batch):
        return (batch.student.logits.column_mass() > 0.1).sum()


class NanWhenNothingIsScored(Good):
    def forward(self, batch):
        count = self.units(batch)
        value = self.sums(batch).sum() / count
        return LossOutput(value, count, {"distance": value.detach()})


class ConstantWhenNothingIsScored(Good):
    def sums(self, batch):
        return super().sums(batch) + 0.25


class PlainZeroWhenNothingIsScored(Good):
    def forward(self, batch):
        if not batch.student.mask.any():
            zero = torch.zeros((), dtype=torch.float64)
            return LossOutput(zero, self.units(batch), {"distance": zero})
        return super().forward(batch)


class NeedsASequence(Good):
    def sums(self, batch):
        longest = batch.student.mask.sum(1).amax()
        return super().sums(batch) + 0.0 * longest


class CountsOneInAnEmptyBatch(Good):
    def units(self, batch):
        return super().units(batch).clamp_min(1)


class TellsTextsWithoutPositions(Good):
    def sums(self, batch):
        return super().sums(batch) + (batch.teacher.mask.shape[1] == 0)


class AsksForMoreThanThereIs(Good):
    k = 2

    def probs(self, batch):
        student = batch.student.logits.sorted_probs(self.k)
        return student, batch.teacher.logits.sorted_probs(self.k).detach()


class TakesKForAWeight(Good):
    k = 2

    def sums(self, batch):
        return super().sums(batch) * self.k


class _Unguarded(Good):
    """Without what every loss refuses."""

    def __call__(self, batch):
        return torch.nn.Module.__call__(self, batch)


class InfiniteWhereAColumnIsMasked(_Unguarded):
    def distances(self, batch):
        ids = torch.zeros((len(batch.student.mask), 1, 1), dtype=torch.int64)
        log_probs = batch.student.logits.log_probs(ids)[..., 0]
        return super().distances(batch) - log_probs[:, : batch.teacher.mask.shape[1]]


class HasNoGradientAtAProbabilityOfZero(_Unguarded):
    def distances(self, batch):
        ids = torch.arange(7).expand(len(batch.student.mask), 1, -1)
        roots = batch.student.logits.log_probs(ids).exp().sqrt().sum(-1)
        return super().distances(batch) + roots[:, : batch.teacher.mask.shape[1]]


class RefusesWithoutSayingWhat(_Unguarded):
    def distances(self, batch):
        if (batch.student.logits.tensor == -torch.inf).any():
            raise BatchError("the student's logits are minus infinity somewhere")
        return super().distances(batch)


class BlamesTheOtherSide(_Unguarded):
    def distances(self, batch):
        if (batch.student.logits.tensor == -torch.inf).any():
            raise BatchError("the teacher's logits are minus infinity in column 0")
        return super().distances(batch)


class TellsACompiler(Good):
    def __call__(self, batch):
        # What lies outside the call that every loss has is compiled.
        output = super().__call__(batch)
        return replace(output, value=(1 + torch.compiler.is_compiling()) * output.value)


class TellsACompilerInTheGradient(Good):
    def __call__(self, batch):
        output = super().__call__(batch)
        more = output.value * torch.compiler.is_compiling()
        return replace(output, value=output.value + more - more.detach())


class _SavedTensorsReadTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.square()

    @staticmethod
    def backward(ctx, gradient):
        assert ctx.saved_tensors
        return 2 * gradient * ctx.saved_tensors[0]


class ReadsSavedTensorsTwice(Good):
    def distances(self, batch):
        return _SavedTensorsReadTwice.apply(super().distances(batch))


class SoftmaxInHalfPrecision(Good):
    def probs(self, batch):
        student, teacher = super().probs(batch)
        dtype = batch.student.logits.tensor.dtype
        return student.to(dtype).to(student.dtype), teacher


class NoParts(Good):
    def forward(self, batch):
        output = super().forward(batch)
        return LossOutput(output.value, output.count)


class PartsDoNotSum(Good):
    def forward(self, batch):
        output = super().forward(batch)
        return LossOutput(2 * output.value, output.count, output.parts)


class PartsAreNotDetached(Good):
    def forward(self, batch):
        output = super().forward(batch)
        return LossOutput(output.value, output.count, {"distance": output.value})


class PartsAreVectors(Good):
    def forward(self, batch):
        output = super().forward(batch)
        parts = {name: part.reshape(1) for name, part in output.parts.items()}
        return LossOutput(output.value, output.count, parts)


class DrawsRandomNumbers(Good):
    def distances(self, batch):
        return torch.nn.functional.dropout(super().distances(batch), 0.1)


class RemembersTheLastValue(Good):
    def forward(self, batch):
        self.last = super().forward(batch)
        return self.last


class CountsItsCalls(Good):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        self.calls += 1
        return super().forward(batch)


class _Hidden:
    scale = 1.0


class DependsOnEarlierCalls(Good):
    def sums(self, batch):
        _Hidden.scale += 0.5
        return super().sums(batch) * _Hidden.scale


class StateDoesNotRoundTrip(Good):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def sums(self, batch):
        return super().sums(batch) * self.scale

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.scale.exp()


class AsksForANumber(Good):
    def sums(self, batch):
        longest = int(batch.student.mask.sum(1).max())
        return super().sums(batch) * (longest > 0)


class ShapeDependsOnData(Good):
    def sums(self, batch):
        mask = align_positions(batch).valid
        values = self.distances(batch)[mask]
        index = torch.arange(len(mask)).unsqueeze(1).expand_as(mask)[mask]
        return values.new_zeros(len(mask)).index_add(0, index, values)


class CountLiesOnTheCpu(Good):
    def units(self, batch):
        units = super().units(batch)
        return torch.zeros((), dtype=torch.int64) if units.is_meta else units


class ReadsTheTeacherSTensor(Good):
    def distances(self, batch):
        scale = batch.teacher.logits.tensor.detach().square().mean()
        return super().distances(batch) * scale


class SaysObserved(Good):
    teacher_needs = "observed"


class SaysTopKAndTakesRows(Good):
    teacher_needs = "top_k"

    def distances(self, batch):
        aligned = align_positions(batch)
        values = map_rows(
            batch.student.logits,
            batch.teacher.logits,
            aligned.flattened(batch),
            lambda student, teacher: (student - teacher[:, :1]).square().mean(-1),
        ).values
        return values.view(aligned.valid.shape)


class TellsAStoredTeacher(Good):
    def distances(self, batch):
        return super().distances(batch) * (2 - isinstance(batch.teacher.logits, DenseLogits))


class TellsAStoredTeacherInTheGradient(Good):
    def distances(self, batch):
        distances = super().distances(batch)
        factor = 2 - isinstance(batch.teacher.logits, DenseLogits)
        return factor * distances - (factor - 1) * distances.detach()


class DividesByTheSmallestGap(Good):
    teacher_needs = "top_k"
    teacher_entries = 3

    def distances(self, batch):
        distances = super().distances(batch)
        ids = torch.arange(5).expand(len(batch.teacher.mask), 1, -1)
        gaps = batch.teacher.logits.log_probs(ids).exp().sort(-1).values.diff()
        smallest = gaps.amin(-1).masked_fill(~batch.teacher.mask, 1.0).detach()
        return distances / smallest[:, : distances.shape[1]]


# (check, a loss that fails it, what the check says)
BROKEN = [
    (
        "value_is_a_finite_scalar",
        ValueOfOneElement,
        "ValueOfOneElement.forward returned a LossOutput whose value is a tensor of (1,);",
    ),
    (
        "value_is_a_finite_scalar",
        ReturnsATensor,
        "forward returned Tensor; a loss returns ctkd.loss.LossOutput(value, count, parts)",
    ),
    ("value_is_a_finite_scalar", CountIsANumber, "a LossOutput whose count is int;"),
    ("units_equal_the_count", UnitsAreANumber, "units gives int, not a tensor"),
    ("value_is_a_finite_scalar", CountIsAFloat, "the count is torch.float32"),
    ("value_is_a_finite_scalar", AlwaysFloat32, "torch.float64 gives torch.float32"),
    ("value_is_a_finite_scalar", OverflowsInHalfPrecision, "the value is inf"),
    ("gradient_reaches_the_student_only", TeacherIsNotDetached, "teacher's logits got a gradient"),
    (
        "gradient_reaches_the_student_only",
        TeacherStatesAreNotDetached,
        "teacher's hidden states got a gradient",
    ),
    ("gradient_reaches_the_student_only", IgnoresTheMask, "positions that are not scored got"),
    ("gradient_reaches_the_student_only", FirstPositionOnly, "both sides score got no gradient"),
    ("gradient_reaches_the_student_only", ReadsThePaddedHead, "columns past the tokenizer's"),
    ("gradient_reaches_the_student_only", CannotBeDifferentiated, "cannot be differentiated"),
    ("gradient_reaches_the_student_only", DoesNotUseTheLogits, "student's logits got no gradient"),
    ("gradient_matches_finite_differences", WrongGradient, "is not that of finite differences"),
    ("inputs_are_left_alone", WritesToTheTeacher, "teacher_logits was changed"),
    ("inputs_are_left_alone", WritesToTheStudent, "student_logits was changed"),
    ("padding_changes_nothing", AveragesOverPadding, "padding changes the value"),
    ("padding_changes_nothing", IgnoresTheMask, "padding changes the value"),
    ("a_padded_head_changes_nothing", ReadsThePaddedHead, "padded columns change the value"),
    ("sequences_average_by_count", MeanOfSequenceMeans, "is not the mean of its sequences"),
    ("sequences_average_by_count", DependsOnTheBatch, "is not the mean of its sequences"),
    ("units_equal_the_count", CountsTheTeacher, "units gives 6, count is 9"),
    ("units_equal_the_count", UnitsLookAtLogits, "units gives 0, count is"),
    ("units_equal_the_count", CountIsAFloat, "units are 9.0"),
    ("nothing_scored_gives_zero", NanWhenNothingIsScored, "the value is nan"),
    ("nothing_scored_gives_zero", ConstantWhenNothingIsScored, "the value is 0.75"),
    ("nothing_scored_gives_zero", PlainZeroWhenNothingIsScored, "cannot be differentiated"),
    ("an_empty_batch_gives_zero", NeedsASequence, "without sequences it stops: amax()"),
    ("an_empty_batch_gives_zero", CountsOneInAnEmptyBatch, "the count is 1"),
    (
        "an_empty_batch_gives_zero",
        TellsTextsWithoutPositions,
        "without positions of the teacher, against none scored: the value",
    ),
    (
        "k_above_the_vocabulary_is_all_of_it",
        AsksForMoreThanThereIs,
        "with k=7 it stops: the largest 7 entries",
    ),
    ("k_above_the_vocabulary_is_all_of_it", TakesKForAWeight, "k=1000 changes the value"),
    (
        "masked_columns_are_taken_or_refused",
        InfiniteWhereAColumnIsMasked,
        "with [0] of the student at minus infinity the value is inf",
    ),
    (
        "masked_columns_are_taken_or_refused",
        HasNoGradientAtAProbabilityOfZero,
        "with [0] of the student at minus infinity the gradient is not finite",
    ),
    ("masked_columns_are_taken_or_refused", RefusesWithoutSayingWhat, "names no side and column"),
    (
        "masked_columns_are_taken_or_refused",
        BlamesTheOtherSide,
        "with [0] of the student at minus infinity the error is: the teacher's",
    ),
    ("half_precision_agrees", SoftmaxInHalfPrecision, "bfloat16 and float64 differ in value"),
    ("parts_sum_to_the_value", NoParts, "there are no parts"),
    ("parts_sum_to_the_value", PartsDoNotSum, "the parts do not sum to the value"),
    ("parts_sum_to_the_value", PartsAreNotDetached, "part 'distance' is not detached"),
    ("value_is_a_finite_scalar", PartsAreVectors, "whose distance is a tensor of (1,);"),
    ("a_second_call_gives_the_same", DrawsRandomNumbers, "random numbers were drawn"),
    ("a_second_call_gives_the_same", RemembersTheLastValue, "forward wrote to ['last']"),
    ("a_second_call_gives_the_same", CountsItsCalls, "forward changed calls"),
    ("a_second_call_gives_the_same", DependsOnEarlierCalls, ", then "),
    ("a_checkpoint_changes_nothing", ReadsSavedTensorsTwice, "it does not run in a checkpoint"),
    ("compiling_changes_nothing", TellsACompiler, "compiling changes the value"),
    ("compiling_changes_nothing", TellsACompilerInTheGradient, "compiling changes the gradient"),
    ("state_dict_round_trip", StateDoesNotRoundTrip, "the value changed"),
    ("runs_on_the_meta_device", AsksForANumber, "does not run without numbers"),
    ("runs_on_the_meta_device", ShapeDependsOnData, "does not run without numbers"),
    ("runs_on_the_meta_device", CountLiesOnTheCpu, "a result lies on cpu"),
    ("a_stored_teacher_serves", ReadsTheTeacherSTensor, "it stops: 'TopKLogits' object has no"),
    ("a_stored_teacher_serves", SaysObserved, "'observed', but with 0 entries of each"),
    ("a_stored_teacher_serves", SaysTopKAndTakesRows, "but with 1 entries of each"),
    ("a_stored_teacher_serves", TellsAStoredTeacher, "a stored teacher changes the value"),
    (
        "a_stored_teacher_serves",
        TellsAStoredTeacherInTheGradient,
        "a stored teacher changes the gradient",
    ),
    ("a_stored_teacher_serves", DividesByTheSmallestGap, "with few entries the value is inf"),
]
