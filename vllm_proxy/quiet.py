"""Keep vLLM's chatter off the terminal, and its processes from outliving ours.

An engine is several processes and libraries that log, warn and print tracebacks, also to standard
output. Here descriptors 1 and 2 go to a temporary file while an engine lives, and with them those
of every process it starts; when something fails, its cause is looked up there.

vLLM's engine process does not notice when the process that started it is killed: it would keep the
GPU's memory for ever, and the next run would find none. A guard ends it.
"""

import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from vllm_proxy.errors import ProxyConfigError

_CAUSE = re.compile(r"\b(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception)): (.+)")
_POINTER = re.compile(r"root cause|stack trace", re.IGNORECASE)
"""An error that only says that there was another one."""

_GUARD = """
import os, signal, sys, time
me, parent, others = os.getpid(), int(sys.argv[1]), set()
while os.getppid() == parent:
    try:
        with open("/proc/{0}/task/{0}/children".format(parent)) as file:
            children = set(map(int, file.read().split()))
    except OSError:
        children = ()
    # A dying process loses its children thread by thread: a list without us is of one.
    if me in children:
        others = children - {me}
    time.sleep(0.5)
for ending in signal.SIGTERM, signal.SIGKILL:
    for pid in others:
        try:
            os.kill(pid, ending)
        except OSError:
            pass
    time.sleep(3)
"""
"""Polls: of a pipe or a lock, the engine's processes would inherit the end that is to be closed."""


@contextmanager
def _guard() -> Iterator[None]:
    """Have the processes that this one starts in the body ended if this one is killed."""
    guard = subprocess.Popen(
        [sys.executable, "-ISc", _GUARD, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of a Ctrl-C
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()


@contextmanager
def quiet_engine(verbose: bool) -> Iterator[IO[str]]:
    """Run an engine in the body. vLLM must not be imported before.

    Args:
        verbose: leave everything visible, on standard error, with tracebacks.

    Yields:
        The terminal's standard error, for the caller's own messages.

    Raises:
        ProxyConfigError: whatever exception ends the body, as one line.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        os.dup2(saved[1] if verbose else log.fileno(), 1)
        if not verbose:
            os.dup2(log.fileno(), 2)
        try:
            with _guard():
                yield terminal
        except (ProxyConfigError, BrokenPipeError):
            raise
        except Exception as error:
            if verbose:
                traceback.print_exc(file=terminal)
            log.seek(0)
            hint = "" if verbose else " (--verbose shows the traceback)"
            cause = explain(error, log.read().decode(errors="replace"))
            raise ProxyConfigError(cause + hint) from error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def explain(error: Exception, log: str = "") -> str:
    """Return the cause of *error* in one line.

    Args:
        error: what reached this process; from another one, vLLM passes on only that it died.
        log: what all processes wrote; its last exception is then the cause.
    """
    details = getattr(error, "errors", None)  # pydantic's
    text = details()[0]["msg"].removeprefix("Value error, ") if callable(details) else str(error)
    if _POINTER.search(text):
        causes = [match for match in _CAUSE.findall(log) if not _POINTER.search(match[1])]
        if causes:
            name, text = causes[-1]
            text = text if name in ("ProxyConfigError", "ValueError") else f"{name}: {text}"
    elif not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())
