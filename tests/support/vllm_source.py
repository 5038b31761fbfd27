"""What a vLLM source tree defines, read without importing it.

griffe reads a module and says what is in it. Here is what it does not do: read no more modules than
a name leads through, look behind a module's `__getattr__`, follow an alias that is an assignment,
and find attributes that a method other than `__init__` sets.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe


class Absent(Exception):
    """A name, or a parameter of it, is not in the tree."""


class SourceTree:
    """The package below *root* (`root/vllm/__init__.py`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules = griffe.ModulesCollection()
        self._lines = griffe.LinesCollection()
        self._module = cache(self._read)

    @property
    def version(self) -> str:
        """As the wheel says in `vllm/_version.py`."""
        return ast.literal_eval(self.find("vllm._version:__version__").value)

    def check(self, seam: str, parameters: tuple[str, ...]) -> None:
        """Raise `Absent` unless the tree has *seam* and it takes every one of *parameters*."""
        found = self.find(seam)
        if not parameters:
            return
        known = self._parameters(found)
        for name in parameters:
            if name not in known and "**" not in known:
                raise Absent(f"`{seam}` has no parameter `{name}`, only {', '.join(known)}")

    def find(self, seam: str) -> griffe.Object:
        """Return what `module:attribute.path` is. Raises `Absent`."""
        module, _, path = seam.partition(":")
        found = self._module(module)
        for name in path.split("."):
            found = found and self._member(found, name)
        if found is None:
            raise Absent(f"no `{seam}`")
        return found

    def bases(self, seam: str) -> set[str]:
        """Return the names of a class and of its bases, as far as the tree has them.

        Raises:
            Absent: there is no such class.
        """
        found = self.find(seam)
        if found.is_alias or not found.is_class:
            raise Absent(f"`{seam}` is not a class")
        return {one.name for one in self._classes(found)}

    def _read(self, name: str) -> griffe.Module | None:
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not path.is_file():
            return None
        parent_name, _, own = name.rpartition(".")
        parent = self._module(parent_name) if parent_name else None
        code = path.read_text()
        collections = {"lines_collection": self._lines, "modules_collection": self._modules}
        try:
            module = griffe.visit(own, path, code, parent=parent, **collections)
        except SystemError:  # CPython 3.11 adds up the depth of threads that compile at once
            module = griffe.visit(own, path, code, parent=parent, **collections)
        self._lines[path] = code.splitlines()
        if parent is None:
            self._modules.set_member(own, module)
        return module

    def _member(self, owner: griffe.Object, name: str) -> griffe.Object | None:
        if owner.is_alias:  # of what is not in the tree
            return None
        if owner.is_module:
            return self._global(owner, name)
        if not owner.is_class:
            return None
        classes = list(self._classes(owner))
        for one in classes:
            if name in one.members:
                return self._followed(one.members[name])
        return next((one for one in classes if name in _set_on_instances(one)), None)

    def _global(self, module: griffe.Module, name: str) -> griffe.Object | None:
        member = module.members.get(name)
        if member is not None and (member.runtime or name in _lazy_names(module.filepath)):
            return self._followed(member)
        if inner := self._module(f"{module.path}.{name}"):
            return inner
        if name in _lazy_names(module.filepath):
            return module.members["__getattr__"]
        for star in module.members.values():
            source = self._module(star.wildcard) if star.is_alias and star.wildcard else None
            if found := source and self._global(source, name):
                return found
        return None

    def _at(self, path: str) -> griffe.Object | None:
        """Return what a path of dots is."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if found := self._module(".".join(parts[:end])):
                for name in parts[end:]:
                    found = found and self._member(found, name)
                return found
        return None

    def _followed(self, found: griffe.Object | griffe.Alias) -> griffe.Object | None:
        """Go on to where an import, an alias or the class of an instance is defined."""
        if found.is_alias:
            inside = found.target_path.startswith("vllm.")
            return self._at(found.target_path) if inside else found
        if not found.is_attribute or found.parent is None or not found.parent.is_module:
            return found
        called = found.value.function if isinstance(found.value, griffe.ExprCall) else found.value
        if isinstance(called, griffe.ExprName) and called.name != found.name:
            other = self._global(found.parent, called.name)  # `LLMEngine = V1LLMEngine`, `A()`
            if other and (called is found.value or (not other.is_alias and other.is_class)):
                return other
        return found

    def _classes(self, found: griffe.Class) -> Iterator[griffe.Class]:
        """Yield a class and its bases, as far as they are in the tree, nearest first."""
        yield found
        for base in found.bases:
            while isinstance(base, griffe.ExprSubscript):  # `Protocol[T]`
                base = base.left
            other = self._global(found.module, base.name) if hasattr(base, "name") else None
            if other and not other.is_alias and other.is_class and other is not found:
                yield from self._classes(other)

    def _parameters(self, found: griffe.Object) -> list[str]:
        """Return what may be given by name or by place; `**` stands for any name."""
        if found.is_class:
            for one in self._classes(found):
                if "__init__" in one.members:
                    return self._parameters(one.members["__init__"])
                if _is_record(one):
                    classes = self._classes(found)
                    return [name for each in classes for name in _fields(each)]
        if not found.is_function:
            return []
        kinds = {parameter.name: parameter.kind for parameter in found.parameters}
        any_name = griffe.ParameterKind.var_keyword in kinds.values()
        return [*kinds, *(["**"] if any_name else [])]


@cache
def _syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@cache
def _lazy_names(path: Path) -> frozenset[str]:
    """Return what a module's `__getattr__` may make: named in it, or a key of a table beside it."""
    keys, getters = [], []
    for node in _statements(_syntax(path).body):
        if isinstance(getattr(node, "value", None), ast.Dict):
            keys += node.value.keys
        elif isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            getters.append(node)
    if not getters:
        return frozenset()
    nodes = [*keys, *ast.walk(getters[-1])]
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant))


@cache
def _set_on_instances(found: griffe.Class) -> frozenset[str]:
    """Return what methods set on `self`; griffe looks at `__init__` alone."""
    places = {
        node.end_lineno: node
        for node in ast.walk(_syntax(found.filepath))
        if isinstance(node, ast.ClassDef)
    }
    return frozenset(
        node.attr
        for node in ast.walk(places[found.endlineno])
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _is_record(found: griffe.Class) -> bool:
    """Whether `__init__` is made from the fields: by a decorator, or by msgspec."""
    made_by = [str(one.value) for one in found.decorators] + [str(base) for base in found.bases]
    records = ("dataclass", "dataclasses.dataclass", "config", "msgspec.Struct")
    return any(name.partition("(")[0] in records for name in made_by)


def _fields(found: griffe.Class) -> list[str]:
    """Return the fields that a dataclass or a struct takes when it is made."""
    return [
        name
        for name, member in found.members.items()
        if member.is_attribute
        and member.annotation is not None
        and "instance-attribute" in member.labels  # not a ClassVar
        and "init=False" not in str(member.value)
    ]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, with those under `if`, `try` and `with`.

    Not those under `if TYPE_CHECKING`, which are not there when it runs.
    """
    for node in body:
        yield node
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in ("orelse", "finalbody") if typing_only else ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", ()):
            yield from _statements(handler.body)


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of every `from … import …` that runs, wherever in the file it is."""
    tree = ast.parse(file.read_bytes())
    for scope in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))):
        for node in _statements(scope.body):
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    yield node.module, alias.name
