"""A loss that ctkd finds by its entry point: pip install examples/plugin; ctkd losses."""

from ctkd.loss import Loss, Paper, Weights, average, masked_sum


class AnswerLikelihood(Loss):
    """Compares the log-likelihoods, in nats, that both models give to a whole answer."""

    paper = Paper("none", "none", "none")
    matches = "log-likelihood of the whole answer"
    unit = "sequence"
    teacher_needs = "observed"
    default_weights = Weights(ce=1.0, kd=0.1)

    def units(self, batch):
        return self._compared(batch).sum()

    def forward(self, batch):
        student, teacher = map(self._log_likelihood, (batch.student, batch.teacher))
        gap = masked_sum((student - teacher.detach()).abs(), self._compared(batch))
        return average({"likelihood": gap}, self.units(batch))

    def _compared(self, batch):
        return batch.student.mask.any(1) & batch.teacher.mask.any(1)

    def _log_likelihood(self, side):
        return masked_sum(
            side.logits.log_probs(side.token_ids.unsqueeze(-1)).squeeze(-1), side.mask
        )
