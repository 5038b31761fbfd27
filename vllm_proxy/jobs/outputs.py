"""The output of a batch job: records that survive a crash and show which rows are done."""

import json
import os
import stat
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.redaction import without_secrets
from vllm_proxy.jobs import parquet
from vllm_proxy.jobs.files import replacing, require_free_path, sync_directory
from vllm_proxy.jobs.inputs import STANDARD_STREAM
from vllm_proxy.jobs.locks import LockedError, close_locked, open_locked
from vllm_proxy.jobs.records import OWN_FORMAT, RecordFormat, decode, encode, row_number

_SYNC_SECONDS = 1.0
"""Records older than this survive a power failure, and not only the death of a process."""
_REMEDY = "add --overwrite to replace it, or give another --output"
_NOT_RESUMABLE = "the file exists, and a job whose rows come from a stream cannot be resumed"


class Output:
    """The records of a job, and which of its rows already have one.

    Records are JSON lines, appended as rows finish. Nothing can be appended to a Parquet file, so
    its records are lines of a journal next to it (`OUTPUT.partial.jsonl`) until `finish`.

    Nothing on disk changes before `begin`, except that a missing file is created. Links are
    followed: the records go where the link points.

    Args:
        name: the path, or `-` for standard output.
        fingerprint: what the records depend on; None if the job cannot be resumed.
        rows: number of rows of the job; None for a stream.
        total: number of rows that an earlier run may have answered; *rows* by default.
        record_format: of the records.
        ordered: sort the records by row at the end.
        overwrite: replace the records of another job.

    Attributes:
        done: one byte per row, 1 if the row has a record; empty if the job cannot be resumed.
        failed: number of records that are errors.

    Raises:
        ProxyConfigError: the file cannot be written, another process is writing it, or it holds
            something that is not a record of this job.
    """

    def __init__(
        self,
        name: str,
        fingerprint: dict[str, Any] | None,
        rows: int | None,
        record_format: RecordFormat = OWN_FORMAT,
        *,
        total: int | None = None,
        ordered: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.name = name
        self._fingerprint = fingerprint
        self._format = record_format
        self._is_ordered = ordered
        self._is_parquet = parquet.is_name(name)
        _require_supported(name, record_format, ordered=ordered, is_parquet=self._is_parquet)

        # What the records say.
        self.done = bytearray(rows or 0)
        self.failed = 0
        self._total = rows if total is None else total
        self._last_index = -1
        self._in_order = True

        # The state of the file.
        self._kept = 0  # bytes that `begin` leaves in the file
        self._synced = time.monotonic()
        self._is_complete = False
        self._is_new = False

        sidecar, journal = companion_files(name)
        self._sidecar = Path(sidecar)
        path = Path(journal if self._is_parquet else name)
        self._is_file = name != STANDARD_STREAM and _may_be_file(path)
        # Resolved, so that a link stays a link when the file is replaced.
        self._path = Path(os.path.realpath(path)) if self._is_file else path
        self._file = self._open()
        if self._is_file and not overwrite:
            try:
                self._resume()
            except BaseException:
                self.close()
                raise

    def _open(self) -> BinaryIO:
        try:
            if self._is_parquet and Path(self.name).is_dir():
                raise IsADirectoryError(0, "Is a directory")
            if self.name == STANDARD_STREAM:
                # Duplicated: descriptor 1 itself will point to the log while an engine runs.
                return os.fdopen(os.dup(1), "wb")
            if not self._is_file:
                return open(self._path, "wb")
            file, self._is_new = open_locked(str(self._path))
            return file
        except LockedError as error:
            raise self._error(f"{error.writer} is writing it", "wait until it ends") from None
        except OSError as error:
            remedy = "give a file in a directory that exists"
            raise self._error(str(error.strerror), remedy) from None

    def _error(self, problem: str, remedy: str | None = None) -> ProxyConfigError:
        return ProxyConfigError(problem, field=f"--output {self.name!r}", remedy=remedy)

    @property
    def resumable(self) -> bool:
        """Whether a later run can continue this one."""
        return self._is_file and self._fingerprint is not None

    def _resume(self) -> None:
        """Read the records that an earlier run has left."""
        if os.fstat(self._file.fileno()).st_size:
            self._require_same_job()
            self._read_records()
        elif self._is_parquet and Path(self.name).exists():
            self._require_same_job()
            self._read_parquet()
        elif self._sidecar.exists() and "format" not in self._written():
            raise self._error(
                f"{self._sidecar.name} next to it was not written by vllm-proxy",
                "move it, or give another --output",
            )

    def _require_same_job(self) -> None:
        if self._fingerprint is None:
            raise self._error(_NOT_RESUMABLE, _REMEDY)
        written = self._written()
        if not written:
            raise self._error(
                "the file exists and was not written by a job of vllm-proxy "
                f"(there is no {self._sidecar.name} next to it)",
                _REMEDY,
            )
        # An earlier version also wrote secrets.
        then, now = _flat(without_secrets(written)), _flat(self._fingerprint)
        changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
        if changed:
            what = "; ".join(f"`{k}` was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
            raise self._error(f"the file exists and belongs to another job: {what}", _REMEDY)

    def _written(self) -> dict[str, Any]:
        """Return the fingerprint in the sidecar; empty if there is no valid sidecar."""
        try:
            written = json.loads(self._sidecar.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return written if isinstance(written, dict) else {}

    def _read_records(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # the earlier run ended while it wrote this line
            try:
                record = decode(line)
                index, is_error = self._format.index(record), self._format.is_error(record)
                self._require_known(index)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ProxyConfigError(
                    f"line {number} is not a record",
                    field=f"--output {str(self._path)!r}",
                    remedy="remove the line, or add --overwrite",
                ) from None
            self._count(index, is_error)
            self._kept += len(line)

    def _require_known(self, index: int) -> None:
        """Reject the number of a row that the input does not have. Raises `ValueError`."""
        if self._total is not None and index >= self._total:
            raise ValueError(index)

    def _read_parquet(self) -> None:
        for index, is_error in parquet.read_indices(self.name):
            try:
                self._require_known(row_number(index))
            except ValueError:
                raise self._error(
                    f"it has a record of row {index!r}, which the input does not have", _REMEDY
                ) from None
            self._count(index, is_error)
        self._is_complete = True
        if missing := self.done.count(0):
            raise self._error(
                f"it is complete but lacks {missing} rows of this job, and nothing can be appended "
                "to a Parquet file",
                "add --overwrite, or give another --output",
            )

    def _count(self, index: int, is_error: bool) -> None:
        self._in_order = self._in_order and index > self._last_index
        self._last_index = index
        # An earlier run with a larger --limit may have left records beyond this one's.
        if index < len(self.done):
            self.done[index] = 1
            self.failed += is_error
        elif self._fingerprint is None:
            self.failed += is_error

    def begin(self) -> None:
        """Remove what is not kept and write the sidecar: from now on the file is this job's."""
        self._is_new = False
        if not self._is_file:
            return
        try:
            self._file.truncate(self._kept)
            if self._is_parquet and not self._kept:
                # Another job's table, which is to be replaced: next to our sidecar it would look
                # like ours.
                Path(os.path.realpath(self.name)).unlink(missing_ok=True)
            # Another job's records must be gone before the sidecar claims that they are ours.
            os.fsync(self._file.fileno())
            sync_directory(self._path.parent)
            if self._fingerprint is None:
                self._sidecar.unlink(missing_ok=True)
                return
            with replacing(self._sidecar) as file:
                file.write(json.dumps(self._fingerprint, indent=1).encode())
        except OSError as error:
            raise self._error(str(error.strerror)) from None

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append *record*; it survives the death of this process.

        Returns:
            The record that was written: a failure record if *record* cannot be encoded as JSON.

        Raises:
            ProxyConfigError: the system refuses, for instance because the disk is full.
            BrokenPipeError: the program that reads the output has ended.
        """
        record, line = encode(record, self._format)
        try:
            self._file.write(line)
            self._file.flush()
            if self._is_file and time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._error(str(error.strerror)) from None
        self._count(self._format.index(record), self._format.is_error(record))
        return record

    def _sync(self) -> None:
        os.fdatasync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Bring the records of a finished job into their final form: sorted, or Parquet.

        Raises:
            ProxyConfigError: the system refuses; the records are still where they were.
        """
        if not self._is_file or self._is_complete:
            return
        try:
            self._sync()
            if self._is_parquet or (self._is_ordered and not self._in_order):
                self._rewrite()
        except OSError as error:
            raise self._error(str(error.strerror)) from None
        self._is_complete = True

    def _rewrite(self) -> None:
        """Write the records again in the order of their rows, and replace the file."""
        starts, columns = array("q"), parquet.Columns()
        self._file.seek(0)
        position = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            record = decode(line)
            index = self._format.index(record)
            starts.extend([-1] * (index + 1 - len(starts)))
            starts[index] = position
            position += len(line)
            if self._is_parquet:
                columns.add(record)
        with replacing(self.name) as file:
            if self._is_parquet:
                parquet.write_records(self._lines(starts), file, columns)
            else:
                file.writelines(self._lines(starts))
        if self._is_parquet:
            self._path.unlink()

    def _lines(self, starts: "array[int]") -> Iterator[bytes]:
        for start in starts:
            if start >= 0:
                self._file.seek(start)
                yield self._file.readline()

    def close(self) -> None:
        """Close the file, which releases the lock; remove it if this job never used it."""
        if self._is_new:  # while the lock is held, no other job can have it
            self._path.unlink(missing_ok=True)
            self._is_new = False
        # The write that met a full disk or a broken pipe has reported it.
        with suppress(OSError):
            close_locked(self._file)


def _may_be_file(path: Path) -> bool:
    """Return whether a path is a regular file or does not exist."""
    try:  # one system call: another job may create the file at this moment
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def companion_files(name: str) -> tuple[str, str]:
    """Return the paths of a job's sidecar and of the journal of a Parquet output."""
    return f"{name}.job.json", f"{name}.partial.jsonl"


def require_new(name: str) -> None:
    """Reject a file with records as the output of a stream. Raises `ProxyConfigError`."""
    require_free_path(
        "--output",
        name,
        overwrite=False,
        may_replace=lambda path: not path.is_file() or not path.stat().st_size,
        problem=_NOT_RESUMABLE,
    )


def _require_supported(
    name: str, record_format: RecordFormat, *, ordered: bool, is_parquet: bool
) -> None:
    """Reject a combination of output and options. Raises `ProxyConfigError`."""
    field = f"--output {name!r}"
    if is_parquet:
        parquet.require_pyarrow(field)
    if is_parquet and record_format is not OWN_FORMAT:
        raise ProxyConfigError(
            "an OpenAI batch file is answered in JSON lines", field=field, remedy="give a .jsonl"
        )
    if name.endswith(".gz"):
        raise ProxyConfigError(
            "records are not compressed", field=field, remedy="give a .jsonl or .parquet"
        )
    if ordered and name == STANDARD_STREAM:
        raise ProxyConfigError(
            "records are sorted in a file, after all rows are answered",
            field="--ordered",
            remedy="give a file as --output",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        k: v
        for key, value in values.items()
        for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
