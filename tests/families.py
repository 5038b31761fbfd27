"""Compare families with the reference by hand: `families.py [--runner v2] FAMILY …`.

Each family alone by stock vLLM, by `check`, and in three triples: all members of the family, the
base with a Llama pair, and the expert with a Llama base and antiexpert. It prints the rows of one
table; `docs/members.md` has what was found (`support/architectures.py`). The tests do not run it.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch

from support.checks import run as run_check
from support.engines import SAFE_MARGIN, TOKEN_ENGINE, run_engines
from support.reference import Reference
from support.tiny_models import FAMILIES, SHAPES, VOCAB_SIZE, write_model
from vllm_proxy.config.roles import ROLES, Role

TOKENS = 12
LENGTHS = (1, 3, 17, 33, 71, 150)
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MORE: dict[str, dict[str, object]] = {
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
        **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    },
    "granitemoe": _LOCAL,
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 64},
    "lfm2_moe": {
        **_EXPERTS,
        **{"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        **{"conv_L_cache": 3, "head_dim": None},
    },
    # the last two as real configs have them, and transformers' do not
    "minimax_m2": {
        **_LOCAL,
        **{"rotary_dim": 32, "use_routing_bias": True, "scoring_func": "sigmoid"},
    },
    "phimoe": {**_LOCAL, "head_dim": None, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": True},
}
"""Settings of families that the tests do not run, in addition to those of `write_model`."""
TRIPLES: dict[str, tuple[Role, ...]] = {"same": ROLES, "base": ("base",), "expert": ("expert",)}
"""Which members are of the family; the others are Llama."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="+", metavar="FAMILY", help="`model_type` in config.json")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1")
    parser.add_argument("--engine", type=json.loads, default={}, help="engine arguments, as JSON")
    given = parser.parse_args()
    FAMILIES.update(MORE)
    torch.set_num_threads(1)
    write_row("family", "stock vLLM", "check", *TRIPLES)
    write_row(*["---"] * (3 + len(TRIPLES)))
    for family in given.families:
        with tempfile.TemporaryDirectory() as root:
            write_row(family, *compared(family, Path(root), given.runner, given.engine))


def write_row(*cells: str) -> None:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    sys.stdout.write(f"| {' | '.join(escaped)} |\n")
    sys.stdout.flush()


def compared(family: str, root: Path, runner: str, settings: dict) -> list[str]:
    """Return the cells of a family's row."""
    triples = write_triples(family, root)
    engine = {**TOKEN_ENGINE, "max_model_len": 256, "max_num_seqs": 8, **settings}
    alone = triples["same"]["base"]
    stock = {"plain": {"model": alone, "disable_log_stats": False, **engine}}
    plan, right = [], {}
    for name in ("stock", *triples):
        config = stock if name == "stock" else {**triples[name], "engine": engine}
        paths = [alone] if name == "stock" else triples[name].values()
        prompts, right[name] = answered(Reference(*paths, alpha=0.0 if name == "stock" else 1.0))
        questions = [{"name": "greedy", "prompts": prompts, "params": GREEDY}]
        plan.append({"name": name, "config": config, "questions": questions})
    results = run_engines(plan, root / "engines", runner)
    cells = {name: verdict(result, right[name]) for name, result in results.items()}
    reports = {name: run_check(triple, engine=engine) for name, triple in triples.items()}
    refused = [f"{n}: {report.problems[0]}" for n, report in reports.items() if report.problems]
    return [cells.pop("stock"), "; ".join(refused) or "accepts", *cells.values()]


def write_triples(family: str, root: Path) -> dict[str, dict[Role, str]]:
    """Write the members of all triples; return their paths."""
    paths = {}
    for name in (family, "llama"):
        for role, shape in SHAPES.items():
            # Not all vLLM's classes of mixtures can tie the head.
            settings = {**shape, "tied": False}
            if kinds := FAMILIES[name].get("layer_types"):
                settings["layer_types"] = kinds[: shape["layers"]]
            paths[name, role] = str(write_model(root / name / role, name, **settings))
    return {
        name: {role: paths[family if role in roles else "llama", role] for role in ROLES}
        for name, roles in TRIPLES.items()
    }


def answered(reference: Reference) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts that have one answer beyond doubt, and these."""
    rng = random.Random(0)
    drawn = [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in LENGTHS for _ in range(2)]
    decoded = ((ids, reference.greedy(ids, TOKENS)) for ids in drawn)
    safe = [(ids, answer.token_ids) for ids, answer in decoded if answer.margin > SAFE_MARGIN]
    return [ids for ids, _ in safe], [tokens for _, tokens in safe]


def verdict(result: dict, right: list[list[int]]) -> str:
    """Return how many of an engine's answers are *right*, or why there are none."""
    if "error" in result:
        return result["error"].strip().splitlines()[-1][:300]
    found = [answer["token_ids"][0] for answer in result["answers"]["greedy"]]
    equal = sum(map(list.__eq__, found, right))
    return f"{'exact' if equal == len(right) else 'WRONG'}, {equal} of {len(right)}"


if __name__ == "__main__":
    main()
