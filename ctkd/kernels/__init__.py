"""Loops over rows of logits, compiled for the CPU when they are first used.

Importing a module of this package imports numba, so that is done inside functions, when tensors on
a CPU are worked on and `ctkd.compiled.has_kernels` says yes. Nothing here knows tensors, masks or
autograd; every module with loops has its torch counterpart, which tests hold it to.
"""

__all__: list[str] = []
