"""The records of a batch job: they survive the death of their writer, and tell what is done."""

import fcntl
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vllm_proxy import parquet
from vllm_proxy.errors import ProxyConfigError
from vllm_proxy.inputs import STANDARD_STREAM
from vllm_proxy.redaction import without_secrets

_SYNC_SECONDS = 1.0
"""Records that are older than this survive a loss of power, not only the death of a process."""
_REMEDY = "add --overwrite to replace it, or give another --output"


class RecordFormat(NamedTuple):
    """What a job must know of the records that it writes.

    Attributes:
        index: the number of the row that a record answers.
        is_error: whether it says that the row could not be answered.
        tokens: numbers of prompt tokens and of generated ones.
    """

    index: Callable[[dict[str, Any]], int]
    is_error: Callable[[dict[str, Any]], bool]
    tokens: Callable[[dict[str, Any]], tuple[int, int]]


OWN_FORMAT = RecordFormat(
    index=lambda record: record["index"],
    is_error=lambda record: "error" in record,
    tokens=lambda record: (record.get("prompt_tokens", 0), record.get("completion_tokens", 0)),
)


class Output:
    """The records of a job, and which of its rows they answer already.

    Records are JSON lines, appended as they come. Parquet cannot be appended to, so its records
    are lines of a journal beside it (`OUTPUT.partial.jsonl`) until `finish`.

    Nothing on disk is changed before `begin`, except that a missing file is made.

    Args:
        name: the path, or `-`.
        fingerprint: what the records depend on; None if the job cannot be resumed.
        rows: number of rows of the job; None for a stream.
        record_format: of the records.
        ordered: leave the records in the order of their rows.
        overwrite: replace records of another job.

    Attributes:
        done: a byte for each row, 1 for those that have a record; empty if the job cannot resume.
        failed: number of records that are errors.

    Raises:
        ProxyConfigError: the file cannot be written, is being written by another process, or holds
            something else than records of this job.
    """

    def __init__(
        self,
        name: str,
        fingerprint: dict[str, Any] | None,
        rows: int | None,
        record_format: RecordFormat = OWN_FORMAT,
        *,
        ordered: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.name, self._fingerprint, self._format = name, fingerprint, record_format
        self._sidecar = Path(f"{name}.job.json")
        self.done, self.failed = bytearray(rows or 0), 0
        self._kept = 0  # bytes that `begin` leaves in the file
        self._last, self._in_order = -1, True
        self._synced = time.monotonic()
        self._is_parquet = parquet.is_name(name)
        self._is_ordered = ordered
        self._is_complete = False
        _require_possible(name, record_format, ordered=ordered, is_parquet=self._is_parquet)
        self._path = path = Path(f"{name}.partial.jsonl" if self._is_parquet else name)
        self._made = name != STANDARD_STREAM and not path.exists()
        self._is_file = name != STANDARD_STREAM and (path.is_file() or not path.exists())
        try:
            if self._is_parquet and Path(name).is_dir():
                raise IsADirectoryError(0, "Is a directory")
            # Duplicated, so that the engine's chatter can be turned away from descriptor 1.
            self._file = (
                os.fdopen(os.dup(1), "wb")
                if name == STANDARD_STREAM
                else open(path, "a+b" if self._is_file else "wb")  # noqa: SIM115 - see `close`
            )
        except OSError as error:
            raise ProxyConfigError(
                f"--output {name!r}: {error.strerror}; give a file in a directory that exists"
            ) from None
        if self._is_file:
            try:
                self._lock()
                if not overwrite:
                    self._take_up()
            except BaseException:
                self.close()
                raise

    @property
    def resumable(self) -> bool:
        """Whether a later run can tell what this one has done."""
        return self._is_file and self._fingerprint is not None

    def _lock(self) -> None:
        try:
            # Held by this process alone: `flock` would pass to the engine's processes, and live on
            # in them for a while after this one is killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ProxyConfigError(
                f"--output {self.name!r}: another process is writing it; wait for it to end"
            ) from None
        except OSError:
            return  # a file system without locks

    def _take_up(self) -> None:
        """Read what an earlier run has left."""
        if os.fstat(self._file.fileno()).st_size:
            self._require_same_job()
            self._read_records()
        elif self._is_parquet and Path(self.name).exists():
            self._require_same_job()
            self._read_parquet()

    def _require_same_job(self) -> None:
        if self._fingerprint is None:
            raise _not_resumable(self.name)
        try:
            written = json.loads(self._sidecar.read_text())
        except (OSError, ValueError):
            raise ProxyConfigError(
                f"--output {self.name!r} exists and is no job of ours "
                f"(no {self._sidecar.name} beside it); {_REMEDY}"
            ) from None
        # An earlier version wrote secrets, too.
        then, now = _flat(without_secrets(written)), _flat(self._fingerprint)
        changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
        if changed:
            what = "; ".join(f"`{k}` was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
            raise ProxyConfigError(
                f"--output {self.name!r} exists and is of another job: {what}; {_REMEDY}"
            )

    def _read_records(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # the line on which the last run died
            try:
                record = json.loads(line)
                self._count(self._format.index(record), self._format.is_error(record))
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ProxyConfigError(
                    f"--output {str(self._path)!r}: line {number} is not a record; remove the "
                    "line, or add --overwrite"
                ) from None
            self._kept += len(line)

    def _read_parquet(self) -> None:
        for index, is_error in parquet.read_indices(self.name):
            self._count(index, is_error)
        self._is_complete = True
        if missing := self.done.count(0):
            raise ProxyConfigError(
                f"--output {self.name!r} is finished without {missing} rows that the job has now, "
                "and Parquet cannot be added to; add --overwrite, or give another --output"
            )

    def _count(self, index: int, is_error: bool) -> None:
        self._in_order, self._last = self._in_order and index > self._last, index
        # With a smaller --limit than before, there may be records beyond it.
        if index < len(self.done):
            self.done[index] = 1
            self.failed += is_error
        elif self._fingerprint is None:
            self.failed += is_error

    def begin(self) -> None:
        """Drop what is not kept and write the sidecar: from here on the file is this job's."""
        self._made = False
        if not self._is_file:
            return
        self._file.truncate(self._kept)
        if self._fingerprint is None:
            self._sidecar.unlink(missing_ok=True)
            return
        partial = self._sidecar.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self._fingerprint, indent=1))
        partial.replace(self._sidecar)

    def write(self, record: dict[str, Any]) -> None:
        """Append *record*; it survives the death of this process.

        Raises:
            ProxyConfigError: the system refuses, for instance because the disk is full.
            BrokenPipeError: whoever read the output has gone.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            # A lone surrogate, which UTF-8 cannot say, comes out as JSON's own escape.
            self._file.write(line.encode(errors="backslashreplace"))
            self._file.flush()
            if self._is_file and time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ProxyConfigError(f"--output {self.name!r}: {error.strerror}") from None
        self._count(self._format.index(record), self._format.is_error(record))

    def _sync(self) -> None:
        os.fdatasync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Bring the records of a job that is done into their final form, at once.

        Raises:
            ProxyConfigError: the system refuses; the records are where they were.
        """
        if not self._is_file or self._is_complete:
            return
        try:
            self._sync()
            if self._is_parquet or (self._is_ordered and not self._in_order):
                self._rewrite()
        except OSError as error:
            raise ProxyConfigError(f"--output {self.name!r}: {error.strerror}") from None
        self._is_complete = True

    def _rewrite(self) -> None:
        """Write the records anew, by row, and put the new file in its place."""
        starts, columns = array("q"), parquet.Columns()
        self._file.seek(0)
        position = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            index = self._format.index(record)
            starts.extend([-1] * (index + 1 - len(starts)))
            starts[index] = position
            position += len(line)
            if self._is_parquet:
                columns.see(record)
        new = f"{self.name}.new"
        if self._is_parquet:
            parquet.write_records(self._lines(starts), new, columns)
        else:
            with open(new, "wb") as file:
                file.writelines(self._lines(starts))
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, self.name)
        if self._is_parquet:
            self._path.unlink()

    def _lines(self, starts: array) -> Iterator[bytes]:
        for start in starts:
            if start >= 0:
                self._file.seek(start)
                yield self._file.readline()

    def close(self) -> None:
        """Close the file, which gives up the lock; take back an empty one made for nothing."""
        # A full disk or a broken pipe has been reported by the write that met it.
        with suppress(OSError):
            self._file.close()
        if self._made:
            self._path.unlink(missing_ok=True)


def require_new(name: str) -> None:
    """Refuse a file with records as the output of a stream. Raises `ProxyConfigError`."""
    path = Path(name)
    if path.is_file() and path.stat().st_size:
        raise _not_resumable(name)


def _not_resumable(name: str) -> ProxyConfigError:
    return ProxyConfigError(
        f"--output {name!r} exists, and rows of a stream cannot be resumed; {_REMEDY}"
    )


def _require_possible(
    name: str, record_format: RecordFormat, *, ordered: bool, is_parquet: bool
) -> None:
    """Refuse what no file of this name can be. Raises `ProxyConfigError`."""
    if is_parquet:
        parquet.require_pyarrow(f"--output {name!r}")
    if is_parquet and record_format is not OWN_FORMAT:
        raise ProxyConfigError(
            f"--output {name!r}: an OpenAI batch file is answered in JSON lines; give a .jsonl"
        )
    if name.endswith(".gz"):
        raise ProxyConfigError(
            f"--output {name!r}: records are not compressed; give a .jsonl or .parquet"
        )
    if ordered and name == STANDARD_STREAM:
        raise ProxyConfigError(
            "--ordered: records are sorted in a file, once all are there; give an --output"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        k: v
        for key, value in values.items()
        for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
