"""Requests that differ in every way, in one engine, each held to the reference by itself.

Strengths, weights, schedules, filters, a prompt for each member, lengths, sampling parameters,
arrivals and aborts are drawn at random (seeded). Both model runners; small chunks and a KV cache
that is too small; speculation; two ranks; two pipeline stages.
"""

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from support.engines import (
    SAFE_MARGIN,
    TOKEN_ENGINE,
    TRACED,
    answers_of,
    in_graphs,
    run_engines,
)
from support.reference import Reference
from support.tiny_models import VOCAB_SIZE, write_triple

BLOCK = 32
REQUESTS = 300
ASKED = 160
"""Of these; the others would arrive later."""
LENGTHS = (1, 2, 5, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 100, 150)
MAX_TOKENS = 12
HOT = 1.2
"""Temperature of requests whose tokens are drawn at random. Without a seed: with one, vLLM's CPU
runner V1 ends at the first prompt in chunks ("CPU Generator does not use offset")."""
SURE = 0.9
"""Part of the requests that must have a right answer, or the test would show little."""
ENGINE = {**TOKEN_ENGINE, "max_model_len": 512, "max_num_seqs": 64}
SMALL = {"max_num_batched_tokens": 48, "max_num_seqs": 16, "num_gpu_blocks_override": 17}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
SHARDED = not torch.cpu._is_avx512_supported()
"""vLLM's kernel by which ranks gather on CPUs with AVX512 knows no int64, which this wants."""
ENGINES = {
    "v1": {
        "mixed": (ASKED, {}),
        "small": (60, SMALL),
        "ngram": (40, {"speculative_config": {**NGRAM, "prompt_lookup_max": 3}}),
        "drafts": (60, {}),  # by the expert, which is no engine argument
        "tp2": (30, {"tensor_parallel_size": 2}),
        "pp2": (30, {"pipeline_parallel_size": 2, **TRACED}),
    },
    "v2": {
        "mixed": (120, in_graphs("FULL_AND_PIECEWISE")),
        "small": (40, SMALL | in_graphs("FULL")),
        "ngram": (
            20,
            {"speculative_config": {**NGRAM, "prompt_lookup_max": 3}, **in_graphs("PIECEWISE")},
        ),
        "drafts": (20, in_graphs("FULL_AND_PIECEWISE")),
        # Each rank samples some of the requests.
        "tp2": (16, {"tensor_parallel_size": 2, "enable_batch_sharded_sampling": SHARDED}),
        "tp2 in graphs": (16, {"tensor_parallel_size": 2, **in_graphs("FULL")}),
        "pp2 drafts": (16, SMALL | {"pipeline_parallel_size": 2}),
    },
}
"""How many of the requests an engine is asked, and what it is started with."""


def draw_requests() -> list[dict]:
    rng = random.Random(0)
    prefix = [rng.randrange(3, VOCAB_SIZE) for _ in range(2 * BLOCK)]
    requests = []
    for i in range(REQUESTS):
        prompt = draw_ids(rng, rng.choice(LENGTHS))
        if rng.random() < 0.1:
            prompt = prefix + prompt
        control = draw_control(rng)
        if rng.random() < 0.4:
            for role in rng.choice((["expert"], ["antiexpert"], ["expert", "antiexpert"])):
                near = (len(prompt) + d for d in (-BLOCK - 1, -BLOCK, -1, 0, 1, BLOCK, BLOCK + 1))
                length = rng.choice([*near, 1, 250])
                control[f"proxy_{role}_prompt"] = draw_ids(rng, max(length, 1))
        requests.append(
            {
                "prompt": prompt,
                "control": control,
                "params": draw_params(rng),
                "arrival": rng.randrange(REQUESTS // 8),
                "abort": rng.randrange(1, MAX_TOKENS) if i % 10 == 0 else None,
            }
        )
    return requests


def draw_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def draw_control(rng: random.Random) -> dict:
    alpha = {"proxy_alpha": round(rng.uniform(-0.5, 2.0), 2)}
    schedule = rng.choice(("first", "linear"))
    filters = {"proxy_top_p": 0.9, "proxy_plausibility": 0.1}
    some = {key: filters[key] for key in rng.choice((["proxy_top_p"], ["proxy_plausibility"]))}
    return rng.choice(
        (
            {},
            {},
            {"proxy_alpha": 0},
            alpha,
            alpha,
            {"proxy_weights": [round(rng.uniform(-1, 1.5), 2) for _ in range(3)]},
            {"proxy_weights": rng.choice(([1, 0, 0], [0, 1, 0], [0, 0, 1]))},
            alpha | {"proxy_alpha_schedule": schedule, "proxy_alpha_steps": rng.randrange(1, 9)},
            {"proxy_alpha": "adaptive"},
            {**alpha, **some},
            {**filters, "proxy_weights": [1, 0.5, 0]},
        )
    )


def draw_params(rng: random.Random) -> dict:
    params = {"temperature": 0, "max_tokens": rng.randrange(1, MAX_TOKENS + 1), "ignore_eos": True}
    kind = rng.randrange(8)
    if kind == 0:
        return {**params, "temperature": HOT, "logprobs": 2}
    if kind == 1:
        return {**params, "temperature": 1.0, "min_p": 1.0, "n": 2}  # keeps the likeliest: greedy
    if kind == 2:
        return {**params, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
    if kind == 3:
        return {**params, "prompt_logprobs": 1}
    return params


@pytest.fixture(scope="module")
def requests() -> list[dict]:
    return draw_requests()[:ASKED]


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, str]:
    return write_triple(tmp_path_factory.mktemp("members"), "llama")


@pytest.fixture(scope="module")
def runs(members, requests, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """The results of both runners to be: one after the other, beside the reference."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        runs = {}
        for runner in ("v2", "v1"):
            plan = []
            for name, (count, options) in ENGINES[runner].items():
                config = {**members, "engine": {**ENGINE, **options}}
                if "drafts" in name:
                    config["speculate"] = {"tokens": 3, "adapt": False}
                questions = [{"name": "requests", "requests": asked_of(name, requests[:count])}]
                if name == "mixed":
                    questions += [cached_question(), forbidden_question()]
                plan.append({"name": name, "config": config, "questions": questions})
            directory = tmp_path_factory.mktemp(f"requests-{runner}")
            runs[runner] = pool.submit(run_engines, plan, directory, runner)
        yield runs


def asked_of(engine: str, requests: list[dict]) -> list[dict]:
    if engine == "ngram" or "drafts" in engine:  # vLLM's runner V1 has no min-p with speculation
        return [request for request in requests if "min_p" not in request["params"]]
    return requests


def cached_question() -> dict:
    """One prompt at several strengths, one after the other, for the prefix cache to be hit."""
    ids = draw_ids(random.Random(1), 100)
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    controls = [None, {"proxy_alpha": 0.0}, {"proxy_weights": [0, 1, 0]}]
    return {"name": "cached", "prompts": [ids] * 3, "extra_args": controls, "params": params}


def forbidden_question() -> dict:
    """Filters that keep a token or two, of requests that may use few of all tokens."""
    rng = random.Random(2)
    controls = [
        {"proxy_top_p": 1e-6},
        {"proxy_plausibility": 1.0, "proxy_alpha": 0.5},
        {"proxy_top_p": 0.1, "proxy_plausibility": 0.9, "proxy_weights": [1, 0.5, 0]},
    ]
    allowed = sorted(rng.sample(range(3, VOCAB_SIZE), 60))
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "allowed_token_ids": allowed}
    prompts = [draw_ids(rng, 9) for _ in controls]
    return {"name": "forbidden", "prompts": prompts, "extra_args": controls, "params": params}


@pytest.fixture(scope="module")
def reference(members) -> Reference:
    torch.set_num_threads(1)
    return Reference(**members)


@pytest.fixture(scope="module")
def expected(requests, runs, reference) -> list[tuple[list[int], float]]:
    """Greedy tokens and margin of every request; computed while the engines run."""
    return [decode(reference, request) for request in requests]


def decode(reference: Reference, request: dict) -> tuple[list[int], float]:
    prompt, params = request["prompt"], request["params"]
    if "repetition_penalty" not in params:
        decoded = reference.greedy(prompt, params["max_tokens"], request["control"])
        return decoded.token_ids, decoded.margin
    tokens, margin = [], float("inf")
    for logits, own_margin in walk(reference, request, tokens):
        penalized = logits.copy()
        seen = sorted({*prompt, *tokens})
        values = penalized[seen]
        penalty = params["repetition_penalty"]
        penalized[seen] = np.where(values > 0, values / penalty, values * penalty)
        for token in tokens:
            penalized[token] -= params["frequency_penalty"]
        second, first = np.sort(penalized)[-2:]
        # What a filter removes is no candidate; how near its bound is, the fused margin tells.
        has_filter = not np.isfinite(logits).all()
        margin = min(margin, first - second, own_margin if has_filter else np.inf)
        tokens.append(int(penalized.argmax()))
        if len(tokens) == params["max_tokens"]:
            return tokens, margin
    raise AssertionError


def walk(
    reference: Reference, request: dict, tokens: list[int]
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield fused logits and margin at every step along *tokens*, to which a caller may add."""
    prompt, control = request["prompt"], request["control"]
    own = (control.get(f"proxy_{role}_prompt", prompt) for role in ("base", "expert", "antiexpert"))
    caches: list = [None, None, None]
    members = reference.feed(list(own), caches)
    t = 0
    while True:
        yield reference.fuse(*(logits[-1] for logits in members), control, t)
        if t == len(tokens):
            return
        members = reference.feed([[tokens[t]]] * 3, caches)
        t += 1


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(request, runs, expected) -> dict[str, dict]:
    # Waited for here and not in a test: the limit on a test's time leaves fixtures out.
    return runs[request.param].result() | {"runner": request.param}


@pytest.mark.parametrize(
    ("engines", "name"),
    [(runner, name) for runner, engines in ENGINES.items() for name in engines],
    indirect=["engines"],
)
def test_each_request_gets_what_it_asked_for(engines, requests, expected, name):
    count, _ = ENGINES[engines["runner"]][name]
    asked = asked_of(name, requests[:count])
    answers = answers_of(engines, name)["requests"]
    wrong, compared, greedy = [], 0, 0
    for request, answer in zip(asked, answers, strict=True):
        if answer is None:
            assert request["abort"] is not None
            continue
        if request["params"]["temperature"] == HOT:
            continue
        tokens, margin = expected[requests.index(request)]
        greedy += 1
        if margin > SAFE_MARGIN:
            compared += 1
            copies = request["params"].get("n", 1)
            if answer["token_ids"] != [tokens] * copies:
                wrong.append((request, answer["token_ids"], tokens))
    assert not wrong
    assert compared >= SURE * greedy > 0


def test_sampled_tokens_have_the_reference_s_probabilities(engines, requests, reference):
    """Of requests at a temperature: raw logprobs along the path that the engine took."""
    compared = 0
    for request, answer in zip(requests, answers_of(engines, "mixed")["requests"], strict=False):
        filters = request["control"].keys() & {"proxy_top_p", "proxy_plausibility"}
        if answer is None or request["params"]["temperature"] != HOT or filters:
            continue
        (tokens,), (rows,) = answer["token_ids"], answer["logprobs"]
        for (logits, _), row in zip(walk(reference, request, tokens), rows, strict=False):
            logprobs = torch.from_numpy(logits).log_softmax(-1)
            for token, value in row.items():
                assert value == pytest.approx(logprobs[int(token)].item(), rel=5e-5, abs=2e-4)
        compared += 1
    assert compared >= 5


def test_prompt_logprobs_are_of_the_request_s_own_distribution(engines, requests, reference):
    """If members have different prompts: the base's alone, where one of them has not begun."""
    compared, own = 0, 0
    for request, answer in zip(requests, answers_of(engines, "mixed")["requests"], strict=False):
        filters = request["control"].keys() & {"proxy_top_p", "proxy_plausibility"}
        if answer is None or "prompt_logprobs" not in request["params"] or filters:
            continue
        truth = reference.greedy(request["prompt"], 1, request["control"]).prompt_logprobs
        assert len(answer["prompt_logprobs"]) == len(request["prompt"])
        for row, logprobs in zip(answer["prompt_logprobs"][1:], truth, strict=False):
            for token, value in row.items():
                assert value == pytest.approx(logprobs[int(token)].item(), rel=5e-5, abs=2e-4)
        compared += len(request["prompt"]) > 1
        own += any(key.endswith("_prompt") for key in request["control"])
    assert compared >= 5
    assert own >= 2


def test_strengths_share_cached_prefixes(engines, reference):
    question = cached_question()
    answers = answers_of(engines, "mixed")["cached"]
    for answer, ids, control in zip(
        answers, question["prompts"], question["extra_args"], strict=True
    ):
        decoded = reference.greedy(ids, 8, control)
        assert decoded.margin > SAFE_MARGIN
        assert answer["token_ids"] == [decoded.token_ids]
    assert engines["mixed"]["metrics"]["vllm:prefix_cache_hits"] > 0


def test_filters_leave_what_is_allowed(engines, reference):
    """Where a filter removes all that is allowed, what it removed is generated in its order."""
    question = forbidden_question()
    allowed = question["params"]["allowed_token_ids"]
    answers = answers_of(engines, "mixed")["forbidden"]
    removed = 0
    for answer, ids, control in zip(
        answers, question["prompts"], question["extra_args"], strict=True
    ):
        free = {k: v for k, v in control.items() if k not in ("proxy_top_p", "proxy_plausibility")}
        tokens: list[int] = []
        both = (walk(reference, {"prompt": ids, "control": c}, tokens) for c in (control, free))
        for (kept, _), (fused, _) in zip(*both, strict=True):
            is_kept = np.isfinite(kept[allowed]).any()
            candidates = (kept if is_kept else fused)[allowed]
            removed += not is_kept
            second, first = np.sort(candidates)[-2:]
            assert first - second > 0.01, "a tie: draw another prompt"
            tokens.append(allowed[candidates.argmax()])
            if len(tokens) == question["params"]["max_tokens"]:
                break
        assert answer["token_ids"] == [tokens]
    assert removed > 8


def test_nothing_is_left_behind(engines):
    for name in ENGINES[engines["runner"]]:
        answers_of(engines, name)["requests"]
        assert engines[name]["kv_cache_usage"] == 0
        assert engines[name]["unfinished"] == 0


@pytest.mark.parametrize(
    ("engines", "name", "kinds"),
    [
        ("v2", "mixed", {"FULL", "PIECEWISE"}),
        ("v2", "small", {"FULL"}),
        ("v2", "ngram", {"PIECEWISE"}),
        ("v2", "drafts", {"FULL", "PIECEWISE"}),
        ("v2", "tp2 in graphs", {"FULL"}),
    ],
    indirect=["engines"],
)
def test_steps_really_replay_graphs(engines, name, kinds):
    """This includes steps with a prompt for each member."""
    answers_of(engines, name)
    steps = engines[name]["steps"]
    for kind in kinds:
        assert steps.get(kind, 0) > 0, steps
        assert steps.get(f"{kind} own", 0) > 0, steps


def test_small_kv_cache_really_preempts(engines):
    answers_of(engines, "small")["requests"]
    assert engines["small"]["metrics"]["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("name", ["ngram", "drafts"])
def test_speculation_really_speculates(engines, name):
    """Random models seldom agree; that drafts are accepted, `test_exactness.py` shows."""
    answers_of(engines, name)["requests"]
    assert engines[name]["metrics"]["vllm:spec_decode_num_draft_tokens"] > 50
