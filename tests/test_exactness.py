"""Token for token and logprob for logprob, what the engine says is what the formula says.

The reference (`reference.py`) is a transformers loop in float32, one prompt at a time. The engines
run the same prompts in one continuous batch: both model runners, eager, compiled and in CUDA graphs
(Model Runner V2, in the rig `graphs_on_cpu`), one worker and two, with prefix caching, chunked
prefill, preemption and speculation.
"""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from support.engines import (
    KV_CACHE_BYTES,
    RIGS,
    SAFE_MARGIN,
    TOKEN_ENGINE,
    answers_of,
    in_graphs,
    own_caches,
    require_frequencies,
    result_of,
    run_engines,
)
from support.made_once import MadeOnce
from support.matrix import (
    COMPILED,
    DELTA_NETS,
    LATENT,
    MANY,
    MATRIX_OF_RUNNER,
    ON_V1,
    OTHERS,
    RECURRENT,
    SPECIAL,
    architecture_of,
    families_of,
)
from support.quantized import quantize_activations
from support.reference import Decoded, Reference
from support.tiny_makes import HUB, LEFT_ALONE
from support.tiny_models import VOCAB_SIZE, write_model, write_triple
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.pages import state_blocks
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes

MAX_TOKENS = 32
PROMPTS = 32
FEW = 8
"""Prompts, or tokens, for questions about one property: Triton's interpreter is slow."""
CLEAR = 0.5
"""Lead of the likeliest token, in logits, that bfloat16 weights and activations do not turn round:
they moved logprobs of these models by 0.05 in the mean, and by 0.36 at most."""
ROUNDING = 0.1
"""How far logprobs of vLLM's bfloat16 logits are from ours, which leave the head in float32."""
HALF = 0.5
SAMPLES = {"v1": 1000, "v2": 400}
GREEDY = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
ONE_WITH_LOGPROBS = {"max_tokens": 1, "logprobs": 1}
ENGINE = {**TOKEN_ENGINE, "max_model_len": 512}
VARIANTS = {
    "plain": {},
    # A chunk is shorter than most prompts; the KV cache holds a few sequences of sixteen.
    "chunked": {
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 24,
    },
    # Windows make groups of KV caches, and each takes blocks of its own.
    "windows-chunked": {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 100},
    # Each recurrent layer takes blocks too: of 60 blocks, the longest sequence may take 38.
    "states": {
        "max_num_batched_tokens": 80,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 60,
    },
    "states-cached": {"max_num_batched_tokens": 80},
    "unlimited": {},
    # of 9 blocks, the longest sequence takes 7
    "latent-cached": {
        **{"max_num_batched_tokens": 48, "max_num_seqs": 8},
        **{"max_model_len": 256, "num_gpu_blocks_override": 10},
    },
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    },
    "draft": {},  # the expert drafts; its path is known only to the fixture
    "bfloat16": {"dtype": "bfloat16"},
    "compiled": {"enforce_eager": False},
    "compiled-again": {"enforce_eager": False},
    "tp2": {"tensor_parallel_size": 2},
    # Each rank samples some of the requests (Model Runner V2 only).
    "tp2-sharded": {"tensor_parallel_size": 2, "enable_batch_sharded_sampling": True},
    "pp2-tp2-compiled": {
        "pipeline_parallel_size": 2,
        "tensor_parallel_size": 2,
        "enforce_eager": False,
    },
}
GRAPHS = {
    "plain": in_graphs("FULL_DECODE_ONLY", (FEW // 2, FEW, PROMPTS)),
    "chunked": in_graphs("FULL_AND_PIECEWISE", (4, 16, 48)),
    **dict.fromkeys(("states", "states-cached"), in_graphs("FULL_DECODE_ONLY", (FEW // 2, FEW))),
}
"""Variants that Model Runner V2 runs in CUDA graphs. The others keep vLLM's own CPU attention."""
FEW_GRAPHS = in_graphs("FULL_DECODE_ONLY", (FEW // 2,))
"""Of the engines that are asked as many requests at once."""
LACKING = [
    {"prompt": prompt, "params": {"temperature": 0, "max_tokens": 4, "ignore_eos": True, **params}}
    for prompt, params in (
        ([5, 490], {}),
        ([5, 6], {"allowed_token_ids": [480, 511]}),
        ([5, 6], {"allowed_token_ids": [7], "min_tokens": 1, "stop_token_ids": [7]}),
        ([5, 6], {"extra_args": {"proxy_alpha": 3e38}}),
        ([5, 490], {"extra_args": {"proxy_weights": [1, 0, 0]}}),
        ([5, 6], {"allowed_token_ids": [7, 511]}),
        ([5, 6], {"extra_args": {"proxy_alpha": 1e30}}),
        ([5, 6], {"extra_args": {"proxy_alpha": 1e-300}}),
    )
]
"""Requests of the triple `padded`, whose base has 512 ids and whose expert has 480: four that are
refused, and four that are answered."""
CACHED = "llama"
"""The triple that is asked twice, to hit the prefix cache."""
CACHED_VARIANTS = ("states-cached", "latent-cached")
"""Variants in which all are."""
LOGPROBS = ("llama", "qwen2", "gemma2")
"""Triples of which logprobs are compared as well: fused logits, and Gemma 2's, which are not."""
WINDOWED = "mistral-two-windows"
"""The triple whose expert drafts, with different prompts: windows of a block and of two."""
WINDOW_ASKED = {"prompts": 14, "max_tokens": 48}
"""Enough tokens for the window to leave the prompt's last block, which other requests then use."""
STATES_ASKED = {"prompts": FEW, "max_tokens": FEW}
DRAFTS = {"tokens": 2, "adapt": False}
IDENTITIES = ("alpha-zero", "same-small-models", "base-is-antiexpert")


@pytest.fixture(scope="session")
def members(tmp_path_factory) -> dict[str, dict[str, object]]:
    """Configurations by family; what the reference reads instead stands under `reference`."""
    root = tmp_path_factory.mktemp("members")
    return {
        name: SPECIAL[name](root / name) if name in SPECIAL else write_triple(root / name, name)
        for name in (*MANY, *OTHERS, *RECURRENT, *LATENT, *ON_V1)
    }


@pytest.fixture(scope="session")
def alone(members, expected) -> dict[str, list[list[int]]]:
    """What a member says on its own to the llama prompts: the formula with alpha = 0."""
    prompts = [ids for ids, _ in expected["llama"][:FEW]]
    answers = {}
    for role in ("base", "expert"):
        path = members["llama"][role]
        model = Reference(path, path, path, alpha=0.0)
        answers[role] = [model.greedy(ids, MAX_TOKENS).token_ids for ids in prompts]
    return answers


def draw_prompts() -> list[list[int]]:
    """Lengths from one token to several blocks; some share a prefix, some repeat themselves."""
    rng = random.Random(0)
    lengths = (1, 2, 5, 17, 31, 32, 33, 64, 100, 150, 200)
    prompts = [
        [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice(lengths))] for _ in range(30)
    ]
    prompts += [[*prompts[i][:40], rng.randrange(3, VOCAB_SIZE)] for i in range(10)]
    prompts += [[rng.randrange(3, VOCAB_SIZE) for _ in range(4)] * 9 for _ in range(10)]
    return prompts


@pytest.fixture(scope="session")
def expected(members, tmp_path_factory) -> dict[str, list[tuple[list[int], Decoded]]]:
    """The reference's answers by family, for prompts that have one beyond doubt."""
    torch.set_num_threads(1)
    return MadeOnce(lambda family: answers_of_reference(family, members[family]), tmp_path_factory)


def answers_of_reference(family: str, config: dict) -> list[tuple[list[int], Decoded]]:
    reference = Reference(**config.get("reference", config))
    if family == "w8a8":
        quantize_activations(reference.models[0], family, LEFT_ALONE)
    count, length, margin = asked_of(family)
    drawn = draw_prompts() if family in (*MANY, "w8a8") else draw_prompts()[::3]
    configs = [model.config.get_text_config() for model in reference.models]
    vocab_size = min(config.vocab_size for config in configs)
    drawn = [[token % vocab_size for token in ids] for ids in drawn]
    decoded = ((ids, reference.greedy(ids, length)) for ids in drawn)
    safe = [(ids, answer) for ids, answer in decoded if answer.margin > margin]
    assert len(safe) >= count, family
    # From both ends: the special prompts stand last.
    return safe[: count // 2] + safe[-count // 2 :]


def asked_of(family: str) -> tuple[int, int, float]:
    """Number of prompts, tokens generated for each, and how far from a tie."""
    if family == "w8a8":
        # A difference of 1e-6 now and then rounds an activation to the next of 255 values, which
        # moves logprobs by up to 0.2.
        return FEW // 2, 4, 0.3
    if family in MANY:
        return PROMPTS, MAX_TOKENS, SAFE_MARGIN
    return FEW, MAX_TOKENS // 2, SAFE_MARGIN


def plan(members: dict, expected: dict, runner: str) -> list[dict]:
    engines = []
    for family, variant in MATRIX_OF_RUNNER[runner]:
        prompts = [ids for ids, _ in expected[family]]
        triple = {role: members[family][role] for role in ROLES}
        graphs = GRAPHS.get(variant, {}) if runner == "v2" else {}
        if graphs and family in OTHERS and variant == "plain":
            graphs = FEW_GRAPHS
        config = {**triple, "engine": {**ENGINE, **VARIANTS[variant], **graphs}}
        asked = greedy_part(expected, runner, family, variant)
        params = {**GREEDY, "max_tokens": len(asked[0][1])}
        questions = [{"name": "greedy", "prompts": [ids for ids, _ in asked], "params": params}]
        if variant == "bfloat16":
            questions = [{**logprobs_of(prompts), "params": {**GREEDY, **ONE_WITH_LOGPROBS}}]
        if (family, variant) == (CACHED, "plain") or variant in CACHED_VARIANTS:
            questions.append({**questions[0], "name": "again"})
        if (family in RECURRENT and runner == "v2") or variant == "latent-cached":
            questions.append(own_prompts(**STATES_ASKED))
        if variant == "latent-cached":
            config["speculate"] = DRAFTS
        if variant == "plain" and family in LOGPROBS:
            questions.append(logprobs_of(prompts[::4]))
        if (family, variant) == ("llama", "plain"):
            questions += sampled(prompts, SAMPLES[runner])
        if family == "padded":
            questions.append({"name": "lacking", "refused": LACKING})
        if variant == "draft":
            config["engine"]["speculative_config"] = {
                "method": "draft_model",
                "model": config["expert"],
                "num_speculative_tokens": 3,
            }
        engines.append({"name": f"{family}-{variant}", "config": config, "questions": questions})
    triple, prompts = members["llama"], [ids for ids, _ in expected["llama"]]
    few = prompts[: FEW if runner == "v1" else FEW // 2]
    question = {"name": "greedy", "prompts": few, "params": GREEDY}
    for name in IDENTITIES if runner == "v1" else ():  # V2 has them as requests' weights
        changed = {
            "alpha-zero": {"alpha": 0.0},
            "same-small-models": {"antiexpert": triple["expert"]},
            "base-is-antiexpert": {"antiexpert": triple["base"]},
        }[name]
        config = {**triple, **changed, "engine": ENGINE}
        engines.append({"name": name, "config": config, "questions": [question]})
    graphs = GRAPHS["plain"] if runner == "v2" else {}
    tight = {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 18, "max_num_seqs": 8}
    windows = {role: members[WINDOWED][role] for role in ROLES}
    config = {**windows, "speculate": DRAFTS, "engine": {**ENGINE, **tight, **graphs}}
    engines.append(
        {"name": "windows", "config": config, "questions": [own_prompts(**WINDOW_ASKED)]}
    )
    stock = {"plain": {"model": triple["base"], "disable_log_stats": False, **ENGINE}}
    engines.append({"name": "stock", "config": stock, "questions": [question]})
    return engines


def delta_net_engines(paths: dict[str, str]) -> list[dict]:
    """An engine of two members with gated delta nets, and vLLM's own of each.

    In bfloat16, since vLLM's kernel for CPUs takes nothing else.
    """
    rng = random.Random(4)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (1, 33, 64, 150)]
    settings = {"dtype": "bfloat16", "max_logprobs": VOCAB_SIZE, "max_num_batched_tokens": 160}
    engine = {**ENGINE, **settings}
    params = {**GREEDY, "max_tokens": 2, "logprobs": VOCAB_SIZE}
    questions = [{"name": "logprobs", "prompts": prompts, "params": params}]
    configs = {
        role: {"plain": {"model": path, "disable_log_stats": False, **engine}}
        for role, path in paths.items()
    }
    configs["both"] = {**paths, "alpha": HALF, "engine": engine}
    return [
        {"name": f"delta-net-{name}", "config": config, "questions": questions}
        for name, config in configs.items()
    ]


def own_prompts(prompts: int, max_tokens: int) -> dict:
    """Requests of which half have another prompt for the expert."""
    rng = random.Random(3)
    ids = [
        [rng.randrange(5, 400) for _ in range(rng.randrange(3, 120))] for _ in range(2 * prompts)
    ]
    asked, others = ids[:prompts], ids[prompts:]
    own = [{"proxy_expert_prompt": other} if i % 2 else None for i, other in enumerate(others)]
    params = {**GREEDY, "max_tokens": max_tokens}
    return {"name": "own", "prompts": asked, "extra_args": own, "params": params}


def greedy_part(
    expected: dict, runner: str, family: str, variant: str
) -> list[tuple[list[int], list[int]]]:
    """Prompts and right answers: of V2, which is slow here, half of each, and but rarely of all.

    Not where it takes many and long ones to run out of KV cache.
    """
    every = [(ids, answer.token_ids) for ids, answer in expected[family]]
    if runner == "v1" or variant in ("chunked", "states", *CACHED_VARIANTS):
        return every
    half = [(ids, tokens[: MAX_TOKENS // 2]) for ids, tokens in every]
    return half if (family, variant) == (CACHED, "plain") else half[::2]


def logprobs_of(prompts: list[list[int]]) -> dict:
    params = {**GREEDY, "max_tokens": FEW, "logprobs": 5, "prompt_logprobs": 5}
    return {"name": "logprobs", "prompts": prompts, "params": params}


def sampled(prompts: list[list[int]], samples: int) -> list[dict]:
    # n > 1 wants a temperature; keeping only the most likely makes it greedy again.
    four = {**GREEDY, "temperature": 1.0, "min_p": 1.0, "n": 4}
    seeded = {"temperature": 1.0, "max_tokens": FEW, "ignore_eos": True, "seed": 7}
    first = {"temperature": 1.0, "max_tokens": 1, "n": samples, "seed": 1}
    return [
        {"name": "n4", "prompts": prompts[:FEW], "params": four},
        {"name": "seeded", "prompts": prompts[:FEW], "params": seeded},
        {"name": "seeded-again", "prompts": prompts[:FEW], "params": seeded},
        {"name": "frequencies", "prompts": prompts[:1], "params": first},
    ]


@pytest.fixture(scope="session")
def results() -> dict[str, dict]:
    """By runner, of engines that were started already."""
    return {}


@pytest.fixture(scope="session")
def delta_net(tmp_path_factory) -> dict[str, str]:
    """A base and an expert with gated delta nets of different sizes."""
    root = tmp_path_factory.mktemp("delta-net")
    small = {"layers": 2, "layer_types": ["linear_attention", "full_attention"], "kv_heads": 2}
    heads = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # the kernel's
    sizes = {
        "base": {"seed": 0, "hidden_size": 256, "layers": 3, "kv_heads": 2},
        "expert": {"seed": 1, "linear_num_value_heads": 4, **small},
    }
    return {
        role: str(write_model(root / role, DELTA_NETS[role], **size, **heads))
        for role, size in sizes.items()
    }


@pytest.fixture(scope="session", params=["v1", "v2"])
def engines(request, results, members, expected, delta_net, tmp_path_factory) -> dict[str, dict]:
    """The results of a runner; `conftest.py` gives all its tests to one worker."""
    runner = request.param
    if runner in results:  # pytest sets this up again for every parameter of a test
        return results[runner]
    directory = tmp_path_factory.mktemp(f"engines-{runner}")
    env = own_caches(directory)
    # What vLLM finds out about model classes, in a process for each, is the same for all.
    known_classes = tmp_path_factory.getbasetemp().parent / "modelinfos"
    known_classes.mkdir(exist_ok=True)
    Path(env["VLLM_CACHE_ROOT"]).mkdir(parents=True)
    (Path(env["VLLM_CACHE_ROOT"]) / "modelinfos").symlink_to(known_classes)
    env["HF_HUB_CACHE"] = str(Path(members["makes"]["base"]).parent / HUB)
    rigs = [RIGS / name for name in ("avx2_kernels", "int4_on_cpu", "delta_nets_on_cpu")]
    if runner == "v2":  # compiled and captured as on GPUs
        names = "model_runner_v2", "graphs_on_cpu", "vllm_compile_on_cpu"
        rigs += [RIGS / name for name in names]
        env["VLLM_USE_AOT_COMPILE"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(map(str, rigs))
    families = list(dict.fromkeys(family for family, _ in MATRIX_OF_RUNNER[runner]))
    # The other runner's worker begins at the other end, and neither waits for what both need.
    for family in families if runner == "v1" else families[::-1]:
        assert expected[family]
    planned = plan(members, expected, runner)
    planned += delta_net_engines(delta_net) if runner == "v1" else []
    answers = run_engines(planned, directory, runner, env)
    results[runner] = {"runner": runner, **answers}
    return results[runner]


def test_checkpoints_are_of_the_families_that_the_documentation_names(members, delta_net):
    """Members of each triple have the class in config.json that `docs/members.md` is made from."""
    for name, config in members.items():
        paths = config.get("reference", config)
        for role, family in families_of(name).items():
            assert architectures(paths[role]) == [architecture_of(family)], (name, role)
    for role, path in delta_net.items():
        assert architectures(path) == [architecture_of(DELTA_NETS[role])]


def architectures(path: str) -> list[str]:
    return json.loads(Path(path, "config.json").read_text())["architectures"]


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["token_ids"][0] for answer in answers]


@pytest.mark.parametrize(
    ("engines", "family", "variant"),
    [
        (runner, *engine)
        for runner, matrix in MATRIX_OF_RUNNER.items()
        for engine in matrix
        if engine[1] != "bfloat16"
    ],
    indirect=["engines"],
)
def test_greedy_decoding_is_the_formula(engines, expected, family, variant):
    answers = answers_of(engines, f"{family}-{variant}")["greedy"]
    right = [answer for _, answer in greedy_part(expected, engines["runner"], family, variant)]
    assert tokens(answers) == right
    if engines["runner"] == "v2" and variant in GRAPHS:
        steps = engines[f"{family}-{variant}"]["steps"]
        assert steps["FULL"] >= len(right[0]) - 1
        assert variant != "chunked" or steps["PIECEWISE"] > 0


def test_a_window_sees_the_blocks_of_a_member_with_another_prompt(engines, members):
    require_own_prompts(engines, "windows", members[WINDOWED], WINDOW_ASKED)


@pytest.mark.parametrize("engines", ["v2"], indirect=True)
@pytest.mark.parametrize("family", RECURRENT)
def test_states_of_members_with_different_prompts(engines, members, family):
    variant = dict(MATRIX_OF_RUNNER["v2"])[family]
    require_own_prompts(engines, f"{family}-{variant}", members[family], STATES_ASKED)


def test_latent_attention_with_different_prompts_and_drafts(engines, members):
    """A backend without a kernel for several queries verifies drafts as the end of a prompt."""
    name = "latent-small-latent-cached"
    require_own_prompts(engines, name, members["latent-small"], STATES_ASKED)
    assert engines[name]["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


def require_own_prompts(engines: dict, name: str, paths: dict, asked: dict[str, int]) -> None:
    """Answers to `own_prompts` are the reference's, wherever it has one beyond doubt."""
    question, found = own_prompts(**asked), answers_of(engines, name)["own"]
    reference = Reference(**{role: paths[role] for role in ROLES})
    compared = 0
    each = zip(question["prompts"], question["extra_args"], found, strict=True)
    for prompt, control, answer in (one for one in each if one[1]):
        truth = reference.greedy(prompt, asked["max_tokens"], control)
        if truth.margin > SAFE_MARGIN:
            assert answer["token_ids"] == [truth.token_ids]
            compared += 1
    assert compared > asked["prompts"] // 3


@pytest.mark.parametrize(
    ("engines", "name"),
    [("v1", "padded-tp2"), ("v2", "padded-tp2-sharded")],
    indirect=["engines"],
)
def test_ids_that_a_member_lacks_are_never_read_or_asked_for(engines, members, name):
    answers = answers_of(engines, name)["lacking"]
    refused, answered = answers[:4], answers[4:]
    assert [reason.partition(";")[0] for reason in refused] == [
        "`prompt`: it has the id 490 at position 1",
        "`allowed_token_ids`: it has only ids that the expert lacks: all members have the ids from "
        "0 to 479",
        "`allowed_token_ids` and `min_tokens` leave no token to generate",
        '`proxy_alpha` is 3e+38: give a finite number from -1e+30 to 1e+30, "adaptive", or a '
        "mapping with `schedule`",
    ]
    paths = members["padded"]
    base = Reference(paths["base"], paths["base"], paths["base"])
    assert answered[0] == base.greedy([5, 490], 4, {"proxy_weights": [1, 0, 0]}).token_ids
    assert answered[1] == [7] * 4
    triple = Reference(*(paths[role] for role in ROLES))
    controls = [{"proxy_weights": [0, 1, -1]}, {"proxy_alpha": 0.0}]
    assert answered[2:] == [triple.greedy([5, 6], 4, own).token_ids for own in controls]


@pytest.mark.parametrize("family", ["llama", "gptq"])
def test_bfloat16_is_the_formula_but_for_rounding(engines, expected, family):
    """The next token where the reference's choice is clear, and the logprob of it."""
    answers = answers_of(engines, f"{family}-bfloat16")["logprobs"]
    clear = 0
    for (_, reference), answer in zip(expected[family], answers, strict=True):
        first, second = reference.logprobs[0].topk(2).values.tolist()
        if first - second > CLEAR:
            clear += 1
            ((row,),) = answer["logprobs"]
            assert answer["token_ids"][0] == reference.token_ids[:1]
            assert row[str(reference.token_ids[0])] == pytest.approx(first, abs=CLEAR)
    assert clear >= len(answers) // 4


@pytest.mark.parametrize("engines", ["v1"], indirect=True)
def test_gated_delta_nets_are_vllm_s_own(engines):
    """The formula of the logprobs that vLLM alone gives each member, with the same kernels."""
    names = "both", "base", "expert"
    found = [answers_of(engines, f"delta-net-{name}")["logprobs"] for name in names]
    for answers in zip(*found, strict=True):
        fused, *alone = map(first_row, answers)
        right = torch.lerp(*alone, HALF).log_softmax(-1)
        torch.testing.assert_close(fused, right, rtol=0, atol=ROUNDING)


def first_row(answer: dict) -> torch.Tensor:
    """Return the logprobs of all ids for the first token, `[vocab]`."""
    row = answer["logprobs"][0][0]
    return torch.tensor([row[str(token)] for token in range(VOCAB_SIZE)])


def test_prefix_cache_hits_change_nothing(engines, expected):
    answers = answers_of(engines, f"{CACHED}-plain")
    # Every whole block of a prompt but the one with its last token can come from the cache.
    whole = sum((len(ids) - 1) // ENGINE["block_size"] for ids, _ in expected[CACHED])
    assert sum(answer["cached"] for answer in answers["again"]) == whole * ENGINE["block_size"]
    right = [answer for _, answer in greedy_part(expected, engines["runner"], CACHED, "plain")]
    assert tokens(answers["again"]) == right


@pytest.mark.parametrize(
    "name",
    ["llama-chunked", "hybrids-states", "latent-small-latent-cached"],
)
def test_small_kv_cache_really_preempts(engines, name):
    answers_of(engines, name)
    assert engines[name]["metrics"]["vllm:num_preemptions"] > 0


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("states-mixed", "states-cached"),
        ("delta-nets", "states-cached"),
        ("latent-small", "latent-cached"),
    ],
)
def test_what_prefixes_leave_in_the_cache_changes_nothing(engines, expected, family, variant):
    """Recurrent states and latent vectors: a hit needs all members' of a block."""
    answers = answers_of(engines, f"{family}-{variant}")["again"]
    assert sum(answer["cached"] for answer in answers) > 0
    assert tokens(answers) == [answer.token_ids for _, answer in expected[family]]


@pytest.mark.parametrize("name", ["states-mixed", "delta-nets"])
def test_plan_counts_the_blocks_that_an_engine_with_states_has(engines, members, name):
    """Tokens of a block, and how many blocks there are for the same memory."""
    found = result_of(engines, f"{name}-states-cached")
    triple = {role: members[name][role] for role in ROLES}
    config = ProxyConfig.parse({**triple, "engine": ENGINE}, "test")
    read = read_all(config)
    settings = read_engine(config, read)
    planned = state_blocks(read_shapes(config, read, settings), Layout(), 0, settings)
    assert planned.tokens == found["block_size"]
    assert KV_CACHE_BYTES // planned.bytes == found["num_gpu_blocks"]


@pytest.mark.parametrize("variant", ["ngram", "draft"])
def test_speculation_really_speculates(engines, variant):
    answers_of(engines, f"llama-{variant}")
    metrics = engines[f"llama-{variant}"]["metrics"]
    assert metrics["vllm:spec_decode_num_draft_tokens"] > 100
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0


def test_n_completions_are_each_the_formula(engines, expected):
    answers = answers_of(engines, "llama-plain")["n4"]
    assert [answer["token_ids"] for answer in answers] == [
        [answer.token_ids] * 4 for _, answer in expected["llama"][:FEW]
    ]


@pytest.mark.parametrize("family", LOGPROBS)
def test_logprobs_are_of_the_fused_distribution(engines, expected, family):
    answers = answers_of(engines, f"{family}-plain")["logprobs"]
    for (ids, reference), answer in zip(expected[family][::4], answers, strict=True):
        (generated,) = answer["logprobs"]
        assert len(generated) == FEW
        for row, truth in zip(generated, reference.logprobs[:FEW], strict=True):
            assert_logprobs(row, truth)
        assert answer["prompt_logprobs"][0] is None
        assert len(answer["prompt_logprobs"]) == len(ids)
        for row, truth in zip(
            answer["prompt_logprobs"][1:], reference.prompt_logprobs, strict=False
        ):
            assert_logprobs(row, truth)


def assert_logprobs(row: dict[str, float], truth: torch.Tensor) -> None:
    """The five best are those of *truth*, and every value is within 1e-4 of it."""
    best = {str(token) for token in truth.topk(5).indices.tolist()}
    assert best <= row.keys()
    for token, value in row.items():
        assert value == pytest.approx(truth[int(token)].item(), abs=1e-4)


@pytest.mark.parametrize("engines", ["v1"], indirect=True)
@pytest.mark.parametrize(
    ("name", "stands_for"),
    [("alpha-zero", "base"), ("same-small-models", "base"), ("base-is-antiexpert", "expert")],
)
def test_identities_of_the_formula(engines, alone, name, stands_for):
    """alpha = 0 or expert = antiexpert leave the base; base = antiexpert leaves the expert."""
    answers = answers_of(engines, name)["greedy"]
    assert tokens(answers) == alone[stands_for][: len(answers)]


def test_other_models_are_untouched(engines, alone):
    """A stock model in an environment with the plugin answers as transformers does."""
    answers = answers_of(engines, "stock")["greedy"]
    assert tokens(answers) == alone["base"][: len(answers)]


def test_sampling_with_a_seed_is_reproducible(engines):
    answers = answers_of(engines, "llama-plain")
    assert tokens(answers["seeded"]) == tokens(answers["seeded-again"])


def test_sampled_frequencies_are_the_formula(engines, expected):
    """Chi-square of first tokens against the reference distribution, rare tokens pooled."""
    (answer,) = answers_of(engines, "llama-plain")["frequencies"]
    counts, samples = Counter(token for (token,) in answer["token_ids"]), SAMPLES[engines["runner"]]
    assert counts.total() == samples
    probabilities = expected["llama"][0][1].logprobs[0].double().exp()
    require_frequencies(counts, probabilities)


def test_kv_memory_is_sized_for_all_members(engines):
    """Each layer has a cache of its own shape, and the budget covers the sum of them."""
    answers_of(engines, "llama-plain")
    result = engines["llama-plain"]
    shapes = {"base": (3, 2 * 64), "expert": (2, 2 * 32), "antiexpert": (2, 2 * 32)}
    caches: dict[str, list[int]] = {role: [] for role in shapes}
    for name, size in result["kv_cache"].items():
        root = name.partition(".")[0]
        caches[root if root in shapes else "base"].append(size)
    for role, (layers, width) in shapes.items():
        # keys and values, float32
        assert caches[role] == [result["num_gpu_blocks"] * 32 * width * 2 * 4] * layers
    total = sum(result["kv_cache"].values())
    assert 0.9 * KV_CACHE_BYTES < total <= KV_CACHE_BYTES


@pytest.mark.parametrize("engines", ["v1"], indirect=True)
def test_second_start_compiles_nothing(engines):
    """All graphs come from the cache; expert and antiexpert do not overwrite each other's."""
    first, second = compiled_twice(engines, "compiled")
    assert first["fxgraph_cache_miss"] > 0
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert second["fxgraph_cache_hit"] >= 3


@pytest.mark.parametrize("engines", ["v2"], indirect=True)
def test_second_start_loads_what_was_compiled_ahead_of_time(engines):
    """As on GPUs: each member has an artifact, with no other member's code in it."""
    first, second = compiled_twice(engines, "ahead_of_time")
    assert first == {"compiled": 3, "saved": 3, "loaded": 0}
    assert second == {"compiled": 0, "saved": 0, "loaded": 3}


def compiled_twice(engines: dict, fact: str) -> list[dict]:
    """Return a fact about the engine that compiled, and about the one that came after it."""
    family = COMPILED[engines["runner"]]
    return [result_of(engines, f"{family}-{v}")[fact] for v in ("compiled", "compiled-again")]
