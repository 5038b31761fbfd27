"""The rows of a batch job: of one file, of many, or of a stream; read lazily, in order."""

import codecs
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from itertools import chain, islice
from typing import BinaryIO, NamedTuple

from vllm_proxy import parquet
from vllm_proxy.errors import ProxyConfigError

STANDARD_STREAM = "-"


class Line(NamedTuple):
    """One row: its number in the job, its bytes, and whether these are a prompt and not JSON."""

    index: int
    data: bytes
    is_text: bool


class Input:
    """The rows of files, or of a stream: standard input, a pipe.

    A file has JSON lines, prompts (`.txt`), one a line, either of them compressed (`.gz`), or is a
    table (`.parquet`), whose rows are read as the JSON objects that they stand for.

    Args:
        names: paths, or patterns (`shard-*.jsonl`), whose files come in the order of their names;
            or `-` alone.
        limit: read only the first so many rows.

    Attributes:
        paths: the files, in order, or the one stream.
        rows: number of rows that the job is to answer; None for a stream.
        sha256: of all that the rows depend on; None for a stream.

    Raises:
        ProxyConfigError: a file cannot be read to its end, or there are no rows.
    """

    def __init__(self, names: str | Sequence[str], limit: int | None = None) -> None:
        self._limit = limit
        self.rows: int | None = None
        self.sha256: str | None = None
        self.paths = _paths([names] if isinstance(names, str) else names)
        self._begun: Iterator[Line] | None = None
        if not self.is_stream:
            self._scan()

    @property
    def is_text(self) -> bool:
        """Whether all lines are prompts."""
        return all(map(_is_text, self.paths))

    @property
    def is_stream(self) -> bool:
        """Whether the rows can be read only once."""
        return _is_stream(self.paths[0])

    def _scan(self) -> None:
        digests, rows = [], 0
        for path in self.paths:
            digest, own = _scan(path)
            digests.append(digest)
            rows += own
        if not rows:
            raise ProxyConfigError(f"--input {self.paths[0]!r}: no rows; write one prompt a line")
        whole = hashlib.sha256("".join(digests).encode()).hexdigest()
        self.sha256 = digests[0] if len(digests) == 1 else whole
        self.rows = self._limit = rows if self._limit is None else min(rows, self._limit)

    def first(self) -> Line | None:
        """Return the first row without using it up; of a stream, once there is one."""
        if not self.is_stream:
            return next(self.lines(), None)
        self._begun = self.lines()
        first = next(self._begun, None)
        if first is not None:
            self._begun = chain([first], self._begun)
        return first

    def missing(self, done: Sequence[int]) -> Iterator[Line]:
        """Yield the rows that are not *done*: a number for each row; those beyond it are not."""
        return (row for row in self.lines() if row.index >= len(done) or not done[row.index])

    def lines(self) -> Iterator[Line]:
        """Yield the rows, read as they are asked for."""
        if self._begun is not None:
            return self._begun
        every = ((data, _is_text(path)) for path in self.paths for data in _rows_of(path))
        numbered = enumerate(islice(every, self._limit))
        return (Line(index, data, is_text) for index, (data, is_text) in numbered)


class Prompts(Input):
    """Prompts that are given one by one, as the rows of a file without a name."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._lines = [json.dumps({"prompt": prompt}).encode() for prompt in prompts]
        self.paths, self.rows = [], len(prompts)
        self.sha256 = hashlib.sha256(b"\n".join(self._lines)).hexdigest()

    @property
    def is_text(self) -> bool:
        """They are JSON lines."""
        return False

    @property
    def is_stream(self) -> bool:
        """They can be read again."""
        return False

    def lines(self) -> Iterator[Line]:
        """Yield the rows."""
        return (Line(index, data, False) for index, data in enumerate(self._lines))


def _paths(names: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for name in names:
        found = [name]
        if has_magic(name) and not os.path.exists(name):
            found = sorted(glob(name, recursive=True))
            if not found:
                raise ProxyConfigError(f"--input {name!r}: no file matches; check the pattern")
        paths += found
    for path in paths:
        try:
            is_stream = _is_stream(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        if is_stream and len(paths) > 1:
            raise ProxyConfigError(f"--input {path!r}: a stream stands alone; give files, or it")
        if paths.count(path) > 1:
            raise ProxyConfigError(f"--input {path!r} is given twice; remove one")
    return paths


def _is_stream(path: str) -> bool:
    return path == STANDARD_STREAM or stat.S_ISFIFO(os.stat(path).st_mode)


def _is_text(path: str) -> bool:
    return path.removesuffix(".gz").endswith(".txt")


def _open(path: str) -> BinaryIO:
    if path == STANDARD_STREAM:
        return open(0, "rb")
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _rows_of(path: str) -> Iterator[bytes]:
    if parquet.is_name(path):
        yield from parquet.read_lines(path)
        return
    with _open(path) as file:
        for number, line in enumerate(file):
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _scan(path: str) -> tuple[str, int]:
    """Return a file's digest and its number of rows, all of it read."""
    try:
        if parquet.is_name(path):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return digest, parquet.count_rows(path)
        lines, rows = hashlib.sha256(), 0
        with _open(path) as file:
            for line in file:
                lines.update(line)
                rows += 1
        return lines.hexdigest(), rows
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ProxyConfigError(
            f"--input {path!r}: truncated or damaged ({error}); get the file again"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> ProxyConfigError:
    return ProxyConfigError(
        f"--input {path!r}: {error.strerror or error}; give a file of rows, or - for standard input"
    )
