"""The rows of a batch job, read lazily and in order from one or more files, or from a stream."""

import codecs
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from itertools import chain, islice
from typing import BinaryIO, NamedTuple, TypeVar

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.jobs import parquet

STANDARD_STREAM = "-"
MOST_BYTES = 2**26
"""The longest row. A longer one is an error and is never held in memory as a whole."""
_PIECE = 2**20
_ROWS_PER_CHECK = 64
"""Rows between two checks of whether their file has changed."""
_T = TypeVar("_T")


class Line(NamedTuple):
    """One row.

    Attributes:
        index: its number in the job, from 0; blank lines are not counted.
        data: its bytes; empty if it could not be read.
        is_text: whether the bytes are a prompt instead of JSON.
        problem: why it could not be read; empty if it could.
        directory: where the relative paths in it begin: that of its file, or else this process's.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    data: bytes
    is_text: bool
    problem: str = ""
    directory: str = ""


class _Scan(NamedTuple):
    """The state of a file when it was read as a whole.

    Attributes:
        stamp: device, inode, size and times of the file, taken before reading; a write changes it.
        sha256: of its rows.
        rows: their number.
    """

    stamp: tuple[int, ...]
    sha256: str
    rows: int


class Input:
    """The rows of files, or of one stream: standard input or a pipe.

    A file holds JSON lines, or one prompt per line (`.txt`), either of them also compressed
    (`.gz`); or it is a table (`.parquet`), whose rows are read as JSON objects. Blank lines are
    skipped. If a file changes after the job was opened, reading its rows fails.

    Args:
        names: paths, or patterns (`shard-*.jsonl`), whose files are sorted by name; or `-` alone.
        limit: read only the first *limit* rows.

    Attributes:
        paths: the files, in order, or the one stream.
        rows: number of rows that the job answers; None for a stream.
        total: number of rows in the files; None for a stream.
        sha256: of everything that the rows depend on; None for a stream.

    Raises:
        ProxyConfigError: a file cannot be read to its end, or there are no rows.
    """

    def __init__(self, names: str | Sequence[str], limit: int | None = None) -> None:
        self._limit = limit
        self.rows: int | None = None
        self.total: int | None = None
        self.sha256: str | None = None
        self.paths = _paths([names] if isinstance(names, str) else names)
        self._begun: Iterator[Line] | None = None
        self._scans: list[_Scan] = []
        if not self.is_stream:
            self._scan()

    @property
    def is_text(self) -> bool:
        """Whether every line is a prompt."""
        return all(map(_is_text, self.paths))

    @property
    def is_stream(self) -> bool:
        """Whether the rows can be read only once."""
        return _is_stream(self.paths[0])

    def _scan(self) -> None:
        self._scans = [_scan(path) for path in self.paths]
        digests = [scan.sha256 for scan in self._scans]
        rows = self.total = sum(scan.rows for scan in self._scans)
        if not rows:
            raise _error(self.paths[0], "no rows", "write one prompt per line")
        whole = hashlib.sha256("".join(digests).encode()).hexdigest()
        self.sha256 = digests[0] if len(digests) == 1 else whole
        self.rows = self._limit = rows if self._limit is None else min(rows, self._limit)

    def first(self) -> Line | None:
        """Return the first row without consuming it; waits for it if the input is a stream."""
        if not self.is_stream:
            return next(self.lines(), None)
        self._begun = self.lines()
        first = next(self._begun, None)
        if first is not None:
            self._begun = chain([first], self._begun)
        return first

    def missing(self, done: Sequence[int]) -> Iterator[Line]:
        """Yield the rows whose entry in *done* is 0, and the rows beyond its end."""
        return (row for row in self.lines() if row.index >= len(done) or not done[row.index])

    def lines(self) -> Iterator[Line]:
        """Yield the rows; each is read when it is needed.

        Raises:
            ProxyConfigError: a file has changed since the job was opened.
        """
        if self._begun is not None:
            return self._begun
        if self.is_stream:
            files = [(path, _rows_of(path)) for path in self.paths]
        else:
            scans = zip(self.paths, self._scans, strict=True)
            files = [(path, _unchanged_rows(path, scan)) for path, scan in scans]
        every = (
            (data, _is_text(path), problem, directory)
            for path, rows in files
            for directory in [_directory(path)]
            for data, problem in rows
        )
        numbered = enumerate(islice(every, self._limit))
        return (Line(index, *row) for index, row in numbered)


class Prompts(Input):
    """Prompts given as text, read like the rows of a file."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._lines = [json.dumps({"prompt": prompt}).encode() for prompt in prompts]
        self.paths = []
        self.rows = self.total = len(prompts)
        self.sha256 = hashlib.sha256(b"\n".join(self._lines)).hexdigest()

    @property
    def is_text(self) -> bool:
        """False: they are JSON lines."""
        return False

    @property
    def is_stream(self) -> bool:
        """False: they can be read again."""
        return False

    def lines(self) -> Iterator[Line]:
        """Yield the rows."""
        here = _directory("")
        return (Line(index, data, False, "", here) for index, data in enumerate(self._lines))


def _paths(names: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for name in names:
        found = [name]
        if has_magic(name) and not os.path.exists(name):
            found = sorted(glob(name, recursive=True))
            if not found:
                raise _error(name, "no file matches", "check the pattern")
        paths += found
    for path in paths:
        try:
            is_stream = _is_stream(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        if is_stream and len(paths) > 1:
            raise _error(
                path,
                "a stream cannot be combined with other inputs",
                "pass either the stream or files",
            )
        if paths.count(path) > 1:
            raise _error(path, "it is given twice", "remove one")
    return paths


def _is_stream(path: str) -> bool:
    return path == STANDARD_STREAM or stat.S_ISFIFO(os.stat(path).st_mode)


def _is_text(path: str) -> bool:
    return path.removesuffix(".gz").endswith(".txt")


def _directory(path: str) -> str:
    return os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else os.getcwd()


def _open(path: str) -> BinaryIO | gzip.GzipFile:
    if path == STANDARD_STREAM:
        return open(0, "rb")
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _error(path, f"truncated or damaged ({error})", "get the file again") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _rows_of(path: str, look: Callable[[bytes], object] = bool) -> Iterator[tuple[bytes, str]]:
    """Yield every row of a file and why it could not be read; pass its raw lines to *look*."""
    with _reading(path):
        if parquet.is_name(path):
            for data, problem in parquet.read_lines(path):
                yield (data, problem) if len(data) <= MOST_BYTES else (b"", _too_long(len(data)))
            return
        with _open(path) as file:
            yield from _lines_of(file, look)


def _lines_of(
    file: BinaryIO | gzip.GzipFile, look: Callable[[bytes], object]
) -> Iterator[tuple[bytes, str]]:
    mark = codecs.BOM_UTF8
    while line := file.readline(MOST_BYTES + 1):
        row, mark, size = line.removeprefix(mark), b"", len(line)
        if size <= MOST_BYTES and not row.strip():
            continue
        look(line)
        if size <= MOST_BYTES:
            yield row, ""
            continue
        while not line.endswith(b"\n") and (line := file.readline(_PIECE)):
            look(line)
            size += len(line)
        yield b"", _too_long(size)


def _too_long(size: int) -> str:
    return f"the row has {size} bytes, more than {MOST_BYTES}; shorten or split it"


def _scan(path: str) -> _Scan:
    """Read a whole file. Raises `ProxyConfigError`."""
    stamp = _stamp(path)
    if parquet.is_name(path):
        with _reading(path), open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _Scan(stamp, digest, parquet.count_rows(path))
    lines = hashlib.sha256()
    rows = sum(1 for _ in _rows_of(path, lines.update))
    return _Scan(stamp, lines.hexdigest(), rows)


def _stamp(path: str) -> tuple[int, ...]:
    # Users can set the time of the last write (mtime), but not that of the last change (ctime).
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unchanged_rows(path: str, scan: _Scan) -> Iterator[tuple[bytes, str]]:
    """Yield the rows of a file, a block at a time, after checking that it has not changed.

    Raises:
        ProxyConfigError: it has.
    """
    rows, stamp, count = _rows_of(path), scan.stamp, 0
    while True:
        try:
            block = take_block(rows, _ROWS_PER_CHECK, lambda row: len(row[0]))
        except ProxyConfigError:
            _require_same(path, scan, stamp)
            raise
        stamp = _require_same(path, scan, stamp)
        if not block:
            break
        count += len(block)
        yield from block
    if count != scan.rows:
        raise _changed(path, scan.rows, count)


def _require_same(path: str, scan: _Scan, stamp: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stamp of a file whose rows are still those of *scan*.

    The rows are read again if the stamp has changed.

    Raises:
        ProxyConfigError: the rows have changed.
    """
    if _stamp(path) == stamp:
        return stamp
    now = _scan(path)
    if (now.sha256, now.rows) != (scan.sha256, scan.rows):
        raise _changed(path, scan.rows, now.rows)
    return now.stamp


def _changed(path: str, then: int, now: int) -> ProxyConfigError:
    what = "different rows" if then == now else f"{now} rows"
    return _error(
        path,
        f"the file changed while the job ran: it had {then} rows, and now it has {what}",
        "put the old file back",
    )


def take_block(rows: Iterator[_T], most: int, size: Callable[[_T], int]) -> list[_T]:
    """Take rows to handle together: at most *most*, and no more once they reach a megabyte.

    Args:
        rows: to take from.
        most: of them.
        size: of a row, in bytes.
    """
    found: list[_T] = []
    total = 0
    for row in rows:
        found.append(row)
        total += size(row)
        if len(found) >= most or total >= _PIECE:
            break
    return found


def _unreadable(path: str, error: OSError) -> ProxyConfigError:
    remedy = "give a file of rows, or - for standard input"
    return _error(path, str(error.strerror or error), remedy)


def _error(path: str, problem: str, remedy: str) -> ProxyConfigError:
    return ProxyConfigError(problem, field=f"--input {path!r}", remedy=remedy)
