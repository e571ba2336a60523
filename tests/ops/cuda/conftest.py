"""Tests of kernels for CUDA by Triton's interpreter, in a process that interprets nothing else."""

import functools
import importlib
import importlib.metadata
import importlib.util
import operator
import os
from collections.abc import Callable
from typing import Any

import numpy as np


def hasten(interpreter: Any) -> None:
    """Have the interpreter do once what it does in every operation: it takes a third of the time.

    It puts its own functions in place of the language's whenever a kernel calls a function, looks
    types up in a table that it makes anew, checks sums of integers by the language itself, and
    combines entry by entry what numpy could.
    """
    language = interpreter.tl
    replace = functools.cache(interpreter._patch_lang)

    class Stays:
        @staticmethod
        def restore() -> None: ...

    def replaced(function: Callable[..., Any]) -> type[Stays]:
        replace(function)
        return Stays

    interpreter._patch_lang = replaced
    dtype_of = interpreter._get_np_dtype
    dtype_of_scalar = functools.cache(dtype_of)

    def looked_up(one: Any) -> Any:
        # Pointers have no hash.
        return (dtype_of if one.scalar.is_ptr() else dtype_of_scalar)(one.scalar)

    interpreter._get_np_dtype = looked_up
    reduction = interpreter.ReduceOps
    reduce_generally = reduction.apply_impl

    def reduce(self: Any, given: Any) -> Any:
        if self.combine_fn != language.standard._xor_combine:
            return reduce_generally(self, given)
        (one,) = given
        data = np.bitwise_xor.reduce(one.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, one.dtype)

    reduction.apply_impl = reduce

    def refuse_overflow(self: Any, first: Any, second: Any, operation: Callable[..., Any]) -> None:
        scalar = first.type.scalar
        if scalar.int_bitwidth < 64:
            exact = getattr(operator, operation.__name__)(
                first.handle.data.astype("int64"), second.handle.data.astype("int64")
            )
            lowest, highest = scalar.get_int_min_value(), scalar.get_int_max_value()
            assert ((lowest <= exact) & (exact <= highest)).all(), f"overflow of {scalar}"

    type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = refuse_overflow


if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    # Looked through for examples, the last would import triton where there is none.
    collect_ignore_glob = ["test_*.py", "machine_code.py"]
elif importlib.metadata.version("triton").startswith("3.7."):
    # Others may be written otherwise, and are as slow as they are.
    hasten(importlib.import_module("triton.runtime.interpreter"))
