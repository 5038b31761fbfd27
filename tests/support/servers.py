"""Servers that answer over HTTP."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from support.commands import COMMAND_ENV
from support.forks import Fork


@contextmanager
def serving(
    command: list[str], directory: Path, env: dict[str, str] | None = None
) -> Iterator[str]:
    """Run *command* with a free port; yield the address when it answers.

    `vllm` without a path runs in a fork in which it is imported already.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = directory / "log.txt"
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    own = {**COMMAND_ENV, **(env or {})}
    process: Fork | subprocess.Popen
    if command[0] == "vllm":
        process = Fork(words, own, log, log)
    else:
        with log.open("w") as file:
            process = subprocess.Popen(words, env=own, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE:
                pytest.fail(f"the server ended:\n{log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")
        yield address
    finally:
        process.terminate()
        process.wait(30)
