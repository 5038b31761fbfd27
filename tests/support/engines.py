"""Engines in processes of their own (`engine_process.py`), and what their results are held to."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from scipy.stats import chisquare

from support.forks import Fork

if TYPE_CHECKING:
    from vllm import LLM

SUPPORT = Path(__file__).parent
RIGS = SUPPORT.parent / "rig"


ENGINE_ENV = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The engine inside the asking process: starts in seconds and can be looked into.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CXX": str(RIGS / "compiled_once" / "g++"),
}
RUNNER_ENV = {
    "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "v2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{RIGS / 'model_runner_v2'}{os.pathsep}{RIGS / 'graphs_on_cpu'}",
    },
}
KV_CACHE_BYTES = 256 << 20
"""Many times what any question needs; the memory is written to at the start."""
TOKEN_ENGINE = {
    "dtype": "float32",
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
    "skip_tokenizer_init": True,
    "block_size": 32,
    "enforce_eager": True,
}
"""Arguments of an engine that is given ids and answers with ids."""
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""Of one whose code is traced, without which vLLM has no pipeline on a CPU, and not compiled."""


def in_graphs(mode: str, sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 48)) -> dict[str, object]:
    """Return arguments of an engine that replays CUDA graphs (V2 only; the rig `graphs_on_cpu`).

    Args:
        mode: vLLM's `cudagraph_mode`.
        sizes: numbers of tokens for which there are graphs.
    """
    compilation = {"mode": 0, "cudagraph_mode": mode, "cudagraph_capture_sizes": [*sizes]}
    if "PIECEWISE" in mode:  # the pieces are found by tracing, and run as they are
        compilation |= {"mode": 3, "backend": "eager"}
    return {"enforce_eager": False, "compilation_config": compilation}


SAFE_MARGIN = 1e-3
"""Prompts whose greedy path comes closer to a tie than this are left out: float32 sums in another
order differ by about 1e-5, and a tie has no right answer."""
FALSE_ALARM = 1e-6
"""Probability that a frequency test fails though the engine is right (seeded: it never flickers,
but a change of seed or vLLM version is a fresh draw)."""


def with_tests_paths(paths: str | None) -> str:
    """Return a PYTHONPATH, so that what the tests import is what their engines import."""
    return os.pathsep.join(filter(None, (paths, os.environ.get("PYTHONPATH"))))


def own_caches(directory: Path) -> dict[str, str]:
    """Return variables by which engines keep compiled code there, and take none of other kernels'.

    Code that was compiled with one rig's kernels is wrong with another's.
    """
    names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
    return {name: str(directory / "cache" / name) for name in names}


@contextlib.contextmanager
def engine_in_this_process(start: "Callable[[], LLM]") -> "Iterator[LLM]":
    """Start an engine here and end it, with its ranks and its environment, after the body."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENGINE_ENV.items():
            environment.setenv(name, value)
        llm = start()
        yield llm
        llm.llm_engine.engine_core.shutdown()


def run_engines(
    plan: list[dict], directory: Path, runner: str = "v1", env: dict[str, str] | None = None
) -> dict[str, dict]:
    """Run *plan* under *runner* and return the results by engine name (see `engine_process`)."""
    directory.mkdir(parents=True, exist_ok=True)
    plan_file = directory / "plan.json"
    plan_file.write_text(json.dumps(plan))
    own = {**os.environ, **ENGINE_ENV, **RUNNER_ENV[runner], **(env or {})}
    if "VLLM_CPU_KVCACHE_SPACE" not in (env or {}):
        del own["VLLM_CPU_KVCACHE_SPACE"]  # vLLM prefers it to `kv_cache_memory_bytes`
    own["PYTHONPATH"] = with_tests_paths({**RUNNER_ENV[runner], **(env or {})}.get("PYTHONPATH"))
    words = [str(SUPPORT / "engine_process.py"), str(plan_file), str(directory)]
    Fork(words, own, directory / "log.txt", directory / "log.txt").wait(2400)
    log = (directory / "log.txt").read_text()
    results = {}
    for engine in plan:
        file = directory / f"{engine['name']}.json"
        answered = file.exists() and file.stat().st_size
        died = {"error": f"its process died:\n{log[-3000:]}"}
        results[engine["name"]] = json.loads(file.read_text()) if answered else died
    return results


def result_of(engines: dict, name: str) -> dict:
    """Return the result of an engine; *engines* has the `runner` beside the results."""
    result = engines[name]
    assert "error" not in result, result["error"]
    assert result["v2"] == (engines["runner"] == "v2")
    return result


def answers_of(engines: dict, name: str) -> dict:
    """Return the answers of an engine by the questions' names."""
    return result_of(engines, name)["answers"]


def require_frequencies(counts: Counter, probabilities: torch.Tensor) -> None:
    """Chi-square of counted tokens against their probabilities, rare tokens pooled."""
    samples = counts.total()
    common = [i for i in range(len(probabilities)) if probabilities[i] * samples >= 5]
    assert len(common) > 5
    observed = [counts[i] for i in common]
    ideal = [probabilities[i].item() * samples for i in common]
    observed.append(samples - sum(observed))
    ideal.append(max(samples - sum(ideal), 1e-9))
    assert chisquare(observed, ideal, sum_check=False).pvalue > FALSE_ALARM
