"""Files that are written in one piece."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Have the body write a file that appears whole: after any kind of death, the old or the new.

    The new file waits in the same directory, under a name that nobody else uses. A link is
    followed, and the permissions of a file that is replaced stay.

    Args:
        path: of the file, which need not exist.

    Raises:
        OSError: the system refuses; the old file is as it was.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe, a device: nothing to replace
        with open(path, "wb") as file:
            yield file
        return
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    part = os.path.join(directory, f".{name[:64]}.{secrets.token_hex(8)}")
    try:
        with open(part, "xb") as file:  # fails if the name is taken, by a link too
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_directory(directory)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Have the names in *directory* survive a loss of power, where its file system can do that."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
