"""Files that one process at a time may write; the second one learns which process is first."""

import fcntl
import os
from contextlib import suppress
from typing import BinaryIO

_held: set[int] = set()
"""Descriptors of the files that this process has locked."""


class LockedError(Exception):
    """Another process has locked the file.

    Attributes:
        writer: the process, in words.
    """

    def __init__(self, pid: int | None) -> None:
        self.writer = "another process" if pid is None else f"process {pid}"
        super().__init__(self.writer)


def open_locked(path: str) -> tuple[BinaryIO, bool]:
    """Open a file for reading and appending, create it if it is missing, and lock it.

    The lock belongs to this opening of the file. A second `open_locked` fails in this process as in
    others, and closing another descriptor of the file does not release the lock. A file system
    without locks gives no lock.

    Args:
        path: of the file, which is not a link.

    Returns:
        The file, and whether this call has created it and nobody has written to it since.

    Raises:
        LockedError: another process has locked it.
        OSError: the system refuses.
    """
    while True:
        descriptor, made = _open(path)
        try:
            _lock(descriptor)
            if _is_at(descriptor, path):
                _held.add(descriptor)
                # Another job may have written between our creating the file and locking it.
                made = made and not os.fstat(descriptor).st_size
                return os.fdopen(descriptor, "a+b"), made
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that had the lock has removed the file


def close_locked(file: BinaryIO) -> None:
    """Close a file and release its lock. Raises `OSError`."""
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
    """Return the process that has locked a file, if the system tells."""
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    with suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            words = line.split()  # 1: FLOCK ADVISORY WRITE 1234 fe:00:2146380 0 EOF
            if words[1] == "FLOCK" and words[5] == f"{device}:{file.st_ino}":
                return int(words[4]) or None
    return None


def _drop_in_child() -> None:
    """Close the locked files in a forked process, so that only its parent holds the locks.

    Otherwise an engine's process would hold them for a while after the job is killed. The same
    descriptors then refer to /dev/null, opened for reading: a write there fails visibly.
    """
    if _held:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor in _held:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
