"""The records of a batch job: they survive the death of their writer, and tell what is done."""

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
from vllm_proxy.jobs.files import replacing, sync_directory
from vllm_proxy.jobs.inputs import STANDARD_STREAM
from vllm_proxy.jobs.locks import LockedError, close_locked, open_locked
from vllm_proxy.jobs.records import OWN_FORMAT, RecordFormat, decode, encode, row_number

_SYNC_SECONDS = 1.0
"""Records that are older than this survive a loss of power, not only the death of a process."""
_REMEDY = "add --overwrite to replace it, or give another --output"


class Output:
    """The records of a job, and which of its rows they answer already.

    Records are JSON lines, appended as they come. Parquet cannot be appended to, so its records
    are lines of a journal beside it (`OUTPUT.partial.jsonl`) until `finish`.

    Nothing on disk is changed before `begin`, except that a missing file is made. A path that is a
    link is followed: the records go where it points.

    Args:
        name: the path, or `-`.
        fingerprint: what the records depend on; None if the job cannot be resumed.
        rows: number of rows of the job; None for a stream.
        total: number of rows that records of an earlier run may be of; else *rows*.
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
        total: int | None = None,
        ordered: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.name, self._fingerprint, self._format = name, fingerprint, record_format
        sidecar, journal = own_files(name)
        self._sidecar = Path(sidecar)
        self.done, self.failed = bytearray(rows or 0), 0
        self._total = rows if total is None else total
        self._kept = 0  # bytes that `begin` leaves in the file
        self._last, self._in_order = -1, True
        self._synced = time.monotonic()
        self._is_parquet = parquet.is_name(name)
        self._is_ordered = ordered
        self._is_complete = False
        _require_possible(name, record_format, ordered=ordered, is_parquet=self._is_parquet)
        path = Path(journal if self._is_parquet else name)
        self._is_file = name != STANDARD_STREAM and _may_be_file(path)
        # Where a link points, so that it stays a link.
        self._path = Path(os.path.realpath(path)) if self._is_file else path
        self._made = False
        self._file = self._open()
        if self._is_file and not overwrite:
            try:
                self._take_up()
            except BaseException:
                self.close()
                raise

    def _open(self) -> BinaryIO:
        try:
            if self._is_parquet and Path(self.name).is_dir():
                raise IsADirectoryError(0, "Is a directory")
            if self.name == STANDARD_STREAM:
                # Duplicated, so that the engine's chatter can be turned away from descriptor 1.
                return os.fdopen(os.dup(1), "wb")
            if not self._is_file:
                return open(self._path, "wb")
            file, self._made = open_locked(str(self._path))
            return file
        except LockedError as error:
            raise ProxyConfigError(
                f"--output {self.name!r}: {error.writer} is writing it; wait for it to end"
            ) from None
        except OSError as error:
            raise ProxyConfigError(
                f"--output {self.name!r}: {error.strerror}; give a file in a directory that exists"
            ) from None

    @property
    def resumable(self) -> bool:
        """Whether a later run can tell what this one has done."""
        return self._is_file and self._fingerprint is not None

    def _take_up(self) -> None:
        """Read what an earlier run has left."""
        if os.fstat(self._file.fileno()).st_size:
            self._require_same_job()
            self._read_records()
        elif self._is_parquet and Path(self.name).exists():
            self._require_same_job()
            self._read_parquet()
        elif self._sidecar.exists() and "format" not in self._written():
            raise ProxyConfigError(
                f"--output {self.name!r}: {self._sidecar.name} beside it is no file of ours; move "
                "it, or give another --output"
            )

    def _require_same_job(self) -> None:
        if self._fingerprint is None:
            raise _not_resumable(self.name)
        written = self._written()
        if not written:
            raise ProxyConfigError(
                f"--output {self.name!r} exists and is no job of ours "
                f"(no {self._sidecar.name} beside it); {_REMEDY}"
            )
        # An earlier version wrote secrets, too.
        then, now = _flat(without_secrets(written)), _flat(self._fingerprint)
        changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
        if changed:
            what = "; ".join(f"`{k}` was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
            raise ProxyConfigError(
                f"--output {self.name!r} exists and is of another job: {what}; {_REMEDY}"
            )

    def _written(self) -> dict[str, Any]:
        """Return what the sidecar says; nothing if there is none of ours."""
        try:
            written = json.loads(self._sidecar.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return written if isinstance(written, dict) else {}

    def _read_records(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # the line on which the last run died
            try:
                record = decode(line)
                index, is_error = self._format.index(record), self._format.is_error(record)
                self._require_known(index)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ProxyConfigError(
                    f"--output {str(self._path)!r}: line {number} is not a record; remove the "
                    "line, or add --overwrite"
                ) from None
            self._count(index, is_error)
            self._kept += len(line)

    def _require_known(self, index: int) -> None:
        """Refuse the number of a row that there is not. Raises `ValueError`."""
        if self._total is not None and index >= self._total:
            raise ValueError(index)

    def _read_parquet(self) -> None:
        for index, is_error in parquet.read_indices(self.name):
            try:
                self._require_known(row_number(index))
            except ValueError:
                raise ProxyConfigError(
                    f"--output {self.name!r} has a record of row {index!r}, which the job has not; "
                    f"{_REMEDY}"
                ) from None
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
        try:
            self._file.truncate(self._kept)
            if self._is_parquet and not self._kept:
                # Of another job, which is to be replaced: with our sidecar it would pass for ours.
                Path(os.path.realpath(self.name)).unlink(missing_ok=True)
            # Records of another job must have gone before the sidecar says that they are ours.
            os.fsync(self._file.fileno())
            sync_directory(self._path.parent)
            if self._fingerprint is None:
                self._sidecar.unlink(missing_ok=True)
                return
            with replacing(self._sidecar) as file:
                file.write(json.dumps(self._fingerprint, indent=1).encode())
        except OSError as error:
            raise ProxyConfigError(f"--output {self.name!r}: {error.strerror}") from None

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append *record*; it survives the death of this process.

        Returns:
            The record that was written: that of a failure if JSON cannot say *record*.

        Raises:
            ProxyConfigError: the system refuses, for instance because the disk is full.
            BrokenPipeError: whoever read the output has gone.
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
            raise ProxyConfigError(f"--output {self.name!r}: {error.strerror}") from None
        self._count(self._format.index(record), self._format.is_error(record))
        return record

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
        """Write the records again, by row, and replace the old file by the new one."""
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
                columns.see(record)
        with replacing(self.name) as file:
            if self._is_parquet:
                parquet.write_records(self._lines(starts), file, columns)
            else:
                file.writelines(self._lines(starts))
        if self._is_parquet:
            self._path.unlink()

    def _lines(self, starts: array) -> Iterator[bytes]:
        for start in starts:
            if start >= 0:
                self._file.seek(start)
                yield self._file.readline()

    def close(self) -> None:
        """Close the file, which gives up the lock; take back an empty one made for nothing."""
        if self._made:  # while the lock is held: it is nobody else's
            self._path.unlink(missing_ok=True)
            self._made = False
        # A full disk or a broken pipe has been reported by the write that met it.
        with suppress(OSError):
            close_locked(self._file)


def _may_be_file(path: Path) -> bool:
    """Return whether a path is a file, or is still free."""
    try:  # one look at it: another job may make it at this moment
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def own_files(name: str) -> tuple[str, str]:
    """Return the paths of a job's sidecar, and of the journal of one that ends as a table."""
    return f"{name}.job.json", f"{name}.partial.jsonl"


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
