"""Commands in forks of processes that have imported vLLM: most of what a command takes is that.

There is one such process for each set of variables that are read while modules are imported, and
at most `MOST_IDLE` of them wait for a command. See `forked_command.py`.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock, Timer

import psutil

AT_IMPORT = (
    *("PYTHONPATH", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER", "HF_HUB_CACHE"),
    *("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL", "CXX"),
)
"""Variables that must be the same for commands of one process."""
MOST_IDLE = 2
"""Each takes 0.6 GiB."""


class Parent:
    """A process that has imported vLLM, and starts commands.

    Attributes:
        running: how many of its commands have not been waited for.
    """

    running = 0

    def __init__(self, env: Mapping[str, str]) -> None:
        self._lock, self._log = Lock(), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked_command.py"))],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, question: object) -> int:
        """Send a line, and return the number that answers it."""
        with self._lock:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            if answer := self._process.stdout.readline():
                return int(answer)
        self._log.seek(0)
        raise RuntimeError(f"the process that starts commands ended:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


_parents: dict[tuple, Parent] = {}  # the one that was used last is the last one


def parent_of(env: Mapping[str, str]) -> Parent:
    """Return a process for commands with these variables. Others may end: those unused longest."""
    values = (env.get(name) for name in AT_IMPORT)
    key = tuple(None if value in ("", "0") else value for value in values)  # off, as by default
    parent = _parents.pop(key, None)
    idle = [other for other, process in _parents.items() if not process.running]
    for other in idle[: len(idle) + 1 - MOST_IDLE]:
        _parents.pop(other).close()
    _parents[key] = parent or Parent(env)
    return _parents[key]


@atexit.register
def close() -> None:
    for parent in _parents.values():
        parent.close()


class Fork:
    """A command that runs in a session of its own."""

    def __init__(
        self,
        words: list[str],
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        directory: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            words: `vllm-proxy`'s; or `vllm`, or the path of a script, and theirs.
            env: all of its variables.
            stdout: the file that it writes to.
            stderr: another one, or the same.
            directory: where it runs; by default, where the tests do.
        """
        self._parent, self._status = parent_of(env), None
        self._output = stdout, stderr
        for path in self._output:
            path.write_bytes(b"")  # here, so that it is there at once
        command = {"words": words, "output": [str(stdout), str(stderr)], "environment": dict(env)}
        self.pid = self._parent.ask({**command, "directory": str(directory or Path.cwd())})
        self._parent.running += 1

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def kill(self) -> None:
        """End it at once, as the kernel does where memory is short."""
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status when it has ended; after *timeout* seconds, its session is killed.

        Until then no other command can be started.
        """
        if self._status is None:
            late = Timer(timeout or 0, os.killpg, (self.pid, signal.SIGKILL))
            if timeout is not None:
                late.start()
            self._status = self._parent.ask(self.pid)
            late.cancel()
            self._parent.running -= 1
        return self._status

    def end(self) -> tuple[int, str, str]:
        """Return exit status, standard output and standard error when it has ended."""
        status = self.wait()
        stdout, stderr = (path.read_text() for path in self._output)
        return status, stdout, stderr


def run(words: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    with tempfile.TemporaryDirectory() as directory:
        output = [Path(directory, name) for name in ("stdout", "stderr")]
        status = Fork(words, env, *output).wait(500)
        return subprocess.CompletedProcess(words, status, *(path.read_text() for path in output))
