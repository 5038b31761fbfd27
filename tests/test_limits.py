"""What an engine of some members cannot do is known from its configuration, on any machine."""

import inspect
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import vllm
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from support.checks import engine_config
from support.tiny_models import write_alike, write_model, write_triple
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.admission import NO_PROMPTS_REASONS
from vllm_proxy.engine.limits import prompts_problem
from vllm_proxy.members.vllm_configs import member_model_config
from vllm_proxy.model.kernels import in_one_window
from vllm_proxy.preflight.check.run import check
from vllm_proxy.preflight.plan.plan import plan
from vllm_proxy.preflight.plan.predict import Demand


@pytest.fixture(scope="module")
def triple(tmp_path_factory) -> dict[str, str]:
    return write_alike(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> dict[str, str]:
    return write_alike(tmp_path_factory.mktemp("mixtures"), "mixtral")


@pytest.fixture(scope="module")
def hybrid(triple, tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("hybrid") / "expert"
    return {**triple, "expert": str(write_model(path, "granitemoehybrid", seed=1, layers=3))}


def why_no_prompts(config: vllm.config.VllmConfig) -> str | None:
    members = {role: member_model_config(config.model_config, role, "auto") for role in ROLES}
    return prompts_problem(config, members)


class TestBreakableGraphs:
    """They replay the pass of all members as it was captured, without the members' inputs."""

    @pytest.mark.parametrize(
        ("variables", "mode", "reason"),
        [
            ({}, "PIECEWISE", None),
            ({"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, "PIECEWISE", "breakable"),
            ({"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, "NONE", None),
            # vLLM turns them on for this, but after it has asked our hook.
            ({"VLLM_BATCH_INVARIANT": "1"}, "PIECEWISE", "breakable"),
            (
                {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_BREAKABLE_CUDAGRAPH": "0"},
                "PIECEWISE",
                None,
            ),
        ],
    )
    def test_prompts(self, triple, monkeypatch, variables, mode, reason):
        config = engine_config(triple)
        # As on a GPU: the rule starts none, and only asks where it is.
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
        # An engine that this process has started has made vLLM keep the variables' values.
        monkeypatch.setattr(envs, "__getattr__", inspect.unwrap(envs.__getattr__))
        for name in ("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_BATCH_INVARIANT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config.compilation_config.cudagraph_mode = vllm.config.CUDAGraphMode[mode]
        assert why_no_prompts(config) == reason
        assert reason is None or "VLLM_USE_BREAKABLE_CUDAGRAPH to 0" in NO_PROMPTS_REASONS[reason]


class TestWindows:
    """Members find their blocks in one KV cache group, which has the largest of several windows."""

    @pytest.fixture(scope="class")
    def windowed(self, tmp_path_factory) -> dict[str, str]:
        return write_triple(tmp_path_factory.mktemp("windows"), "mistral-two-windows")

    def test_are_in_one_group_where_the_expert_drafts(self, windowed):
        config = engine_config({**windowed, "speculate": {"tokens": 3}})
        assert config.scheduler_config.disable_hybrid_kv_cache_manager
        assert why_no_prompts(config) is None
        assert not engine_config(windowed).scheduler_config.disable_hybrid_kv_cache_manager

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, "windows"),
            ({"disable_hybrid_kv_cache_manager": True}, None),
            ({"disable_hybrid_kv_cache_manager": False}, "windows"),
        ],
    )
    def test_prompts(self, windowed, options, reason):
        assert why_no_prompts(engine_config(windowed, **options)) == reason

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"pipeline_parallel_size": 2}, r"sliding windows \(base 24, .* with pipelines; leave"),
            ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, ".* which this engine does"),
        ],
    )
    def test_cannot_be_in_one_group_without_our_worker(self, windowed, options, words):
        """Or on pipeline ranks, which might each know another largest window."""
        options = {"disable_hybrid_kv_cache_manager": True, **options}
        with pytest.raises(ValueError, match=f"`disable_hybrid_kv_cache_manager`.*: {words}"):
            engine_config(windowed, **options)

    def test_a_layer_has_the_largest_window_of_its_group(self):
        heads = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
        group = {str(w): SlidingWindowSpec(**heads, sliding_window=w) for w in (24, 48)}
        full = {**group, "full": FullAttentionSpec(**heads)}

        def shared(specs: dict, *, is_one: bool | None) -> dict:
            scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=is_one)
            return in_one_window(SimpleNamespace(scheduler_config=scheduler), specs)

        assert {spec.sliding_window for spec in shared(group, is_one=True).values()} == {48}
        assert shared(group, is_one=None) == group
        assert shared(full, is_one=True) == full  # of which vLLM then frees no block
        assert shared({}, is_one=True) == {}


class TestRoutedExperts:
    """vLLM stores which experts a layer chose by the layer's number and the row of the batch."""

    ROUTING: ClassVar = {"enable_return_routed_experts": True}

    def test_of_two_members_are_refused_alike(self, mixtures):
        words = (
            "enable_return_routed_experts` is [Tt]rue: the expert also is a mixture of experts, "
            "and its choice would replace the base's; remove it"
        )
        with pytest.raises(ValueError, match=f"`{words}"):
            engine_config(mixtures, **self.ROUTING)
        config = ProxyConfig.parse({**mixtures, "engine": self.ROUTING}, "test")
        problems = check(config).problems  # others are this machine's, which has no GPU
        assert [bool(re.search(f"`engine.{words}", p)) for p in problems].count(True) == 1
        with pytest.raises(ProxyConfigError, match=f"`engine.{words}"):
            plan(config, "A100-80G", Demand(1, 16, 16))

    def test_of_the_base_are_right_while_it_has_all_rows(self, mixtures, triple):
        config = engine_config({**triple, "base": mixtures["base"]})
        config.aux_output_config.enable_return_routed_experts = True
        assert why_no_prompts(config) == "routing"


class TestRecurrentLayers:
    """Their states have no positions, and cannot go back: refused before weights are read."""

    @pytest.mark.parametrize(
        ("engine", "words"),
        [
            (
                {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
                "`speculative_config.method` is 'ngram': the expert has recurrent layers, and "
                "their states cannot go back",
            ),
            (
                {"kv_offloading_size": 1.0},
                "`kv_offloading_size` is 1.0: the expert has recurrent layers, and no connector",
            ),
            (
                {"disable_hybrid_kv_cache_manager": True},
                "`disable_hybrid_kv_cache_manager` is [Tt]rue: the expert has recurrent layers",
            ),
            (
                {"pipeline_parallel_size": 2, "enforce_eager": False},
                "`pipeline_parallel_size` is 2: the expert has recurrent layers",
            ),
        ],
    )
    def test_arguments(self, hybrid, engine, words):
        with pytest.raises(ValueError, match=f"{words}.*; remove it"):
            engine_config(hybrid, **engine)

    def test_drafts(self, hybrid):
        words = "`speculate`: the expert has recurrent layers, .*; remove it"
        with pytest.raises(ValueError, match=words):
            engine_config({**hybrid, "speculate": {"tokens": 2}})

    def test_prompts(self, hybrid, tmp_path, monkeypatch):
        """Possible under Model Runner V2, but next to sliding windows."""
        windowed = {**hybrid, "base": str(write_model(tmp_path, "mistral", seed=0))}
        configs = engine_config(hybrid), engine_config(windowed)
        assert [*map(why_no_prompts, configs)] == ["states", "states"]
        with monkeypatch.context() as v2:
            v2.setattr(type(configs[0]), "use_v2_model_runner", True)
            assert [*map(why_no_prompts, configs)] == [None, "states"]
        words = "`chat`: members would have different prompts, .* recurrent layers .*one format"
        with pytest.raises(ValueError, match=words):
            engine_config({**hybrid, "chat": {"expert": "template"}})
