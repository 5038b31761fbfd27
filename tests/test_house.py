"""The layout of the repository: what may import what, and how long a function may be."""

import ast
import sys
from pathlib import Path

from importlinter.api import read_configuration
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"


def imported(path: Path) -> set[str]:
    """Return the modules, and the names in them, that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_rooms_import_only_rooms_below_them(capsys, monkeypatch):
    """The contracts in `pyproject.toml`, as `make lint` holds them."""
    monkeypatch.chdir(ROOT)
    assert len(read_configuration("pyproject.toml")["contracts_options"]) >= 2
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out
