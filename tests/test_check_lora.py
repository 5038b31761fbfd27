"""An adapter in the configuration and in `check`: what is said of it, and each mistake."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import vllm
import yaml
from safetensors.torch import load_file

from support.quantized import write_quantized
from support.tiny_adapters import edit_config, edit_weights, write_adapter
from support.tiny_models import write_model, write_triple
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import Member, ProxyConfig, ProxySection
from vllm_proxy.preflight.check.run import CheckReport, check, require_valid

MODULES = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_triple(tmp_path_factory.mktemp("triple"), "llama")


@pytest.fixture(scope="module")
def written(triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "tuned"
    return write_adapter(Path(triple["antiexpert"]), path, target_modules=MODULES)


@pytest.fixture
def adapter(written, tmp_path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(written, tmp_path / "tuned")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run(triple: dict[str, str], lora: object, **changes: Any) -> CheckReport:
    """Check the triple with the antiexpert and *lora* as expert."""
    expert = {"model": triple.get("antiexpert"), "lora": str(lora)}
    return check(ProxyConfig.parse({**triple, "expert": expert, **changes}, "test"))


def only_problem(report: CheckReport) -> str:
    assert len(report.problems) == 1, report.problems
    assert "\n" not in report.problems[0]
    return report.problems[0]


# -- configuration ---------------------------------------------------------------------------------


def test_the_adapter_reaches_every_process(tmp_path):
    text = "base: big\nexpert: {model: small, revision: v1, lora: ./tuned}\nantiexpert: small"
    (tmp_path / "c.yaml").write_text(text)
    config = ProxyConfig.from_yaml(tmp_path / "c.yaml")
    assert config.expert == Member(model="small", revision="v1", lora="./tuned")
    assert str(config.expert) == "small@v1 + ./tuned"
    assert config.antiexpert != config.expert
    words = config.serve_arguments()
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    assert overrides["proxy"]["antiexpert"] == {"model": "small"}
    section = ProxySection.parse(overrides["proxy"], "test")
    assert (section.expert, section.antiexpert) == (config.expert, config.antiexpert)


def test_keyword_arguments_are_parsed_again(tmp_path):
    """`ProxyLLM.from_config` passes the members on as mappings, the unset fields with them."""
    values = {
        "base": {"model": "big"},
        "expert": {"model": "small", "lora": "tuned"},
        "antiexpert": {"model": "small"},
    }
    config = ProxyConfig.parse(yaml.safe_load(yaml.safe_dump(values)), "test")
    dumped = {role: config.member(role).model_dump() for role in values}
    assert ProxyConfig.parse(dumped, "test") == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"base": {"model": "big", "lora": "x"}},
            "`base.lora` is 'x': an adapter belongs to the expert or the antiexpert; remove it",
        ),
        ({"expert": {"model": "small", "lora": ""}}, "`expert.lora` is ''"),
        ({"expert": {"model": "small", "lora": 3}}, "`expert.lora` is 3"),
        ({"expert": {"model": "small", "lroa": "x"}}, "`expert.lroa`; did you mean `lora`?"),
        ({"expert": {"lora": "x"}}, "`expert.model` is missing; add `expert.model: <value>`"),
    ],
)
def test_mistakes_are_one_line(values, words):
    with pytest.raises(ProxyConfigError) as error:
        ProxyConfig.parse({"base": "b", "expert": "e", "antiexpert": "a", **values}, "config")
    assert words in str(error.value)
    assert str(error.value).startswith("config: ")


# -- what will run ---------------------------------------------------------------------------------


def test_the_adapter_is_described(triple, adapter):
    report = run(triple, adapter)
    assert report.problems == ()
    assert report.members[1].model == f"{triple['antiexpert']} + {adapter}"
    assert (
        f"expert is `{triple['antiexpert']}` with the adapter `{adapter}` (rank 4, 4 modules) "
        "added to its layers, in one pass with the antiexpert."
    ) in report.notes
    merged = run(triple, adapter, one_pass=False)
    assert any(sentence.endswith("merged during loading.") for sentence in merged.notes)
    assert not any("trained on" in sentence for sentence in report.notes)
    # the antiexpert is the same model without it
    assert not any("always zero" in sentence for sentence in report.notes)


def test_two_adapters_of_one_model(triple, adapter, tmp_path):
    other = write_adapter(
        Path(triple["antiexpert"]),
        tmp_path / "other",
        target_modules=MODULES,
        rank_pattern={"v_proj": 8},
        modules_to_save=["norm"],  # PEFT takes all whose names end so
    )
    antiexpert = {"model": triple["antiexpert"], "lora": str(other)}
    report = run(triple, adapter, antiexpert=antiexpert)
    assert report.problems == ()
    assert any(s.startswith("expert is") and "(rank 4, 4 modules)" in s for s in report.notes)
    sizes = "(ranks 4 to 8, 4 modules, 5 tensors instead of the model's)"
    assert any(s.startswith("antiexpert is") and sizes in s for s in report.notes)
    assert not any("always zero" in sentence for sentence in report.notes)
    same = run(triple, adapter, antiexpert={"model": triple["antiexpert"], "lora": str(adapter)})
    assert any("always zero" in sentence for sentence in same.notes)


def test_adapter_of_another_model_of_the_same_shapes_is_a_note(triple, adapter):
    edit_config(adapter, base_model_name_or_path="somebody/other")
    report = run(triple, adapter)
    assert report.problems == ()
    assert any("of expert says that it was trained on 'somebody/other'" in s for s in report.notes)
    edit_config(adapter, base_model_name_or_path="somebody/AntiExpert")  # the directory's name
    assert not any("trained on" in sentence for sentence in run(triple, adapter).notes)


def test_weights_that_are_not_inspected_are_a_note(triple, adapter):
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    report = run(triple, adapter)
    assert report.problems == ()
    assert any("(its weights were not inspected) merged" in sentence for sentence in report.notes)


def test_cached_hub_adapter_is_checked_without_the_network(triple, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--tuned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(adapter, repository / "snapshots" / ("0" * 40))
    report = run(triple, "somebody/tuned")
    assert report.problems == ()
    assert any("adapter `somebody/tuned` (rank 4, 4 modules)" in s for s in report.notes)


def test_random_weights_are_not_merged_into(triple):
    report = run(triple, "/no/such/adapter", engine={"load_format": "dummy"})
    assert report.problems == ()
    assert "expert runs without its adapter (`engine.load_format: dummy`)." in report.notes


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("/no/such/adapter", "no such directory; check the path"),
        ("~/adapter", "no such directory (`~` is not expanded); check the path"),
        ("somebody/none", "neither a local directory nor a model on the hub (HF_HUB_OFFLINE is"),
    ],
)
def test_missing_adapter(triple, lora, words):
    assert only_problem(run(triple, lora)).startswith(f"expert adapter `{lora}`: {words}")


def test_file_instead_of_directory(triple, adapter):
    file = adapter / "adapter_model.safetensors"
    assert only_problem(run(triple, file)) == (
        f"expert adapter `{file}`: it is a file; give the directory that holds adapter_config.json"
    )


def test_model_instead_of_an_adapter(triple):
    problem = only_problem(run(triple, triple["expert"]))
    assert problem == (
        f"expert adapter `{triple['expert']}`: the directory has no adapter_config.json; give one "
        "saved by PEFT"
    )


def test_adapter_instead_of_a_model(triple, adapter):
    problem = only_problem(check(ProxyConfig.parse({**triple, "expert": str(adapter)}, "test")))
    assert problem == (
        f"expert `{adapter}`: it is an adapter; give it as "
        "`{model: <the model it was trained on>, lora: <path>}`"
    )


def test_adapter_without_weights(triple, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert "the directory has no adapter_model.safetensors; save" in only_problem(
        run(triple, adapter)
    )


def test_adapter_cut_short(triple, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "adapter_model.safetensors: " in only_problem(run(triple, adapter))


def test_unsupported_kind(triple, adapter):
    edit_config(adapter, peft_type="IA3")
    problem = only_problem(run(triple, adapter))
    assert problem.startswith(f"expert adapter `{adapter}`: its `peft_type` is 'IA3', not 'LORA'")
    assert problem.endswith("and give the result as `model`")


def test_shapes_that_do_not_fit(triple, adapter, tmp_path):
    wide = str(write_model(tmp_path / "wide", seed=4, hidden_size=256, kv_heads=2))
    problem = only_problem(run(triple, adapter, expert={"model": wide, "lora": str(adapter)}))
    assert problem.startswith(f"expert adapter `{adapter}`: model.layers.0.self_attn.")
    assert "_proj needs a weight of [" in problem
    assert f"the one that it was trained on ('{triple['antiexpert']}', says" in problem
    config = ProxyConfig.parse({**triple, "expert": {"model": wide, "lora": str(adapter)}}, "test")
    with pytest.raises(ProxyConfigError, match="needs a weight of"):
        require_valid(config)


def test_stock_entry_points_refuse_it_too(triple, adapter, tmp_path):
    """`vllm serve` and `vllm.LLM` do not call `check`."""
    narrow = write_model(tmp_path / "narrow", seed=4, hidden_size=64, heads=2, kv_heads=2)
    expert = {"model": str(narrow), "lora": str(adapter)}
    config = ProxyConfig.parse({**triple, "expert": expert}, "test")
    with pytest.raises(ValueError, match=r"expert: adapter .* needs a weight of .*; give as"):
        vllm.EngineArgs(**config.engine_args()).create_engine_config()
    fitting = {"model": triple["antiexpert"], "lora": str(adapter)}
    config = ProxyConfig.parse({**triple, "expert": fitting}, "test")
    vllm.EngineArgs(**config.engine_args()).create_engine_config()


def test_modules_that_the_model_has_not(triple, tmp_path):
    deep = write_model(tmp_path / "deep", seed=5, layers=3, kv_heads=2)
    adapter = write_adapter(deep, tmp_path / "a", target_modules=["o_proj"])
    problem = only_problem(run(triple, adapter))
    assert (
        "the checkpoint lacks 1 of the 3 tensors that it changes: "
        "model.layers.2.self_attn.o_proj.weight; give as `model`"
    ) in problem


@pytest.mark.filterwarnings("ignore")  # PEFT's, on the same
def test_tied_embedding(triple, tmp_path):
    adapter = write_adapter(
        Path(triple["antiexpert"]), tmp_path / "a", target_modules=["embed_tokens"]
    )
    assert "one tensor for embedding and head (`tie_word_embeddings`); give a copy" in only_problem(
        run(triple, adapter)
    )


@pytest.fixture(scope="module")
def quantized(triple, tmp_path_factory) -> str:
    """The antiexpert with int8 weights, for which every CPU has a kernel."""
    root = tmp_path_factory.mktemp("quantized")
    path = write_quantized(Path(triple["antiexpert"]), root / "small", root / "twin", "w8a8")
    return str(path)


def test_the_adapter_of_a_quantized_model_is_added_to_its_layers(triple, adapter, quantized):
    expert = {"model": quantized, "lora": str(adapter)}
    report = run(triple, adapter, expert=expert, antiexpert=quantized)
    assert report.problems == ()
    assert [m.quantization for m in report.members] == [None, *["compressed-tensors"] * 2]
    assert (
        f"expert is `{quantized}` with the adapter `{adapter}` (rank 4, 4 modules) added to its "
        "layers, in one pass with the antiexpert."
    ) in report.notes


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "use the unquantized checkpoint, or the same model as antiexpert"),
        ({"antiexpert": None}, "use the unquantized checkpoint"),
        (
            {"antiexpert": "quantized", "one_pass": False},
            "use the unquantized checkpoint, or remove `one_pass: false`",
        ),
    ],
)
def test_nothing_is_merged_into_a_quantized_model(triple, adapter, quantized, changes, remedy):
    changes = {key: quantized if value == "quantized" else value for key, value in changes.items()}
    expert = {"model": quantized, "lora": str(adapter)}
    members = {role: path for role, path in triple.items() if changes.get(role, "") is not None}
    changes = {key: value for key, value in changes.items() if value is not None}
    problem = only_problem(run(members, adapter, **{"expert": expert, **changes}))
    assert problem == (
        f"expert {quantized!r}: it is quantized (compressed-tensors), and the adapter "
        f"{str(adapter)!r} cannot be merged into it; {remedy}"
    )


@pytest.mark.filterwarnings("ignore")  # PEFT's, on what it saves
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"use_dora": True},
            "does more than add products to linear layers (DoRA, biases, embeddings, "
            "modules_to_save) and must be merged, which a quantized model (compressed-tensors) "
            "does not allow; use the unquantized checkpoint",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "must be merged, which a quantized model (compressed-tensors) does not allow; use the "
            "unquantized checkpoint",
        ),
    ],
)
def test_an_adapter_that_must_be_merged_into_a_quantized_model(triple, tmp_path, options, words):
    plain = write_model(tmp_path / "plain", seed=4)
    lora = write_adapter(plain, tmp_path / "adapter", **{"target_modules": MODULES, **options})
    model = write_quantized(plain, tmp_path / "small", tmp_path / "twin", "w8a8")
    expert = {"model": str(model), "lora": str(lora)}
    problem = only_problem(run(triple, lora, expert=expert, antiexpert=str(model)))
    assert words in problem
    assert f"adapter `{lora}` " in problem


def test_an_adapter_of_other_sizes_than_the_quantized_model(triple, adapter, quantized):
    narrow = lambda t: {k: v[:, :-1].clone() for k, v in t.items() if "lora_A" in k}  # noqa: E731
    edit_weights(adapter, lambda tensors: tensors.update(narrow(tensors)))
    expert = {"model": quantized, "lora": str(adapter)}
    problem = only_problem(run(triple, adapter, expert=expert, antiexpert=quantized))
    assert "needs a weight of " in problem
    assert "give as `model` the one that it was trained on" in problem
