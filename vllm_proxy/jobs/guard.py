"""End an engine's processes when this process ends, even if it is killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_proxy.jobs import guard_main


@contextmanager
def guard() -> Iterator[None]:
    """If this process is killed in the body, end the processes that it started there."""
    watcher = subprocess.Popen(
        [sys.executable, "-IS", guard_main.__file__, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C does not reach it
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
