"""Shared fixtures. Engines run in processes of their own (`engine_process.py`), one a runner."""

import gc
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from support.engines import engine_in_this_process
from support.reference import Reference
from support.tiny_models import write_triple

if TYPE_CHECKING:
    from vllm_proxy import ProxyLLM

LONGEST = (
    *("test_exactness", "test_ray", "test_batch", "test_requests", "test_drafting"),
    *("test_one_pass", "test_benchmarks", "test_gap_closed", "test_examples", "test_server"),
    *("test_evaluate", "test_live_weights", "test_inspect", "test_graphs", "test_two_members"),
)
"""Begun first, so that no worker is left alone with one of them in the end."""


class ByEngines(LoadScopeScheduling):
    """Gives a worker all tests that share engines: a file's, or in the longest file a runner's."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).stem
        runner = re.search(r"\[.*\b(v1|v2)\b", nodeid) if file == LONGEST[0] else None
        return f"{file}-{runner[1]}" if runner else file


def pytest_configure(config: pytest.Config) -> None:
    """Have a place for what engines compile: see `rig/compiled_once`. Workers inherit it."""
    if not hasattr(config, "workerinput"):
        directory = tempfile.TemporaryDirectory()
        config.add_cleanup(directory.cleanup)
        os.environ["COMPILED_ONCE"] = directory.name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngines:
    return ByEngines(config, log)


ENGINE_FIXTURES = {"proxy_llm", "cluster", "loaded", "evaluated"}
STARTERS = {"serving", "run_engines", "Command"}
"""Names in `support` of what starts an engine; tests that do it otherwise are marked by hand."""


def starts_an_engine(item: pytest.Item) -> bool:
    """Whether a test, or a fixture that it uses, starts an engine or asks a running one."""
    if not isinstance(item, pytest.Function):
        return False
    fixtures = item._fixtureinfo.name2fixturedefs
    functions = [item.function, *(fixture.func for each in fixtures.values() for fixture in each)]
    names = {
        name for one in functions if hasattr(one, "__code__") for name in one.__code__.co_names
    }
    return bool(ENGINE_FIXTURES & fixtures.keys() or STARTERS & names)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks for an engine, and begin with the longest files."""
    for item in items:
        if starts_an_engine(item):
            item.add_marker("engine")
    rank = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Spare the collector, also that of forks, what is imported now and stays."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def members(tmp_path_factory) -> dict[str, str]:
    """Three real checkpoints with tokenizers: paths by role."""
    return write_triple(tmp_path_factory.mktemp("members"), "llama")


@pytest.fixture(scope="session")
def reference(members) -> Reference:
    """What the engines on `members` must say."""
    return Reference(**members)


@pytest.fixture(scope="module")  # while it runs, `check` here starts no engine without weights
def proxy_llm(members) -> Iterator["ProxyLLM"]:
    """One real engine in this process, for all tests of a file that need no other."""
    from vllm_proxy import ProxyLLM

    settings = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True}
    sampling = {"temperature": 0.0, "max_tokens": 7}
    with engine_in_this_process(lambda: ProxyLLM(**members, sampling=sampling, **settings)) as llm:
        yield llm


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    """A process group of this process alone, which vLLM's layers ask for their rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        place = f"file://{tmp_path}/rendezvous"
        parallel_state.init_distributed_environment(1, 0, place, 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
