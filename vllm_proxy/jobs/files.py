"""Files that are written in one piece, and paths that may be written."""

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vllm_proxy.config.errors import ProxyConfigError


def require_free_path(
    option: str,
    name: str,
    *,
    overwrite: bool,
    may_replace: Callable[[Path], bool] = lambda _: False,
    problem: str = "the file exists",
) -> None:
    """Reject a path that no file can be written to, or whose file must not be replaced.

    Args:
        option: that gives the path, for the error.
        name: the path; the file need not exist.
        overwrite: replace any file.
        may_replace: whether an existing file may be replaced without *overwrite*.
        problem: why another file may not, for the error.

    Raises:
        ProxyConfigError: names the option, the path and the remedy.
    """
    path, field = Path(name), f"{option} {name!r}"
    if path.is_dir():
        raise ProxyConfigError("it is a directory", field=field, remedy="give a file")
    if not path.parent.is_dir():
        raise ProxyConfigError(
            "its directory does not exist",
            field=field,
            remedy="give a file in a directory that exists",
        )
    if path.exists() and not overwrite and not may_replace(path):
        remedy = f"add --overwrite to replace it, or give another {option}"
        raise ProxyConfigError(problem, field=field, remedy=remedy)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file atomically: after a crash, the path holds either the old or the new file.

    The body writes a temporary file in the same directory, under a random name. Links are followed,
    and a replaced file keeps its permissions.

    Args:
        path: of the file, which need not exist.

    Raises:
        OSError: the system refuses; the old file is unchanged.
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
    """Make the names in *directory* survive a power failure, where its file system can do that."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
