"""Every architecture that vLLM has is run by the tests, refused by name, or listed as not run.

Read from source, so that those of the newest vLLM are found before anyone installs it.
"""

import ast
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.architectures import (
    ELSEWHERE,
    HARDWARE,
    MULTIMODAL_CLASSES,
    NOT_RUN,
    OBSTACLES,
    RECURRENT,
    REGISTRY,
    bases,
    compared,
    read_as_text,
    refused,
    registered,
    unknown,
    written,
)
from support.matrix import families_of
from support.members_page import NAMES, PAGE, replaced
from support.newest_vllm import newest_tree
from support.tiny_models import TRIPLES
from support.vllm_source import SourceTree

TESTS = Path(__file__).parent
RECURRENT_CLASSES = {"IsHybrid", "IsAttentionFree"}


@pytest.fixture(scope="module")
def trees() -> dict[str, SourceTree]:
    installed = SourceTree(Path(find_spec("vllm").origin).parents[1])
    return {"installed": installed, "newest": newest_tree()}


@pytest.mark.parametrize("version", ["installed", "newest"])
def test_every_architecture_is_tested_or_refused_or_listed(trees, version):
    found = unknown(registered(trees[version].root))
    assert not found, (
        f"vLLM {trees[version].version} has classes that are neither tested nor refused by name: "
        f"{', '.join(found)}; add them to MATRIX (tests/support/matrix.py), or say in "
        "tests/support/architectures.py why they are not run"
    )


def test_what_vllm_adds_is_found(trees, tmp_path):
    """A text model by name; a multimodal one is refused."""
    text = (trees["installed"].root / "vllm" / REGISTRY).read_text()
    for table in ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS"):
        old = f"{table} = {{\n"
        assert old in text
        text = text.replace(old, f'{old}    "New{table}": ("new", "New"),\n')
    path = tmp_path / "vllm" / REGISTRY
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert unknown(registered(tmp_path)) == ["New_TEXT_GENERATION_MODELS"]


def test_every_listed_architecture_exists(trees):
    tables = [registered(tree.root) for tree in trees.values()]
    names = {name for registries in tables for table in registries.values() for name in table}
    absent = [name for part in written().values() for name in part if name not in names]
    assert not absent, f"no supported vLLM has {', '.join(absent)}; remove them"


def test_each_architecture_is_in_one_list():
    """What the tests begin to run is no longer said to be run by hand, or not at all."""
    counts = Counter(name for names in written().values() for name in names)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", "newest"])
def test_classes_are_of_the_kinds_that_the_lists_say(trees, version):
    """By what vLLM asks: the interfaces that a class inherits from."""
    tree = trees[version]
    tables = registered(tree.root)
    wrong = []
    recurrent = {*NOT_RUN[RECURRENT], *(n for one in OBSTACLES for n in one.architectures)}
    for registry, table in tables.items():
        for name, (module, cls) in table.items():
            inherited = bases(tree, module, cls)
            multimodal = not inherited.isdisjoint(MULTIMODAL_CLASSES)
            if multimodal != (name in refused(tables) or name in read_as_text()):
                wrong.append(f"{registry}: {name} is {'' if multimodal else 'not '}multimodal")
            if (name in NOT_RUN[HARDWARE]) != (is_apart(module) and not_run(name)):
                wrong.append(f"{name} is in {module}")
            if name in NOT_RUN[RECURRENT] and inherited.isdisjoint(RECURRENT_CLASSES):
                wrong.append(f"{name} has no recurrent layers")
            known = name in recurrent or name in compared() or is_apart(module) or multimodal
            if not known and not inherited.isdisjoint(RECURRENT_CLASSES):
                wrong.append(f"{name} has recurrent layers")
    assert wrong == []


def is_apart(module: str) -> bool:
    """Whether vLLM has a model in a package with code for certain hardware."""
    return module.startswith("vllm.models.")


def not_run(name: str) -> bool:
    return any(name in names for names in NOT_RUN.values())


@pytest.mark.parametrize("run", ELSEWHERE, ids=lambda run: run.family)
def test_tests_of_families_exist(run):
    file, _, name = run.test.partition(":")
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert name in functions
    written = {*strings, *(f for t in strings & TRIPLES.keys() for f in families_of(t).values())}
    assert run.family in written or file == "test_exactness"  # which has it from `matrix.py`


def test_every_tested_architecture_has_a_name():
    assert NAMES.keys() == compared().keys()


def test_the_page_is_up_to_date():
    text = PAGE.read_text()
    assert replaced(text) == text, f"{PAGE.name} is out of date; run `make members-page`"
