"""Tiny multimodal checkpoints: a text model like those of `tiny_models`, and towers."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from support.quantized import write_quantized
from support.tiny_adapters import merged_by_peft, write_adapter
from support.tiny_models import (
    FAMILIES,
    SHAPES,
    VOCAB_SIZE,
    WINDOW,
    draw_parameters,
    text_settings,
    write_model,
    write_tokenizer,
)

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "patch_size": 4}
QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

DELTA_NETS: dict[str, object] = {
    **FAMILIES["qwen3_5_text"],
    **{"layer_types": None, "full_attention_interval": 2},
    "rope_parameters": {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}

TEXT: dict[str, dict[str, object]] = {
    "gemma3": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 48,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    },
    "gemma4": {
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "global_head_dim": 64,
        "num_kv_shared_layers": 0,
    },
    "mistral3": {"model_type": "mistral"},
    "llama4": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 256,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
        "no_rope_layer_interval": 2,  # every second layer has full attention
    },
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {"rope_parameters": {**ROPE, "mrope_interleaved": True}},
    "qwen3_vl_moe": {
        "rope_parameters": {**ROPE, "mrope_interleaved": True},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
        "norm_topk_prob": True,
    },
    "qwen3_5": DELTA_NETS,
    "qwen3_5_moe": {
        **DELTA_NETS,
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        "shared_expert_intermediate_size": 64,
    },
}
"""Settings of a family's text model beside those of `write_multimodal`."""

WHOLE: dict[str, dict[str, object]] = {
    "gemma3": {
        "vision_config": {**TOWER, "num_attention_heads": 2, "image_size": 8},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "vision_config": {
            **TOWER,
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
            **{"global_head_dim": 16, "position_embedding_size": 16, "pooling_kernel_size": 1},
        },
        "audio_config": None,
    },
    "mistral3": {
        "vision_config": {
            **TOWER,
            **{"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 16, "image_size": 8},
        },
        "image_token_index": VOCAB_SIZE,  # the default is an id of the tests' tokenizer
    },
    "llama4": {
        "vision_config": {
            **TOWER,
            **{"num_attention_heads": 2, "image_size": 8, "projector_input_dim": 32},
            **{"projector_output_dim": 32, "vision_output_dim": 32},
        },
    },
    "qwen2_vl": {
        "vision_config": {"depth": 1, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2},
    },
    "qwen2_5_vl": {
        "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [0]},
    },
    **{
        name: {
            "vision_config": {
                **QWEN_TOWER,
                **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            },
        }
        for name in ("qwen3_vl", "qwen3_vl_moe")
    },
    **{
        name: {"vision_config": {**QWEN_TOWER, "num_position_embeddings": 16}}
        for name in ("qwen3_5", "qwen3_5_moe")
    },
}
"""What a family's config has beside its text model's."""


IN_TEXT_MODEL = r".*language_model.*\.(q_proj|v_proj|down_proj)"
"""Layers for an adapter, as PEFT matches them in the whole model."""


def write_multimodal(
    path: Path,
    family: str,
    *,
    seed: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool = False,
    tower: Mapping[str, object] = MappingProxyType({}),
    **config: object,
) -> Path:
    """Write a float32 checkpoint of one of `WHOLE`, named as transformers saves it.

    Args:
        tower: settings of the vision tower beside those of `WHOLE`.
        config: others of the whole model, beside those of `WHOLE`.
    """
    text = {**text_settings(hidden_size, layers, heads, kv_heads, tied), **TEXT[family]}
    if family.startswith("qwen"):  # half of the numbers that are rotated, for the three rows
        rope = {**ROPE, **TEXT[family].get("rope_parameters", {})}
        eighth = int(hidden_size // heads * rope.get("partial_rotary_factor", 1)) // 8
        text["rope_parameters"] = {**rope, "mrope_section": [2 * eighth, eighth, eighth]}
    whole = {"tie_word_embeddings": text["tie_word_embeddings"], **WHOLE[family], **config}
    vision = {**WHOLE[family]["vision_config"], **tower}
    if "depth" in vision:
        vision["hidden_size" if family == "qwen2_vl" else "out_hidden_size"] = hidden_size
    whole["vision_config"] = vision
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, text_config=text, **whole), dtype=torch.float32
    )
    draw_parameters(model, norms=3.0 if family == "gemma4" else 0.3)
    model.save_pretrained(path)
    _as_published(path / "model.safetensors", family)
    write_tokenizer(path)
    return path


def _as_published(file: Path, family: str) -> None:
    """Give a checkpoint what real ones have, and transformers does not save."""
    tensors = load_file(file)
    if family in ("qwen3_5", "qwen3_5_moe"):  # a draft model's
        tensors |= {"mtp.fc.weight": torch.zeros(8, 16), "mtp.norm.weight": torch.zeros(8)}
    if family == "qwen3_vl_moe":
        experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        tensors |= {name: tensor.mT.contiguous() for name, tensor in experts.items()}
    save_file(tensors, file, {"format": "pt"})


def old_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors as checkpoints of another age have them: the other of both ways."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model.model."):
            name = name.replace("language_model.model.", "model.language_model.")
        elif name.startswith("model.language_model."):
            name = name.replace("model.language_model.", "language_model.model.")
        elif name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            name = name.replace("model.", "model.language_model.", 1)
        found[name.removeprefix("language_model.") if "lm_head" in name else name] = tensor
    return found


def write_multimodal_triple(root: Path, base: str, expert: str, antiexpert: str) -> dict[str, str]:
    """Write members of these families, in the sizes of `write_triple`."""
    paths = {}
    families = {"base": base, "expert": expert, "antiexpert": antiexpert}
    for role, family in families.items():
        write = write_multimodal if family in WHOLE else write_model
        paths[role] = str(write(root / role, family, **SHAPES[role]))
    return paths


def write_adapted_multimodal_triple(root: Path, family: str) -> dict[str, object]:
    """Write a triple whose expert is the antiexpert with an adapter of its text model's layers."""
    triple = write_multimodal_triple(root, family, family, family)
    small, merged = Path(triple["antiexpert"]), root / "merged"
    adapter = write_adapter(small, root / "adapter", target_modules=IN_TEXT_MODEL)
    merged_by_peft(small, adapter).save_pretrained(merged)
    expert = {"model": str(small), "lora": str(adapter)}
    return {**triple, "expert": expert, "reference": {**triple, "expert": str(merged)}}


def write_quantized_multimodal_pair(root: Path) -> dict[str, object]:
    """Write a plain base, and a quantized multimodal pair; the reference's are their twins.

    One layer of each is not quantized, which config.json says by its name in the checkpoint. They
    are named in both ways.
    """
    triple: dict[str, object] = {**write_multimodal_triple(root, "mistral", "mistral3", "mistral3")}
    twins = dict(triple)
    layer = "layers.1.mlp.down_proj"
    rename_tensors(Path(str(triple["antiexpert"])))
    for role, method, name in (
        ("expert", "gptq", f"language_model.model.{layer}"),
        ("antiexpert", "w4a16", f"model.language_model.{layer}"),
    ):
        path, twin = root / f"{role}-{method}", root / f"{role}-twin"
        write_quantized(Path(str(triple[role])), path, twin, method, plain=[name])
        triple[role], twins[role] = str(path), str(twin)
    return {**triple, "reference": twins}


def rename_tensors(model: Path) -> None:
    """Give a checkpoint's tensors their `old_names`."""
    path = model / "model.safetensors"
    save_file(old_names(load_file(path)), path, {"format": "pt"})
