"""The rows of a batch job: of one file, of many, or of a stream; read lazily, in order."""

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
"""How long a row may be. A longer one is an error, and is never held in memory as a whole."""
_PIECE = 2**20
_AT_ONCE = 64
"""Rows for which it is looked at once whether their file has changed."""
_T = TypeVar("_T")


class Line(NamedTuple):
    """One row.

    Attributes:
        index: its number in the job, from 0; blank lines are not counted.
        data: its bytes.
        is_text: whether these are a prompt and not JSON.
        problem: why it could not be read; then there are no *data*.
    """

    index: int
    data: bytes
    is_text: bool
    problem: str = ""


class _Scan(NamedTuple):
    """What a file was when it was read whole.

    Attributes:
        stamp: of the file, before that; every write changes it.
        sha256: of its rows.
        rows: how many these are.
    """

    stamp: tuple[int, ...]
    sha256: str
    rows: int


class Input:
    """The rows of files, or of a stream: standard input, a pipe.

    A file has JSON lines, prompts (`.txt`), one a line, either of them compressed (`.gz`), or is a
    table (`.parquet`), whose rows are read as the JSON objects that they stand for. Blank lines are
    no rows. No row is given out of a file that is no longer what it was when the job was opened.

    Args:
        names: paths, or patterns (`shard-*.jsonl`), whose files come in the order of their names;
            or `-` alone.
        limit: read only the first so many rows.

    Attributes:
        paths: the files, in order, or the one stream.
        rows: number of rows that the job is to answer; None for a stream.
        total: number of rows that there are; None for a stream.
        sha256: of all that the rows depend on; None for a stream.

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
        """Whether all lines are prompts."""
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
        """Yield the rows, read as they are asked for.

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
        every = ((data, _is_text(path), problem) for path, rows in files for data, problem in rows)
        numbered = enumerate(islice(every, self._limit))
        return (Line(index, *row) for index, row in numbered)


class Prompts(Input):
    """Prompts that are given one by one, as the rows of a file without a name."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._lines = [json.dumps({"prompt": prompt}).encode() for prompt in prompts]
        self.paths, self.rows, self.total = [], len(prompts), len(prompts)
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


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ProxyConfigError(
            f"--input {path!r}: truncated or damaged ({error}); get the file again"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _rows_of(path: str, look: Callable[[bytes], object] = bool) -> Iterator[tuple[bytes, str]]:
    """Yield every row of a file, and why it could not be read; have *look* see its lines."""
    with _reading(path):
        if parquet.is_name(path):
            for data, problem in parquet.read_lines(path):
                yield (data, problem) if len(data) <= MOST_BYTES else (b"", _too_long(len(data)))
            return
        with _open(path) as file:
            yield from _lines_of(file, look)


def _lines_of(file: BinaryIO, look: Callable[[bytes], object]) -> Iterator[tuple[bytes, str]]:
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
    return f"the row has {size} bytes, and {MOST_BYTES} are the most; shorten or split it"


def _scan(path: str) -> _Scan:
    """Read all of a file. Raises `ProxyConfigError`."""
    stamp = _stamp(path)
    if parquet.is_name(path):
        with _reading(path), open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _Scan(stamp, digest, parquet.count_rows(path))
    lines = hashlib.sha256()
    rows = sum(1 for _ in _rows_of(path, lines.update))
    return _Scan(stamp, lines.hexdigest(), rows)


def _stamp(path: str) -> tuple[int, ...]:
    # Anybody can set the time of the last write, nobody that of the last change (ctime).
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unchanged_rows(path: str, scan: _Scan) -> Iterator[tuple[bytes, str]]:
    """Yield the rows of a file that is still what it was; before that, look at its stamp.

    Raises:
        ProxyConfigError: it is not.
    """
    rows, stamp, count = _rows_of(path), scan.stamp, 0
    while True:
        try:
            block = taken(rows, _AT_ONCE, lambda row: len(row[0]))
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
    """Return the stamp of a file whose rows are those of *scan*; read it again if it is another.

    Raises:
        ProxyConfigError: they are not.
    """
    if _stamp(path) == stamp:
        return stamp
    now = _scan(path)
    if (now.sha256, now.rows) != (scan.sha256, scan.rows):
        raise _changed(path, scan.rows, now.rows)
    return now.stamp


def _changed(path: str, then: int, now: int) -> ProxyConfigError:
    what = "other rows" if then == now else f"{now} rows"
    return ProxyConfigError(
        f"--input {path!r} changed while the job ran: it had {then} rows, and now it has {what}; "
        "put the old file back"
    )


def taken(rows: Iterator[_T], most: int, size: Callable[[_T], int]) -> list[_T]:
    """Take rows to be handled together: *most*, or fewer that are a megabyte by their *size*."""
    found: list[_T] = []
    total = 0
    for row in rows:
        found.append(row)
        total += size(row)
        if len(found) >= most or total >= _PIECE:
            break
    return found


def _unreadable(path: str, error: OSError) -> ProxyConfigError:
    return ProxyConfigError(
        f"--input {path!r}: {error.strerror or error}; give a file of rows, or - for standard input"
    )
