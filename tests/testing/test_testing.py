"""Each check for losses passes on a good loss and fails on a broken one."""

import re

import pytest
import torch

import ctkd
import ctkd.testing
from ctkd.batch import Batch
from ctkd.testing import CHECKS, check_loss, make_inputs
from tests.testing.broken_losses import BROKEN, Good, PartsDoNotSum

BY_NAME = {check.__name__: check for check in CHECKS}


@pytest.mark.parametrize(
    ("name", "broken", "message"), BROKEN, ids=[f"{cls.__name__}-{name}" for name, cls, _ in BROKEN]
)
def test_a_broken_loss_is_caught(name, broken, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        BY_NAME[name](broken())


def test_every_check_is_shown_to_fail():
    assert {name for name, _, _ in BROKEN} == set(BY_NAME)
    assert len(BY_NAME) == len(CHECKS)


def test_a_good_loss_passes():
    check_loss(Good())


def test_check_loss_runs_every_check_but_those_to_be_skipped(monkeypatch):
    ran = []
    checks = [lambda loss, name=check.__name__: ran.append(name) for check in CHECKS]
    for check, stand_in in zip(CHECKS, checks, strict=True):
        stand_in.__name__ = check.__name__
    monkeypatch.setattr(ctkd.testing, "CHECKS", checks)
    check_loss(Good())
    assert ran == list(BY_NAME)
    ran.clear()
    check_loss(Good(), skip=("parts_sum_to_the_value", "state_dict_round_trip"))
    assert set(BY_NAME) - set(ran) == {"parts_sum_to_the_value", "state_dict_round_trip"}


def test_check_loss_raises_what_a_check_finds():
    others = tuple(name for name in BY_NAME if name != "parts_sum_to_the_value")
    with pytest.raises(AssertionError, match="the parts do not sum"):
        check_loss(PartsDoNotSum(), skip=others)


def test_check_loss_refuses_to_skip_what_does_not_exist():
    with pytest.raises(ValueError, match=r"no check is called \['parts_sum'\]; there are \['value"):
        check_loss(Good(), skip=("parts_sum", "parts_sum_to_the_value"))


def test_every_check_says_what_it_checks():
    for check in CHECKS:
        assert check.__doc__ and check.__doc__.splitlines()[0].endswith("."), check.__name__


def test_the_inputs_hold_what_the_checks_need():
    batch = Batch.from_causal_lm(**make_inputs())
    assert batch.student.mask.sum(1).tolist() == [4, 3, 2]
    assert batch.teacher.mask.sum(1).tolist() == [4, 2, 0]
    assert batch.student.logits.tensor.shape[-1] > batch.student.logits.shape[2]
    assert batch.num_chunks == 3 and batch.student.chunk_ids.max() == 2
    assert (batch.student.token_ids < batch.student.logits.shape[2]).all()
    tied = make_inputs(ties=True)["student_logits"]
    assert torch.equal(tied, (2 * tied).round() / 2)
    assert not torch.equal(make_inputs(seed=1)["student_logits"], make_inputs()["student_logits"])
    for row in (0, 1):
        assert len(set(tied[row, 2].tolist())) < tied.shape[-1]


def test_state_that_is_no_tensor_survives_the_round_trip():
    class WithExtraState(Good):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            assert state == {"seen": 3}

    BY_NAME["state_dict_round_trip"](WithExtraState())
    BY_NAME["a_second_call_gives_the_same"](WithExtraState())
    assert isinstance(WithExtraState(), ctkd.Loss)
