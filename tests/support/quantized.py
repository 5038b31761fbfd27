"""Real quantized checkpoints of tiny models, each with the float32 checkpoint it stands for.

`write_quantized` takes a plain checkpoint and writes two: the quantized one, on disk as the tools
of its method write it, and its twin, plain float32, whose weights are what the quantized ones stand
for. What an engine says to the first a transformers loop over the second says too.

N and K are a layer's output and input sizes, G its number of groups, of K / G inputs each.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import nn

GROUP_SIZE = 32
NIBBLES = 8
"""Int4 values an int32."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours AWQ puts into each nibble of an int32, lowest bits first."""

Layer = dict[str, torch.Tensor]
"""Tensors of one linear layer by the last part of their names."""
Quantize = Callable[[torch.Tensor], tuple[Layer, torch.Tensor]]
"""From a weight `[N, K]` to what is stored, and the weight that it stands for."""
Describe = Callable[[bool, Sequence[str]], dict]
"""From `lm_head` and `plain` to the `quantization_config` of config.json."""


def write_quantized(
    source: Path,
    path: Path,
    twin: Path,
    method: str,
    *,
    lm_head: bool = False,
    plain: Sequence[str] = (),
) -> Path:
    """Write the checkpoint *source* quantized by *method* to *path*, and its twin to *twin*.

    Args:
        source: a plain checkpoint, as `tiny_models.write_model` writes it.
        path: new.
        twin: new.
        method: a key of `METHODS`, or `MIXED`.
        lm_head: quantize the language model head too, which tools leave alone by default.
        plain: layers to leave alone besides, such as `model.layers.1.mlp.down_proj`; the
            checkpoint's configuration names them.

    Returns:
        *path*.
    """
    describe = describe_mixed if method == MIXED else METHODS[method][1]
    config = json.loads((source / "config.json").read_text())
    if lm_head and config["tie_word_embeddings"]:
        raise ValueError(f"{source}: its head is its embedding, which stays unquantized")
    quantized, dequantized = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, kind = name.rpartition(".")
        chosen = layer.endswith("_proj") or (lm_head and layer == "lm_head")
        if kind == "weight" and chosen and layer not in plain:
            tensors, weight = METHODS[method_of(layer, method)][0](tensor)
            quantized |= {f"{layer}.{key}": value for key, value in tensors.items()}
            dequantized[name] = weight
        else:
            quantized[name] = dequantized[name] = tensor
    for directory, tensors in ((path, quantized), (twin, dequantized)):
        shutil.copytree(source, directory)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = describe(lm_head, plain)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def gptq(weight: torch.Tensor) -> tuple[Layer, torch.Tensor]:
    """Int4, symmetric: nibbles 0 to 15 with zero point 8. The weight is `[N, K]`."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    scale = storable(groups.abs().amax(-1) / 7)  # [N, G]
    q = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    inputs = weight.shape[1]
    layer = {
        # [K / 8, N]
        "qweight": pack(q.flatten(1).int()).T,
        # [G, N / 8]; version 1 of the format stores one less than the zero point
        "qzeros": pack(torch.full_like(scale, 8 - 1).T.int()),
        # [G, N]
        "scales": scale.T.half(),
        # [K]: the group of each input
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP_SIZE,
    }
    return layer, ((q - 8) * scale[..., None]).flatten(1)


def gptq_config(lm_head: bool, plain: Sequence[str]) -> dict:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": lm_head,
        "dynamic": {f"-:{re.escape(name)}": {} for name in plain},
    }


def awq(weight: torch.Tensor) -> tuple[Layer, torch.Tensor]:
    """Int4, asymmetric: nibbles 0 to 15, a zero point a group. The weight is `[N, K]`."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = storable((high - low) / 15)  # [N, G]
    zero = (-low / scale).round().clamp(0, 15)
    q = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    layer = {
        "qweight": pack(q.flatten(1).T.int(), AWQ_ORDER),  # [K, N / 8]
        "qzeros": pack(zero.T.int(), AWQ_ORDER),  # [G, N / 8]
        "scales": scale.T.half(),  # [G, N]
    }
    return layer, ((q - zero[..., None]) * scale[..., None]).flatten(1)


def awq_config(lm_head: bool, plain: Sequence[str]) -> dict:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "zero_point": True,
        "lm_head": lm_head,
        "modules_to_not_convert": list(plain) or None,
    }


def pack(values: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """Pack nibbles `[rows, columns]`, eight neighbours of a row an int32: `[rows, columns / 8]`."""
    nibbles = values.unflatten(1, (-1, NIBBLES))[..., order or list(range(NIBBLES))]
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def compressed_tensors(preset: str, storage: str, largest: int) -> tuple[Quantize, Describe]:
    """A scheme of the compressed-tensors package, by the package itself.

    Args:
        preset: the package's name for the scheme.
        storage: the package's name for the format on disk.
        largest: absolute value to which the largest weight of a group is rounded.
    """

    def describe(lm_head: bool, plain: Sequence[str]) -> dict:
        config = QuantizationConfig(
            config_groups={preset: ["Linear", "re:.*lm_head"] if lm_head else ["Linear"]},
            format=storage,
            quantization_status="compressed",
            ignore=[*plain] if lm_head else [*plain, "lm_head"],
        )
        (scheme,) = config.config_groups.values()
        if scheme.weights.group_size:
            scheme.weights.group_size = GROUP_SIZE
        return json.loads(config.model_dump_json())

    def quantize(weight: torch.Tensor) -> tuple[Layer, torch.Tensor]:
        (group,) = describe(False, ())["config_groups"].values()
        scheme = QuantizationScheme.model_validate(group)
        size = scheme.weights.group_size or weight.shape[1]
        scale = storable(weight.unflatten(1, (-1, size)).abs().amax(-1) / largest)  # [N, G]
        compressor = BaseCompressor.get_value_from_registry(storage)
        layer = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        dequantized = compressor.decompress(layer, scheme)["weight"]
        return {**layer, "weight_scale": scale.bfloat16()}, dequantized

    return quantize, describe


def storable(scale: torch.Tensor) -> torch.Tensor:
    """Round to what bfloat16, float16 and float32 all hold.

    The weights are then the same, whichever the checkpoint stores and the engine computes with.
    """
    return scale.bfloat16().half().float()


METHODS = {
    "gptq": (gptq, gptq_config),
    "awq": (awq, awq_config),
    # compressed-tensors: int4 and int8 weights alone; int8 weights and activations
    "w4a16": compressed_tensors("W4A16", "pack-quantized", largest=7),
    "w8a16": compressed_tensors("W8A16", "pack-quantized", largest=127),
    # Not 127: without VNNI, oneDNN multiplies with an instruction (vpmaddubsw) that adds two
    # products of an input, shifted to 0 … 255, and a weight in 16 bits, and saturates.
    "w8a8": compressed_tensors("W8A8", "int-quantized", largest=64),
    "fp8": compressed_tensors("FP8_DYNAMIC", "float-quantized", largest=448),
}
MIXED = "mixed"
"""Three methods in one checkpoint, as compressed-tensors allows."""
MIXTURE = {r".*self_attn\.[qkv]_proj": "fp8", r".*o_proj": "w4a16", r".*mlp\..*_proj": "w8a8"}


def method_of(layer: str, method: str) -> str:
    """Return the key of `METHODS` by which a layer of a checkpoint is quantized."""
    if method != MIXED:
        return method
    (found,) = (value for pattern, value in MIXTURE.items() if re.fullmatch(pattern, layer))
    return found


def describe_mixed(lm_head: bool, plain: Sequence[str]) -> dict:
    groups = {}
    for pattern, method in MIXTURE.items():
        config = METHODS[method][1](lm_head, plain)
        (group,) = config["config_groups"].values()
        groups[method] = {**group, "targets": [f"re:{pattern}"], "format": config["format"]}
    return {**config, "config_groups": groups, "format": "mixed-precision"}


def quantize_activations(model: nn.Module, method: str, plain: Collection[str] = ()) -> None:
    """Make a transformers model round the inputs of its quantized layers as *method* does.

    For the twin of a checkpoint; the rounded inputs stay float32, as its weights do. In a model
    with an adapter of PEFT's, the adapter's own products keep the inputs as they are.

    Args:
        model: with or without an adapter.
        method: as in `write_quantized`; not all methods round inputs.
        plain: as in `write_quantized`.
    """
    for name, module in model.named_modules():
        layer = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if not isinstance(module, nn.Linear) or not layer.endswith("_proj") or layer in plain:
            continue
        if rounded := ROUNDED.get(method_of(layer, method)):
            module.register_forward_pre_hook(lambda _, inputs, rounded=rounded: (rounded(*inputs),))


def _to_int8(x: torch.Tensor) -> torch.Tensor:
    """Each token's by the largest of its absolute values, symmetric, halves to even."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x * (1 / scale)).round() * scale


def _to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Each token's by the largest of its absolute values, to E4M3."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x * (1 / scale)).to(torch.float8_e4m3fn).float() * scale


ROUNDED = {"w8a8": _to_int8, "fp8": _to_fp8}
"""What the methods that round inputs make of them."""
