"""Formatting, lint, types and lists of parameters, so that one command checks everything."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
}
MOST_POSITIONAL = 8


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_is_clean(command):
    program = Path(sys.executable).with_name(command[0])
    found = str(program) if program.exists() else shutil.which(command[0])
    assert found, f"{command[0]} is not installed; install the extra 'test'"
    done = subprocess.run([found, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_belongs_together_is_passed_together():
    """No function, kernels included, has more positional parameters than one can keep apart."""
    found = []
    for file in sorted((ROOT / "ctkd").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                count = len(node.args.posonlyargs) + len(node.args.args)
                if count > MOST_POSITIONAL:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno} has {count}")
    assert not found, "\n".join(found)
