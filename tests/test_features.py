"""Features of vLLM that are for one model: refused by name, before weights are read."""

import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from support import checks, forks
from support.checks import run
from support.commands import COMMAND_ENV
from support.tiny_models import write_alike, write_model
from vllm_proxy.config.engine_arguments import FAST_LOAD_FORMATS, LOAD_FORMATS
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.engine.drafting.v2 import ExpertSpeculator
from vllm_proxy.engine.features import require_supported_features
from vllm_proxy.engine.limits import prompts_problem
from vllm_proxy.members.supported import require_supported_member
from vllm_proxy.members.vllm_configs import member_model_config


@pytest.fixture(scope="module")
def triple(tmp_path_factory) -> dict[str, str]:
    return write_alike(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[int, str]:
    """Mixtures of experts, by how many they have."""
    root = tmp_path_factory.mktemp("mixtures")
    counts = {4: {}, 8: {"num_local_experts": 8}}
    return {n: str(write_model(root / str(n), "mixtral", seed=n, **o)) for n, o in counts.items()}


engine_config = partial(checks.engine_config, dtype="bfloat16")


@pytest.mark.parametrize("method", ["eagle", "eagle3", "medusa", "dspark", "extract_hidden_states"])
def test_drafters_that_read_hidden_states(triple, method):
    drafter = {"method": method, "model": triple["base"], "num_speculative_tokens": 3}
    words = f"`speculative_config.method` is '{method}': .* hidden states .*; set `speculate`"
    with pytest.raises(ValueError, match=words):
        engine_config(triple, speculative_config=drafter)


@pytest.fixture(scope="module")
def checked(triple, tmp_path_factory) -> Callable[..., str]:
    """A function that returns what `check` says, in a process without an engine of other tests."""
    file = tmp_path_factory.mktemp("checked") / "proxy.yaml"

    def check(**engine: object) -> str:
        file.write_text(yaml.safe_dump({**triple, "engine": {"dtype": "bfloat16", **engine}}))
        result = forks.run(["check", str(file)], COMMAND_ENV)
        assert result.returncode == 2, result.stderr
        return " ".join((result.stdout + result.stderr).split())

    return check


def test_check_names_such_a_drafter(triple, checked):
    drafter = {"method": "eagle3", "model": triple["base"], "num_speculative_tokens": 3}
    words = "`speculative_config.method` is 'eagle3': it drafts from the hidden"
    assert words in checked(max_model_len=64, speculative_config=drafter)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafters_of_texts(triple, method):
    own = {"prompt_lookup_max": 3} if method == "ngram" else {"model": triple["expert"]}
    drafter = {"method": method, "num_speculative_tokens": 3, **own}
    config = engine_config(triple, speculative_config=drafter)
    assert config.speculative_config.method == method


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            {"offload_group_size": 8},
            "offload_group_size` is 8: vLLM prefetches .*; use `cpu_offload_gb`",
        ),
        (
            {"offload_backend": "prefetch", "offload_group_size": 4},
            "offload_backend` is 'prefetch': .*; use uva",
        ),
    ],
)
def test_weights_prefetched_from_the_host(triple, engine, words):
    with pytest.raises(ValueError, match=f"`{words}"):
        engine_config(triple, **engine)
    problem, *_ = run(triple, engine={"dtype": "bfloat16", **engine}).problems
    assert re.match(f"`engine.{words}", problem)


def test_weights_on_the_host_stay_possible(triple):
    assert engine_config(triple, cpu_offload_gb=1).offload_config.uva.cpu_offload_gb == 1


def test_balanced_experts(triple):
    (problem,) = run(triple, engine={"enable_eplb": True}).problems
    assert problem.startswith("`engine.enable_eplb` is True: experts of several members cannot")
    config = engine_config(triple)
    config.parallel_config.enable_eplb = True  # vLLM refuses it on a CPU
    with pytest.raises(ProxyConfigError) as error:
        require_supported_features(config)
    assert (error.value.field, error.value.value) == ("enable_eplb", "True")
    assert error.value.remedy is not None


def test_filters_of_expert_weights(triple, experts):
    """They would skip tensors of a member with more experts than the base."""
    on = {"enable_expert_parallel": True, "enable_ep_weight_filter": True}
    on["tensor_parallel_size"] = 2
    words = r"`enable_ep_weight_filter` is True: .* \(base 4, expert 8\); remove it"
    with pytest.raises(ValueError, match=words):
        engine_config({"base": experts[4], "expert": experts[8]}, **on)
    engine_config({"base": experts[4], "expert": experts[4]}, **on)
    small = {"base": triple["base"], "expert": experts[4], "antiexpert": experts[8]}
    with pytest.raises(ValueError, match=r"\(expert 4, antiexpert 8\); remove it"):
        engine_config(small, **on)
    dense = {"base": experts[4], "expert": triple["expert"]}
    engine_config(dense, **on)  # vLLM alone rejects expert parallelism for this expert
    assert run(dense, engine={"dtype": "bfloat16", **on}).problems == ()


def test_engine_is_a_mixture_of_experts_if_a_member_is(triple, experts):
    """Else vLLM makes no group of ranks for experts, and data parallel engines run alone."""
    mixed, on = {**triple, "expert": experts[4]}, {"enable_expert_parallel": True}
    for engine in ({}, on):
        config = engine_config(mixed, **engine)
        assert config.model_config.get_num_experts() == 4
        assert config.parallel_config.is_moe_model
        assert not member_model_config(config.model_config, "base", "auto").is_moe
        assert run(mixed, engine={"dtype": "bfloat16", **engine}).problems == ()
    assert not engine_config(triple).model_config.is_moe
    words = "enable_expert_parallel` is True: Number of experts"
    assert words in run(triple, engine={"dtype": "bfloat16", **on}).problems[0]
    with pytest.raises(ValueError, match="Number of experts"):
        engine_config(triple, **on)


def test_members_of_data_parallel_experts_have_one_prompt(triple, experts):
    config = engine_config({**triple, "antiexpert": experts[4]}, data_parallel_size=2)
    members = {role: member_model_config(config.model_config, role, "auto") for role in ROLES}
    assert prompts_problem(config, members) == "experts"


def test_sampled_drafts_keep_logits_in_the_dtype_of_the_expert_s_head():
    """vLLM's kernel refuses others; its own drafters have logits of the model's dtype."""
    vllms = object.__new__(StandaloneARSpeculator)
    vllms.draft_logits = torch.zeros(2, 3, 5, dtype=torch.bfloat16)
    runner = SimpleNamespace(speculator=vllms)
    ExpertSpeculator.take_over(runner)
    assert runner.speculator.draft_logits.dtype == torch.float32
    assert runner.speculator.draft_logits.shape == (2, 3, 5)
    vllms.draft_logits = None  # drafts are the likeliest tokens
    ExpertSpeculator.take_over(runner)
    assert runner.speculator.draft_logits is None


def test_load_formats_are_those_of_the_default_loader():
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    default = {name for name, loader in loaders.items() if loader is DefaultModelLoader}
    assert default | {"dummy"} == set(LOAD_FORMATS)


@pytest.mark.parametrize("load_format", FAST_LOAD_FORMATS)
def test_fast_loaders(triple, checked, monkeypatch, load_format):
    words = f"`load_format` is '{load_format}': it copies files to a GPU, .* none; remove it"
    with pytest.raises(ValueError, match=words):
        engine_config(triple, load_format=load_format)
    assert re.search(words, checked(load_format=load_format))
    # As on a GPU: the rule starts none, and only asks where it is.
    config = engine_config(triple)
    config.load_config.load_format = load_format
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    with pytest.raises(ProxyConfigError, match="the package of that name is not installed"):
        require_supported_features(config)
    monkeypatch.setitem(sys.modules, load_format, ModuleType(load_format))
    sys.modules[load_format].__spec__ = ModuleSpec(load_format, None)
    require_supported_features(config)


@pytest.mark.parametrize("load_format", [*FAST_LOAD_FORMATS, "mistral", "safetensors"])
def test_files_of_other_kinds_are_not_read(triple, tmp_path, load_format):
    path = Path(shutil.copytree(triple["expert"], tmp_path / "expert"))
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    members = {**triple, "expert": str(path)}
    problems = run(members, engine={"load_format": load_format}).problems
    assert f"no weights that `engine.load_format: {load_format}` reads" in " ".join(problems)


@pytest.mark.parametrize("role", ["base", "expert"])
def test_models_in_object_storage(triple, role):
    """The loader that streams them would leave the other members without weights."""
    config = member_model_config(engine_config(triple).model_config, role, "auto")
    config.model_weights = "s3://bucket/model"  # vLLM sets it when it has fetched the config
    with pytest.raises(ProxyConfigError, match=f"^{role} 's3://bucket/model': .*; download it"):
        require_supported_member(config, role, None)
