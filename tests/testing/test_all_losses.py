"""Every registered loss passes every check, in each of the forms that its settings give it."""

import pytest
import torch

import ctkd
from ctkd.testing import check_loss, make_inputs, make_pair, sequences_average_by_count

FORMS = [
    *[(name, {}) for name in ctkd.list_losses()],
    ("uld", {"top_k": 3}),
    ("uld", {"student_temperature": 2.0, "teacher_temperature": 0.5}),
    ("uld", {"pairing": "chunk"}),
    ("uld", {"pairing": "chunk", "top_k": 3}),
    ("multilevelot", {"k": 3, "matching": "greedy"}),
    ("multilevelot", {"k": 3, "matching": "assignment"}),
    ("multilevelot", {"k": 3, "matching": "assignment_topk", "candidates": 4}),
    ("multilevelot", {"k": 3, "temperature": 1.5, "sl_temperature": 0.5, "sd_temperature": 1.0}),
    ("multilevelot", {"k": 3, "pairing": "chunk"}),
    ("multilevelot", {"k": 3, "pairing": "chunk", "matching": "greedy"}),
    ("multilevelot", {"k": 3, "pairing": "chunk", "matching": "assignment"}),
    ("multilevelot", {"k": 3, "pairing": "chunk", "matching": "assignment_topk"}),
    ("multilevelot_token", {"k": 3, "pairing": "chunk"}),
    ("alm", {"debias": True}),
    ("alm", {"temperature": 1.0}),
    ("mined", {"k": 3, "temperature": 2.0}),
    ("mined", {"form": "dense", "temperature": 2.0}),
    ("mined", {"alignment": "dtw"}),
    ("mined", {"alignment": "dtw", "form": "dense"}),
    # Each merging meets a divergence of either kind, and weights that are given.
    ("gold", {"merging": "observed"}),
    ("gold", {"merging": "observed", "beta": 1.0, "student_temperature": 2.0}),
    ("gold", {"merging": "bayesian", "beta": 0.3, "teacher_temperature": 0.5}),
    ("gold", {"merging": "bayesian", "matched_weight": 0.0, "unmatched_weight": 2.0}),
    ("gold", {"beta": 0.0}),
    ("gold", {"beta": 1.0, "matched_weight": 1.0, "unmatched_weight": 0.0}),
    ("bpm", {"rest": "renormalize", "temperature": 2.0}),
    ("bpm", {"conditional": False}),
    ("shared_kl", {"rest": "class"}),
    ("shared_kl", {"rest": "class", "direction": "reverse", "temperature": 2.0}),
    ("shared_kl", {"rest": "class", "direction": "jsd"}),
    ("shared_kl", {"direction": "reverse"}),
    ("shared_kl", {"direction": "jsd", "temperature": 2.0}),
    ("multilevelot_released", {"student_temperature": 2.0, "teacher_temperature": 0.5}),
]
# Checks that an assignment cannot pass, and why.
NEEDS_NUMBERS = ("runs_on_the_meta_device",)
# Equal optima: a step, or rounding, changes which of them is taken.
EQUAL_OPTIMA = ("gradient_matches_finite_differences", "half_precision_agrees")
LEFT_OUT = {
    "assignment": NEEDS_NUMBERS + EQUAL_OPTIMA,
    "assignment_topk": NEEDS_NUMBERS,
}
# What runs in a compiled step is a loss's call, which is that of `ctkd.Loss` in every form.
ONE_FOR_ALL = ("compiling_changes_nothing",)


@pytest.mark.parametrize(
    ("name", "settings"), FORMS, ids=[f"{name}-{settings}" for name, settings in FORMS]
)
def test_a_loss_passes(name, settings):
    loss = ctkd.get_loss(name, pair=make_pair(), **settings)
    skip = LEFT_OUT.get(settings.get("matching"), ())
    if settings:
        skip += ONE_FOR_ALL
    if name == "multilevelot_released":
        # It ranks columns over the whole batch, as the authors' code does.
        with pytest.raises(AssertionError, match="the batch is not the mean of its sequences"):
            sequences_average_by_count(loss)
        skip += ("sequences_average_by_count",)
    check_loss(loss, skip=skip)


def test_what_is_not_scored_between_answers_changes_no_loss():
    """Nor any gradient: that of such positions is zero."""
    for name in ctkd.list_losses():
        results = []
        for holes in (False, True):
            inputs = make_inputs()
            leaf = inputs["student_logits"].requires_grad_()
            if holes:
                for side in ("student", "teacher"):
                    size = inputs[f"{side}_labels"].shape[1]
                    # Two positions in front of the last but one, and one in front of the last.
                    spread = torch.tensor([*range(size - 2), size, size + 2])
                    for field, blank in (("logits", 7.0), ("labels", -100), ("chunk_ids", -1)):
                        value = inputs[f"{side}_{field}"]
                        wide = value.new_full((len(value), size + 3, *value.shape[2:]), blank)
                        if field == "logits":
                            # What predicts a token stands one position before it.
                            wide[:, spread[1:] - 1] = value[:, :-1]
                        else:
                            wide[:, spread] = value
                        inputs[f"{side}_{field}"] = wide
                    del inputs[f"{side}_hidden"]
            loss = ctkd.get_loss(name, pair=make_pair())
            batch = ctkd.Batch.from_causal_lm(**inputs)
            output = loss(batch)
            (grad,) = torch.autograd.grad(output.value, leaf)
            results.append((output.value, output.count, grad))
        (value, count, grad), (other_value, other_count, other_grad) = results
        assert count == other_count == loss.units(batch) > 0
        torch.testing.assert_close(other_value, value, rtol=1e-12, atol=0)
        torch.testing.assert_close(other_grad, grad, rtol=1e-12, atol=1e-15)
        assert grad.abs().max() > 0
