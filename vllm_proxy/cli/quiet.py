"""Keep vLLM's logs off the terminal, and end its processes when ours is killed.

An engine is several processes and libraries that log, warn and print tracebacks, some of them on
standard output. While an engine runs, descriptors 1 and 2 point to a temporary file, also in every
process that the engine starts. When something fails, we search that file for the cause.

vLLM's engine process does not notice when the process that started it is killed: it would hold the
GPU's memory for ever, and the next run would find none. A guard process ends it.
"""

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

from vllm_proxy.config.errors import ProxyConfigError, error_message
from vllm_proxy.jobs.guard import guard

_CAUSE = re.compile(r"\b(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception)): (.+)")
_POINTER = re.compile(r"root cause|stack trace|creation task|died unexpectedly", re.IGNORECASE)
"""Matches an error that only says that there was another one."""


class EngineStreams(NamedTuple):
    """Where output goes while an engine is kept quiet.

    Attributes:
        terminal: the terminal's standard error, for the command's own messages.
        log: the file that receives what all processes write.
    """

    terminal: IO[str]
    log: IO[bytes]

    def cause(self, error: Exception) -> str:
        """Return the cause of *error* in one line."""
        self.log.seek(0)
        cause = explain(error, self.log.read().decode(errors="replace"))
        remark = getattr(error, "remark", "")
        return f"{cause}; {remark}" if remark else cause


@contextmanager
def quiet_engine(verbose: bool) -> Iterator[EngineStreams]:
    """Run an engine in the body. vLLM must not be imported before.

    Args:
        verbose: leave all output visible, on standard error, with tracebacks.

    Raises:
        ProxyConfigError: an exception ended the body; its cause, as one line.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        streams = EngineStreams(terminal, log)
        os.dup2(saved[1] if verbose else log.fileno(), 1)
        if not verbose:
            os.dup2(log.fileno(), 2)
        try:
            with guard():
                yield streams
        except (ProxyConfigError, BrokenPipeError):
            raise
        except Exception as error:
            if verbose:
                traceback.print_exc(file=terminal)
            hint = "" if verbose else " (--verbose shows the traceback)"
            raise ProxyConfigError(streams.cause(error) + hint) from error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def explain(error: Exception, log: str = "") -> str:
    """Return the cause of *error* in one line.

    Args:
        error: the exception that reached this process. If another process died, vLLM reports only
            that it died.
        log: what all processes wrote. If a process died, the last exception in it is the cause.
    """
    text = error_message(error)
    if _POINTER.search(text):
        # An exception in a warning did not end an engine.
        log = "\n".join(line for line in log.splitlines() if " WARNING " not in line)
        causes = [match for match in _CAUSE.findall(log) if not _POINTER.search(match[1])]
        if not causes:
            return "an engine process ended without an error message: killed, or out of memory"
        name, text = causes[-1]
        text = text if name in ("ProxyConfigError", "ValueError") else f"{name}: {text}"
    elif not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())
