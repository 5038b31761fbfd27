"""Commands in forks of one process that has imported vLLM."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class Forks:
    """Runs commands in forks of a process that has imported vLLM: see `forked_command.py`."""

    def __init__(self, directory: Path, env: dict[str, str] | None = None) -> None:
        """Start that process; *directory* gets what commands write, in files of their own."""
        self.directory, self.log = directory, directory / "forks.txt"
        with self.log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("forked_command.py"))],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def start(self, words: list[str], output: Sequence[Path] = (), **environment: str) -> int:
        """Start a command, when the one before has ended; return its process id."""
        command = {"words": words, "output": [*map(str, output)], "environment": environment}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """Return the exit status of the command that was started last, when it has ended."""
        return int(self._process.stdout.readline())

    def run(self, words: list[str], **environment: str) -> subprocess.CompletedProcess:
        """Run a command to its end."""
        output = self.directory / "stdout.txt", self.directory / "stderr.txt"
        self.start(words, output, **environment)
        status = self.wait()
        return subprocess.CompletedProcess(words, status, *(path.read_text() for path in output))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
