"""gpt-oss with experts in MXFP4, as OpenAI publishes it: loaded as a small member, bit for bit.

vLLM's kernel needs AMX, so the layers are built as if there were some, and not run.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from vllm.config import set_current_vllm_config

from support.checks import engine_config, set_config
from support.tiny_models import write_model
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.members.vllm_configs import member_vllm_config
from vllm_proxy.model.build import build_member, load_member, required_parameters

EXPERTS = "model.layers.1.mlp.experts"
BLOCK = 32
NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def write_mxfp4(path: Path) -> Path:
    """Write a gpt-oss of two layers whose experts' weights are blocks of 32 numbers of 4 bits."""
    write_model(path, "gpt_oss", seed=3)
    set_config(quantization_config={"quant_method": "mxfp4"})(path)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // BLOCK
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, BLOCK // 2), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 127, shape, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return what a layer holds, `[experts, outputs, inputs / 2]`, as `[experts, inputs, outputs]`.

    By the definition of the format: two numbers a byte, the low bits first; a sign, and one of
    eight values; a power of two for each block.
    """
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
    values = NUMBERS[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    powers = torch.exp2(scales.float() - 127).repeat_interleave(BLOCK, -1)
    return (values * powers).transpose(1, 2)


@pytest.fixture
def member(tmp_path, monkeypatch, one_rank):
    """A function that builds the expert with the tensors given; and those of its checkpoint."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    base = write_model(tmp_path / "base", seed=0)
    expert = write_mxfp4(tmp_path / "expert")
    config = engine_config({"base": str(base), "expert": str(expert)}, dtype="bfloat16")
    tensors = load_file(expert / "model.safetensors")

    def load(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
        own = member_vllm_config(config, "expert")
        with set_current_vllm_config(own):
            built = build_member(own, "expert")
            needed = required_parameters(built, quantized=True)
            load_member(built, "expert", "gpt-oss", tensors.items(), required=needed)
        return built

    return load, tensors


def test_experts_are_those_of_the_checkpoint(member):
    load, tensors = member
    (experts,) = (m for n, m in load(tensors).named_modules() if n.endswith("1.mlp.experts"))
    weights = {name.rpartition(".")[2]: weight for name, weight in experts.named_parameters()}
    for layer, name in (("w13", "gate_up_proj"), ("w2", "down_proj")):
        blocks, scales = (tensors[f"{EXPERTS}.{name}_{part}"] for part in ("blocks", "scales"))
        right = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        found = dequantized(weights[f"{layer}_weight"], weights[f"{layer}_weight_scale"])
        torch.testing.assert_close(found, right, rtol=0, atol=0)
        bias = tensors[f"{EXPERTS}.{name}_bias"].bfloat16()
        torch.testing.assert_close(weights[f"{layer}_bias"], bias, rtol=0, atol=0)


def test_checkpoint_without_its_head(member):
    load, tensors = member
    del tensors["lm_head.weight"]
    with pytest.raises(ProxyConfigError, match=r"lacks 1 .* tensors: lm_head\.weight"):
        load(tensors)
