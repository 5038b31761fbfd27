"""The expert drafts: answers are those without drafts, and every draft is the expert's own.

How many drafts are accepted is known beforehand: a loop of the reference's asks the expert alone
what comes next and compares. A wrong position, a lost key or value, a drafter that is not the
expert: each changes the count, though not the answers.
"""

import random
from collections import Counter

import pytest
import torch
from vllm import EngineArgs

from support.drafts import (
    DRAFTING_ENGINE,
    DRAFTS,
    MAX_TOKENS,
    NEAR_EXPERT,
    Case,
    draw_cases,
    greedy,
)
from support.engines import SAFE_MARGIN, in_graphs, require_frequencies, result_of, run_engines
from support.reference import Reference
from support.tiny_models import write_triple
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.limits import drafts_problem
from vllm_proxy.members.vllm_configs import member_model_config

FEW = 3
"""Requests that run at once for which the expert drafts, of the engine of this name."""
LONG = 96
"""Tokens of answers that no draft predicts; drafting must stop while they are generated."""
SAMPLES = {"v1": 800, "v2": 400}
TEMPERATURE = 0.7
BASE_ALONE = {"proxy_alpha": 0.0}
SAMPLED = {"expert": NEAR_EXPERT, "base": BASE_ALONE}
"""What sampled requests ask for: where many drafts are accepted, and where few are."""
ENGINES = {
    "v1": {
        "llama": ("llama", {}),
        "padded": ("padded", {}),  # the expert knows fewer ids than the base
        "compiled": ("llama", {"enforce_eager": False}),
        "tp2": ("padded", {"tensor_parallel_size": 2}),
        "bfloat16": ("llama", {"dtype": "bfloat16"}),
        "sampled": ("llama", {}),
        "few": ("llama", {}),
        "adapts": ("llama", {}),
    },
    "v2": {
        "llama": ("llama", in_graphs("FULL_AND_PIECEWISE", (4, 16, 64))),
        "padded": ("padded", in_graphs("FULL_DECODE_ONLY", (4, 16, 64))),
        "tp2": ("padded", {"tensor_parallel_size": 2}),
        "pp2": (  # as on a GPU; without async scheduling in `test_one_pass.py`
            "padded",
            {
                "pipeline_parallel_size": 2,
                "async_scheduling": True,
                **in_graphs("FULL_AND_PIECEWISE", (4, 16, 64)),
            },
        ),
        "sampled": ("llama", {}),
        "few": ("llama", {}),
        "adapts": ("llama", {}),
    },
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("members")
    return {name: write_triple(root / name, name) for name in ("llama", "padded")}


@pytest.fixture(scope="module")
def references(paths) -> dict[str, Reference]:
    torch.set_num_threads(1)
    return {name: Reference(**triple) for name, triple in paths.items()}


@pytest.fixture(scope="module")
def cases(references) -> dict[str, list[Case]]:
    return {name: draw_cases(reference) for name, reference in references.items()}


@pytest.fixture(scope="module")
def unforeseen(references) -> list[tuple[list[int], list[int]]]:
    """Prompts and the base's own long answers, which the expert knows nothing of."""
    rng, found = random.Random(1), []
    while len(found) < 2:
        prompt = [rng.randrange(3, 470) for _ in range(9)]
        path = references["llama"].greedy(prompt, LONG, BASE_ALONE)
        if path.margin >= SAFE_MARGIN:
            found.append((prompt, path.token_ids))
    return found


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(request, paths, cases, unforeseen, results, tmp_path_factory) -> dict[str, dict]:
    runner = request.param
    if runner not in results:
        plan = []
        for name, (family, options) in ENGINES[runner].items():
            questions = [greedy(cases[family])]
            if name == "sampled":
                questions = [
                    sampled(kind, cases[family][0], control, SAMPLES[runner])
                    for kind, control in SAMPLED.items()
                ]
            config = {**paths[family], "speculate": {"tokens": DRAFTS, "adapt": name == "adapts"}}
            if name == "few":
                config["speculate"]["requests"] = FEW
                questions.append({**greedy(cases[family][:FEW]), "name": "few"})
            if name == "adapts":
                questions.append(
                    {
                        "name": "unforeseen",
                        "prompts": [prompt for prompt, _ in unforeseen],
                        "extra_args": [BASE_ALONE] * len(unforeseen),
                        "params": {"temperature": 0, "max_tokens": LONG, "ignore_eos": True},
                    }
                )
            config["engine"] = {**DRAFTING_ENGINE, **options}
            plan.append({"name": name, "config": config, "questions": questions})
        results[runner] = run_engines(plan, tmp_path_factory.mktemp(f"drafts-{runner}"), runner)
    return {"runner": runner, **results[runner]}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """By runner, of engines that were started already."""
    return {}


def sampled(name: str, case: Case, control: dict | None, samples: int) -> dict:
    """Many requests for two tokens, the second one drafted, and a greedy one among them."""
    hot = {"temperature": TEMPERATURE, "n": samples // 2, "seed": None}
    params = [hot, hot, {"temperature": 0}]
    return {
        "name": name,
        "prompts": [case.prompt] * 3,
        "extra_args": [control, control, case.control],
        "params": [{"max_tokens": 2, "ignore_eos": True, **own} for own in params],
    }


SPECIAL = "sampled", "few", "adapts"
EVERY = [(runner, name) for runner, own in ENGINES.items() for name in own if name not in SPECIAL]


@pytest.mark.parametrize(("engines", "name"), EVERY, indirect=["engines"])
def test_answers_are_those_without_drafts(engines, cases, name):
    family, options = ENGINES[engines["runner"]][name]
    answers = result_of(engines, name)["answers"]["greedy"]
    for answer, case in zip(answers, cases[family], strict=True):
        if "dtype" not in options:
            assert answer["token_ids"] == [case.answer]
    if "compilation_config" in options:
        assert engines[name]["steps"]["FULL own"] > 0
    # Rounding to bfloat16 sends answers of random models elsewhere, sooner or later.
    same = sum(
        (*(a == b for a, b in zip(answer["token_ids"][0], case.answer, strict=True)), 0).index(0)
        for answer, case in zip(answers, cases[family], strict=True)
    )
    assert same > len(answers) * MAX_TOKENS / 2


@pytest.mark.parametrize(("engines", "name"), EVERY, indirect=["engines"])
def test_drafts_are_the_expert_s_own(engines, cases, name):
    """As many of them are accepted as the reference says."""
    family, options = ENGINES[engines["runner"]][name]
    metrics = result_of(engines, name)["metrics"]
    drafted = sum(case.drafted for case in cases[family])
    accepted = sum(case.accepted for case in cases[family])
    assert 0.2 < accepted / drafted < 0.9
    found = [metrics[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted")]
    if "dtype" in options:
        assert found[1] / found[0] == pytest.approx(accepted / drafted, abs=0.1)
    else:
        assert found == [drafted, accepted]


def test_nothing_is_drafted_for_more_requests_than_was_said(engines, cases):
    result = result_of(engines, "few")
    for question, asked in (("greedy", cases["llama"]), ("few", cases["llama"][:FEW])):
        answers = [answer["token_ids"] for answer in result["answers"][question]]
        assert answers == [[case.answer] for case in asked]
    metrics = result["metrics"]
    drafted = sum(case.drafted for case in cases["llama"][:FEW])
    assert metrics["vllm:spec_decode_num_draft_tokens"] == drafted


def test_drafting_stops_by_itself_where_it_costs_more_than_it_saves(engines, cases, unforeseen):
    """And changes no answer, however many are drafted in a step."""
    result = result_of(engines, "adapts")
    answers = [answer["token_ids"] for answer in result["answers"]["greedy"]]
    assert answers == [[case.answer] for case in cases["llama"]]
    answers = [answer["token_ids"] for answer in result["answers"]["unforeseen"]]
    assert answers == [[answer] for _, answer in unforeseen]
    drafted = sum(case.drafted for case in cases["llama"])
    steps = len(unforeseen) * (LONG - 1)
    metrics = result["metrics"]
    # When it stops is up to the clock of a busy machine; always drafting, it would be all of them.
    assert 0 < metrics["vllm:spec_decode_num_draft_tokens"] < drafted + 0.75 * DRAFTS * steps


@pytest.mark.parametrize("name", ["expert", "base"])
def test_sampled_tokens_are_drawn_from_the_fused_distribution(engines, cases, references, name):
    """Chi-square of second tokens, which were drafted, against their marginal distribution.

    Beside greedy requests, whose answers are compared, too.
    """
    case, control = cases["llama"][0], SAMPLED[name]
    answers = result_of(engines, "sampled")["answers"][name]
    assert answers[-1]["token_ids"] == [case.answer[:2]]
    counts = Counter(tokens[1] for answer in answers[:-1] for tokens in answer["token_ids"])
    samples, reference = SAMPLES[engines["runner"]], references["llama"]
    assert counts.total() == samples

    def distribution(ids: list[int]) -> torch.Tensor:
        logits = reference.greedy(ids, 1, control).logprobs[0].double()
        return (logits / TEMPERATURE).softmax(-1)

    first = distribution(case.prompt)
    marginal = torch.zeros_like(first)
    for token in torch.nonzero(first > 1e-5).flatten().tolist():
        marginal += first[token] * distribution([*case.prompt, token])
    require_frequencies(counts, marginal)


def test_sampled_drafts_are_accepted_at_times(engines):
    metrics, samples = result_of(engines, "sampled")["metrics"], SAMPLES[engines["runner"]]
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > samples / 8
    assert metrics["vllm:spec_decode_num_draft_tokens"] > 2 * samples


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "llama",
            {"pipeline_parallel_size": 2},
            "`speculate`: not possible with pipeline_parallel_size 2 under Model Runner V1",
        ),
        (
            "llama",
            {"speculative_config": None},
            r"`speculate`: .* speculative_config \(None\) .* set it to {.*_size\": \[\[1, 1, 3]]}",
        ),
        (
            "llama",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
            r"`speculate`: .* speculative_config \({'method': 'ngram', .*; start it with",
        ),
        (
            "llama",
            {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
            "`speculate`: .*worker_cls",
        ),
        (
            "windows",
            {"disable_hybrid_kv_cache_manager": False},
            r"`speculate`: .*\(none, 24\).* remove it, or disable_hybrid_kv_cache_manager",
        ),
    ],
)
def test_what_cannot_draft_is_one_line(tmp_path, paths, family, changes, words):
    """Of the stock entry points as well, before a process is started."""
    triple = paths.get(family) or write_triple(tmp_path / "members", "mistral-base-only")
    values = {**triple, "speculate": {"tokens": DRAFTS}, "engine": {"dtype": "float32"}}
    args = ProxyConfig.parse(values, "test").engine_args() | changes
    with pytest.raises(ValueError, match=words):
        EngineArgs(**args).create_engine_config()


def test_stages_cannot_divide_the_expert(paths, monkeypatch):
    """As on a GPU: this process has no Model Runner V2, but the rule can be asked."""
    values = {**paths["llama"], "speculate": {"tokens": DRAFTS}, "engine": {"dtype": "float32"}}
    parsed = ProxyConfig.parse(values, "test")
    config = EngineArgs(**parsed.engine_args()).create_engine_config()
    members = {role: member_model_config(config.model_config, role, "auto") for role in ROLES}
    config.parallel_config.pipeline_parallel_size = 2
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert drafts_problem(config, members, parsed.speculate) is None
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    problem = drafts_problem(config, members, parsed.speculate)
    assert problem.endswith("VLLM_PP_LAYER_PARTITION divides every member's; unset it")


def test_a_request_cannot_ask_for_drafts():
    with pytest.raises(ProxyConfigError, match="unknown key `proxy_speculate`"):
        RequestControl.from_extra_args({"proxy_speculate": 4})


def test_the_drafter_takes_no_memory_of_its_own(engines):
    """No layer with a KV cache, and no weight, beside the members'."""
    result = result_of(engines, "llama")
    assert {name.partition(".")[0] for name in result["kv_cache"]} == {
        "model",
        "expert",
        "antiexpert",
    }
    assert len(result["kv_cache"]) == 3 + 2 + 2
