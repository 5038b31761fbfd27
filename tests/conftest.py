"""Shared fixtures. Engines run in processes of their own (`engine_process.py`), one a runner."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from reference import Reference
from tiny_models import write_triple
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from vllm_proxy import ProxyLLM

TESTS = Path(__file__).parent
RIGS = TESTS / "rig"

ENGINE_ENV = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The engine inside the asking process: starts in seconds and can be looked into.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
RUNNER_ENV = {
    "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "v2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(RIGS / "model_runner_v2"),
    },
}


LONGEST = (
    *("test_exactness", "test_ray", "test_requests", "test_batch", "test_drafting"),
    *("test_server", "test_evaluate", "test_gap_closed", "test_benchmarks"),
)
"""Begun first, so that no worker is left alone with one of them in the end."""


class ByEngines(LoadScopeScheduling):
    """Gives a worker all tests that share engines: a file's, or in the longest file a runner's."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).stem
        runner = re.search(r"\[.*\b(v1|v2)\b", nodeid) if file == LONGEST[0] else None
        return f"{file}-{runner[1]}" if runner else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngines:
    return ByEngines(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    rank = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def run_engines(
    plan: list[dict], directory: Path, runner: str = "v1", env: dict[str, str] | None = None
) -> dict[str, dict]:
    """Run *plan* under *runner* and return the results by engine name (see `engine_process`)."""
    directory.mkdir(parents=True, exist_ok=True)
    plan_file = directory / "plan.json"
    plan_file.write_text(json.dumps(plan))
    own = {**os.environ, **ENGINE_ENV, **RUNNER_ENV[runner], **(env or {})}
    # What the tests import is what their engines import.
    paths = own.get("PYTHONPATH"), os.environ.get("PYTHONPATH")
    own["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = subprocess.run(
        [sys.executable, str(TESTS / "engine_process.py"), str(plan_file), str(directory)],
        env=own,
        capture_output=True,
        text=True,
        check=False,
        timeout=2400,
    )
    log = process.stdout + process.stderr
    (directory / "log.txt").write_text(log)
    results = {}
    for engine in plan:
        file = directory / f"{engine['name']}.json"
        answered = file.exists() and file.stat().st_size
        died = {"error": f"its process died:\n{log[-3000:]}"}
        results[engine["name"]] = json.loads(file.read_text()) if answered else died
    return results


class Forks:
    """Runs commands in forks of a process that has imported vLLM: see `forked_command.py`."""

    def __init__(self, directory: Path, env: dict[str, str] | None = None) -> None:
        """Start that process; *directory* gets what commands write, in files of their own."""
        self.directory, self.log = directory, directory / "forks.txt"
        with self.log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(TESTS / "forked_command.py")],
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


def result_of(engines: dict, name: str) -> dict:
    """Return the result of an engine; *engines* has the `runner` beside the results."""
    result = engines[name]
    assert "error" not in result, result["error"]
    assert result["v2"] == (engines["runner"] == "v2")
    return result


@pytest.fixture(scope="session")
def members(tmp_path_factory) -> dict[str, str]:
    """Three real checkpoints with tokenizers: paths by role."""
    return write_triple(tmp_path_factory.mktemp("members"), "llama")


@pytest.fixture(scope="session")
def reference(members) -> Reference:
    """What the engines on `members` must say."""
    return Reference(**members)


@pytest.fixture(scope="session")
def proxy_llm(members) -> Iterator["ProxyLLM"]:
    """One real engine in this process, for all tests that need no other."""
    os.environ.update(ENGINE_ENV)
    from vllm_proxy import ProxyLLM

    llm = ProxyLLM(
        **members,
        sampling={"temperature": 0.0, "max_tokens": 7},
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
