"""The ranges of rows that members are compiled for, and where all-reduces are fused in them."""

from types import SimpleNamespace

import pytest
import torch
import vllm
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.tiny_models import write_model
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.registered import ProxyTunedForCausalLM
from vllm_proxy.model.compile_ranges import CompileRanges, FusedAllReduce, member_endpoints

MIB = 1 << 20


def shared_by(fused: FusedAllReduce, most: int) -> list[int]:
    """vLLM's endpoints, which it computes for the base (`VllmConfig._set_compile_ranges`)."""
    of_base = fused.most_bytes // fused.base_row
    return sorted({most, of_base} if of_base < most else {most})


@pytest.mark.parametrize(
    ("mib", "base", "member", "twice", "endpoints"),
    [
        # The buffer has 8192 rows of 2048 numbers, which are 6553 rows of 2560.
        (64, 2048, 2560, False, [6553, 8193]),
        # Llama-2 13B and 7B: 64 MiB are 6553.6 rows of the base, and 8192 of the expert.
        (64, 5120, 4096, False, [8191, 8193]),
        (64, 8192, 4096, False, [8192]),
        (64, 8192, 4096, True, [8192, 16384]),
        (64, 4096, 4096, True, [8192, 16384]),
        (0.5, 8192, 4096, False, [64, 8192]),
        (None, 4096, 4096, False, [8192]),
        (None, 4096, 4096, True, [8192, 16384]),
    ],
)
def test_endpoints_of_a_member(mib, base, member, twice, endpoints):
    if mib is None:
        assert member_endpoints([8192], 8192, None, twice=twice) == endpoints
        return
    fused = FusedAllReduce(int(mib * MIB), 2 * base, 2 * member)
    assert member_endpoints(shared_by(fused, 8192), 8192, fused, twice=twice) == endpoints


@settings(deadline=None, max_examples=300)
@example(64 * MIB, 4096, 10240, 8192, 8192, False)
@given(
    st.integers(1 << 16, 64 * MIB),
    st.integers(64, 16384),
    st.integers(64, 16384),
    st.integers(1, 16384),
    st.integers(1, 16384),
    st.booleans(),
)
def test_what_is_fused_fits_the_buffer_of_the_base(
    most_bytes, base, member, most, given_end, twice
):
    fused = FusedAllReduce(most_bytes, 2 * base, 2 * member)
    shared = sorted({*shared_by(fused, most), min(given_end, most)})
    ends = member_endpoints(shared, most, fused, twice=twice)
    limit = min(most_bytes // (2 * member), most)  # AllReduceFusionPass.max_token_num
    buffer = min(most_bytes // (2 * base), most) * 2 * base
    fused_ends = [end for end in ends if end <= limit]
    assert all(end * 2 * member <= buffer for end in fused_ends)
    assert ends == sorted(set(ends))
    assert ends[0] > 0
    assert ends[-1] >= (2 * most if twice else most)
    if buffer >= 2 * member <= most_bytes:  # a row or more fits: as many are fused as fit
        assert max(fused_ends) == min(limit, buffer // (2 * member))


class Noted(torch.nn.Module):
    """Stands for a member: notes the ranges that vLLM would compile it for, when it is run."""

    def __init__(self, config: vllm.config.VllmConfig, role: str) -> None:
        super().__init__()
        self.config, self.role = config, role

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        self.seen = self.config.compilation_config.compile_ranges_endpoints
        return torch.zeros(1, self.config.model_config.get_hidden_size())


def test_each_member_is_compiled_for_its_ranges(tmp_path, monkeypatch):
    """And vLLM's warm-up, which reads the engine's, sees none beyond the largest batch."""
    paths = {
        role: str(write_model(tmp_path / role, seed=seed, hidden_size=size))
        for seed, (role, size) in enumerate({"base": 64, "expert": 128, "antiexpert": 32}.items())
    }
    fusion = {"fuse_allreduce_rms": True, "fi_allreduce_fusion_max_size_mb": 0.5}
    engine = {
        "dtype": "float32",
        "load_format": "dummy",
        "max_model_len": 64,
        "max_num_batched_tokens": 1024,
        "tensor_parallel_size": 2,
        "compilation_config": {"pass_config": fusion},
    }
    config = ProxyConfig.parse({**paths, "engine": engine}, "test")
    vllm_config = vllm.EngineArgs(**config.engine_args()).create_engine_config()
    where = "vllm_proxy.model.proxy_model"
    monkeypatch.setattr(f"{where}.build_member", Noted)
    monkeypatch.setattr(f"{where}.get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    monkeypatch.setattr(f"{where}.ProxyModel._make_head", lambda *_: None)
    model = ProxyTunedForCausalLM(vllm_config=vllm_config)
    model(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.long))
    seen = {role: model.member(role).seen for role in paths}
    assert seen == {"base": [1024], "expert": [512, 1025], "antiexpert": [1024]}
    assert vllm_config.compilation_config.compile_ranges_endpoints == [1024]


def test_each_member_has_a_directory_for_its_graphs():
    """vLLM keeps the first one that it chose, whose name knows only the first model compiled."""
    config = vllm.config.VllmConfig()
    ranges = CompileRanges(config, {})
    for _ in range(2):  # later runs find what the first one chose
        for role in ("base", "expert"):
            with ranges.of(role):
                config.compilation_config.cache_dir = config.compilation_config.cache_dir or role
                assert config.compilation_config.cache_dir == role
    given = vllm.config.VllmConfig(compilation_config={"cache_dir": "given"})
    with CompileRanges(given, {}).of("expert"):
        assert given.compilation_config.cache_dir == "given"
