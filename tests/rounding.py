"""How far apart one number may come out on two machines.

Vector widths, fused products, threads and libraries change the order of additions and the last bit
of an exponential. What is equal up to that is compared with these tolerances.
"""

import torch


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Relative error of a sum of so many terms of one sign, each rounded a few times of its own."""
    return (terms + 16) * torch.finfo(dtype).eps
