"""What recurrent layers need of an engine, as far as it shows without one.

That such members are exact is in `test_exactness.py`.
"""

import re
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from support import forks
from support.checks import engine_config, run
from support.commands import COMMAND_ENV
from support.tiny_models import write_model, write_triple
from vllm_proxy.config.roles import ROLES
from vllm_proxy.members.vllm_configs import member_vllm_config
from vllm_proxy.model.kernels import separate_backends, without_checkpoints


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, str]:
    """A Llama triple, and two models with states to put in."""
    root: Path = tmp_path_factory.mktemp("members")
    found = write_triple(root, "llama")
    for name in ("granitemoehybrid", "nemotron_h"):
        found[name] = str(write_model(root / name, name, seed=7, layers=3))
    return found


@pytest.fixture(scope="module")
def triple(members) -> dict[str, str]:
    return {role: members[role] for role in ROLES}


@pytest.mark.parametrize("role", ["base", "expert"])
def test_states_are_set_up_whichever_member_has_them(members, triple, role):
    mixed = {**triple, role: members["granitemoehybrid"]}
    cache = engine_config(mixed, block_size=32).cache_config
    assert (cache.mamba_cache_mode, cache.mamba_block_size) == ("align", 32)
    cache = engine_config(mixed, enable_prefix_caching=False).cache_config
    assert (cache.mamba_cache_mode, cache.mamba_block_size) == ("none", 64)


def test_no_states_are_set_up_where_no_member_has_any(triple):
    assert engine_config(triple).cache_config.mamba_block_size is None


def test_each_member_s_states_have_the_dtype_that_its_architecture_wants(members, triple):
    """vLLM's hook chooses float32 for Nemotron-H, and nothing for Granite."""
    mixed = {**triple, "base": members["nemotron_h"], "expert": members["granitemoehybrid"]}
    config = engine_config(mixed, dtype="bfloat16")
    config.cache_config.mamba_ssm_cache_dtype = "auto"  # on some CPUs vLLM sets it
    dtypes = [member_vllm_config(config, role).cache_config.mamba_ssm_cache_dtype for role in ROLES]
    assert dtypes == ["float32", "auto", "auto"]


class Builder:
    """Keeps the model's config, as some of vLLM's builders for GPUs read sizes of heads in it."""

    def __init__(self, spec: object, layers: list[str], config: SimpleNamespace, device: str):
        self.seen = config.model_config

    @classmethod
    def get_cudagraph_support(cls, vllm_config: SimpleNamespace, kv_cache_spec: object) -> str:
        return vllm_config.model_config


class Backend:
    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def is_ssm() -> bool:
        return False


def test_a_member_s_metadata_is_built_by_its_own_config():
    engine = SimpleNamespace(model_config="base's")
    layers = {
        name: SimpleNamespace(attn_backend=Backend, get_attn_backend=lambda: Backend)
        for name in ("model.layers.0.attn", "expert.model.layers.0.attn")
    }
    separate_backends(layers, {"base": "base's", "expert": "expert's"})
    for layer, right in zip(layers.values(), ("base's", "expert's"), strict=True):
        builder = layer.attn_backend.get_builder_cls()
        assert builder(None, [], engine, "cpu").seen == right
        assert builder.get_cudagraph_support(engine, None) == right


@pytest.mark.parametrize("family", ["lfm2", "deepseek_v2"])
@pytest.mark.parametrize("given", [[], ["+rotary_embedding"]])
def test_a_kernel_that_is_wrong_for_a_member_is_not_used(triple, tmp_path, family, given):
    """Unless the user says so. Without it, the engines of `test_exactness.py` are wrong."""
    sizes = {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 256}
    sizes = {**sizes, "tied": True} if family == "lfm2" else {}
    member = write_model(tmp_path / family, family, seed=8, layers=3, **sizes)
    settings = {"compilation_config": {"custom_ops": given}}
    config = engine_config({**triple, "expert": str(member)}, **settings)
    assert (given or ["-rotary_embedding"])[0] in config.compilation_config.custom_ops
    assert "-rotary_embedding" not in engine_config(triple).compilation_config.custom_ops


def test_states_next_to_latent_attention(members, triple, tmp_path):
    """vLLM caches no prefixes with such a base on a CPU, and pads no page of latent vectors."""
    latent = str(write_model(tmp_path / "latent", "deepseek_v2", seed=8, first_k_dense_replace=2))
    mixed = {**triple, "base": latent, "expert": members["granitemoehybrid"]}
    assert not engine_config(mixed).cache_config.enable_prefix_caching
    engine = {"dtype": "float32", "max_model_len": 128}
    assert run(mixed, engine=engine).problems == ()
    states = {"layers": 3, "mamba_d_state": 128}
    wide = str(write_model(tmp_path / "wide", "granitemoehybrid", seed=9, **states))
    heads = str(write_model(tmp_path / "heads", seed=9, head_dim=128))
    (problem,) = run({"base": heads, "expert": latent, "antiexpert": wide}, engine=engine).problems
    assert "those of latent attention (expert) no larger than they are; use" in problem


@pytest.mark.parametrize(
    ("family", "sizes", "words"),
    [
        ("mamba", {"expand": 2, "state_size": 8}, r"recurrent layers \(MAMBA1\) on a CPU; use"),
        ("qwen3_next", {}, "bfloat16, not torch.float32; set `engine.dtype: bfloat16`"),
    ],
)
def test_check_names_what_has_no_kernel_here(triple, tmp_path, family, sizes, words):
    """vLLM would start, and fail at the first request."""
    path = write_model(tmp_path / "base", family, seed=9, layers=3, **sizes)
    settings = {"dtype": "float32", "max_model_len": 64}
    file = tmp_path / "proxy.yaml"
    file.write_text(yaml.safe_dump({**triple, "base": str(path), "engine": settings}))
    # In a process without an engine of other tests, where `check` starts one without weights.
    result = forks.run(["check", str(file)], COMMAND_ENV)
    assert result.returncode == 2, result.stderr
    said = " ".join((result.stdout + result.stderr).split())
    assert re.search(f"base .*{words}", said)


def test_check_says_how_large_states_are(members, triple):
    report = run({**triple, "expert": members["granitemoehybrid"]}, engine={"dtype": "float32"})
    assert not report.problems
    (note,) = (note for note in report.notes if "Recurrent layers" in note)
    # Two of three layers: 8 heads of 32 x 16 numbers, and 3 columns of 256 + 2 * 16 channels.
    size = 2 * 4 * (prod((8, 32, 16)) + 3 * (256 + 2 * 16))
    assert f"expert {size:,}, {size:,} bytes in total" in note
    # One layer has attention: 2 x 4 heads of 32 numbers.
    assert any(f"expert {4 * 2 * 4 * 32:,}, " in note for note in report.notes)


def test_no_states_are_saved_amid_a_prefill():
    """They would lie at positions of one member's sequence; see `without_checkpoints`."""
    sizes = {"block_size": 32, "shapes": ((4, 8),), "dtypes": (torch.float32,)}
    plain = MambaSpec(**sizes)
    saving = MambaSpec(**sizes, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)
    attention = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
    specs = {"attention": attention, "base": saving, "expert": plain}
    assert without_checkpoints(specs) == {**specs, "base": plain}
