"""What we lean on in vLLM is there, and a version without it fails by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import vllm

from support.tiny_makes import give_head
from support.tiny_models import write_model
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ARCHITECTURE, ProxyConfig
from vllm_proxy.engine import compatibility
from vllm_proxy.members import vllm_configs as seams
from vllm_proxy.plugin import register
from vllm_proxy.preflight.check.run import check


def test_installed_vllm_has_every_seam():
    compatibility.require_supported_vllm()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0"])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ProxyConfigError, match=rf"vllm {version} .*>= 0\.32, < 0\.34"):
        compatibility.require_supported_vllm()


@pytest.mark.parametrize(
    "seam",
    [
        "vllm.nowhere:x",
        "vllm.config:ModelConfig.no_such_field",
        "vllm:LLM.no_such_attribute",
    ],
)
def test_missing_seam_is_named(monkeypatch, seam):
    monkeypatch.setattr(compatibility, "SEAMS", {**compatibility.SEAMS, seam: ()})
    with pytest.raises(ProxyConfigError, match=f"has no `{seam}`"):
        compatibility.require_supported_vllm()


@pytest.mark.parametrize(
    "seam",
    ["vllm:EngineArgs", "vllm:SamplingParams", "vllm:LLM.enqueue", "vllm.config:ModelConfig"],
)
def test_missing_parameter_is_named(monkeypatch, seam):
    monkeypatch.setattr(
        compatibility,
        "SEAMS",
        {**compatibility.SEAMS, seam: (*compatibility.SEAMS[seam], "no_such")},
    )
    with pytest.raises(ProxyConfigError, match=f"`{seam}` has no parameter `no_such`"):
        compatibility.require_supported_vllm()


def test_registering_again_changes_nothing():
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register()
    before = dict(MODELS_CONFIG_MAP), set(ModelRegistry.get_supported_archs())
    register()
    assert (dict(MODELS_CONFIG_MAP), set(ModelRegistry.get_supported_archs())) == before
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()


def test_members_keep_what_belongs_to_their_checkpoints(members, tmp_path):
    """Quantization of the base is the base's alone; graphs are cached under names of their own."""
    quantized = Path(shutil.copytree(members["base"], tmp_path / "quantized"))
    path = quantized / "config.json"
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": []}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))
    engine = {"dtype": "float32", "max_model_len": 128}
    values = {**members, "base": str(quantized), "antiexpert": members["expert"], "engine": engine}
    args = ProxyConfig.parse(values, "test").engine_args()
    parent = vllm.EngineArgs(**args).create_engine_config()
    configs = {role: seams.member_vllm_config(parent, role) for role in ROLES}
    names = {
        role: config.quant_config and config.quant_config.get_name()
        for role, config in configs.items()
    }
    assert names == {"base": "compressed-tensors", "expert": None, "antiexpert": None}
    models = {role: config.model_config for role, config in configs.items()}
    assert [models[role].max_model_len for role in ROLES] == [128, 128, 128]
    assert {models[role].architecture for role in ROLES} == {"LlamaForCausalLM"}
    assert models["base"].get_hidden_size() == 256
    assert models["expert"].get_hidden_size() == 128
    # Expert and antiexpert are one checkpoint here, and still two compiled graphs.
    assert len({models[role].compute_hash() for role in ROLES}) == 3


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_head_is_tied_as_in_the_checkpoint(members, tmp_path, load_format):
    """Whatever its config says, unless no checkpoint is read; a copy takes no memory of its own."""
    paths = {role: Path(shutil.copytree(members["expert"], tmp_path / role)) for role in ROLES}
    give_head(paths["base"])
    give_head(paths["expert"])
    give_head(paths["antiexpert"], copy=True)
    engine = {"dtype": "float32", "load_format": load_format}
    config = ProxyConfig.parse({**{r: str(p) for r, p in paths.items()}, "engine": engine}, "test")
    parent = vllm.EngineArgs(**config.engine_args()).create_engine_config()
    models = {role: seams.member_vllm_config(parent, role).model_config for role in ROLES}
    tied = {role: model.hf_text_config.tie_word_embeddings for role, model in models.items()}
    own = load_format == "auto"
    assert tied == {"base": not own, "expert": not own, "antiexpert": True}
    report = check(config)
    assert {member.role: member.tied for member in report.members} == tied
    said = [sentence for sentence in report.notes if "a separate head, which is used" in sentence]
    assert [sentence.split()[0] for sentence in said] == (["base", "expert"] if own else [])


def test_width_of_the_fused_head_is_part_of_compiled_graphs(members):
    """An embedding tied to a head is read with the stride of all members' heads together."""
    parent = vllm.EngineArgs(**ProxyConfig.parse(members, "test").engine_args())
    config = seams.member_vllm_config(parent.create_engine_config(), "expert")
    hashes = set()
    for width in (512, 768):
        config.model_config.hf_config.proxy_head_width = width
        hashes.add(config.compute_hash())
    assert len(hashes) == 2


def test_members_keep_their_own_windows(tmp_path):
    """vLLM keeps a window of all layers beside the model, where the base's is."""
    windows = {"base": 24, "expert": 48, "antiexpert": None}
    paths = {
        "base": write_model(tmp_path / "base", "mistral", seed=0, sliding_window=24),
        "expert": write_model(tmp_path / "expert", "mistral", seed=1, sliding_window=48),
        "antiexpert": write_model(tmp_path / "antiexpert", "llama", seed=2),
    }
    triple = {role: str(path) for role, path in paths.items()}
    parent = vllm.EngineArgs(**ProxyConfig.parse(triple, "test").engine_args())
    parent = parent.create_engine_config()
    configs = {role: seams.member_vllm_config(parent, role) for role in ROLES}
    assert {role: c.cache_config.sliding_window for role, c in configs.items()} == windows


def test_strength_is_no_part_of_compiled_graphs(members):
    """Another alpha finds the graphs of the last one."""
    hashes = []
    for alpha in (0.5, 1.0):
        config = ProxyConfig.parse({**members, "alpha": alpha}, "test")
        parent = vllm.EngineArgs(**config.engine_args()).create_engine_config()
        hashes.append([seams.member_vllm_config(parent, role).compute_hash() for role in ROLES])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("cores", "given", "reserved"),
    [(4, None, "0"), (5, None, None), (2, "1", "1"), (None, None, "0")],
)
def test_few_cpu_cores_are_all_given_to_workers(monkeypatch, members, cores, given, reserved):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", given or "")
    if given is None:
        monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU")
    config = ProxyConfig(**members, engine={"dtype": "float32", "max_model_len": 64})
    vllm.EngineArgs(**config.engine_args()).create_engine_config()
    # Not `vllm.envs`, which an engine that another test started in this process has made a cache.
    assert os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU") == reserved
