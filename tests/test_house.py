"""The rules by which the package is arranged: rooms, lengths of functions, one formula."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "vllm_proxy").rglob("*.py"))
MOST_LINES = 60


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_rooms_depend_on_rooms_below_them():
    """The contracts of pyproject.toml, which `make lint` checks as well."""
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "Contracts: 2 kept, 0 broken." in result.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    """But for the commands of the command line, most of which is a list of options."""
    for function in functions(path):
        first = function.body[0].lineno if path.parent.name == "cli" else function.lineno
        assert function.end_lineno - first < MOST_LINES, f"{path}:{function.lineno}"


def test_the_formula_is_one_line():
    """What is fast is tested against it; a second copy could say something else."""

    def is_formula(node: ast.AST) -> bool:
        return ast.unparse(node).endswith("* (expert - antiexpert)") and isinstance(node, ast.BinOp)

    found = [
        (path.name, function.name)
        for path in FILES
        for function in functions(path)
        if any(map(is_formula, ast.walk(function)))
    ]
    assert found == [("fusion.py", "fuse")]
