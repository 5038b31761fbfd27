"""Every supported vLLM has what we depend on; one without a name or a parameter fails by name.

Read from source, so that the newest vLLM is looked at before anyone installs it.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

import vllm_proxy
from support.newest_vllm import newest_tree
from support.vllm_source import Absent, SourceTree, imports
from vllm_proxy.engine.compatibility import (
    REQUIRED,
    REQUIRED_BY_PART,
    SUPPORTED_VLLM,
    require_part,
    require_supported_vllm,
)

EVERY = REQUIRED | {
    seam: names for part in REQUIRED_BY_PART.values() for seam, names in part.items()
}


@pytest.fixture(scope="session")
def newest():
    """Without it the tests fail: they would show nothing."""
    return newest_tree()


@pytest.fixture(scope="session", params=["installed", "newest"])
def tree(request):
    """A source tree to look things up in."""
    if request.param == "newest":
        return request.getfixturevalue("newest")
    return SourceTree(Path(find_spec("vllm").origin).parents[1])


@pytest.mark.parametrize("seam", EVERY)
def test_seam(tree, seam):
    tree.check(seam, EVERY[seam])


@pytest.mark.parametrize("part", REQUIRED_BY_PART)
def test_the_installed_vllm_is_supported_at_run_time(part):
    require_supported_vllm()
    require_part(part)


def test_every_import_is_listed():
    """A new import from vLLM is looked up, too; but for those that only type checkers see."""
    split = [seam.partition(":") for seam in EVERY]
    listed = {(module, path.split(".")[0]) for module, _, path in split}
    listed |= {tuple(module.rsplit(".", 1)) for module, *_ in split}  # `from vllm import envs`
    unlisted = {
        f"{file.name}: {module}:{name}"
        for file in sorted(Path(vllm_proxy.__file__).parent.rglob("*.py"))
        for module, name in imports(file)
        if module.split(".")[0] == "vllm" and (module, name) not in listed
    }
    assert not unlisted


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model_executor/model_loader/default_loader.py", "secondary_weights"),
        ("v1/worker/gpu/model_runner.py", "compute_logits_local"),
    ],
)
def test_name_is_looked_up_on_the_model(tree, file, name):
    """What vLLM asks our model for by name, so that no signature shows it."""
    assert f'"{name}"' in (tree.root / "vllm" / file).read_text()


def test_newest_is_supported(newest):
    version = tuple(int(part) for part in newest.version.split(".")[:2])
    assert SUPPORTED_VLLM[0] <= version < SUPPORTED_VLLM[1]


@pytest.mark.parametrize(
    "seam",
    [
        "vllm.nowhere:x",
        "vllm:NoSuchClass",
        "vllm.config:NoSuchConfig",
        "vllm.config:ModelConfig.no_such_field",
        "vllm.config:ModelConfig.get_hidden_size.no_such_attribute",
        "vllm.envs:VLLM_NO_SUCH_VARIABLE",
        "vllm.platforms:no_such_platform",
        "vllm:LLM.no_such_attribute",
        "vllm.model_executor.models:ModelRegistry.no_such_method",
    ],
)
def test_missing_name_is_found_out(tree, seam):
    with pytest.raises(Absent, match=seam):
        tree.check(seam, ())


@pytest.mark.parametrize(
    "seam",
    [
        "vllm:EngineArgs",  # a dataclass
        "vllm:SamplingParams",  # a msgspec struct
        "vllm:CompletionOutput",
        "vllm:LLM.enqueue",  # found through a lazy import
        "vllm.config:ModelConfig",  # a pydantic dataclass
        "vllm.model_executor.models:ModelRegistry.register_model",  # of an instance
        "vllm.compilation.backends:set_model_tag",  # decorated
        "vllm.config:ModelConfig.architecture",  # takes none
    ],
)
def test_missing_parameter_is_found_out(tree, seam):
    with pytest.raises(Absent, match=f"`{seam}` has no parameter `no_such_parameter`"):
        tree.check(seam, ("no_such_parameter",))


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory):
    """The ways in which vLLM defines, moves and hides names."""
    root = tmp_path_factory.mktemp("source")
    files = {
        "__init__.py": """
            import typing
            TABLE = {"Lazy": ".base:Base"}
            if typing.TYPE_CHECKING:
                from vllm.base import Base as Lazy, Typed
            else:
                def __getattr__(name):
                    return TABLE[name]
        """,
        "base.py": """
            from typing import ClassVar, Generic, overload
            from dataclasses import dataclass, field
            @overload
            def function(old): ...
            @overload
            def function(): ...
            def function(new, *, keyword=None): ...
            try:
                import fast
            except ImportError:
                def fallback(): ...
            class Base:
                def __init__(self, own, **rest):
                    self.made = own
                def method(self, argument): ...
            @dataclass
            class Record:
                first: int
                shared: ClassVar[int] = 0
                derived: int = field(default=0, init=False)
            @dataclass
            class Longer(Record):
                second: int = 0
        """,
        "package/__init__.py": """
            from ..base import *
            from . import inner
            from .inner import Child as Renamed
        """,
        "package/inner.py": """
            from vllm.base import Base
            class Child(Base, Generic[int]):
                def own(self, *arguments): ...
            Alias = Child
            instance = Child()
        """,
    }
    for name, text in files.items():
        path = root / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        path.write_text("\n".join(line[12:] for line in lines))
    return SourceTree(root)


@pytest.mark.parametrize(
    ("seam", "parameters"),
    [
        ("vllm:Lazy.method", ("self", "argument")),
        ("vllm.base:function", ("new", "keyword")),
        ("vllm.base:fallback", ()),
        ("vllm.base:Base", ("own", "anything")),
        ("vllm.base:Base.made", ()),
        ("vllm.base:Longer", ("first", "second")),
        ("vllm.base:Longer.shared", ()),
        ("vllm.package:function", ("new",)),
        ("vllm.package:inner.Child", ("own",)),
        ("vllm.package:Renamed.method", ("argument",)),
        ("vllm.package:Renamed.own", ("arguments",)),
        ("vllm.package.inner:Alias.made", ()),
        ("vllm.package.inner:instance.method", ("argument",)),
    ],
)
def test_what_is_there_is_found(small_tree, seam, parameters):
    small_tree.check(seam, parameters)


@pytest.mark.parametrize(
    ("seam", "parameters"),
    [
        ("vllm:Typed", ()),  # imported for type checkers alone
        ("vllm:lazy", ()),
        ("vllm.base:function", ("old",)),  # of an overload, not of the function
        ("vllm.base:Base.own", ()),
        ("vllm.base:Longer", ("shared",)),
        ("vllm.base:Longer", ("derived",)),
        ("vllm.package:Child", ()),
        ("vllm.package:inner.Base.nothing", ()),
        ("vllm.package.inner:instance.method", ("other",)),
    ],
)
def test_what_is_not_there_is_not_found(small_tree, seam, parameters):
    with pytest.raises(Absent, match=seam):
        small_tree.check(seam, parameters)
