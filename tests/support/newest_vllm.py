"""The newest supported vLLM: its Python files, read from pip's index once."""

import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import BinaryIO

from support.vllm_source import SourceTree
from vllm_proxy.engine.compatibility import SUPPORTED_VLLM

CACHE = Path(__file__).parents[2] / ".cache"
TREE_VARIABLE = "VLLM_PROXY_NEWEST_VLLM"


def newest_tree() -> SourceTree:
    """Return the source tree of the newest supported vLLM.

    Raises:
        RuntimeError: it cannot be had; says how to do without.
    """
    if given := os.environ.get(TREE_VARIABLE):
        if not Path(given, "vllm", "__init__.py").is_file():
            raise RuntimeError(f"{TREE_VARIABLE}={given}: there is no vllm/__init__.py below it")
        return SourceTree(Path(given))
    requirement = f"vllm<{'.'.join(map(str, SUPPORTED_VLLM[1]))}"
    try:
        version, url = _wheel(requirement)
        root = CACHE / f"vllm-{version}"
        if not root.is_dir():  # made whole, or not at all
            CACHE.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                try:
                    _extract(io.BufferedReader(_RemoteFile(url), 2**20), Path(scratch, "tree"))
                except OSError:  # no server of parts: all of it, then, as pip knows how to get it
                    _pip("download", "--dest", scratch, f"vllm=={version}")
                    (wheel,) = Path(scratch).glob("*.whl")
                    _extract(wheel, Path(scratch, "tree"))
                Path(scratch, "tree").rename(root)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise RuntimeError(
            f"the newest `{requirement}` cannot be had: {error}\nWithout a network, unpack its "
            f"wheel and set {TREE_VARIABLE} to the directory that holds `vllm/`"
        ) from error
    return SourceTree(root)


def _wheel(requirement: str) -> tuple[str, str]:
    """Ask pip, which knows this machine's index, for the version and the URL of the wheel."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        _pip("install", "--dry-run", "--ignore-installed", "--report", str(report), requirement)
        (package,) = json.loads(report.read_text())["install"]
    return package["metadata"]["version"], package["download_info"]["url"]


def _pip(command: str, *arguments: str) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--quiet"]
    line = [sys.executable, "-m", "pip", command, *options, *arguments]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"pip says: {run.stderr.strip()}")


def _extract(file: Path | BinaryIO, root: Path) -> None:
    """Unpack the Python files alone: a twentieth of the wheel, which is mostly kernels."""
    with zipfile.ZipFile(file) as wheel:
        files = [
            info
            for info in wheel.infolist()
            if info.filename.startswith("vllm/") and info.filename.endswith(".py")
        ]
        wheel.extractall(root, sorted(files, key=lambda info: info.header_offset))


class _RemoteFile(io.RawIOBase):
    """A file behind a URL, read in ranges."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        head = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(head, timeout=60) as response:
            self.size = int(response.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        part = {"Range": f"bytes={self.position}-{end - 1}"}
        request = urllib.request.Request(self.url, headers=part)
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:
                raise OSError(f"{self.url} cannot be read in parts")
            data = response.read()
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
