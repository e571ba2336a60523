"""Loads of kernels that are not widened where they are loaded.

Arithmetic on narrow values is rounded at every step on a GPU; the interpreter computes with the
bits of those in bfloat16, in silence.
"""

import ast
from collections.abc import Iterator

# By the pointer that a load begins with: whole numbers, or truth values.
WHOLE = {
    *("chunks.tensor", "clear_rows.index", "columns_mask", "ends", "ids.tensor", "mask.tensor"),
    *("fused_target.ids", "fused_target.labels", "fused_target.names", "teacher_of.tensor"),
    *("in_image", "lists.in_image", "lists.ranges", "lists.student_ids", "lists.teacher_ids"),
    *("matched.missing", "matched.valid", "memory.ends", "memory.waiting"),
    *("other.counts", "partners", "rows.numbers", "sequence", "settings.partners", "side.at"),
    *("side.counts", "side.mask", "student.order", "student_ids", "targets.tensor"),
    *("teacher_ids", "term.columns", "term.ids"),
}
# Made by kernels, or widened before one starts.
FLOAT32 = {
    *("_count_above.row", "_sorted_log_total.row", "student.entries", "teacher.entries", "tails"),
    *("column_side.potentials", "row_side.potentials", "row_side.gradient"),
    *("sinkhorn_backward.cost_grad", "softmax.deviations", "softmax.normalizers"),
    *("distance", "targets.distance", "targets.entries"),
    *("term.normalizers", "term.totals", "term.weights"),
}
KNOWN = WHOLE | FLOAT32


def assignments(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """What each name of a function is given first."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            (target,), value = node.targets, node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, one in pairs:
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, one)
    return found


def pointer(node: ast.expr, given: dict[str, ast.expr]) -> str:
    """What a sum begins with, names of the function replaced by what they are given."""
    while isinstance(node, ast.BinOp) or (isinstance(node, ast.Name) and node.id in given):
        node = node.left if isinstance(node, ast.BinOp) else given[node.id]
    return ast.unparse(node)


def is_widened(load: ast.Call, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a loaded value becomes a wide float or bits at once, or is only stored elsewhere."""
    parent = parents[load]
    if isinstance(parent, ast.Call) and ast.unparse(parent.func) == "tl.store":
        return parent.args[1] is load
    call = parents[parent]
    if not (isinstance(parent, ast.Attribute) and parent.attr == "to"):
        return False
    written = ast.unparse(call).removeprefix(ast.unparse(parent))
    return written in ("(tl.float32)", "(tl.float64)", "(tl.int16, bitcast=True)")


def loads(source: str) -> Iterator[tuple[str, bool]]:
    """Every load of a module as function.pointer, and whether it is widened."""
    tree = ast.parse(source)
    parents = {child: one for one in ast.walk(tree) for child in ast.iter_child_nodes(one)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            given = assignments(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                    name = f"{function.name}.{pointer(node.args[0], given)}"
                    yield name, is_widened(node, parents)


def known(name: str) -> set[str]:
    """The names in `KNOWN` that a load has."""
    return {name, name.partition(".")[2]} & KNOWN


def narrow_loads(source: str) -> list[str]:
    """Loads that may be of narrow values and are not widened."""
    return [name for name, wide in loads(source) if not (wide or known(name))]
