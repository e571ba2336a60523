"""The checks of settings."""

import pytest
import torch

from ctkd.errors import SettingError
from ctkd.settings import (
    check_choice,
    check_count,
    check_positive,
    check_some_weight,
    check_weight,
)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None, True, torch.ones(())])
def test_numbers_out_of_range_are_refused(value):
    for check, text in ((check_positive, "above 0"), (check_weight, "of at least 0")):
        with pytest.raises(SettingError, match=f"w must be a finite number {text}, got"):
            check("w", value)
    with pytest.raises(SettingError, match="w must be a whole number of at least 1, got"):
        check_count("w", value)


def test_one_weight_must_be_above_zero():
    check_some_weight(first=0.0, second=0.5)
    with pytest.raises(SettingError, match="at least one of first, second must be above 0"):
        check_some_weight(first=0.0, second=0)
    with pytest.raises(SettingError, match="first must be a finite number of at least 0, got -1"):
        check_some_weight(first=-1, second=0.5)


def test_the_limits_of_the_ranges():
    check_weight("w", 0)
    check_positive("w", 1e-30)
    check_count("w", 1)
    for check, value in ((check_positive, 0.0), (check_count, 0), (check_count, 2.0)):
        with pytest.raises(SettingError):
            check("w", value)
    check_choice("w", "a", ("a", "b"))
    with pytest.raises(SettingError, match="w must be one of a, b, got 'c'"):
        check_choice("w", "c", ("a", "b"))
