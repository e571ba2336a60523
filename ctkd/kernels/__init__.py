"""Loops over rows of logits, compiled for the CPU when they are first used.

Importing a module of this package imports numba, so only `ctkd.compiled` does that, when tensors
on a CPU are worked on. Nothing here knows tensors, masks or autograd; every module with loops has
its torch counterpart, which tests hold it to.
"""

__all__: list[str] = []
