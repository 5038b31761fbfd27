"""Servers that answer over HTTP."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from support.engines import ENGINE_ENV


@contextmanager
def serving(
    command: list[str], directory: Path, env: dict[str, str] | None = None
) -> Iterator[str]:
    """Run *command* with a free port; yield the address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = directory / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={
                **os.environ,
                **ENGINE_ENV,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                # What the tests import is what the server imports.
                "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
                **(env or {}),
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if process.poll() is not None:
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
