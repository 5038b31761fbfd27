"""The triples that `test_exactness.py` compares with the reference, their families and engines.

`docs/members.md` names the families from here (`members_page.py`).
"""

from functools import partial

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from support.tiny_makes import (
    write_lora_triple,
    write_quantized_triple,
    write_triple_of_many_makes,
    write_triple_of_odd_configs,
    write_triple_with_trained_tokens,
)
from support.tiny_models import TRIPLES
from support.tiny_multimodal import (
    WHOLE,
    write_adapted_multimodal_triple,
    write_multimodal_triple,
    write_quantized_multimodal_pair,
)
from vllm_proxy.config.roles import ROLES, Role

MANY = ("llama", "qwen2", "padded")
"""Triples whose engines are asked much; those of the others show that such members work."""
OTHERS = (
    *("padded-pair", "gqa", "mistral", "mistral-base-only", "mistral-two-windows"),
    *("qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "mixtures", "cohere"),
    *("gptq", "images"),
)
RECURRENT = ("hybrids", "states-mixed", "delta-nets")
"""Triples with recurrent layers, asked in chunks, and under V2 with different prompts too."""
LATENT = {"latent": "unlimited", "latent-small": "latent-cached"}
"""Triples with latent attention, and the variant in which they run: the rig has no graphs of it."""
IMAGES = {
    # each with the rows of positions that it has for images
    "images": ("qwen3_vl", "qwen2_5_vl", "mistral3"),
    "gemma4-images": ("gemma4", "gemma4", "gemma4"),
    "llama4-images": ("llama4", "qwen3_vl_moe", "llama"),
    "delta-nets": ("qwen3_next", "qwen3_5", "qwen3_5_moe"),
}
"""Families of base, expert and antiexpert where some are multimodal: asked about text."""
SPECIAL = {
    "gptq": partial(write_quantized_triple, method="gptq", roles=["base"], lm_head=True),
    "awq": partial(write_quantized_triple, method="awq", roles=["base"]),
    "w8a8": partial(write_quantized_triple, method="w8a8", roles=["base"]),
    "w4a16-pair": partial(write_quantized_triple, method="w4a16", roles=["expert", "antiexpert"]),
    "lora": write_lora_triple,
    "makes": write_triple_of_many_makes,
    "odd": write_triple_of_odd_configs,
    "qwen3": write_triple_with_trained_tokens,
    **{
        name: partial(write_multimodal_triple, **dict(zip(ROLES, families, strict=True)))
        for name, families in IMAGES.items()
    },
    "gemma3-images": partial(write_adapted_multimodal_triple, family="gemma3"),
    "quantized-images": write_quantized_multimodal_pair,
}
OF_SPECIAL = {
    **dict.fromkeys(("gptq", "awq", "w8a8", "w4a16-pair", "lora", "makes"), ("llama",) * 3),
    "odd": ("llama", "phi3", "llama"),
    "qwen3": ("qwen3",) * 3,
    **IMAGES,
    "gemma3-images": ("gemma3",) * 3,
    "quantized-images": ("mistral", "mistral3", "mistral3"),
}
"""Families of base, expert and antiexpert of the triples in `SPECIAL`."""
ON_V1 = (
    *("awq", "w8a8", "w4a16-pair", "lora", "makes", "odd"),
    *("gemma3-images", "gemma4-images", "llama4-images", "quantized-images"),
)
"""Triples that only runner V1 runs: their checkpoints are special, and no runner reads those."""
MATRIX = [
    *(("llama", variant) for variant in ("plain", "chunked", "ngram", "draft")),
    ("qwen2", "plain"),
    *((family, "plain") for family in OTHERS),
    ("gemma2", "windows-chunked"),
    ("hybrids", "states"),
    ("states-mixed", "states-cached"),
    ("delta-nets", "states-cached"),
    *LATENT.items(),
    ("llama", "bfloat16"),
    ("gptq", "bfloat16"),
]
COMPILED = {"v1": "llama", "v2": "gemma2"}
"""By runner the triple whose engine is compiled, and started again. Gemma 2 is compiled ahead of
time: all its heads are tied to embeddings, and none is part of the fused product."""
# vLLM's CPU runner V1 has no pipeline without compiled code, and no batch-sharded sampling at all.
# Two stages on one rank are in `test_requests.py`.
MATRIX_OF_RUNNER = {
    "v1": [
        *MATRIX,
        *((family, "plain") for family in ON_V1),
        *((COMPILED["v1"], variant) for variant in ("compiled", "compiled-again")),
        *((family, "tp2") for family in ("padded", "gemma2", "gptq")),
        ("padded", "pp2-tp2-compiled"),
    ],
    # Compiled code is in the same cache under both.
    "v2": [
        *MATRIX,
        *((COMPILED["v2"], variant) for variant in ("compiled", "compiled-again")),
        ("padded", "tp2-sharded"),
    ],
}
DELTA_NETS = {"base": "qwen3_next", "expert": "qwen3_5_text"}
"""Families with gated delta nets, compared in bfloat16 with vLLM's own logprobs, on runner V1."""


def families_of(name: str) -> dict[Role, str]:
    """Return the family of each member of a triple."""
    if name in OF_SPECIAL:
        return dict(zip(ROLES, OF_SPECIAL[name], strict=True))
    own = TRIPLES.get(name, {})
    settings = {
        role: {**({} if role == "base" else own.get("pair", {})), **own.get(role, {})}
        for role in ROLES
    }
    return {role: str(setting.get("family", name)) for role, setting in settings.items()}


def architecture_of(family: str) -> str:
    """Return the class that config.json of a tiny checkpoint names."""
    multimodal = family in WHOLE
    names = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if multimodal
        else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    return names[family]
