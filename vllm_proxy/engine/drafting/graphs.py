"""FULL CUDA graphs of drafts, and of passes that verify any number of them (Model Runner V2).

vLLM captures decode graphs for the numbers of drafts in `num_speculative_tokens_per_batch_size`,
which names at most one number per running request. It then tries only the graphs with the nearest
captured number of tokens, which often belong to another number of drafts. Steps that find no FULL
graph run in piecewise graphs, although `DraftLengths` chooses any number from 0 to `tokens`.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from math import inf

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_proxy.members.vllm_configs import proxy_section


def capture_every_length(manager: CudaGraphManager, drafts: int, requests: int | None) -> None:
    """Make *manager* capture, and find, a FULL graph for each pass after 0 … *drafts* drafts.

    To be called before it captures. Each number of drafts adds at most `2 log2(requests) + 2`
    graphs to those of steps without drafts. None is larger than vLLM's largest one; vLLM's and the
    user's choice of mode and sizes stay, and piecewise graphs do not change.

    Args:
        manager: vLLM's, of a model.
        drafts: most drafts before a pass.
        requests: drafts are verified for at most this number of requests; None for any number.
    """
    mode, config = manager.cudagraph_mode, manager.compilation_config
    sizes, most = config.cudagraph_capture_sizes, config.max_cudagraph_capture_size
    if not (sizes and mode.decode_mode() == CUDAGraphMode.FULL and mode.separate_routine()):
        return  # there are no graphs for decode steps alone
    running = min(requests or manager.max_num_reqs, manager.max_num_reqs)
    graphs: list[list[BatchExecutionDescriptor]] = []
    for length in range(1, min(drafts + 1, most) + 1):  # rows of a request
        counts = _counts(sizes, length, min(manager.max_num_reqs, most // length))
        if length > 1:
            counts = _thinned(counts, running)
        graphs.append([_graph(count, length) for count in counts])
    manager._capture_descs[CUDAGraphMode.FULL] = sorted(
        (graph for same in graphs for graph in same), key=lambda g: g.num_tokens, reverse=True
    )
    for tokens in range(most + 1):
        found = [same[i] for same in graphs if (i := _first(same, tokens)) < len(same)]
        others = manager._candidates.get((tokens, 0), ())  # 0: no adapters of vLLM's
        found += [other for other in others if other.cg_mode != CUDAGraphMode.FULL]
        manager._candidates[tokens, 0] = found


def capture_up_to(manager: CudaGraphManager, requests: int | None) -> None:
    """Make *manager*, of drafts, capture no FULL graph that no draft would replay.

    To be called before it captures.

    Args:
        manager: vLLM's, with graphs of one row per request.
        requests: drafts are made for at most this number of requests; None for any number.
    """
    graphs = manager._capture_descs.get(CUDAGraphMode.FULL, [])
    enough = [graph.num_tokens for graph in graphs if graph.num_tokens >= (requests or inf)]
    if not enough:
        return
    for found in (graphs, *manager._candidates.values()):
        found[:] = [graph for graph in found if graph.num_tokens <= min(enough)]


def most_requests(config: VllmConfig) -> int | None:
    """Return for how many requests at most an engine drafts; None for any number.

    Data-parallel engines draft for any number: see `limits.drafts_problem`.
    """
    speculate = proxy_section(config.model_config).speculate
    assert speculate is not None
    return speculate.requests if config.parallel_config.data_parallel_size == 1 else None


def _counts(sizes: Iterable[int], length: int, most: int) -> list[int]:
    """Return numbers of requests, ascending: the capture sizes, each rounded up to whole requests.

    Args:
        sizes: numbers of tokens.
        length: tokens of each request.
        most: the largest number of requests.
    """
    return sorted({min(-(-size // length), most) for size in sizes})


def _thinned(counts: list[int], running: int) -> list[int]:
    """Return the numbers among *counts* that pad 1 … *running* requests by about a half at most."""
    chosen = {bisect_left(counts, step) for step in _steps(running)}
    return sorted({counts[min(i, len(counts) - 1)] for i in chosen})


def _steps(most: int) -> Iterator[int]:
    """Yield 1, 2, 3, 4, 6, 8, 12, 16, 24, … below *most*, then *most*."""
    step = 1
    while step < most:
        yield step
        if step > 1 and (between := step * 3 // 2) < most:
            yield between
        step *= 2
    yield most


def _graph(requests: int, length: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL,
        num_tokens=requests * length,
        num_reqs=requests,
        uniform_token_count=length,
    )


def _first(graphs: list[BatchExecutionDescriptor], tokens: int) -> int:
    return bisect_left(graphs, tokens, key=lambda graph: graph.num_tokens)
