"""The rules of the repository: what may import what, lengths of functions, one formula."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.api import read_configuration
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
FILES = sorted((ROOT / "vllm_proxy").rglob("*.py"))
MOST_LINES = 60


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported(path: Path) -> set[str]:
    """Return the modules, and the names in them, that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_test_module_is_imported():
    """What tests share is in `tests/support`."""
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    tests = {path.stem for path in ROOT.glob("tests/test_*.py")} | {"conftest"}
    assert len(tests) > 30
    found = {path.name: imported(path) & tests for path in files}
    assert not any(found.values()), found


def test_no_support_file_hides_the_standard_library():
    assert not {path.stem for path in SUPPORT.glob("*.py")} & sys.stdlib_module_names


def test_rooms_depend_on_rooms_below_them(capsys, monkeypatch):
    """The contracts of pyproject.toml, which `make lint` checks as well."""
    monkeypatch.chdir(ROOT)
    assert len(read_configuration("pyproject.toml")["contracts_options"]) == 2
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    """But for the commands of the command line, most of which is a list of options."""
    for function in functions(path):
        first = function.body[0].lineno if path.parent.name == "cli" else function.lineno
        assert function.end_lineno - first < MOST_LINES, f"{path}:{function.lineno}"


def test_the_formula_is_one_line():
    """What is fast is tested against it; a second copy could say something else."""
    sums = [
        f"{path.name}: {source}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add)
        and {"base", "expert", "antiexpert"} <= set(re.findall(r"\w+", source := ast.unparse(node)))
    ]
    assert sums == ["fusion.py: base + alpha * (expert - antiexpert)"]
    shifts = [
        (path.name, function.name)
        for path in FILES
        for function in functions(path)
        if any(
            isinstance(node, ast.BinOp) and ast.unparse(node).endswith("* (expert - antiexpert)")
            for node in ast.walk(function)
        )
    ]
    assert shifts == [("fusion.py", "fuse")]
