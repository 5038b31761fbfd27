"""A missing expert or antiexpert: the base plays its part, and nothing is held for it.

The reference takes the formula of all three, with the base twice.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from support.engines import (
    KV_CACHE_BYTES,
    SAFE_MARGIN,
    TOKEN_ENGINE,
    engine_in_this_process,
    result_of,
    run_engines,
)
from support.reference import Reference
from support.tiny_models import VOCAB_SIZE, write_model
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig, ProxySection
from vllm_proxy.preflight.check.run import check, render

PAIRS = {"expert": ("base", "antiexpert"), "antiexpert": ("base", "expert")}
"""The members that there are, by the missing one."""
ALPHA = 0.5
"""The engines' own."""
PROMPTS = 8
MAX_TOKENS = 12
ENGINE = {**TOKEN_ENGINE, "max_model_len": 256, "disable_log_stats": False}

EXPERTS_WORDS = {
    "proxy_weights": [0.0, 1.0, 0.0],
    "proxy_plausibility": 0.3,
    "proxy_top_p": 0.9,
}
QUESTIONS: dict[str, list[dict[str, object] | None]] = {
    "default": [None] * PROMPTS,
    "alpha 1": [{"proxy_alpha": 1.0}] * PROMPTS,
    "mixed": [
        None,
        {"proxy_alpha": 1.0},
        {"proxy_alpha": -0.5},
        {"proxy_alpha": 1.0, "proxy_alpha_schedule": "linear", "proxy_alpha_steps": 6},
        {"proxy_weights": [1.0, 0.7, -0.4]},
        *({"proxy_weights": [float(role == one) for role in ROLES]} for one in ROLES),
    ],
    "filtered": [
        None,
        *[
            {"proxy_plausibility": 0.1},
            {"proxy_top_p": 0.6},
            {"proxy_alpha": "adaptive"},
            EXPERTS_WORDS,
        ]
        * 2,
    ],
}
"""What requests of one batch ask for."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Members of different sizes, depths and heads; the small heads are their embeddings."""
    root = tmp_path_factory.mktemp("members")
    small = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
    return {
        "base": str(write_model(root / "base", seed=0, hidden_size=256, layers=3, kv_heads=2)),
        "expert": str(write_model(root / "expert", seed=1, **small)),
        "antiexpert": str(write_model(root / "antiexpert", seed=2, **small)),
    }


def pair(paths: Mapping[str, str], missing: str) -> dict[str, str]:
    return {role: paths[role] for role in PAIRS[missing]}


Case = tuple[list[int], dict[str, object] | None, list[int]]
"""Prompt, `extra_args`, right tokens."""


def cases(reference: Reference, missing: str) -> dict[str, list[Case]]:
    """What is asked, by question."""
    rng = random.Random(0)

    def draw() -> list[int]:
        length = rng.choice((1, 2, 17, 31, 32, 33, 64, 90))
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]

    def case(extra_args: dict[str, object] | None) -> Case:
        """Draw a prompt whose right answer is beyond doubt."""
        while True:
            prompt = draw()
            decoded = reference.greedy(prompt, MAX_TOKENS, extra_args)
            if decoded.margin > SAFE_MARGIN:
                return prompt, extra_args, decoded.token_ids

    # Classifier-free guidance: the other member reads a prompt of its own, but for every third.
    key = f"proxy_{PAIRS[missing][1]}_prompt"
    prompts = [{key: draw()} if index % 3 else None for index in range(PROMPTS)]
    questions = {**QUESTIONS, "prompts": prompts}
    return {name: [case(asked) for asked in every] for name, every in questions.items()}


@pytest.fixture(scope="module")
def expected(paths) -> dict[str, dict[str, list[Case]]]:
    torch.set_num_threads(1)
    return {
        missing: cases(Reference(**pair(paths, missing), alpha=ALPHA), missing) for missing in PAIRS
    }


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """By runner, of engines that were started already."""
    return {}


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(request, results, paths, expected, tmp_path_factory) -> dict[str, dict]:
    """Started by the stock `vllm.LLM`, as `vllm serve` does."""
    if request.param in results:
        return results[request.param]
    plan = []
    for missing in PAIRS:
        config = ProxyConfig.parse(
            {**pair(paths, missing), "alpha": ALPHA, "engine": ENGINE}, "test"
        )
        questions = [
            {
                "name": name,
                "prompts": [prompt for prompt, _, _ in asked],
                "extra_args": [extra_args for _, extra_args, _ in asked],
                "params": {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
            }
            for name, asked in expected[missing].items()
        ]
        args = config.engine_args()
        plan.append({"name": missing, "config": {"plain": args}, "questions": questions})
        if request.param == "v1" and missing == "expert":
            args = {**args, "tensor_parallel_size": 2}
            name = f"{missing} tp2"
            plan.append({"name": name, "config": {"plain": args}, "questions": questions})
    directory = tmp_path_factory.mktemp(f"engines-{request.param}")
    answers = run_engines(plan, directory, request.param)
    results[request.param] = {"runner": request.param, **answers}
    return results[request.param]


@pytest.mark.parametrize("question", [*QUESTIONS, "prompts"])
@pytest.mark.parametrize(
    ("engines", "engine"),
    [*product(("v1", "v2"), PAIRS), ("v1", "expert tp2")],
    indirect=["engines"],
)
def test_the_base_plays_the_missing_part(engines, expected, engine, question):
    answers = result_of(engines, engine)["answers"][question]
    right = [tokens for _, _, tokens in expected[engine.split()[0]][question]]
    assert [answer["token_ids"][0] for answer in answers] == right


@pytest.mark.parametrize("missing", PAIRS)
def test_kv_cache_has_no_layers_of_the_missing_member(engines, missing):
    result = result_of(engines, missing)
    caches: dict[str, list[int]] = {}
    for name, size in result["kv_cache"].items():
        root = name.partition(".")[0]
        caches.setdefault(root if root in ROLES else "base", []).append(size)
    values = 2 * 4 * 32 * result["num_gpu_blocks"]  # keys and values, float32, of every slot
    other = PAIRS[missing][1]
    assert caches == {"base": [2 * 64 * values] * 3, other: [2 * 32 * values] * 2}
    assert 0.9 * KV_CACHE_BYTES < sum(result["kv_cache"].values()) <= KV_CACHE_BYTES


@pytest.mark.parametrize("missing", PAIRS)
def test_a_prompt_for_the_missing_member_is_refused(paths, missing):
    from vllm import EngineArgs, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

    config = ProxyConfig.parse({**pair(paths, missing), "engine": ENGINE}, "test")
    args = {key: value for key, value in config.engine_args().items() if key != "disable_log_stats"}
    engine = EngineArgs(**args).create_engine_config()
    processors = engine.model_config.logits_processors
    own, none = (
        SamplingParams(extra_args={f"proxy_{role}_prompt": [3]})
        for role in (PAIRS[missing][1], missing)
    )
    validate_logits_processors_parameters(processors, own)
    with pytest.raises(
        VLLMValidationError, match=f"`proxy_{missing}_prompt`: the model has no {missing}"
    ):
        validate_logits_processors_parameters(processors, none)


@pytest.fixture
def loaded(paths, monkeypatch) -> Iterator[dict[str, object]]:
    """What an engine without expert holds once checkpoints are read; kernels pack weights later."""
    from vllm import LLM

    from vllm_proxy.engine.registered import ProxyTunedForCausalLM

    seen: dict[str, object] = {}
    load = ProxyTunedForCausalLM.load_weights

    def load_weights(model: ProxyTunedForCausalLM, weights: Iterator) -> set[str]:
        names = load(model, weights)
        storages = [parameter.untyped_storage() for parameter in model.parameters()]
        seen["bytes"] = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        seen["head"] = tuple(model.head.product.weight.shape)
        seen["names"] = {name.partition(".")[0] for name in names}
        return names

    monkeypatch.setattr(ProxyTunedForCausalLM, "load_weights", load_weights)
    config = ProxyConfig.parse({**pair(paths, "expert"), "engine": ENGINE}, "test")
    with engine_in_this_process(lambda: LLM(**config.engine_args())):
        yield seen


def test_memory_is_that_of_two_members(loaded, paths):
    models = [AutoModelForCausalLM.from_pretrained(paths[r]) for r in ("base", "antiexpert")]
    assert loaded["names"] == {"base", "antiexpert", "head"}
    assert loaded["head"] == (VOCAB_SIZE, 256 + 128)
    # Tied embeddings once, and as columns of the head.
    assert loaded["bytes"] == 4 * sum(p.numel() for model in models for p in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("missing", PAIRS)
def test_heads_are_weighed_as_the_formula_says(monkeypatch, missing, fused):
    """One product over two members' columns, or the base's own logits in two roles."""
    from vllm import envs

    from support.heads import HIDDEN, Member, rank_of
    from vllm_proxy.config.request import RequestControl
    from vllm_proxy.model.controls import ExtraOps, LogitControls
    from vllm_proxy.model.head import ProxyHead

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", not fused)
    random, roles = torch.Generator().manual_seed(0), PAIRS[missing]
    with rank_of(1, 0):
        members = {role: Member(96, HIDDEN[role]) for role in roles}
        sizes = [HIDDEN[role] for role in roles]
        default = LogitControls.of(RequestControl(alpha=ALPHA))
        head = ProxyHead(members, sizes, dict.fromkeys(roles, 96), default)
        parts = {role: torch.randn(5, HIDDEN[role], generator=random) for role in roles}
        weights = {role: torch.randn(96, HIDDEN[role], generator=random) for role in roles}
        for role, member in members.items():
            member.lm_head.weight.weight_loader(member.lm_head.weight, weights[role])
        head.weights_loaded()
        for layer in (head.product,) if fused else (m.lm_head for m in members.values()):
            layer.quant_method.process_weights_after_loading(layer)
        alone = {role: parts[role].double() @ weights[role].double().T for role in roles}
        base, expert, antiexpert = (alone[role if role in roles else "base"] for role in ROLES)
        hidden_states = torch.cat(list(parts.values()), dim=-1)
        own = torch.randn(5, 3, generator=random)
        controls = torch.cat([own, torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 5)], dim=-1)
        w_base, w_expert, w_antiexpert = own.double()[..., None].unbind(1)
        wanted = w_base * base + w_expert * expert + w_antiexpert * antiexpert
        for extra_ops in (ExtraOps(), ExtraOps(top_p=True, plausibility=True)):
            logits = head(hidden_states, controls, extra_ops)
            torch.testing.assert_close(logits.double(), wanted, atol=1e-4, rtol=0)
        wanted = base + ALPHA * (expert - antiexpert)
        torch.testing.assert_close(head(hidden_states).double(), wanted, atol=1e-4, rtol=0)
    assert (head.product is not None) == fused


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", PAIRS)
def test_a_section_has_the_members_that_are_given(missing):
    values = {role: role for role in PAIRS[missing]}
    config = ProxyConfig.parse({**values, "alpha": 0.5}, "test")
    section = config.hf_overrides()["proxy"]
    other = PAIRS[missing][1]
    assert section == {other: {"model": other}, "alpha": 0.5}
    for read in (config, ProxySection.parse(section, "hf_overrides.proxy")):
        assert read.roles == PAIRS[missing]
        assert read.effective_role(missing) == "base"
        assert read.effective_role(other) == other
    assert config.member(missing) == config.base


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "`expert` and `antiexpert` are missing; add one of them, or both"),
        ({"antiexprt": "x"}, "unknown key `antiexprt`; did you mean `antiexpert`?"),
        ({"expert": None, "antiexpert": "x"}, "`expert` is None: a member is a path or hub id"),
        ({"expert": {"modl": "x"}}, "unknown key `expert.modl`; did you mean `model`?"),
        ({"expert": {"lora": "x"}}, "`expert.model` is missing; add `expert.model: <value>`"),
    ],
)
@pytest.mark.parametrize("cls", [ProxyConfig, ProxySection])
def test_mistakes_are_one_line(cls, values, words):
    base = {"base": "big"} if cls is ProxyConfig else {}
    with pytest.raises(ProxyConfigError) as error:
        cls.parse({**base, **values}, "here")
    assert str(error.value).startswith(f"here: {words}")
    assert "\n" not in str(error.value)


def test_base_cannot_be_missing():
    with pytest.raises(ProxyConfigError, match="`base` is missing; add `base: <value>`"):
        ProxyConfig.parse({"antiexpert": "x"}, "test")


# -- check -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "formula"),
    [
        ("expert", "logits = base + 0.5 * (base - antiexpert), the base instead of the"),
        ("antiexpert", "logits = base + 0.5 * (expert - base), the base instead of the"),
    ],
)
def test_check_shows_two_members(paths, missing, formula):
    config = ProxyConfig.parse({**pair(paths, missing), "alpha": 0.5}, "test")
    report = check(config)
    assert report.problems == ()
    assert tuple(member.role for member in report.members) == PAIRS[missing]
    assert report.notes[0] == f"{formula} missing {missing}."
    (cache,) = (sentence for sentence in report.notes if "bytes per token" in sentence)
    assert f", {missing} " not in cache
    console = Console(width=200, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(render(report))
    header = console.export_text().splitlines()[1].split()
    assert tuple(header) == PAIRS[missing]


def test_check_says_where_two_members_come_to_one(paths):
    def sentences(**values: object) -> tuple[str, ...]:
        return check(ProxyConfig.parse({"base": paths["base"], **values}, "test")).notes

    alone = "`alpha` is 1.0 without an antiexpert: the logits are the expert's alone."
    assert alone in sentences(expert=paths["expert"])
    adaptive = sentences(expert=paths["expert"], alpha="adaptive")
    assert alone.replace("1.0", "adaptive") in adaptive
    assert alone not in sentences(expert=paths["expert"], alpha=0.5)
    assert alone not in sentences(antiexpert=paths["antiexpert"])
    assert any(
        sentence.startswith("base and antiexpert are the same model: the shift is always zero")
        for sentence in sentences(antiexpert=paths["base"])
    )


def test_check_finds_a_mistake_in_one_of_two(paths):
    report = check(ProxyConfig.parse({"base": paths["base"], "antiexpert": "/none"}, "test"))
    assert report.problems == ("antiexpert `/none`: no such directory; check the path",)
    assert [member.role for member in report.members] == ["base"]
