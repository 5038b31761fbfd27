"""The files of a batch job: rows read lazily, records that survive the death of their writer."""

import codecs
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_proxy.errors import ProxyConfigError

STANDARD_STREAM = "-"


class Input:
    """The rows of a file or of a stream: standard input, a pipe.

    Attributes:
        name: the path, or `-`.
        text: whether a line is a prompt (`.txt`) and not a JSON object.
        rows: number of rows that the job is to answer; None for a stream.
        sha256: of all bytes; None for a stream.

    Raises:
        ProxyConfigError: the file cannot be read, or has no rows.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.name, self._limit = name, limit
        self.text = name.endswith(".txt")
        self.rows: int | None = None
        self.sha256: str | None = None
        if name == STANDARD_STREAM:
            return
        try:
            if stat.S_ISFIFO(os.stat(name).st_mode):
                return
            self._scan()
        except OSError as error:
            raise ProxyConfigError(
                f"--input {name!r}: {error.strerror}; give a file of rows, or - for standard input"
            ) from None
        if not self.rows:
            raise ProxyConfigError(f"--input {name!r}: no rows; write one prompt a line")

    def _scan(self) -> None:
        digest, rows = hashlib.sha256(), 0
        with open(self.name, "rb") as file:
            for line in file:
                digest.update(line)
                rows += 1
        self.sha256 = digest.hexdigest()
        self.rows = self._limit = rows if self._limit is None else min(rows, self._limit)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield `(index, line)`, read as they are asked for."""
        with open(0 if self.name == STANDARD_STREAM else self.name, "rb") as file:
            for index, line in enumerate(islice(file, self._limit)):
                yield index, line.removeprefix(codecs.BOM_UTF8) if index == 0 else line


class Output:
    """The records of a job, and which of its rows they answer already.

    Nothing on disk is changed before `begin`, except that a missing file is made.

    Attributes:
        name: the path, or `-`.
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
        *,
        overwrite: bool = False,
    ) -> None:
        self.name, self._fingerprint = name, fingerprint
        self._sidecar = Path(f"{name}.job.json")
        self.done, self.failed = bytearray(rows or 0), 0
        self._kept = 0  # bytes that `begin` leaves in the file
        path = Path(name)
        self._made = name != STANDARD_STREAM and not path.exists()
        self._is_file = name != STANDARD_STREAM and (path.is_file() or not path.exists())
        try:
            # Duplicated, so that the engine's chatter can be turned away from descriptor 1.
            self._file = (
                os.fdopen(os.dup(1), "wb")
                if name == STANDARD_STREAM
                else open(name, "a+b" if self._is_file else "wb")  # noqa: SIM115 - see `close`
            )
        except OSError as error:
            raise ProxyConfigError(
                f"--output {name!r}: {error.strerror}; give a file in a directory that exists"
            ) from None
        if self._is_file:
            try:
                self._lock()
                if not overwrite and os.fstat(self._file.fileno()).st_size:
                    self._require_same_job()
                    self._read_records()
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

    def _require_same_job(self) -> None:
        remedy = "add --overwrite to replace it, or give another --output"
        if self._fingerprint is None:
            raise ProxyConfigError(
                f"--output {self.name!r} exists, and rows of a stream cannot be resumed; {remedy}"
            )
        try:
            written = json.loads(self._sidecar.read_text())
        except (OSError, ValueError):
            raise ProxyConfigError(
                f"--output {self.name!r} exists and is no job of ours "
                f"(no {self._sidecar.name} beside it); {remedy}"
            ) from None
        then, now = _flat(written), _flat(self._fingerprint)
        changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
        if changed:
            what = "; ".join(f"`{k}` was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:3])
            raise ProxyConfigError(
                f"--output {self.name!r} exists and is of another job: {what}; {remedy}"
            )

    def _read_records(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # the line on which the last run died
            try:
                record = json.loads(line)
                index = record["index"]
                # With a smaller --limit than before, there may be records beyond it.
                if index < len(self.done):
                    self.done[index] = 1
                    self.failed += "error" in record
            except (ValueError, KeyError, TypeError):
                raise ProxyConfigError(
                    f"--output {self.name!r}: line {number} is not a record; remove the line, "
                    "or add --overwrite"
                ) from None
            self._kept += len(line)

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
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ProxyConfigError(f"--output {self.name!r}: {error.strerror}") from None
        self.failed += "error" in record

    def close(self) -> None:
        """Close the file, which gives up the lock; take back an empty one made for nothing."""
        # A full disk or a broken pipe has been reported by the write that met it.
        with suppress(OSError):
            self._file.close()
        if self._made:
            Path(self.name).unlink(missing_ok=True)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        k: v
        for key, value in values.items()
        for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
