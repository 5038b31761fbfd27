"""Real checkpoints small enough to make in a test: random weights, a real byte-level tokenizer.

The weights are drawn wide (`initializer_range`), so that the logits of neighbouring ids differ by
far more than float32 rounding and greedy decoding has one right answer.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from vllm_proxy.config.roles import ROLES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VOCAB_SIZE = 512
CONTEXT = 1024
WINDOW = 24
"""Sliding window of the families that have one: shorter than a KV cache block and most prompts."""

_LATENT: dict[str, object] = {
    # as small as latent vectors of 512 + 64 numbers let it be
    **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"qk_rope_head_dim": 64, "head_dim": 64, "n_routed_experts": 4, "n_group": 1},
    **{"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    **{"first_k_dense_replace": 1, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    # Caps low enough that one left out shows; attention scale different from 1 / sqrt(head_dim).
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 10.0,
        "final_logit_softcapping": 10.0,
        "initializer_range": 0.06,
    },
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None, "initializer_range": 0.3},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Attention sinks, and windows on every other layer.
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.5, "use_qk_norm": True},
    # with recurrent layers; sizes of states are in `TRIPLES`
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8},
        **{"mamba_d_head": "auto", "mamba_d_state": 16, "mamba_chunk_size": 16, "head_dim": None},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    },
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8},
        **{"mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8},
        **{"num_hidden_layers": None, "initializer_range": 0.3},
    },
    "falcon_h1": {
        **{"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        **{"mamba_chunk_size": 16, "initializer_range": 0.3},
    },
    "mamba": {
        **{"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None},
        **{"max_position_embeddings": None, "head_dim": None},
    },
    "mamba2": {
        **{"expand": 2, "num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16},
        **{"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None},
        **{"max_position_embeddings": None},
    },
    "lfm2": {
        **{"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "head_dim": None},
        **{"block_multiple_of": 32, "block_auto_adjust_ff_dim": False},
    },
    "qwen3_next": {
        **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        **{"shared_expert_intermediate_size": 64},
    },
    "qwen3_5_text": {
        **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    },
    # without a class of vLLM's own
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "mellum": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "bamba": {
        **{"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16},
        **{"mamba_n_groups": 1, "mamba_expand": 2, "head_dim": None},
    },
    "minimax": {"num_local_experts": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": {
        **{**_LATENT, "q_lora_rank": 48, "topk_method": "noaux_tc"},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
            **{"original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1},
            **{"mscale": 1.0, "mscale_all_dim": 0.7},
        },
    },
    "glm4_moe_lite": {**_LATENT, "topk_method": "noaux_tc"},
    # without a kernel of vLLM's on a CPU
    "deepseek_v32": {
        **{**_LATENT, "q_lora_rank": 48, "topk_method": "noaux_tc"},
        **{"index_topk": 64, "index_n_heads": 4, "index_head_dim": 128},
    },
    "kimi_linear": {
        **{**_LATENT, "mla_use_nope": True, "num_experts": 4, "num_shared_experts": 1},
        "linear_attn_config": {
            **{"kda_layers": [1], "full_attn_layers": [2], "short_conv_kernel_size": 4},
            **{"num_heads": 4, "head_dim": 32},
        },
    },
}
"""Settings of a family's config beside those of `write_model`; None takes one of those away."""

TRIPLES: dict[str, dict[str, dict[str, object]]] = {
    "padded": {  # vocabularies that differ in size
        "base": {"family": "llama"},
        "expert": {"family": "llama", "vocab_size": 480},
        "antiexpert": {"family": "llama", "vocab_size": 500},
    },
    "padded-pair": {
        "base": {"family": "llama", "vocab_size": 470},
        "expert": {"family": "llama", "vocab_size": 512},
        "antiexpert": {"family": "llama", "vocab_size": 500},
    },
    "gqa": {  # as Llama 3's 70B and 8B: the same KV heads and head size, different query heads
        "base": {"family": "llama"},
        "pair": {"family": "llama", "heads": 2},
    },
    "qwen3": {"base": {"head_dim": 96}},  # heads that are not the hidden size cut into pieces
    "mistral-base-only": {"base": {"family": "mistral"}, "pair": {"family": "llama"}},
    "mistral-two-windows": {
        "base": {"family": "mistral"},
        "pair": {"family": "mistral", "sliding_window": 2 * WINDOW},
    },
    # Recurrent layers of all kinds, whose states differ in size; the largest is a small member's.
    "hybrids": {
        "base": {"family": "granitemoehybrid", "kv_heads": 4},
        "expert": {"family": "falcon_h1", "mamba_d_state": 96},
        "antiexpert": {
            **{"family": "lfm2", "layer_types": ["conv", "full_attention"], "conv_dim": 128},
            **{"conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 256},
        },
    },
    # … and members without any, and without attention
    "states-mixed": {
        "base": {"family": "mamba2", "head_dim": 64, "state_size": 8},
        "expert": {
            **{"family": "nemotron_h", "layers_block_type": ["mamba", "attention"], "kv_heads": 4},
        },
        "antiexpert": {"family": "llama", "kv_heads": 4},
    },
    # Latent attention, next to a member without, …
    "latent": {
        "base": {"family": "glm4_moe_lite"},
        "expert": {"family": "deepseek_v3", "first_k_dense_replace": 2},
        "antiexpert": {"family": "llama"},
    },
    # … and in a small member alone: vLLM then reads prompts in chunks, and caches prefixes.
    "latent-small": {
        **{"base": {"family": "llama"}, "antiexpert": {"family": "llama"}},
        "expert": {"family": "deepseek_v2", "first_k_dense_replace": 2},
    },
    # Small ones next to a base without experts; Granite 4 is a mixture as the base.
    "mixtures": {
        "base": {"family": "llama"},
        "expert": {"family": "mixtral"},
        "antiexpert": {"family": "gpt_oss", "tied": False},
    },
    # in vLLM's Transformers backend
    "backend-mixtures": {
        "base": {"family": "hunyuan_v1_moe"},
        "expert": {"family": "mellum", "tied": False},
        "antiexpert": {"family": "flex_olmo", "tied": False},
    },
    "mixtral": {"pair": {"family": "llama"}},
    "olmoe": {"pair": {"family": "llama"}},
    "qwen3_moe": {"pair": {"family": "qwen3"}},
}
"""What members have of their own, by role (`pair`: expert and antiexpert), where the name of a
triple says more than that all members are of one family."""
_SMALL = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
SHAPES: dict[str, dict[str, object]] = {
    "base": {"seed": 0, "hidden_size": 256, "layers": 3, "heads": 4, "kv_heads": 2},
    "expert": {"seed": 1, **_SMALL},
    "antiexpert": {"seed": 2, **_SMALL},
}
"""Seeds and sizes of a triple's members."""
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MEMBER_TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }}!{% endfor %}"
    "{% for d in documents or [] %}{{ d.title }}?{% endfor %}"
    "{% for m in messages %}({{ m.role }}) {{ m.content or '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}(assistant) "
    "{% if enable_thinking is defined and not enable_thinking %}[]{% endif %}{% endif %}"
    "{% if reasoning_effort == 'high' %}{{ raise_exception('no such effort') }}{% endif %}"
)
"""Another template, with a BOS, all arguments of templates, and something that it refuses."""
_CORPUS = [
    "The large model is moved by what fine-tuning changed in the small one.",
    "Question: What is the capital of France? Answer: Paris.",
    'A record: {"name": "value", "count": 12, "list": [1, 2, 3], "flag": true}',
] * 8


def write_model(
    path: Path,
    family: str = "llama",
    *,
    seed: int,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    tied: bool = False,
    vocab_size: int = VOCAB_SIZE,
    context: int = CONTEXT,
    **config: object,
) -> Path:
    """Write a float32 checkpoint with its tokenizer to *path* and return it."""
    settings = {
        **text_settings(
            hidden_size, layers, heads, kv_heads, tied, vocab_size=vocab_size, context=context
        ),
        **FAMILIES[family],
        **config,
    }
    torch.manual_seed(seed)
    given = {name: value for name, value in settings.items() if value is not None}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **given), dtype=torch.float32
    )
    draw_parameters(model)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def text_settings(
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool,
    *,
    vocab_size: int = VOCAB_SIZE,
    context: int = CONTEXT,
) -> dict[str, object]:
    """Return the settings of a config that all families share."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden_size // heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


CORRECTIONS = ("e_score_correction_bias", "expert_bias")
"""What names of buffers end with that correct a router's scores for the choice of experts."""


def draw_parameters(model: torch.nn.Module, norms: float = 0.3) -> None:
    """Draw what transformers starts at zero or one.

    A lost bias or norm would go unseen. Gemma's norms start at zero and stand for one more. They
    are drawn wide, or its large embeddings, which are its head as well, would drown the layers and
    the model repeat its input. *norms*: how wide those that start at one are.
    """
    buffers = [(name, held) for name, held in model.named_buffers() if name.endswith(CORRECTIONS)]
    for name, parameter in (*model.named_parameters(), *buffers):
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            parameter.data += torch.randn_like(parameter) * (norms if parameter.any() else 3.0)


def write_tokenizer(
    path: Path, corpus: list[str] = _CORPUS, more: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer of at most `VOCAB_SIZE` ids, with a chat template.

    *more*: special tokens, which get the ids from 3.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>", *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return fast


def with_template(source: str, target: Path) -> str:
    """Copy a checkpoint to *target*, where it has `MEMBER_TEMPLATE`."""
    shutil.copytree(source, target)
    (target / "chat_template.jinja").write_text(MEMBER_TEMPLATE)
    return str(target)


def tokenizer_engine(path: str, **arguments: object) -> "VllmConfig":
    """Return what an engine of *path* would be configured as; reads its config and tokenizer."""
    from vllm import EngineArgs

    return EngineArgs(model=path, max_model_len=256, **arguments).create_engine_config()


def write_triple(root: Path, name: str) -> dict[str, str]:
    """Write members that differ wherever members may: size, depth, head size, GQA, tied head.

    *name* is one of `FAMILIES`, which all members then are of, or of `TRIPLES`.
    """
    own = TRIPLES.get(name, {})
    paths = {}
    for role, shape in SHAPES.items():
        shared = {} if role == "base" else own.get("pair", {})
        settings = {"family": name, **shape, **shared, **own.get(role, {})}
        paths[role] = str(write_model(root / role, **settings))
    return paths


def write_alike(root: Path, family: str = "llama") -> dict[str, str]:
    """Write three members of one shape and different weights; return their paths by role."""
    return {role: str(write_model(root / role, family, seed=i)) for i, role in enumerate(ROLES)}
