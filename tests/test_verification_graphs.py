"""Which passes over drafts have a FULL CUDA graph, by vLLM's own manager, without an engine."""

from math import ceil, log2
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import vllm.v1.worker.gpu.cudagraph_utils as graphs
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_proxy.config.schema import Member, Speculate
from vllm_proxy.engine import runner_v2
from vllm_proxy.engine.drafting import graphs as drafting_graphs
from vllm_proxy.engine.drafting.graphs import capture_every_length, capture_up_to
from vllm_proxy.engine.drafting.v2 import ExpertSpeculator
from vllm_proxy.engine.runner_v2 import MemberGraphs, ProxyModelState, ProxyRunnerV2

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
BOTH = CUDAGraphMode.FULL_AND_PIECEWISE


def config(speculate: Speculate, running: int, mode=BOTH, sizes=None, batched=8192, replicas=1):
    """Return an engine's configuration, as far as graphs depend on it, with vLLM's own sizes."""
    drafts = speculate.engine_argument(Member(model="base"))
    schedule = drafts.get("num_speculative_tokens_per_batch_size")
    made = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=CompilationConfig(cudagraph_mode=mode, **(sizes or {})),
        scheduler_config=SimpleNamespace(max_num_seqs=running, max_num_batched_tokens=batched),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=replicas),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        performance_mode="balanced",
        num_speculative_tokens=speculate.tokens,
        uniform_decode_query_len=1 + speculate.tokens,
        speculative_config=SimpleNamespace(
            uses_dynamic_speculative_decoding=lambda: schedule is not None,
            num_speculative_tokens_per_batch_size=schedule,
        ),
    )
    with patch.object(
        type(current_platform), "is_device_capability_family", lambda *_: False, create=True
    ):
        VllmConfig._set_cudagraph_sizes(made)
    return made


@pytest.fixture
def manager(monkeypatch):
    """A function that makes vLLM's manager as its runner does, without the graphs themselves."""
    only = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(graphs, "get_pp_group", lambda: only)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(graphs, "current_platform", platform)

    def make(config: SimpleNamespace) -> graphs.ModelCudaGraphManager:
        made = graphs.ModelCudaGraphManager(
            config,
            torch.device("cpu"),
            config.compilation_config.cudagraph_mode,
            decode_query_len=config.uniform_decode_query_len,
        )
        made._graphs_captured = True
        return made

    return make


def dispatched(manager, requests: int, drafts: int) -> graphs.BatchExecutionDescriptor:
    length = drafts + 1
    return manager.dispatch(requests, requests * length, length, 0, max_query_len=length)


def modes(manager, requests: int, drafts: int) -> list[str]:
    """The mode of a pass after 0 … *drafts* drafts for each of *requests* requests."""
    return [dispatched(manager, requests, k).cg_mode.name for k in range(drafts + 1)]


CASES = [
    ({"tokens": 4}, 64),
    ({"tokens": 4}, 1),  # fewer requests than lengths
    ({"tokens": 4}, 256),
    ({"tokens": 4, "requests": 8}, 256),
    ({"tokens": 4, "requests": 6}, 6),
    ({"tokens": 4, "requests": 300}, 256),
    ({"tokens": 3, "requests": 2, "adapt": False}, 32),
    ({"tokens": 4, "adapt": False}, 64),
    ({"tokens": 1}, 512),
    ({"tokens": 8, "requests": 16}, 1024),
    ({"tokens": 16}, 100),
    ({"tokens": 128, "requests": 4}, 64),  # the most drafts
]


@pytest.mark.parametrize(("options", "running"), CASES)
def test_every_length_has_a_full_graph(manager, options, running):
    """For each number of requests and drafts, up to vLLM's largest graph, with bounded padding."""
    speculate = Speculate(**options)
    made = config(speculate, running)
    found = manager(made)
    capture_every_length(found, speculate.tokens, speculate.requests)
    largest = made.compilation_config.max_cudagraph_capture_size
    limit = min(speculate.requests or running, running)
    seen = 0
    for drafts in range(speculate.tokens + 1):
        for requests in range(1, (limit if drafts else running) + 1):
            if (tokens := requests * (drafts + 1)) > largest:
                continue
            graph, seen = dispatched(found, requests, drafts), seen + 1
            assert graph.cg_mode == FULL, (requests, drafts)
            assert graph.uniform_token_count == drafts + 1
            assert requests <= graph.num_reqs <= running
            assert graph.num_tokens == graph.num_reqs * (drafts + 1) <= largest
            # Padded by half, or to vLLM's next capture size.
            assert graph.num_tokens <= 1.5 * tokens + 16 * (drafts + 1), (requests, drafts)
            assert graph in found._capture_descs[FULL]
    assert seen >= min(limit, largest // (speculate.tokens + 1)) * (speculate.tokens + 1)


@pytest.mark.parametrize(("options", "running"), CASES)
def test_the_number_of_graphs_is_bounded(manager, options, running):
    """Each number of drafts adds at most 2 log2(requests) + 2 graphs to those without drafts."""
    speculate = Speculate(**options)
    made = config(speculate, running)
    found = manager(made)
    piecewise = found._capture_descs[PIECEWISE]
    capture_every_length(found, speculate.tokens, speculate.requests)
    full = found._capture_descs[FULL]
    plain = [size for size in made.compilation_config.cudagraph_capture_sizes if size <= running]
    limit = min(speculate.requests or running, running)
    assert len(full) <= len(plain) + 1 + speculate.tokens * (2 * ceil(log2(limit)) + 2)
    assert len(full) == len({*full})
    assert full == sorted(full, key=lambda graph: -graph.num_tokens)  # the largest shapes the pool
    assert found._capture_descs[PIECEWISE] == piecewise


def test_stock_vllm_leaves_most_lengths_piecewise(manager):
    """Why `graphs.py` exists. If this fails, vLLM captures them itself, and we need not."""
    assert modes(manager(config(Speculate(tokens=4), 64)), 4, 4) == ["PIECEWISE"] * 4 + ["FULL"]
    named = config(Speculate(tokens=4), 64)
    named.speculative_config.num_speculative_tokens_per_batch_size = [
        (n + 1, n + 1, 4 - n) for n in range(5)
    ]
    assert "PIECEWISE" in {m for n in range(1, 9) for m in modes(manager(named), n, 4)}


def test_more_requests_than_draft_have_full_graphs_without_drafts_only(manager):
    found = manager(config(Speculate(tokens=4, requests=8), 64))
    capture_every_length(found, 4, 8)
    assert modes(found, 64, 4)[0] == "FULL"
    assert modes(found, 40, 2) == ["FULL", "PIECEWISE", "PIECEWISE"]


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL, CUDAGraphMode.NONE])
def test_a_mode_without_decode_graphs_is_left_alone(manager, mode):
    made = config(Speculate(tokens=4), 64, mode=mode)
    ours, stock = manager(made), manager(made)
    capture_every_length(ours, 4, None)
    assert ours._capture_descs == stock._capture_descs
    assert ours._candidates == stock._candidates


@pytest.mark.parametrize("mode", [BOTH, CUDAGraphMode.FULL_DECODE_ONLY])
def test_the_users_sizes_bound_the_graphs(manager, mode):
    made = config(Speculate(tokens=4), 64, mode, {"cudagraph_capture_sizes": [1, 2, 4, 8]})
    found = manager(made)
    capture_every_length(found, 4, None)
    assert max(graph.num_tokens for graph in found._capture_descs[FULL]) == 8
    assert modes(found, 1, 4) == ["FULL"] * 5
    assert dispatched(found, 8, 0).num_reqs == 8
    assert dispatched(found, 3, 4).cg_mode == CUDAGraphMode.NONE  # 15 tokens
    mixed = found.dispatch(2, 6, None, 0)  # requests with different numbers of tokens
    assert mixed.cg_mode == (PIECEWISE if mode == BOTH else CUDAGraphMode.NONE)


class _StockRunner:
    """What vLLM's runner does there, as far as graphs are concerned."""

    def initialize_kv_cache(self, made: graphs.ModelCudaGraphManager) -> None:
        self.cudagraph_manager = made


class _Runner(ProxyRunnerV2, _StockRunner):
    def __init__(self, config: SimpleNamespace) -> None:
        self.vllm_config, self.model_config = config, config.model_config


@pytest.mark.parametrize(("replicas", "limit"), [(1, 8), (2, 64)])
def test_the_runner_has_graphs_for_drafts_on_every_stage(manager, monkeypatch, replicas, limit):
    """Not only where the drafter is: stages that pad a batch differently cannot work on it."""
    speculate = Speculate(tokens=4, requests=8)
    made = config(speculate, 64, replicas=replicas)
    for module in (runner_v2, drafting_graphs):
        section = SimpleNamespace(speculate=speculate)
        monkeypatch.setattr(module, "proxy_section", lambda _, section=section: section)
    runner = _Runner(made)
    runner.initialize_kv_cache(manager(made))
    assert modes(runner.cudagraph_manager, 8, 4) == ["FULL"] * 5
    assert (modes(runner.cudagraph_manager, 40, 4)[1] == "FULL") == (limit > 8)
    drafter = ExpertSpeculator.__new__(ExpertSpeculator)
    drafter.vllm_config, drafter.device = made, torch.device("cpu")
    drafter.max_num_reqs, drafter.max_model_len = 64, 64
    tables = [torch.zeros(64, 4, dtype=torch.int32)]
    drafter.block_tables = SimpleNamespace(input_block_tables=tables, block_sizes=[16])
    drafter.init_cudagraph_manager(BOTH)
    assert max(graph.num_reqs for graph in drafter.graphs._capture_descs[FULL]) == limit


@pytest.mark.parametrize(("options", "running"), CASES)
def test_drafts_have_graphs_for_the_requests_that_draft(manager, options, running):
    """Each number of requests that may draft has a graph, and no graph is for more of them."""
    speculate = Speculate(**options)
    made = config(speculate, running)
    made.uniform_decode_query_len = 1
    stock, found = manager(made), manager(made)
    capture_up_to(found, speculate.requests)
    limit = min(speculate.requests or running, running)
    used = [dispatched(found, requests, 0) for requests in range(1, limit + 1)]
    assert used == [dispatched(stock, requests, 0) for requests in range(1, limit + 1)]
    captured = {graph for graph in used if graph.cg_mode == FULL}
    assert {*found._capture_descs[FULL]} == captured
    assert dispatched(found, limit + 16, 0).cg_mode != FULL


@pytest.mark.parametrize(("options", "stock", "ours"), [({"requests": 8}, 86, 60), ({}, 51, 95)])
def test_the_numbers_of_graphs_in_the_documentation(manager, options, stock, ours):
    speculate = Speculate(tokens=4, **options)
    found = manager(config(speculate, 256))
    assert len(found._capture_descs[FULL]) == stock
    capture_every_length(found, 4, speculate.requests)
    assert len(found._capture_descs[FULL]) == ours
    text = " ".join((Path(__file__).parents[1] / "docs/drafting.md").read_text().split())
    assert f" {ours} " in text
    assert f"stock{' vLLM' if options else ''}: {stock})" in text


@pytest.mark.parametrize(
    ("mode", "breakable", "prompts_differ", "rows_differ", "found"),
    [
        (BOTH, False, False, False, "FULL"),
        (BOTH, False, True, False, "FULL"),  # all members have the batch's rows
        (BOTH, False, True, True, "PIECEWISE"),
        (CUDAGraphMode.FULL, False, True, False, "FULL"),
        (CUDAGraphMode.FULL, False, True, True, "NONE"),
        (CUDAGraphMode.FULL_DECODE_ONLY, False, True, True, "NONE"),
        (PIECEWISE, False, True, True, "PIECEWISE"),
        # Breakable graphs contain what gives members their inputs.
        (BOTH, True, False, False, "FULL"),
        (BOTH, True, True, False, "FULL"),
        (BOTH, True, True, True, "NONE"),
        (PIECEWISE, True, False, False, "PIECEWISE"),
        (PIECEWISE, True, True, False, "NONE"),
    ],
)
def test_a_graph_is_not_replayed_where_members_have_different_rows(
    manager, mode, breakable, prompts_differ, rows_differ, found
):
    made = manager(config(Speculate(tokens=4), 64, mode=mode))
    made.__class__ = MemberGraphs
    made.use_breakable_cg = breakable
    made.prompts_differ, made.rows_differ = prompts_differ, rows_differ
    step = dispatched(made, 4, 4)  # all drafts: stock vLLM has a FULL graph, too
    assert step.cg_mode.name == found
    if found == "NONE":
        assert (step.num_tokens, step.num_reqs) == (20, 4)


def test_the_members_prompts_are_looked_at_once_per_step(manager, monkeypatch):
    """For the choice of a graph, for metadata and for drafts; and none are left over for the next.

    A worker of the user's own has vLLM's runner, and only metadata is asked for.
    """
    looks: list[tuple[str, ...]] = []

    def prompts_of(req_ids):
        looks.append((*req_ids,))
        return ["its prompts"] if "own" in req_ids else None

    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *_, **__: {})
    state = ProxyModelState.__new__(ProxyModelState)
    state.overrides = SimpleNamespace(prompts_of=prompts_of)
    state.shifts = state.prompts = state._looked_at = None
    state.rows_differ = False
    stock = SimpleNamespace(gather_batch_req_state=lambda _, batch, __: (batch, None))
    runner = type("Runner", (ProxyRunnerV2, type("Stock", (), vars(stock))), {})()
    runner.model_state, runner.cudagraph_manager = state, manager(config(Speculate(tokens=4), 64))
    runner.cudagraph_manager.__class__ = MemberGraphs

    def step(batch, *, ours: bool = True) -> tuple[bool, bool, bool]:
        if ours:
            runner.gather_batch_req_state(batch, batch is None)
        of_manager = runner.cudagraph_manager.prompts_differ
        dummy = SimpleNamespace(req_ids=["req_0"], is_prefilling_np=[False])
        arguments = CUDAGraphMode.NONE, (), None, [[]], None
        state.prepare_attn(batch or dummy, *arguments)
        return of_manager, state.prompts is not None, state.rows_differ

    own = SimpleNamespace(req_ids=["own"], is_prefilling_np=[False])
    assert step(own) == (True, True, False)
    assert looks == [("own",)]
    assert step(None) == (False, False, False)
    assert step(own, ours=False)[1:] == (True, False)
    assert step(SimpleNamespace(req_ids=["other"], is_prefilling_np=[True])) == (False,) * 3
    assert [*map(list, looks)].count(["own"]) == 2
