"""Costs of operations: kernel launches, bytes moved and scratch memory.

The reference is counted on the meta device, operator by operator: nothing has to be declared twice.
A backend with kernels of its own declares theirs as functions of shapes in `DECLARED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ctkd.ops import reference
from ctkd.ops.rows import Rows, SoftmaxTerm

__all__ = ["DECLARED", "Cost", "cost_of"]

DECLARED: dict[str, Callable[..., Cost]] = {}
"""Functions by name of the operation, whose arguments they take."""


class Cost(NamedTuple):
    """Cost of one call.

    Attributes:
        launches: Kernels started.
        bytes_moved: Read and written.
        scratch: Most bytes held beyond arguments.
    """

    launches: int
    bytes_moved: int
    scratch: int


def cost_of(operator: Any, args: Any, kwargs: Any) -> Cost | None:
    """The cost of an operation with these arguments; None if it is none of `ctkd.ops`.

    Args:
        operator: A function of `ctkd.ops`, its name, or a registered operator of that name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Example:
        >>> import torch
        >>> from ctkd import ops
        >>> rows = ops.Rows(torch.empty(4, 1000), None, 1000)
        >>> cost_of(ops.log_normalizers, (rows, [1.0]), {}).bytes_moved >= rows.tensor.nbytes
        True
    """
    schema = getattr(operator, "_schema", None)
    name = str(operator if schema is None else schema.name.rpartition("::")[2])
    name = getattr(operator, "__name__", name) if schema is None else name
    if name in DECLARED:
        return DECLARED[name](*args, **kwargs)
    function = getattr(reference, name, None)
    if name not in reference.__all__ or function is None:
        return None
    counter = _Counter()
    args, kwargs = tree_map(_on_meta, (args, kwargs))
    with counter:
        function(*args, **kwargs)
    return Cost(counter.launches, counter.bytes_moved, counter.scratch)


def _on_meta(value: Any) -> Any:
    """An argument on the meta device, without its values."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, Rows | SoftmaxTerm):
        names = value.__dataclass_fields__
        return replace(value, **{name: _on_meta(getattr(value, name)) for name in names})
    return value


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators of torch that are more than views, and what they touch and hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.bytes_moved = self.scratch = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(answer) if isinstance(one, Tensor)]
        held = {one.untyped_storage()._cdata for one in inputs}
        new = [one for one in outputs if one.untyped_storage()._cdata not in held]
        if new or func._schema.is_mutable:
            self.launches += 1
            self.bytes_moved += sum(one.nbytes for one in {id(t): t for t in inputs + new}.values())
        for storage in map(Tensor.untyped_storage, new):
            self._live[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        self._live = {weak: size for weak, size in self._live.items() if not weak.expired()}  # type: ignore[no-untyped-call]
        self.scratch = max(self.scratch, sum(self._live.values()))
        return answer
