"""The watcher that `guard` starts: ends the descendants of a process that was killed.

It polls /proc. A pipe or a lock would not work: the engine's processes inherit the end whose
closing would be the signal. It is started with `python -IS`, so it can import only the standard
library.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

POLL_S = 0.5
PATIENCE_S = 3.0
"""Seconds between SIGTERM and SIGKILL."""


def children(pid: int) -> Iterator[int]:
    """Yield the children of a process. The kernel lists each one at the thread that started it."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                yield from map(int, file.read().split())
    except OSError:
        pass  # the process or the thread has ended


def descendants(pid: int) -> Iterator[int]:
    """Yield the children of a process, their children, and so on."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def watch(parent: int) -> set[int]:
    """Wait for *parent* to end, and return its descendants without this process."""
    others: set[int] = set()
    while os.getppid() == parent:
        found = set(descendants(parent))
        # A dying process loses its children thread by thread: a list without us is incomplete.
        if os.getpid() in found:
            others = found - {os.getpid()}
        time.sleep(POLL_S)
    return others


def end(pids: set[int]) -> None:
    """End these processes and those that they have started since."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        for pid in list(pids):
            pids.update(descendants(pid))
        for pid in pids:
            with suppress(OSError):  # it has ended
                os.kill(pid, ending)
        time.sleep(PATIENCE_S)


if __name__ == "__main__":
    end(watch(int(sys.argv[1])))
