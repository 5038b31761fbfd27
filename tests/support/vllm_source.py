"""What a vLLM source tree defines, read without importing it; and where to get the newest one."""

import ast
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import BinaryIO

from vllm_proxy.engine.compatibility import SUPPORTED_VLLM

CACHE = Path(__file__).parents[1] / ".cache"
TREE_VARIABLE = "VLLM_PROXY_NEWEST_VLLM"


class Absent(Exception):
    """A name, or a parameter of it, is not in the tree."""


@dataclass(frozen=True)
class Module:
    """A module's own definitions. `names` are its module-level bindings: the last one of each."""

    name: str
    is_package: bool
    names: dict[str, ast.AST]
    stars: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A definition and the module it is in. Of an assignment, `node` is the value."""

    module: Module
    node: ast.AST


class SourceTree:
    """The package below *root* (`root/vllm/__init__.py`), by its syntax trees alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = cache(self._module)

    @cached_property
    def version(self) -> str:
        """As the wheel says in `vllm/_version.py`."""
        return ast.literal_eval(self.find("vllm._version:__version__").node)

    def check(self, seam: str, parameters: tuple[str, ...]) -> None:
        """Raise `Absent` unless the tree has *seam* and it takes every one of *parameters*."""
        found = self.find(seam)
        if not parameters:
            return
        known = self._parameters(found)
        for name in parameters:
            if name not in known and "**" not in known:
                raise Absent(f"`{seam}` has no parameter `{name}`, only {', '.join(known)}")

    def find(self, seam: str) -> Found:
        """Return what `module:attribute.path` is. Raises `Absent`."""
        module, _, path = seam.partition(":")
        first, *others = path.split(".")
        found = self._global(module, first)
        for name in others:
            found = found and self._attribute(found, name)
        if found is None:
            raise Absent(f"no `{seam}`")
        return found

    def _module(self, name: str) -> Module | None:
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if not path.is_file():
            return None
        body = ast.parse(path.read_bytes()).body
        names = {name: node for name, node in _bindings(body)}
        stars = [
            node
            for node in _statements(body)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]
        module = Module(name, base.is_dir(), names, ())
        return Module(name, base.is_dir(), names, tuple(_source(module, star) for star in stars))

    def _global(self, module_name: str, name: str) -> Found | None:
        module = self.module(module_name)
        if module is None:
            return None
        node = module.names.get(name)
        if node is not None:
            return self._followed(Found(module, node), name)
        if lazy := self._lazy(module, name):
            return lazy
        for star in module.stars:
            if found := self._global(star, name):
                return found
        return None

    def _followed(self, found: Found, name: str) -> Found | None:
        """Go on to where an import, an alias or the class of an instance is defined."""
        module, node = found.module, found.node
        if isinstance(node, ast.ImportFrom):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            source = _source(module, node)
            if self.module(f"{source}.{original}"):
                return Found(self.module(f"{source}.{original}"), ast.Module([], []))
            if source.split(".")[0] != "vllm":
                return found
            return self._global(source, original)
        called = node.func if isinstance(node, ast.Call) else node
        if isinstance(called, ast.Name) and called.id != name:  # `LLMEngine = V1LLMEngine`, `A()`
            other = self._global(module.name, called.id)
            if other and (called is node or isinstance(other.node, ast.ClassDef)):
                return other
        return found

    def _lazy(self, module: Module, name: str) -> Found | None:
        """Find what a module's `__getattr__` makes: named in it, or a key of a table beside it."""
        getter = module.names.get("__getattr__")
        if getter is None:
            return None
        for table in module.names.values():
            if not isinstance(table, ast.Dict):
                continue
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    target = value.value if isinstance(value, ast.Constant) else None
                    if not isinstance(target, str) or ":" not in target:
                        return Found(module, value)
                    source, _, attribute = target.partition(":")  # ".entrypoints.llm:LLM"
                    return self._global(_absolute(module, source), attribute)
        named = any(isinstance(n, ast.Constant) and n.value == name for n in ast.walk(getter))
        return Found(module, getter) if named else None

    def _classes(self, found: Found) -> Iterator[Found]:
        """Yield a class and its bases, as far as they are in the tree, nearest first."""
        if not isinstance(found.node, ast.ClassDef):
            return
        yield found
        for base in found.node.bases:
            while isinstance(base, ast.Subscript):  # `Protocol[T]`
                base = base.value
            other = self._global(found.module.name, base.id) if isinstance(base, ast.Name) else None
            if other is not None and other.node is not found.node:
                yield from self._classes(other)

    def _attribute(self, found: Found, name: str) -> Found | None:
        if isinstance(found.node, ast.Module):
            return self._global(found.module.name, name)
        for owner in self._classes(found):
            members = dict(_bindings(owner.node.body))
            if name in members:
                return Found(owner.module, members[name])
        for owner in self._classes(found):  # set on instances
            for node in ast.walk(owner.node):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and (node.value.id, node.attr) == ("self", name)
                ):
                    return Found(owner.module, node)
        return None

    def _parameters(self, found: Found) -> list[str]:
        """Return what may be given by name or by place; `**` stands for any name."""
        if isinstance(found.node, ast.ClassDef):
            for owner in self._classes(found):
                members = dict(_bindings(owner.node.body))
                if "__init__" in members:
                    return self._parameters(Found(owner.module, members["__init__"]))
                if _is_record(owner.node):
                    return list(dict.fromkeys(self._fields(found)))
            return []
        if not isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return []
        args = found.node.args
        names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
        names += [args.vararg.arg] if args.vararg else []
        return names + (["**"] if args.kwarg else [])

    def _fields(self, found: Found) -> Iterator[str]:
        """Yield the fields that a dataclass or a struct takes when it is made."""
        for owner in self._classes(found):
            for node in owner.node.body:
                if (
                    isinstance(node, ast.AnnAssign)
                    and isinstance(node.target, ast.Name)
                    and "ClassVar" not in ast.unparse(node.annotation)
                    and "init=False" not in ast.unparse(node.value or node.annotation)
                ):
                    yield node.target.id


def _is_record(node: ast.ClassDef) -> bool:
    """Whether `__init__` is made from the fields: by a decorator, or by msgspec."""
    made_by = [
        ast.unparse(other).partition("(")[0] for other in (*node.decorator_list, *node.bases)
    ]
    records = ("dataclass", "dataclasses.dataclass", "config", "msgspec.Struct")
    return any(name in records for name in made_by)


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


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the names that a module or class binds, in order; of overloads the last is real."""
    for node in _statements(body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value or node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.value


def _source(module: Module, node: ast.ImportFrom) -> str:
    return _absolute(module, "." * node.level + (node.module or ""))


def _absolute(module: Module, name: str) -> str:
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    parts = module.name.split(".")
    parts = parts[: len(parts) - level + module.is_package]
    return ".".join([*parts, name[level:]] if name[level:] else parts)


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of every `from … import …` that runs, wherever in the file it is."""
    tree = ast.parse(file.read_bytes())
    for scope in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))):
        for node in _statements(scope.body):
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    yield node.module, alias.name


def newest_tree() -> SourceTree:
    """Return the newest supported vLLM: a wheel's Python files, read from pip's index once.

    Raises:
        RuntimeError: it cannot be had; says how to do without.
    """
    if given := os.environ.get(TREE_VARIABLE):
        if not Path(given, "vllm", "__init__.py").is_file():
            raise RuntimeError(f"{TREE_VARIABLE}={given}: there is no vllm/__init__.py below it")
        return SourceTree(Path(given))
    requirement = f"vllm<{'.'.join(map(str, SUPPORTED_VLLM[1]))}"
    try:
        version, url = _wheel(requirement)
        root = CACHE / f"vllm-{version}"
        if not root.is_dir():  # made whole, or not at all
            CACHE.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                try:
                    _extract(io.BufferedReader(_RemoteFile(url), 2**20), Path(scratch, "tree"))
                except OSError:  # no server of parts: all of it, then, as pip knows how to get it
                    _pip("download", "--dest", scratch, f"vllm=={version}")
                    (wheel,) = Path(scratch).glob("*.whl")
                    _extract(wheel, Path(scratch, "tree"))
                Path(scratch, "tree").rename(root)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise RuntimeError(
            f"the newest `{requirement}` cannot be had: {error}\nWithout a network, unpack its "
            f"wheel and set {TREE_VARIABLE} to the directory that holds `vllm/`"
        ) from error
    return SourceTree(root)


def _wheel(requirement: str) -> tuple[str, str]:
    """Ask pip, which knows this machine's index, for the version and the URL of the wheel."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        _pip("install", "--dry-run", "--ignore-installed", "--report", str(report), requirement)
        (package,) = json.loads(report.read_text())["install"]
    return package["metadata"]["version"], package["download_info"]["url"]


def _pip(command: str, *arguments: str) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--quiet"]
    line = [sys.executable, "-m", "pip", command, *options, *arguments]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"pip says: {run.stderr.strip()}")


def _extract(file: Path | BinaryIO, root: Path) -> None:
    """Unpack the Python files alone: a twentieth of the wheel, which is mostly kernels."""
    with zipfile.ZipFile(file) as wheel:
        files = [
            info
            for info in wheel.infolist()
            if info.filename.startswith("vllm/") and info.filename.endswith(".py")
        ]
        wheel.extractall(root, sorted(files, key=lambda info: info.header_offset))


class _RemoteFile(io.RawIOBase):
    """A file behind a URL, read in ranges."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        head = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(head, timeout=60) as response:
            self.size = int(response.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        part = {"Range": f"bytes={self.position}-{end - 1}"}
        request = urllib.request.Request(self.url, headers=part)
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:
                raise OSError(f"{self.url} cannot be read in parts")
            data = response.read()
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
