"""What is said of every token: held to log-softmax, ranks and KL of a transformers loop.

Both model runners; answers that are generated, sampled and given, common prompts and members' own,
strengths, schedules, filters; in chunks shorter than the prompts, with preemption, on two ranks.
"""

import random

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from support.engines import TOKEN_ENGINE, run_engines
from support.reference import Reference, filtered
from support.tiny_models import write_triple

TOP_K = 5
SHARED = 480
"""Ids that all members of the triple `padded` have."""
ERROR = 3e-4
"""Of log-probabilities and KL: float32 sums in another order, and an adaptive alpha."""
ENGINE = {**TOKEN_ENGINE, "max_model_len": 256, "max_num_seqs": 16}
# A chunk is shorter than most prompts.
CHUNKED = {"max_num_batched_tokens": 40}
# Two of the long requests fit; the third one is preempted.
SMALL = {"num_gpu_blocks_override": 9, **CHUNKED}
ENGINES = {
    "v1": {
        "whole": {},
        "chunked": CHUNKED,
        "small": SMALL,
        "tp2": {"tensor_parallel_size": 2, **CHUNKED},
        "no expert": {},
    },
    "v2": {"chunked": CHUNKED, "pp2": {"pipeline_parallel_size": 2}, "no antiexpert": {}},
}
FEW = {"tp2", "pp2", "no expert", "no antiexpert"}
"""Engines that are asked every third request."""


def draw_requests() -> list[dict]:
    rng = random.Random(3)

    def ids(length: int, most: int = SHARED) -> list[int]:
        return [rng.randrange(3, most) for _ in range(length)]

    def request(length: int, tokens: int = 6, answer: list | None = None, **control) -> dict:
        params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        own = {f"proxy_{key}": value for key, value in control.items()}
        return {"prompt": ids(length), "params": params, "answer": answer, "control": own}

    linear = {"alpha": 1.5, "alpha_schedule": "linear", "alpha_steps": 4}
    requests = [
        request(5),
        request(50, expert_prompt=ids(70), antiexpert_prompt=ids(3)),
        request(20, alpha=1.5, top_p=0.8),
        request(70, **linear),
        request(33, alpha="adaptive"),
        request(9, expert_prompt=ids(41), **linear),
        request(1, alpha=0.4, plausibility=0.05),
        request(40, alpha=0.0),
        request(12, answer=ids(1)),
        request(30, antiexpert_prompt=ids(64), answer=ids(90)),
        request(3, answer=[*ids(40), SHARED - 2, SHARED - 1, *ids(3)], weights=[1, 0.5, 0]),
        request(60, tokens=1, alpha_schedule="first", alpha_steps=2),
        request(31, tokens=20, alpha=0.7),
        request(8, answer=ids(6), alpha_schedule="first", alpha_steps=3),
        request(45, answer=ids(12), alpha="adaptive", expert_prompt=ids(20), top_p=0.9),
    ]
    requests[12]["params"]["temperature"] = 1.2
    return requests


REQUESTS = draw_requests()


def asked_of(engine: str) -> list[dict]:
    if engine not in FEW:
        return REQUESTS
    missing = engine.removeprefix("no ") if engine.startswith("no ") else "nobody"
    return [r for r in REQUESTS if f"proxy_{missing}_prompt" not in r["control"]][::3]


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, str]:
    return write_triple(tmp_path_factory.mktemp("members"), "padded")


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """By runner, of engines that were started already."""
    return {}


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(request, results, members, tmp_path_factory) -> dict[str, dict]:
    runner = request.param
    if runner not in results:
        plan = []
        for name, options in ENGINES[runner].items():
            own = {role: path for role, path in members.items() if name != f"no {role}"}
            # Given up in the middle of a prompt; and when the first one is done.
            given = [request for request in REQUESTS if request["answer"]]
            aborted = {"inspect": given, "top_k": TOP_K}
            questions = [
                {"name": "inspect", "inspect": asked_of(name), "top_k": TOP_K},
                {"name": "abort", **aborted, "abort": 1},
                {"name": "abort late", **aborted, "abort": 3},
                # A step in which workers hear of it.
                {"name": "after", "prompts": [[5]], "params": {"max_tokens": 1}},
            ]
            config = {**own, "engine": {**ENGINE, **options}}
            plan.append({"name": name, "config": config, "questions": questions})
        results[runner] = run_engines(plan, tmp_path_factory.mktemp(f"inspect-{runner}"), runner)
    for result in results[runner].values():
        assert "error" not in result, result["error"]
        assert result["v2"] == (runner == "v2")
    return results[runner]


def truth(reference: Reference, request: dict, answer: list[int]) -> list[dict[str, np.ndarray]]:
    """Return the log-probabilities of the four, `[SHARED]`, at each token of *answer*."""
    control, prompt = request["control"], request["prompt"]
    own = (control.get(f"proxy_{role}_prompt", prompt) for role in ("base", "expert", "antiexpert"))
    members = reference.feed([[*ids, *answer[:-1]] for ids in own], [None] * 3)
    rows = []
    for t in range(len(answer)):
        three = [logits[len(logits) - len(answer) + t] for logits in members]
        fused, _ = reference.fuse(*three, control, t)
        base = three[0][: min(map(len, three))]
        rows.append(
            {
                "base": log_softmax(base),
                "expert": log_softmax(three[1][: len(base)]),
                "antiexpert": log_softmax(three[2][: len(base)]),
                "proxy": log_softmax(fused[: len(base)]),
                "sure": filtered(base, control)[1].min() > ERROR,
            }
        )
    return rows


def check(token: dict, right: dict[str, np.ndarray]) -> None:
    for name in ("base", "expert", "antiexpert", "proxy"):
        said, logprobs = token[name], right[name]
        id_ = token["token_id"]
        own = logprobs[id_] if id_ < len(logprobs) else -np.inf
        if own == -np.inf:
            assert said["logprob"] is None
        else:
            assert said["logprob"] == pytest.approx(own, abs=ERROR)
        # Between what it is with ties broken one way and the other.
        least, most = ((logprobs > own + sign * ERROR).sum() + 1 for sign in (1, -1))
        assert least <= said["rank"] <= most
        best = np.sort(logprobs)[::-1][:TOP_K]
        best = best[best > -np.inf]
        assert len(said["top"]) == len(best)
        for candidate, logprob in zip(said["top"], best, strict=True):
            assert candidate["logprob"] == pytest.approx(logprob, abs=ERROR)
            assert logprobs[candidate["token_id"]] == pytest.approx(logprob, abs=ERROR)
        assert len({candidate["token_id"] for candidate in said["top"]}) == len(best)
    p, q = np.exp(right["proxy"]), np.exp(right["base"])
    assert token["kl"] == pytest.approx(rel_entr(p, q).sum(), abs=ERROR, rel=1e-3)
    assert token["changed"] == (
        token["proxy"]["top"][0]["token_id"] != token["base"]["top"][0]["token_id"]
    )


@pytest.mark.parametrize(
    ("engines", "name"),
    [(runner, name) for runner, engines in ENGINES.items() for name in engines],
    indirect=["engines"],
)
def test_every_token_is_what_the_reference_says(engines, members, name):
    torch.set_num_threads(1)
    missing = [name.removeprefix("no ")] if name.startswith("no ") else []
    reference = Reference(**{k: path for k, path in members.items() if k not in missing})
    compared, changed, filtered_out = 0, 0, 0
    answers = engines[name]["answers"]["inspect"]
    for request, answer in zip(asked_of(name), answers, strict=True):
        ids = answer["token_ids"]
        assert ids == (request["answer"] or ids)
        assert len(ids) == len(answer["tokens"]) > 0
        assert answer["missing"] == missing
        if request["answer"] is None:
            assert len(ids) == request["params"]["max_tokens"]
        for token, right in zip(answer["tokens"], truth(reference, request, ids), strict=True):
            if right["sure"]:
                check(token, right)
                compared += 1
                changed += token["changed"]
                filtered_out += token["proxy"]["logprob"] is None
    assert compared >= (10 if name in FEW else 150)
    assert changed > compared / 4
    assert name in FEW or filtered_out >= 5


@pytest.mark.parametrize("engines", ["v1", "v2"], indirect=True)
def test_greedy_answers_are_the_proxy_s_likeliest_tokens(engines):
    """A schedule counts from the answer's first token, in the second pass as in the first."""
    for request, answer in zip(REQUESTS, engines["chunked"]["answers"]["inspect"], strict=True):
        if request["answer"] is None and request["params"]["temperature"] == 0:
            assert {token["proxy"]["rank"] for token in answer["tokens"]} == {1}


@pytest.mark.parametrize("engines", ["v1", "v2"], indirect=True)
def test_a_strength_of_zero_changes_nothing(engines):
    (answer,) = (
        answer
        for request, answer in zip(REQUESTS, engines["chunked"]["answers"]["inspect"], strict=True)
        if request["control"].get("proxy_alpha") == 0
    )
    for token in answer["tokens"]:
        assert token["kl"] == pytest.approx(0, abs=1e-6)
        assert not token["changed"]


@pytest.mark.parametrize("engines", ["v1", "v2"], indirect=True)
def test_nothing_is_left_behind(engines):
    for result in engines.values():
        assert result["probes"] in (0, None)
        assert result["unfinished"] == 0
    assert engines["chunked"]["probes"] == 0


@pytest.mark.parametrize("engines", ["v1"], indirect=True)
def test_a_small_kv_cache_really_preempts(engines):
    assert engines["small"]["metrics"]["vllm:num_preemptions"] > 0
