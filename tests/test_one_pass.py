"""An expert that is the antiexpert and an adapter runs in one pass with it: answers, and memory.

The reference has the adapter merged by PEFT, and runs the small members one after the other.
"""

import json
import os
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from vllm import EngineArgs, _custom_ops
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.platforms import PlatformEnum

from support.drafts import (
    DRAFTING_ENGINE,
    DRAFTS,
    MAX_TOKENS,
    NEAR_EXPERT,
    Case,
    draw_cases,
    greedy,
)
from support.engines import (
    RIGS,
    SAFE_MARGIN,
    TRACED,
    in_graphs,
    own_caches,
    result_of,
    run_engines,
)
from support.quantized import MIXED, quantize_activations, write_quantized
from support.reference import Reference
from support.tiny_adapters import adapted_by_peft, edit_weights, merged_by_peft, write_adapter
from support.tiny_makes import LEFT_ALONE, write_lora_triple
from support.transfer import TRANSFER, checkpoint, update
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.registered import ProxyTunedForCausalLM
from vllm_proxy.members.adapter_set import AdapterSet, fitted, shared_adapters
from vllm_proxy.members.lora import LoraAdapter, LoraModule
from vllm_proxy.model.loading import AdapterPart
from vllm_proxy.model.one_pass import attach, can_pair, put

SMALL = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "num_gpu_blocks_override": 17}
"""Chunks shorter than most prompts, and a KV cache of a few of them."""
ENGINE = {**DRAFTING_ENGINE, **TRANSFER}
DRAFTING = {"speculate": {"tokens": DRAFTS, "adapt": False}}
ENGINES = {
    "v1": {
        "plain": ({}, {}),
        "merged": ({"one_pass": False}, {}),
        "small": ({}, SMALL),
        "drafts": (DRAFTING, {}),
        "compiled drafts": (DRAFTING, {"enforce_eager": False}),
        "compiled again": (DRAFTING, {"enforce_eager": False}),
        "tp2 drafts": (DRAFTING, {"tensor_parallel_size": 2}),
        "pp2": ({}, {"pipeline_parallel_size": 2, **TRACED}),
    },
    "v2": {
        "plain": ({}, {}),
        "small": ({}, SMALL | in_graphs("FULL_AND_PIECEWISE", (4, 16, 64))),
        "drafts": (DRAFTING, in_graphs("FULL_DECODE_ONLY", (4, 16, 64))),
        "tp2": ({}, {"tensor_parallel_size": 2}),
        "pp2 drafts": (DRAFTING, {"pipeline_parallel_size": 2}),
    },
}


NAMED = (
    *("small", "drafts", "compiled drafts", "compiled again", "tp2", "tp2 drafts"),
    *("pp2", "pp2 drafts"),
)
"""Engines with more experts, of which requests choose one by its name."""
CACHED = [("v1", "pp2"), ("v2", "tp2")]
"""Those that are asked again, with prefixes in the cache."""
NAMED_CONTROLS = (
    {"proxy_alpha": 2.0},
    NEAR_EXPERT | {"proxy_expert_prompt": 70},
    {"proxy_weights": [0, 1, 0]},
)
LIVE = [
    *(("v1", name) for name in ("merged", "compiled drafts", "tp2 drafts", "pp2")),
    ("v2", "plain"),
]
"""Engines that receive a new adapter after the other questions."""


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
def new_adapter(triple, tmp_path_factory) -> Path:
    adapter = tmp_path_factory.mktemp("new") / "adapter"
    shutil.copytree(triple["expert"]["lora"], adapter)
    edit_weights(adapter, lambda t: t.update({k: v.roll(1, 0) * 0.8 for k, v in t.items()}))
    return adapter


@pytest.fixture(scope="module")
def new_cases(triple, cases, new_adapter) -> dict[int, list[int]]:
    """Answers with the new adapter, by the index of a case that does not come near a tie."""
    merged = new_adapter.parent / "merged"
    merged_by_peft(triple["antiexpert"], new_adapter).save_pretrained(merged)
    reference = Reference(**{**triple["reference"], "expert": str(merged)})
    paths = [reference.greedy(case.prompt, MAX_TOKENS, case.control) for case in cases]
    answers = {i: p.token_ids for i, p in enumerate(paths) if p.margin > SAFE_MARGIN}
    assert len(answers) > 8
    assert sum(answers[i] != cases[i].answer for i in answers) > 5
    return answers


@pytest.fixture(scope="module")
def experts(triple, tmp_path_factory) -> dict[str, Path]:
    """Adapters with other ranks, and one with other modules, than the one without a name."""
    root, small = tmp_path_factory.mktemp("experts"), triple["antiexpert"]
    return {
        "legal": write_adapter(small, root / "legal", r=8, target_modules="all-linear"),
        "terse": write_adapter(small, root / "terse", target_modules=["v_proj", "down_proj"]),
    }


@pytest.fixture(scope="module")
def named_cases(triple, experts) -> list[Case]:
    """Requests of all experts in turn, and one prompt of several blocks that all of them have."""
    drawn: list[Case] = []
    paths = {None: triple["reference"]["expert"]}
    for name, adapter in experts.items():
        paths[name] = str(adapter.parent / f"{name}-merged")
        merged_by_peft(triple["antiexpert"], adapter).save_pretrained(paths[name])
    for name, path in paths.items():
        reference = Reference(**{**triple["reference"], "expert": path})
        control = {} if name is None else {"proxy_expert": name}
        drawn += draw_cases(reference, [{**more, **control} for more in ({}, *NAMED_CONTROLS)])
    answers = {tuple(case.answer) for case in drawn}
    assert len(answers) > len(drawn) - 3
    return [case for turn in range(4) for case in drawn[turn::4]]


@pytest.fixture(scope="module")
def live(cases, new_adapter, new_cases) -> dict[bool, list[dict]]:
    """A new adapter or the merged weights, by whether the expert's adapter is merged.

    Before them what such an expert cannot take, and after them the old files again.
    """
    root = new_adapter.parent
    merged = checkpoint(root / "merged", "expert")
    tensors = load_file(new_adapter / "adapter_model.safetensors")
    adapter = {f"expert.{name}": tensor for name, tensor in tensors.items()}
    return {
        is_merged: [
            question
            for name, step in {
                "refused": update(f"refused-{is_merged}", wrong, root),
                "new": update(f"new-{is_merged}", right, root, bucket=2),
                "reloaded": {"calls": [["collective_rpc", "reload_weights"]]},
            }.items()
            for question in ({**step, "name": f"{name}: errors"}, {**greedy(cases), "name": name})
        ]
        for is_merged, right, wrong in ((True, merged, adapter), (False, adapter, merged))
    }


@pytest.fixture(scope="module")
def emptied(named_cases, experts) -> list[dict]:
    """An update that makes one expert equal to the antiexpert, and what shows it."""
    tensors = load_file(experts["legal"] / "adapter_model.safetensors")
    new = {f"expert.legal/{k}": v * (0 if "lora_B" in k else 1) for k, v in tensors.items()}
    prompts = [case.prompt for case in named_cases if case.control.get("proxy_expert") == "legal"]
    step = update("emptied", new, experts["legal"].parent)
    asked = {"prompts": prompts, "params": greedy([])["params"]}
    return [
        {**step, "name": "emptied: errors"},
        *(
            {**asked, "name": name, "extra_args": [control] * len(prompts)}
            for name, control in (
                ("emptied", {"proxy_expert": "legal"}),
                ("base alone", {"proxy_alpha": 0}),
                ("terse", {"proxy_expert": "terse"}),
            )
        ),
    ]


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """By runner, of engines that were started already."""
    return {}


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(
    request, members, cases, experts, named_cases, live, emptied, results, tmp_path_factory
) -> dict[str, dict]:
    runner = request.param
    named = {**greedy(named_cases), "name": "named"}
    of_name = {"experts": {name: str(path) for name, path in experts.items()}}
    if runner not in results:
        plan = [
            {
                "name": name,
                "config": {
                    **members,
                    **(of_name if name in NAMED else {}),
                    **fields,
                    "engine": {**ENGINE, **options},
                },
                "questions": [
                    greedy(cases),
                    *([named] if name in NAMED else ()),
                    *([{**named, "name": "again"}] if (runner, name) in CACHED else ()),
                    *(live[name == "merged"] if (runner, name) in LIVE else ()),
                    *(emptied if (runner, name) in LIVE and name in NAMED else ()),
                ],
            }
            for name, (fields, options) in ENGINES[runner].items()
        ]
        directory = tmp_path_factory.mktemp(f"pairs-{runner}")
        env = {}
        if runner == "v1":  # compiled as on GPUs
            env = {"PYTHONPATH": str(RIGS / "vllm_compile_on_cpu"), "VLLM_USE_AOT_COMPILE": "1"}
            env["VLLM_CACHE_ROOT"] = str(directory / "cache")
        results[runner] = run_engines(plan, directory, runner, env)
    return {"runner": runner, **results[runner]}


@pytest.mark.parametrize(
    ("engines", "name"),
    [(runner, name) for runner, own in ENGINES.items() for name in own],
    indirect=["engines"],
)
def test_answers_are_those_of_the_merged_expert(engines, cases, name):
    answers = result_of(engines, name)["answers"]["greedy"]
    assert [a["token_ids"] for a in answers] == [[case.answer] for case in cases]
    if "cudagraph_mode" in ENGINES[engines["runner"]][name][1].get("compilation_config", {}):
        assert engines[name]["steps"]["FULL own"] > 0


@pytest.mark.parametrize(
    ("engines", "name"),
    [(runner, name) for runner, own in ENGINES.items() for name in own if name in NAMED],
    indirect=["engines"],
)
def test_requests_choose_an_expert(engines, named_cases, name):
    """In one batch, and again with what is in the prefix cache, which is not another expert's."""
    answers, right = result_of(engines, name)["answers"], [case.answer for case in named_cases]
    assert [answer["token_ids"][0] for answer in answers["named"]] == right
    if (engines["runner"], name) in CACHED:
        assert [answer["token_ids"][0] for answer in answers["again"]] == right
        assert sum(answer["cached"] > 0 for answer in answers["again"]) >= 6


@pytest.mark.parametrize("engines", ["v1"], indirect=True)
def test_second_start_loads_what_was_compiled_ahead_of_time(engines):
    """The base, and the antiexpert with the expert's adapter."""
    names = ("compiled drafts", "compiled again")
    first, second = (result_of(engines, name)["ahead_of_time"] for name in names)
    assert first == {"compiled": 2, "saved": 2, "loaded": 0}
    assert second == {"compiled": 0, "saved": 0, "loaded": 2}


def test_drafts_and_a_merged_adapter_are_compiled_separately(members):
    """vLLM keeps what it compiled under a digest of the configuration."""
    digests = set()
    for fields in ({}, DRAFTING, {"one_pass": False}):
        values = {**members, **fields, "engine": {"dtype": "float32", "max_model_len": 512}}
        args = EngineArgs(**ProxyConfig.parse(values, "test").engine_args())
        digests.add(args.create_engine_config().compute_hash())
    assert len(digests) == 3


@pytest.mark.parametrize(("engines", "name"), LIVE, indirect=["engines"])
def test_a_running_engine_takes_a_new_adapter(engines, cases, new_cases, name):
    answers = result_of(engines, name)["answers"]
    (error,) = filter(None, answers["refused: errors"])
    reason = "named 'base_model'" if name == "merged" else "is not a tensor of its adapter;"
    assert reason in error
    assert "; the old weights keep serving" in error
    assert not any(answers["new: errors"] + answers["reloaded: errors"])
    found = {
        step: [answer["token_ids"][0] for answer in answers[step]]
        for step in ("refused", "new", "reloaded")
    }
    assert {i: found["new"][i] for i in new_cases} == new_cases
    assert found["refused"] == found["reloaded"] == [case.answer for case in cases]


@pytest.mark.parametrize(
    ("engines", "name"), [one for one in LIVE if one[1] in NAMED], indirect=["engines"]
)
def test_a_running_engine_takes_a_new_adapter_by_name(engines, name):
    answers = result_of(engines, name)["answers"]
    assert not any(answers["emptied: errors"])
    found = {
        asked: [answer["token_ids"] for answer in answers[asked]]
        for asked in ("emptied", "base alone", "terse")
    }
    assert found["emptied"] == found["base alone"]
    assert all(map(list.__ne__, found["terse"], found["base alone"]))


@pytest.mark.parametrize(
    ("engines", "name"),
    [("v1", "drafts"), ("v1", "compiled again"), ("v2", "drafts"), ("v2", "pp2 drafts")],
    indirect=["engines"],
)
def test_drafts_are_the_expert_s_own(engines, cases, named_cases, name):
    metrics = result_of(engines, name)["metrics"]
    found = [metrics[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted")]
    asked = [*cases, *named_cases]
    assert found == [sum(case.drafted for case in asked), sum(case.accepted for case in asked)]


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


def test_a_new_adapter_takes_the_place_of_the_old_one(monkeypatch):
    """Its product is added once, from the addresses that compiled code and CUDA graphs hold."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    with set_current_vllm_config(VllmConfig()):
        layer = ColumnParallelLinear(8, 6, bias=False, disable_tp=True, return_bias=False)
    layer.weight.data.normal_()
    model = nn.Module()
    model.layer = nn.ModuleDict({"q_proj": layer})
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
    rows, addresses = torch.randn(4, 8), set()
    plain = linear(rows, layer.weight)
    for _ in range(3):
        a, b = torch.randn(2, 8), torch.randn(6, 2)
        tensors = {"layer.q_proj.lora_A.weight": a, "layer.q_proj.lora_B.weight": b}
        adapters = AdapterSet((LoraAdapter.parse("adapter", config, tensors),))
        if addresses:
            put(fitted(adapters.first, adapters.shapes), model, 0)
        else:
            attach(adapters, model, None)
            layer.quant_method.process_weights_after_loading(layer)  # on a CPU, packs and frees it
        addresses.add((layer.lora_a.data_ptr(), layer.lora_b.data_ptr()))
        output = layer(rows)
        torch.testing.assert_close(output[:2], plain[:2] + 1.5 * rows[:2] @ a.T @ b.T)
        torch.testing.assert_close(output[2:], plain[2:])
    assert len(addresses) == 1


QUANTIZED = [
    ("gptq", {}, {}),
    ("awq", DRAFTING, {"tensor_parallel_size": 2}),
    (MIXED, {}, {}),
]
"""By method of the antiexpert: a configuration's fields, and those of its engine."""
FEW_TOKENS, FAR = 4, 0.15
"""Of antiexperts that round activations: a difference of 1e-6 now and then rounds one to the next
value, which moves logits by up to 0.08."""

AFTER_SLEEP = "lose_weights", "reload_weights"
"""What a worker does at sleep level 2, and what the user calls after it."""


def reference_of(triple: dict, method: str) -> Reference:
    """Return a reference whose adapter, if the method rounds inputs, keeps those as they are."""
    reference = Reference(**triple["reference"])
    if method == MIXED:
        twin = Path(triple["reference"]["antiexpert"])
        reference.models[1] = adapted_by_peft(twin, triple["expert"]["lora"])
        for model in reference.models[1:]:
            quantize_activations(model, method, LEFT_ALONE)
    return reference


def far_cases(reference: Reference) -> list[SimpleNamespace]:
    """Draw requests far from a tie, of few tokens."""
    rng, drawn = random.Random(0), []
    for weights in ([1, 1, -1], [0, 1, 0], [0, 0, 1], [0.2, 0.9, -0.1]) * 3:
        path, prompt, control = None, [], {"proxy_weights": weights}
        while path is None or path.margin < FAR:
            prompt = [rng.randrange(3, 470) for _ in range(rng.choice((1, 5, 31, 32, 33, 64)))]
            path = reference.greedy(prompt, FEW_TOKENS, control)
        drawn.append(SimpleNamespace(prompt=prompt, control=control, answer=path.token_ids))
    return drawn


def with_the_weights_of_another(root: Path, triple: dict, method: str) -> dict:
    """Return the triple after the antiexpert got what the unused expert's checkpoint holds."""
    path, twin, merged = root / "other", root / "other-twin", root / "other-merged"
    write_quantized(root / "expert", path, twin, method, plain=LEFT_ALONE)
    merged_by_peft(twin, triple["expert"]["lora"]).save_pretrained(merged)
    reference = {**triple["reference"], "expert": str(merged), "antiexpert": str(twin)}
    return {**triple, "antiexpert": str(path), "reference": reference}


@pytest.mark.parametrize(("method", "fields", "options"), QUANTIZED)
def test_an_adapter_of_a_quantized_antiexpert(tmp_path, method, fields, options):
    """The layers keep their quantized weights, the same for both; also new ones, and reloaded ones.

    The reference has the adapter merged into what the int4 weights stand for. Of the mixture (FP8,
    W8A8 and W4A16) the adapter's product is added to that of the rounded inputs.
    """
    torch.set_num_threads(1)
    triple = write_lora_triple(tmp_path, method=method)
    members = {role: triple[role] for role in ("base", "expert", "antiexpert")}
    other = with_the_weights_of_another(tmp_path, triple, method)
    reference, safe = reference_of(triple, method), FAR if method == MIXED else SAFE_MARGIN
    cases = far_cases(reference) if method == MIXED else draw_cases(reference)
    reference = reference_of(other, method)
    paths = [reference.greedy(case.prompt, FEW_TOKENS, case.control) for case in cases]
    sent = checkpoint(other["antiexpert"], "antiexpert")
    scale = next(name for name in sent if name.endswith("scale") or name.endswith("scales"))
    half = {name: tensor for name, tensor in sent.items() if name != scale}
    steps = {
        "old": None,
        "half": update("half", half, tmp_path / "sent"),
        "new": update("new", sent, tmp_path / "sent"),
        "reloaded": {"calls": [["collective_rpc", call] for call in AFTER_SLEEP]},
    }
    questions = [
        question
        for name, step in steps.items()
        for question in (
            *([] if step is None else [{**step, "name": f"{name}: errors"}]),
            {**greedy(cases), "name": name},
        )
    ]
    engine = {
        "name": method,
        "config": {**members, **fields, "engine": {**ENGINE, **options}},
        "questions": questions,
    }
    env = own_caches(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join(map(str, [RIGS / "avx2_kernels", RIGS / "int4_on_cpu"]))
    results = {"runner": "v1", **run_engines([engine], tmp_path / "engine", "v1", env)}
    result = result_of(results, method)
    answers = result["answers"]
    (error,) = filter(None, answers["half: errors"])
    assert "the update lacks 1 of the model's tensors" in error
    assert not any(answers["new: errors"] + answers["reloaded: errors"])
    found = {name: [answer["token_ids"][0] for answer in answers[name]] for name in steps}
    right = [case.answer for case in cases]
    for name in ("old", "half", "reloaded"):
        assert [ids[: len(right[0])] for ids in found[name]] == right, name
    new = {i: path.token_ids for i, path in enumerate(paths) if path.margin > safe}
    assert {i: found["new"][i][:FEW_TOKENS] for i in new} == new
    assert sum(right[i][:FEW_TOKENS] != new[i] for i in new) > 1
    if "tensor_parallel_size" not in options:  # its worker is another process
        assert not any(name.startswith("expert.") for name in result["weights"])
        assert len([name for name in result["weights"] if ".lora_a" in name]) == 2 * 4


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_of_another_kind_is_merged(tmp_path, members, options):
    adapter = write_adapter(members["antiexpert"], tmp_path / "adapter", **options)
    values = {**members, "expert": {"model": members["antiexpert"], "lora": str(adapter)}}
    assert not shared_adapters(ProxyConfig.parse(values, "test"), dummy=False, quantization=None)
    with pytest.raises(
        ProxyConfigError, match=r"`one_pass`: adapter .* must be merged; remove `one_pass`"
    ):
        shared_adapters(
            ProxyConfig.parse({**values, "one_pass": True}, "test"), dummy=False, quantization=None
        )


def test_another_model_s_adapter_has_no_pass_of_its_own(members):
    values = {**members, "expert": {"model": "other", "lora": members["expert"]["lora"]}}
    assert not shared_adapters(ProxyConfig.parse(values, "test"), dummy=False, quantization=None)
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
    adapter = shared_adapters(ProxyConfig.parse(members, "test"), dummy=False, quantization=None)
    assert not can_pair(adapter, torch.nn.Module(), must=None, quantization=None)
    with pytest.raises(ProxyConfigError, match="Module has experts on several data-parallel"):
        can_pair(adapter, torch.nn.Module(), must=True, quantization=None, spreads_experts=True)
    with pytest.raises(ProxyConfigError, match=r"Module has no linear layer .*_pr") as error:
        can_pair(adapter, torch.nn.Module(), must=True, quantization=None)
    assert (error.value.field, error.value.value) == ("one_pass", "True")
    assert error.value.remedy is not None
    with pytest.raises(
        ProxyConfigError, match=r"no linear layer .* which a quantized model \(gptq\) does not"
    ) as error:
        can_pair(adapter, torch.nn.Module(), must=None, quantization="gptq")
    assert (error.value.field, error.value.remedy) == ("expert", "use the unquantized checkpoint")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("batched", [False, True])
def test_the_product_is_added_to_the_first_half_of_the_rows(batched):
    """Also of `[1, rows, in]`, which vLLM's Transformers backend passes to its layers."""
    torch.manual_seed(0)
    layer = ReplicatedLinear(6, 5, params_dtype=torch.float32, disable_tp=True, return_bias=False)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    weight, bias = layer.weight.double(), layer.bias.double()
    lora = LoraModule(torch.randn(2, 6), torch.randn(5, 2), scaling=1.5, embedding=False)
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up": layer})})
    attach(AdapterSet((LoraAdapter("adapter", None, False, {"mlp.up": lora}, {}),)), model, None)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(8, 6)
    found = layer(x[None])[0] if batched else layer(x)
    wanted = x.double() @ weight.T + bias
    wanted[:4] += 1.5 * x[:4].double() @ lora.a.double().T @ lora.b.double().T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_each_row_has_its_own_adapter(tmp_path):
    """Of several ranks, one of them none, and after an update of one by its name."""
    torch.manual_seed(0)
    layer = ReplicatedLinear(6, 5, bias=False, params_dtype=torch.float32, return_bias=False)
    torch.nn.init.normal_(layer.weight)
    weight = layer.weight.double()
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up_proj": layer})})
    places: dict[str | None, str | None] = {None: None}
    products = [torch.zeros(5, 6).double()]
    tensors: dict[str, torch.Tensor] = {}
    for rank, name in ((2, "two"), (3, "three")):
        (tmp_path / name).mkdir()
        places[name] = str(tmp_path / name)
        config = {"r": rank, "lora_alpha": 6, "target_modules": ["up_proj"], "peft_type": "LORA"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        a, b = torch.randn(rank, 6), torch.randn(5, rank)
        tensors = {"mlp.up_proj.lora_A.weight": a, "mlp.up_proj.lora_B.weight": b}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        products.append(6 / rank * b.double() @ a.double())
    slots = [0, 2, 1, 1, 2]
    part = AdapterPart(places, model, torch.eye(3)[slots])
    part.start()
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2 * len(slots), 6)

    def require_products() -> None:
        wanted = x.double() @ weight.T
        for row, slot in enumerate(slots):
            wanted[row] += x[row].double() @ products[slot].T
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)

    require_products()
    update = {f"three/{name}": 2 * tensor for name, tensor in tensors.items()}
    part.check(update.items())
    part.replace(update.items())
    products[2] *= 4
    require_products()
    for wrong, message in (
        (
            {f"four/{name}": tensor for name, tensor in tensors.items()},
            "`experts.four`: the engine",
        ),
        ({f"two/{name}": tensor for name, tensor in tensors.items()}, "a matrix of rank 2;"),
        (tensors, "`expert`: the engine has no such adapter"),
        (
            {"three/mlp.up_proj.weight": x},
            "`experts.three`: mlp.up_proj.weight is not a tensor of its",
        ),
        (
            {"three/mlp.up_proj.lora_A.weight": x / 0, "three/mlp.up_proj.lora_B.weight": x},
            "NaN or infinite",
        ),
    ):
        with pytest.raises(ProxyConfigError) as caught:
            part.check(wrong.items())
        assert message in str(caught.value)
    require_products()


@pytest.mark.usefixtures("one_rank")
def test_a_layer_with_an_adapter_is_given_its_input_unquantized():
    """vLLM's MLPs else quantize it for a layer with FP8 or FP4 activations, and keep no other."""
    layer = ReplicatedLinear(6, 5, params_dtype=torch.float32, disable_tp=True)
    layer._input_quant_key = kFp8StaticTensorSym
    lora = LoraModule(torch.randn(2, 6), torch.randn(5, 2), scaling=1.5, embedding=False)
    assert get_input_quant_key(layer) is kFp8StaticTensorSym
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up": layer})})
    attach(AdapterSet((LoraAdapter("adapter", None, False, {"mlp.up": lora}, {}),)), model, None)
    assert get_input_quant_key(layer) is None


class TorchBlockKernel(Fp8BlockScaledMMLinearKernel):
    """A plain product, where vLLM's kernels for a CPU need tiles (AMX)."""

    @classmethod
    def is_supported(cls, _: int | None = None) -> tuple[bool, None]:
        return True, None

    def apply_block_scaled_mm(self, A, B, As, Bs):
        rows, columns = (side.repeat_interleave(128, dim=-1) for side in (As, Bs))
        columns = columns.repeat_interleave(128, dim=0)[: len(B)]
        return (A.float() * rows) @ (B.float() * columns).T


def scaled_fp8_quant(x, scale, **_):
    """As vLLM's operator, of which its build for CPUs has the name only."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def compressed(preset: str, storage: str) -> CompressedTensorsConfig:
    config = QuantizationConfig(
        config_groups={preset: ["Linear"]}, format=storage, quantization_status="compressed"
    )
    return CompressedTensorsConfig.from_config(json.loads(config.model_dump_json()))


SCHEMES = {
    "W8A8": partial(compressed, "W8A8", "int-quantized"),
    "FP8 per channel and token": partial(compressed, "FP8_DYNAMIC", "float-quantized"),
    "FP8 per tensor, static": partial(compressed, "FP8", "float-quantized"),
    "FP8 per block": partial(compressed, "FP8_BLOCK", "float-quantized"),
    "method fp8, static": partial(Fp8Config, True, "static"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_is_added_to_that_of_any_kernel(monkeypatch, scheme):
    """Of a layer with gate and up, each with an adapter and, where per tensor, a scale."""
    blocks = {PlatformEnum.CPU: [TorchBlockKernel]}
    monkeypatch.setattr(kernels, "_POSSIBLE_FP8_BLOCK_KERNELS", blocks)
    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", scaled_fp8_quant)
    # vLLM's kernel of W8A8 for CPUs with AMX takes 16-bit numbers only
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    shown = SimpleNamespace(dtype=torch.float32)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", shown)
    torch.manual_seed(0)
    inputs, sizes = 256, [128, 64]
    parts = {
        name: LoraModule(torch.randn(2, inputs), torch.randn(size, 2), 1.5, embedding=False)
        for name, size in zip(("mlp.gate_proj", "mlp.up_proj"), sizes, strict=True)
    }

    def layer(adapter: LoraAdapter | None) -> MergedColumnParallelLinear:
        made = MergedColumnParallelLinear(
            *(inputs, sizes),
            bias=False,
            params_dtype=torch.float32,
            quant_config=SCHEMES[scheme](),
            prefix="mlp.gate_up_proj",
            return_bias=False,
            disable_tp=True,
        )
        random = torch.Generator().manual_seed(1)
        for name, tensor in made.named_parameters():
            if name == "input_scale":
                tensor.data.fill_(0.02)
            elif "scale" in name:
                tensor.data.uniform_(0.001, 0.003, generator=random)
            else:
                values = torch.randn(tensor.shape, generator=random) * 20
                tensor.data.copy_(values.to(tensor.dtype))
        if adapter is not None:
            model = nn.Module()
            model.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
            model.mlp = nn.ModuleDict({"gate_up_proj": made})
            attach(AdapterSet((adapter,)), model, None)
        made.quant_method.process_weights_after_loading(made)
        return made

    x = torch.randn(8, inputs)
    wanted = layer(None)(x)
    found = layer(LoraAdapter("adapter", None, False, parts, {}))(x)
    assert torch.equal(found[4:], wanted[4:])
    added = torch.cat([1.5 * x[:4] @ lora.a.T @ lora.b.T for lora in parts.values()], dim=-1)
    torch.testing.assert_close(found[:4], wanted[:4] + added, rtol=1e-5, atol=1e-4)
