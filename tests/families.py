"""Compare families with the reference by hand: `families.py [--runner v2] [FAMILY …]`.

FAMILY is a `model_type` of transformers, or `model_type:ARCHITECTURE` if config.json is to name
another class of vLLM: `olmoe:TransformersMoEForCausalLM` runs in vLLM's Transformers backend. Of a
multimodal family the text is asked. Without one, today's families are compared (`TODAY`). Gated
delta nets run in float32, by a rig in plain torch.

Each family alone by stock vLLM, by `check`, and in three triples: all members of the family, the
base with a Llama pair, and the expert with a Llama base and antiexpert. It prints the rows of one
table; `docs/members.md` has what was found (`support/architectures.py`). The tests do not run it.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch

from support.checks import run as run_check
from support.checks import set_config
from support.engines import RIGS, RUNNER_ENV, SAFE_MARGIN, TOKEN_ENGINE, run_engines
from support.reference import Decoded, Reference
from support.tiny_models import FAMILIES, SHAPES, VOCAB_SIZE, WINDOW, write_model
from support.tiny_multimodal import TEXT, WHOLE, write_multimodal
from vllm_proxy.config.roles import ROLES, Role

TOKENS = 12
IN_FLOAT32 = [str(RIGS / name) for name in ("avx2_kernels", "delta_nets_on_cpu")]
"""Kernels of gated delta nets; vLLM's for CPUs with AMX know bfloat16 only."""
TEXT_ALONE = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 0, "video": 0}}
"""Of vLLM's own engine of a multimodal model."""
LENGTHS = (1, 3, 17, 33, 71, 150)
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
_GRANITE = {
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "logits_scaling": 2.0,
}
TODAY = (
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("gemma3", "gemma4", "mistral3", "llama4", "gpt_oss", "deepseek_v3", "glm4_moe_lite"),
    *("granitemoehybrid", "nemotron_h", "falcon_h1", "lfm2"),
)
"""The families with which people start, besides plain ones."""
MORE: dict[str, dict[str, object]] = {
    "afmoe": {
        **{**_EXPERTS, **_WINDOWS, "num_shared_experts": 1, "num_dense_layers": 1},
        **{"route_scale": 2.0, "mup_enabled": True},
        # as real configs have them, and transformers' do not
        **{"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    },
    "cohere2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1},
        **{"layer_types": ["full_attention"] * 3, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        **{"tie_word_embeddings": True, "logit_scale": 0.5, "sliding_window": WINDOW},
    },
    "cwm": {**_WINDOWS},
    # as real configs have it, and transformers' do not
    "deepseek_v3": {**FAMILIES["deepseek_v3"], "scoring_func": "sigmoid"},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
        **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    },
    "exaone_moe": {**_EXPERTS, **_WINDOWS, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "granite_swa": {**_GRANITE, **_WINDOWS},
    "granitemoe": {**_GRANITE, **_LOCAL},
    "granitemoe_swa": {**_GRANITE, **_LOCAL, **_WINDOWS},
    "granitemoeshared": {**_GRANITE, **_LOCAL, "shared_intermediate_size": 64},
    "hy_v3": {
        **{**_EXPERTS, "num_shared_experts": 1, "router_scaling_factor": 2.0},
        # as real configs have them, and transformers' do not
        **{"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True},
        "qk_norm": True,
    },
    "laguna": {**_EXPERTS, **_WINDOWS, "shared_expert_intermediate_size": 64},
    # vLLM always ties the heads of both
    "lfm2": {**FAMILIES["lfm2"], "tie_word_embeddings": True},
    "lfm2_moe": {
        **_EXPERTS,
        **{"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        **{"conv_L_cache": 3, "head_dim": None, "tie_word_embeddings": True},
    },
    "llama4_text": TEXT["llama4"],
    # the last two as real configs have them, and transformers' do not
    "minimax_m2": {
        **_LOCAL,
        **{"rotary_dim": 32, "use_routing_bias": True, "scoring_func": "sigmoid"},
    },
    "olmo": {"clip_qkv": 8.0},
    "phimoe": {
        **{**_LOCAL, "head_dim": None, "sliding_window": None},
        **{"attention_bias": True, "lm_head_bias": True},
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": True},
    "solar_open": _ROUTED,
}
"""Settings of families that the tests do not run, in addition to those of `write_model`."""
PER_LAYER = {"layer_types", "mlp_layer_types"}
"""Settings with a value for each layer of the largest member."""
TRIPLES: dict[str, tuple[Role, ...]] = {"same": ROLES, "base": ("base",), "expert": ("expert",)}
"""Which members are of the family; the others are Llama."""
ENGINES = ("stock", *TRIPLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="`model_type[:ARCHITECTURE]`")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1")
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=ENGINES, metavar="ENGINE")
    parser.add_argument("--engine", type=json.loads, default={}, help="engine arguments, as JSON")
    given = parser.parse_args()
    FAMILIES.update(MORE)
    torch.set_num_threads(1)
    write_row("family", "check", *given.only)
    write_row(*["---"] * (2 + len(given.only)))
    sys.path[:0] = IN_FLOAT32  # for `check`
    for family in given.families or TODAY:
        with tempfile.TemporaryDirectory() as root:
            write_row(family, *compared(family, Path(root), given))


def write_row(*cells: str) -> None:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    sys.stdout.write(f"| {' | '.join(escaped)} |\n")
    sys.stdout.flush()


def compared(family: str, root: Path, given: argparse.Namespace) -> list[str]:
    """Return the cells of a family's row."""
    triples = write_triples(family, root)
    engine = {**TOKEN_ENGINE, "max_model_len": 256, "max_num_seqs": 8, **given.engine}
    alone = triples["same"]["base"]
    own = TEXT_ALONE if family.partition(":")[0] in WHOLE else {}
    stock = {"plain": {"model": alone, "disable_log_stats": False, **engine, **own}}
    plan, right = [], {}
    for name in given.only:
        config = stock if name == "stock" else {**triples[name], "engine": engine}
        paths = [alone] if name == "stock" else triples[name].values()
        prompts, right[name] = answered(Reference(*paths, alpha=0.0 if name == "stock" else 1.0))
        questions = [{"name": "greedy", "prompts": prompts, "params": GREEDY}]
        plan.append({"name": name, "config": config, "questions": questions})
    results = run_engines(plan, root / "engines", given.runner, {"PYTHONPATH": rigs(given.runner)})
    cells = [verdict(results[name], right[name]) for name in given.only]
    reports = {n: run_check(triples[n], engine=engine) for n in given.only if n in triples}
    refused = [f"{n}: {report.problems[0]}" for n, report in reports.items() if report.problems]
    return ["; ".join(refused) or "accepts", *cells]


def rigs(runner: str) -> str:
    """Return the PYTHONPATH of engines."""
    return os.pathsep.join(filter(None, (RUNNER_ENV[runner].get("PYTHONPATH"), *IN_FLOAT32)))


def write_triples(given: str, root: Path) -> dict[str, dict[Role, str]]:
    """Write the members of all triples; return their paths."""
    family, _, architecture = given.partition(":")
    paths = {}
    for name in (family, "llama"):
        for role, shape in SHAPES.items():
            # Not all vLLM's classes of mixtures can tie the head.
            settings = {**shape, "tied": False}
            for key in PER_LAYER & FAMILIES.get(name, {}).keys():
                settings[key] = FAMILIES[name][key][: shape["layers"]]
            if name == "lfm2":  # names that only real configs have
                size = shape["hidden_size"]
                settings |= {"conv_dim": size, "conv_dim_out": size, "block_dim": size}
                settings["block_ff_dim"] = 2 * size
            write = write_multimodal if name in WHOLE else write_model
            path = write(root / name / role, name, **settings)
            if name == family and architecture:
                set_config(architectures=[architecture])(path)
            paths[name, role] = str(path)
    return {
        name: {role: paths[family if role in roles else "llama", role] for role in ROLES}
        for name, roles in TRIPLES.items()
    }


def answered(reference: Reference) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts that have one answer beyond doubt, and these."""
    rng = random.Random(0)
    drawn = [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in LENGTHS for _ in range(2)]
    decoded = ((ids, reference.greedy(ids, TOKENS)) for ids in drawn)
    safe = [
        (ids, answer.token_ids)
        for ids, answer in decoded
        if answer.margin > max(SAFE_MARGIN, rounding(reference, ids, answer))
    ]
    return [ids for ids, _ in safe], [tokens for _, tokens in safe]


def rounding(reference: Reference, prompt: list[int], answer: Decoded) -> float:
    """Return how far the reference without caches moves the gap between first and second logit.

    Recurrent layers compute states in another order then. Random ones amplify its rounding: the
    gap moves by up to 0.3 for tiny Nemotron-H, by 3e-5 for tiny Llama.
    """
    rows = reference.logits([*prompt, *answer.token_ids[:-1]], [None] * 3)[len(prompt) - 1 :]
    best, ids = answer.logprobs.topk(2)
    return (rows.gather(1, ids).diff() - best.diff()).abs().max().item()


def verdict(result: dict, right: list[list[int]]) -> str:
    """Return how many of an engine's answers are *right*, or why there are none."""
    if "error" in result:
        return result["error"].strip().splitlines()[-1][:300]
    found = [answer["token_ids"][0] for answer in result["answers"]["greedy"]]
    equal = sum(map(list.__eq__, found, right))
    return f"{'exact' if equal == len(right) else 'WRONG'}, {equal} of {len(right)}"


if __name__ == "__main__":
    main()
