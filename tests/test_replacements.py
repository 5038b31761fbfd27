"""What the package replaces in vLLM is in one list."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import vllm_proxy
from vllm_proxy.engine.replacements import REPLACEMENTS

PACKAGE = Path(vllm_proxy.__file__).parent


def replacements(tree: ast.AST) -> Iterator[str]:
    """Yield what a file replaces in objects that are not its own: targets of assignments.

    These are `__class__`, anything of a name that is imported from vLLM, attributes that get a
    function, a class or an instance of a class of this file, attributes that get a wrapper of what
    they had, items of private tables, and all calls of `setattr` with a name that is not known
    before.
    """
    nodes = list(ast.walk(tree))
    of_vllm = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    defined = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            yield ast.unparse(node)
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if not isinstance(target, ast.Attribute | ast.Subscript):
                continue
            root = ast.unparse(target).split(".")[0].split("[")[0]
            made = node.value.func if isinstance(node.value, ast.Call) else node.value
            is_made_here = (
                isinstance(node.value, ast.Lambda)
                or (isinstance(made, ast.Name) and made.id in defined)
                or (isinstance(node.value, ast.Attribute) and node.value.attr in defined)
            )
            is_class = isinstance(target, ast.Attribute) and target.attr == "__class__"
            is_attribute_of_another = isinstance(target, ast.Attribute) and root != "self"
            is_item = isinstance(target, ast.Subscript) and not isinstance(target.slice, ast.Slice)
            is_private_item = is_item and "._" in ast.unparse(target)
            is_of_another = is_private_item and root != "self"
            is_of_another |= is_made_here and is_attribute_of_another
            if is_class or root in of_vllm or is_of_another:
                yield ast.unparse(target)


def test_replacements_are_found():
    """In each of their forms; assignments to what is our own are none."""
    source = """
from vllm.somewhere import Theirs
def wrapped(f): ...
class Ours: ...
def install(theirs, name):
    theirs.__class__ = Ours
    Theirs.method = wrapped
    Theirs.TABLE['x'] = 1
    theirs.function = wrapped(theirs.function)
    theirs.layer = Ours()
    theirs.key = lambda: 1
    theirs._table[name] = 1
    setattr(theirs, name, 1)
class More(Theirs):
    def __init__(self):
        self.method = wrapped
        self.part = Ours()
        self.other.size = 3
"""
    assert list(replacements(ast.parse(source))) == [
        "theirs.__class__",
        "Theirs.method",
        "Theirs.TABLE['x']",
        "theirs.function",
        "theirs.layer",
        "theirs.key",
        "theirs._table[name]",
        "setattr(theirs, name, 1)",
    ]


# A configuration in a process that only checks it.
NOT_REPLACED = {
    ("preflight/check/dry_start.py", "setattr(vllm_config.parallel_config, name, 1)"),
}


def test_every_replacement_is_listed():
    found = Counter(
        (str(path.relative_to(PACKAGE)), target)
        for path in sorted(PACKAGE.rglob("*.py"))
        for target in replacements(ast.parse(path.read_text()))
    )
    assert set(found) - NOT_REPLACED == {(one.file, one.target) for one in REPLACEMENTS}
