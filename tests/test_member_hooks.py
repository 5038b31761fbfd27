"""vLLM's config hooks for architectures run for every member, not only for an engine of one."""

from pathlib import Path

import pytest
import vllm
from transformers import Gemma4TextConfig, GptOssConfig, PreTrainedConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from support import checks
from support.tiny_models import write_model

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Only configs, but for Llama: no weights are read here."""
    root: Path = tmp_path_factory.mktemp("models")
    configs: dict[str, PreTrainedConfig] = {
        "Gemma4ForCausalLM": Gemma4TextConfig(
            **SIZES, global_head_dim=64, hidden_size_per_layer_input=0
        ),
        "GptOssForCausalLM": GptOssConfig(**SIZES, num_local_experts=4),
    }
    for name, config in configs.items():
        config.architectures = [name]
        config.save_pretrained(root / name)
    return {
        "llama": str(write_model(root / "llama", seed=0)),
        "gemma4": str(root / "Gemma4ForCausalLM"),
        "gpt-oss": str(root / "GptOssForCausalLM"),
    }


def engine_config(base: str, expert: str) -> vllm.config.VllmConfig:
    return checks.engine_config({"base": base, "expert": expert}, dtype="bfloat16")


@pytest.mark.parametrize(
    ("base", "expert", "backend"),
    [
        ("llama", "llama", None),
        ("llama", "gemma4", AttentionBackendEnum.TRITON_ATTN),
        ("gemma4", "llama", AttentionBackendEnum.TRITON_ATTN),
    ],
)
def test_heads_of_several_sizes_have_a_backend(models, base, expert, backend):
    """vLLM's hook for Gemma 4 chooses it; on this machine there is no FlashAttention 4."""
    assert engine_config(models[base], models[expert]).attention_config.backend == backend


@pytest.mark.parametrize(
    ("base", "expert", "parser", "graphs"),
    [
        ("llama", "llama", "", None),
        ("llama", "gpt-oss", "", 1024),
        ("gpt-oss", "llama", "openai_gptoss", 1024),
    ],
)
def test_answers_are_parsed_as_the_base_s(models, base, expert, parser, graphs):
    config = engine_config(models[base], models[expert])
    assert config.structured_outputs_config.reasoning_parser == parser
    assert config.compilation_config.max_cudagraph_capture_size == graphs


def test_a_hook_that_rejects_the_engine_names_the_member(models, monkeypatch):
    class Rejects(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: vllm.config.VllmConfig) -> None:
            assert vllm_config.model_config.model == models["gemma4"]
            vllm_config.cache_config.cache_dtype = "fp8"
            raise ValueError("no such kernel")

    monkeypatch.setitem(MODELS_CONFIG_MAP, "Gemma4ForCausalLM", Rejects)
    with pytest.raises(ValueError, match=rf"expert '{models['gemma4']}': no such kernel"):
        engine_config(models["llama"], models["gemma4"])


def test_a_small_member_does_not_choose_the_dtype_of_the_cache(models, monkeypatch):
    class Chooses(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: vllm.config.VllmConfig) -> None:
            vllm_config.cache_config.cache_dtype = "fp8_e4m3"

    monkeypatch.setitem(MODELS_CONFIG_MAP, "Gemma4ForCausalLM", Chooses)
    config = engine_config(models["llama"], models["gemma4"])
    assert config.cache_config.cache_dtype == "auto"
    config = engine_config(models["gemma4"], models["llama"])
    assert config.cache_config.cache_dtype == "fp8_e4m3"
