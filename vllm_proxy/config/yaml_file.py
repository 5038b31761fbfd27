"""`read_yaml`: reads a user's YAML file, or rejects it in one line, within a second.

A value that aliases repeat is counted each time, because code that prints, copies or validates the
result visits it each time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.text import has_lone_surrogate

MOST_BYTES = 2**17
"""Limit on a file's size, and on its size with aliases written out."""
PER_VALUE = 16
"""Size that a value counts for in addition to its text."""
DEEPEST = 64
"""Limit on nested mappings and lists."""
_NOT_PLAIN = {"binary", "omap", "pairs", "set", "timestamp"}
"""Kinds of values that YAML has and JSON, in which they are passed on, does not."""


def read_yaml(path: str | Path, source: str, remedy: str) -> Any:
    """Return the content of a YAML file: mappings, lists, text, numbers, true, false and null.

    Args:
        path: the file.
        source: the name of the file in errors.
        remedy: what to do if it cannot be read.

    Raises:
        ProxyConfigError: the file cannot be read, is not YAML, is too large or too deep, or
            contains a key twice.
    """
    return _parsed(path, source, remedy, _Loader.get_single_data)


def require_bounded_yaml(path: str | Path, source: str, remedy: str) -> None:
    """Reject a YAML file that is too large or too deep or contains a key twice; ignore its tags.

    Raises:
        ProxyConfigError: as `read_yaml` does.
    """
    _parsed(path, source, remedy, _Loader.get_single_node)


def _parsed(path: str | Path, source: str, remedy: str, parse: Any) -> Any:
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ProxyConfigError(f"more than {MOST_BYTES:,} bytes", field=source, remedy=remedy)
        return parse(_Loader(text.decode()))
    except (OSError, ValueError) as error:
        if isinstance(error, ProxyConfigError):
            raise
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ProxyConfigError(reason, field=source, remedy=remedy) from None
    except _RefusedError as error:
        raise ProxyConfigError(f"line {error.line}: {error.problem}", field=source) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "reason", None) or "it cannot be parsed"  # a forbidden character
        problem = getattr(error, "problem", None) or reason
        raise ProxyConfigError(f"not YAML{where}: {problem}", field=source) from None


class _RefusedError(yaml.MarkedYAMLError):
    """The file is YAML, but uses something that we reject."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem=problem, problem_mark=mark)
        self.line = mark.line + 1


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data, with limits on size and depth; rejects duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.written_size = 0
        self.extents: dict[Node, tuple[int, int]] = {}  # size and depth, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self.depth += 1
        if self.depth > DEEPEST:  # before PyYAML, which is recursive, exceeds the stack
            raise _RefusedError(f"more than {DEEPEST} levels deep; use fewer", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and node not in self.extents:
            raise _RefusedError("an alias within what it stands for; write it out", mark)
        if not is_alias:
            self._measure(node)
        size, depth = self.extents[node]
        if max(size, self.written_size) > MOST_BYTES:
            raise _RefusedError(
                f"more than {MOST_BYTES:,} characters, with aliases written out; shorten it", mark
            )
        if self.depth + depth > DEEPEST:
            raise _RefusedError(f"more than {DEEPEST} levels deep; use fewer", mark)
        return node

    def _measure(self, node: Node) -> None:
        written = PER_VALUE + (len(node.value) if isinstance(node, ScalarNode) else 0)
        self.written_size += written
        extents = [self.extents[child] for child in _children(node)]
        size = written + sum(size for size, _ in extents)
        self.extents[node] = size, 1 + max((depth for _, depth in extents), default=0)

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (first := seen.setdefault((key.tag, key.value), key)) is not key:
                raise _RefusedError(
                    f"the key `{key.value}` again, which line {first.start_mark.line + 1} has; "
                    "remove one of them",
                    key.start_mark,
                )
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind not in _NOT_PLAIN:
            try:
                value = super().construct_object(node, deep)
            except yaml.YAMLError:
                raise
            except Exception:  # noqa: BLE001 - PyYAML raises any kind where a tag does not fit
                pass
            else:
                if not isinstance(value, str) or not has_lone_surrogate(value):
                    return value
        raise _RefusedError(
            f"{_shown(node)} is read as a value of the kind `{kind}`, which cannot be used; write "
            "it as text, in quotes",
            node.start_mark,
        )

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        for key in values:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise _RefusedError(
                    f"a key is read as {key!r}, not as text; write it in quotes", node.start_mark
                )
        return values


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _shown(node: Node) -> str:
    return ascii(node.value[:40]) if isinstance(node, ScalarNode) else "this"
