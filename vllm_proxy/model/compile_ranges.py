"""The ranges of rows for which vLLM compiles each member.

vLLM divides the rows of a batch into ranges by the base, and fuses all-reduces with the RMSNorm
that follows (`AllReduceFusionPass`) in the ranges that end within the pass's limit. The buffer
that the fused kernels use is made once per process, by the first member that is compiled: the base.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from vllm.config import VllmConfig


class FusedAllReduce(NamedTuple):
    """The buffer of fused all-reduces.

    Attributes:
        most_bytes: of one all-reduce; more are not fused.
        base_row: bytes of a row of the base's hidden states.
        member_row: the same of the member.
    """

    most_bytes: int
    base_row: int
    member_row: int


def member_endpoints(
    shared: Sequence[int], most: int, fused: FusedAllReduce | None, *, twice: bool = False
) -> list[int]:
    """Return the last row of each range that one member is compiled for.

    Args:
        shared: those of the base, of which one limits the base's fusion.
        most: the most tokens of a batch, `max_num_batched_tokens`.
        fused: None if all-reduces are not fused.
        twice: whether the member runs on twice the rows of a batch.
    """
    rows = 2 * most if twice else most
    if fused is None:
        return sorted({*shared, rows})
    of_base = fused.most_bytes // fused.base_row
    limit = min(fused.most_bytes // fused.member_row, most)  # of vLLM's pass, for this member
    fits = min(limit, min(of_base, most) * fused.base_row // fused.member_row)
    ends = {end for end in shared if end != of_base and not fits < end <= limit} | {fits}
    if fits < limit == rows:
        rows += 1  # a range that ends beyond the limit is not fused
    return sorted((ends | {rows}) - {0})


def endpoints_of(member: VllmConfig, base: VllmConfig, *, twice: bool = False) -> list[int]:
    """Return `member_endpoints` for a member's configuration and the engine's."""
    compilation, most = base.compilation_config, base.scheduler_config.max_num_batched_tokens
    passes, ranks = compilation.pass_config, base.parallel_config.tensor_parallel_size
    most_bytes = passes.flashinfer_max_size(ranks) if passes.fuse_allreduce_rms else None
    fused = None
    if most_bytes is not None:
        size = base.model_config.dtype.itemsize
        base_row, member_row = (
            size * config.model_config.get_hidden_size() for config in (base, member)
        )
        fused = FusedAllReduce(most_bytes, base_row, member_row)
    return member_endpoints(compilation.compile_ranges_endpoints or (), most, fused, twice=twice)


class CompileRanges:
    """The ranges of each member, and where its graphs are stored; read when vLLM first runs it.

    They are set only then: vLLM warms up one batch for each range of the engine's configuration,
    and no batch has more tokens than `max_num_batched_tokens`. vLLM names the directory by a hash
    of the first model that it compiles, the base: engines with the same base and different experts
    would load each other's graphs.
    """

    def __init__(self, engine: VllmConfig, endpoints: dict[str, list[int]]) -> None:
        self._config = engine.compilation_config
        self._endpoints = endpoints
        self._directories: dict[str, str] = {}

    @contextmanager
    def of(self, role: str) -> Iterator[None]:
        """Make vLLM compile for the ranges of *role*, into its directory, in the body."""
        config = self._config
        shared = config.compile_ranges_endpoints, config.cache_dir
        config.compile_ranges_endpoints = self._endpoints.get(role, shared[0])
        config.cache_dir = self._directories.get(role, shared[1])
        try:
            yield
        finally:
            self._directories[role] = config.cache_dir
            config.compile_ranges_endpoints, config.cache_dir = shared
