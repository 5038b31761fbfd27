"""`read_yaml`: a YAML file that a user wrote, read whole or refused in one line, within a second.

What the file says once and means many times (aliases) is counted as often as it is meant: whoever
prints, copies or validates the result writes it out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vllm_proxy.config.errors import ProxyConfigError

MOST_BYTES = 2**17
"""Of a file, and of what it means, aliases written out: a value has its text's, and `PER_VALUE`."""
PER_VALUE = 16
DEEPEST = 64
"""Most mappings and lists within each other."""
_NOT_PLAIN = {"binary", "omap", "pairs", "set", "timestamp"}
"""Kinds of values that YAML has and JSON, which they are passed on in, does not."""


def read_yaml(path: str | Path, source: str, remedy: str) -> Any:
    """Return what a YAML file says: mappings, lists, text, numbers, true, false and null.

    Args:
        path: of the file.
        source: what errors call it.
        remedy: what to do if it cannot be read.

    Raises:
        ProxyConfigError: it cannot be read, is no YAML, too large or too deep, or has a key twice.
    """
    return _parsed(path, source, remedy, _Loader.get_single_data)


def require_bounded_yaml(path: str | Path, source: str, remedy: str) -> None:
    """Refuse a YAML file, whatever its tags mean, that is too large or deep or says a key twice.

    Raises:
        ProxyConfigError: as `read_yaml` does.
    """
    _parsed(path, source, remedy, _Loader.get_single_node)


def _parsed(path: str | Path, source: str, remedy: str, parse: Any) -> Any:
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ProxyConfigError(f"{source}: more than {MOST_BYTES:,} bytes; {remedy}")
        return parse(_Loader(text.decode()))
    except (OSError, ValueError) as error:
        if isinstance(error, ProxyConfigError):
            raise
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ProxyConfigError(f"{source}: {reason}; {remedy}") from None
    except _RefusedError as error:
        line = error.problem_mark.line + 1
        raise ProxyConfigError(f"{source}: line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "reason", None) or "it cannot be parsed"  # of a character
        problem = getattr(error, "problem", None) or reason
        raise ProxyConfigError(f"{source}: not YAML{where}: {problem}") from None


class _RefusedError(yaml.MarkedYAMLError):
    """It is YAML, but not what we read."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data, which bounds what it makes, and takes each key once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.own_size = 0
        self.extents: dict[Node, tuple[int, int]] = {}  # size and depth, aliases written out

    def compose_node(self, parent: Node | None, index: int | Node | None) -> Node:
        mark = self.peek_event().start_mark
        self.depth += 1
        if self.depth > DEEPEST:  # before PyYAML, which calls itself, is too deep
            raise _error(f"more than {DEEPEST} levels deep; use fewer", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and node not in self.extents:
            raise _error("an alias within what it stands for; write it out", mark)
        if not is_alias:
            self._measure(node)
        size, depth = self.extents[node]
        if max(size, self.own_size) > MOST_BYTES:
            raise _error(
                f"more than {MOST_BYTES:,} characters, with aliases written out; shorten it", mark
            )
        if self.depth + depth > DEEPEST:
            raise _error(f"more than {DEEPEST} levels deep; use fewer", mark)
        return node

    def _measure(self, node: Node) -> None:
        own = PER_VALUE + (len(node.value) if isinstance(node, ScalarNode) else 0)
        self.own_size += own
        extents = [self.extents[child] for child in _children(node)]
        size = own + sum(size for size, _ in extents)
        self.extents[node] = size, 1 + max((depth for _, depth in extents), default=0)

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], Node] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (first := seen.setdefault((key.tag, key.value), key)) is not key:
                raise _error(
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
            except Exception:  # noqa: BLE001 - PyYAML's, of text that its tag does not fit
                pass
            else:
                if not isinstance(value, str) or _is_text(value):
                    return value
        raise _error(
            f"{_shown(node)} is read as a value of the kind `{kind}`, which cannot be used; write "
            "it as text, in quotes",
            node.start_mark,
        )

    def construct_mapping(self, node: Node, deep: bool = False) -> dict:
        values = super().construct_mapping(node, deep)
        for key in values:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise _error(
                    f"a key is read as {key!r}, not as text; write it in quotes", node.start_mark
                )
        return values


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _is_text(value: str) -> bool:
    """Whether it can be written: YAML's escapes can name half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(node: Node) -> str:
    return ascii(node.value[:40]) if isinstance(node, ScalarNode) else "this"


def _error(problem: str, mark: yaml.Mark) -> _RefusedError:
    return _RefusedError(problem=problem, problem_mark=mark)
