"""An expert that is the antiexpert and an adapter runs in one pass with it: answers, and memory.

The reference has the adapter merged by PEFT, and runs the small members one after the other.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm import EngineArgs

from support.drafts import DRAFTING_ENGINE, DRAFTS, Case, draw_cases, greedy
from support.engines import result_of, run_engines
from support.reference import Reference
from support.tiny_adapters import write_adapter
from support.tiny_makes import write_lora_triple
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.registered import ProxyTunedForCausalLM
from vllm_proxy.members.lora import shared_adapter
from vllm_proxy.model.one_pass import can_pair

SMALL = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "num_gpu_blocks_override": 17}
"""Chunks shorter than most prompts, and a KV cache of a few of them."""
DRAFTING = {"speculate": {"tokens": DRAFTS, "adapt": False}}
ENGINES = {
    "v1": {
        "plain": ({}, {}),
        "merged": ({"one_pass": False}, {}),
        "small": ({}, SMALL),
        "drafts": (DRAFTING, {}),
        "compiled": ({}, {"enforce_eager": False}),
        "compiled drafts": (DRAFTING, {"enforce_eager": False}),
        "tp2": ({}, {"tensor_parallel_size": 2}),
        "pp2": ({}, {"pipeline_parallel_size": 2, "enforce_eager": False}),
    },
    "v2": {
        "plain": ({}, {}),
        "small": ({}, SMALL),
        "drafts": (DRAFTING, {}),
        "tp2": ({}, {"tensor_parallel_size": 2}),
        "pp2": ({}, {"pipeline_parallel_size": 2}),
    },
}


@pytest.fixture(scope="module")
def triple(tmp_path_factory) -> dict[str, object]:
    return write_lora_triple(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def members(triple) -> dict[str, object]:
    return {role: triple[role] for role in ("base", "expert", "antiexpert")}


@pytest.fixture(scope="module")
def cases(triple) -> list[Case]:
    torch.set_num_threads(1)
    return draw_cases(Reference(**triple["reference"]))


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """By runner, of engines that were started already."""
    return {}


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(request, members, cases, results, tmp_path_factory) -> dict[str, dict]:
    runner = request.param
    if runner not in results:
        plan = [
            {
                "name": name,
                "config": {**members, **fields, "engine": {**DRAFTING_ENGINE, **options}},
                "questions": [greedy(cases)],
            }
            for name, (fields, options) in ENGINES[runner].items()
        ]
        results[runner] = run_engines(plan, tmp_path_factory.mktemp(f"pairs-{runner}"), runner)
    return {"runner": runner, **results[runner]}


@pytest.mark.parametrize(
    ("engines", "name"),
    [(runner, name) for runner, own in ENGINES.items() for name in own],
    indirect=["engines"],
)
def test_answers_are_those_of_the_merged_expert(engines, cases, name):
    answers = result_of(engines, name)["answers"]["greedy"]
    assert [a["token_ids"] for a in answers] == [[case.answer] for case in cases]


@pytest.mark.parametrize(
    ("engines", "name"),
    [("v1", "drafts"), ("v1", "compiled drafts"), ("v2", "drafts")],
    indirect=["engines"],
)
def test_drafts_are_the_expert_s_own(engines, cases, name):
    metrics = result_of(engines, name)["metrics"]
    found = [metrics[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted")]
    assert found == [sum(case.drafted for case in cases), sum(case.accepted for case in cases)]


def test_small_kv_cache_really_preempts(engines):
    assert result_of(engines, "small")["metrics"]["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("engines", ["v1"], indirect=True)
def test_shared_weights_exist_once(engines):
    """The expert has no parameter; beside the antiexpert's there are the adapter's, and no others.

    Its KV caches are those that it has as a model of its own.
    """
    plain, merged = (result_of(engines, name) for name in ("plain", "merged"))
    adapter = {name for name in plain["weights"] if ".lora_" in name}
    assert not any(name.startswith("expert.") for name in plain["weights"])
    # Six layers of two decoder layers, of which vLLM has four (q, k and v, gate and up, as one).
    assert len(adapter) == 2 * 2 * 4
    attention = {name for name in plain["weights"] if ".attn." in name}
    tables = {name for name in plain["weights"] if ".rotary_emb." in name}  # one for all models
    ignored = ".attn.", ".rotary_emb."
    others = [n for n in merged["weights"] if not any(part in n for part in ignored)]
    assert set(plain["weights"]) - adapter - attention - tables == {
        name for name in others if not name.startswith("expert.")
    }
    assert plain["kv_cache"] == merged["kv_cache"]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_of_another_kind_is_merged(tmp_path, members, options):
    adapter = write_adapter(members["antiexpert"], tmp_path / "adapter", **options)
    values = {**members, "expert": {"model": members["antiexpert"], "lora": str(adapter)}}
    assert not shared_adapter(ProxyConfig.parse(values, "test"), dummy=False)
    with pytest.raises(
        ProxyConfigError, match=r"`one_pass`: adapter .* must be merged; remove `one_pass`"
    ):
        shared_adapter(ProxyConfig.parse({**values, "one_pass": True}, "test"), dummy=False)


def test_another_model_s_adapter_has_no_pass_of_its_own(members):
    values = {**members, "expert": {"model": "other", "lora": members["expert"]["lora"]}}
    assert not shared_adapter(ProxyConfig.parse(values, "test"), dummy=False)
    with pytest.raises(ProxyConfigError, match="`one_pass` is True: the expert is not the"):
        ProxyConfig.parse({**values, "one_pass": True}, "test")


def test_random_weights_have_no_adapter(monkeypatch, members):
    """Nothing is read where it would be, and the expert is a model of its own."""
    expert = {"model": members["antiexpert"], "lora": "/no/such/adapter"}
    values = {**members, "expert": expert, "engine": {"dtype": "float32", "load_format": "dummy"}}
    config = ProxyConfig.parse(values, "test")
    vllm_config = EngineArgs(**config.engine_args()).create_engine_config()
    monkeypatch.setattr("vllm_proxy.model.proxy_model.build_member", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(
        "vllm_proxy.model.proxy_model.get_pp_group", lambda: SimpleNamespace(is_last_rank=False)
    )
    model = ProxyTunedForCausalLM(vllm_config=vllm_config)
    assert model.modules_of == model.roles


def test_a_model_without_the_layers_is_merged(members):
    """Of a model class of vLLM's, say, that keeps an expert's weights in one tensor."""
    adapter = shared_adapter(ProxyConfig.parse(members, "test"), dummy=False)
    assert not can_pair(adapter, torch.nn.Module(), must=None)
    with pytest.raises(ProxyConfigError, match=r"Module has no linear layer .*_pr") as error:
        can_pair(adapter, torch.nn.Module(), must=True)
    assert (error.value.field, error.value.value) == ("one_pass", "True")
    assert error.value.remedy is not None
