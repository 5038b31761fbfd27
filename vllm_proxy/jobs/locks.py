"""Files that one writer at a time has: whoever comes second is told who was first."""

import fcntl
import os
from contextlib import suppress
from typing import BinaryIO

_held: set[int] = set()
"""Descriptors of the files that this process has."""


class LockedError(Exception):
    """Another writer has the file.

    Attributes:
        writer: the process, in words.
    """

    def __init__(self, pid: int | None) -> None:
        self.writer = "another process" if pid is None else f"process {pid}"
        super().__init__(self.writer)


def open_locked(path: str) -> tuple[BinaryIO, bool]:
    """Open a file to read it and to append to it, make it if it is missing, and lock it.

    The lock is of this opening of the file: other openings in this process are refused as those of
    other processes are, and closing them does not end it. On a file system without locks there is
    none.

    Args:
        path: of the file, which is no link.

    Returns:
        The file, and whether it was made: by nobody else, and nobody has written to it.

    Raises:
        LockedError: another writer has it.
        OSError: the system refuses.
    """
    while True:
        descriptor, made = _open(path)
        try:
            _lock(descriptor)
            if _is_at(descriptor, path):
                _held.add(descriptor)
                # Another job may have come and gone before the lock was ours.
                made = made and not os.fstat(descriptor).st_size
                return os.fdopen(descriptor, "a+b"), made
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it has removed it meanwhile


def close_locked(file: BinaryIO) -> None:
    """Close a file and give up its lock. Raises `OSError`."""
    if not file.closed:
        _held.discard(file.fileno())
        file.close()


def _open(path: str) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_APPEND
    while True:
        with suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(path, flags), False


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(_holder(os.fstat(descriptor))) from None
    except OSError:
        return  # a file system without locks


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file: os.stat_result) -> int | None:
    """Return the process that has a file's lock, where the system tells."""
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    with suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            words = line.split()  # 1: FLOCK ADVISORY WRITE 1234 fe:00:2146380 0 EOF
            if words[1] == "FLOCK" and words[5] == f"{device}:{file.st_ino}":
                return int(words[4]) or None
    return None


def _let_go() -> None:
    """Leave the locks to the process that forked this one.

    An engine's process would keep them for a while after the job is killed. What it has under these
    numbers instead cannot be written to, so nothing can be lost there without an error.
    """
    if _held:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor in _held:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _held.clear()


os.register_at_fork(after_in_child=_let_go)
