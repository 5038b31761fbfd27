"""Multimodal members are their text models: configs, names of tensors, bytes, adapters."""

import asyncio
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from vllm.renderers.chat_utils import parse_chat_messages_async

from support.checks import edit_tensors, engine_config, planned_shapes, run
from support.tiny_adapters import merged_by_peft, write_adapter
from support.tiny_models import CONTEXT, VOCAB_SIZE, write_model
from support.tiny_multimodal import IN_TEXT_MODEL, WHOLE, old_names, write_multimodal
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.lora import LoraAdapter
from vllm_proxy.members.text_part import text_names
from vllm_proxy.members.vllm_configs import member_vllm_config
from vllm_proxy.preflight.plan.read import read_all

DELTA_NETS = ("qwen3_5", "qwen3_5_moe")
SIZES = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: write_multimodal(root / family, family, seed=i, **SIZES)
        for i, family in enumerate(WHOLE)
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("plain") / "model", seed=9))


def text_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors outside the towers, as transformers names them within the text model."""
    model = AutoModelForImageTextToText.from_pretrained(path)
    named = model.named_parameters()
    found = {}
    for name, tensor in named:
        if "language_model." in name or name.startswith("lm_head."):
            name = name.rpartition("language_model.")[2]
            found[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"] = tensor
    return found


@pytest.mark.parametrize("family", WHOLE)
def test_figures_are_those_of_the_text_model(models, plain, family):
    """In `check` and in `plan`, as base and as expert."""
    path = str(models[family])
    size = sum(tensor.numel() for tensor in text_tensors(models[family]).values())
    dtype = "bfloat16" if family in DELTA_NETS else "float32"  # the only one of their kernel here
    report = run(dict.fromkeys(ROLES, path), engine={"dtype": dtype})
    assert report.problems == ()
    for member in report.members[:2]:
        assert member.parameters == size
        assert (member.vocabulary, member.context_length) == (VOCAB_SIZE, CONTEXT)
        assert member.dtype == "float32"
    config = ProxyConfig(base=path, expert=plain, antiexpert=plain, engine={"dtype": "float32"})
    base = planned_shapes(config)["base"]
    parts = base.layers, base.moe_weights, base.embedding, *(() if base.tied else (base.head,))
    assert sum(part.bytes for part in parts) == 4 * size


@pytest.mark.parametrize("family", WHOLE)
def test_an_engine_sees_no_images(models, plain, family):
    """It has one row of positions, and asks for no image processor, in any of its processes."""
    members = {"base": str(models[family]), "expert": plain, "antiexpert": plain}
    drafts = {} if family in DELTA_NETS else {"speculate": {"tokens": 2}}
    config = pickle.loads(pickle.dumps(engine_config({**members, **drafts})))
    model = config.model_config
    assert not model.uses_mrope
    assert not model.is_mm_prefix_lm
    assert not model.is_multimodal_model
    assert model.get_vocab_size() == VOCAB_SIZE
    if drafts:
        draft = config.speculative_config.draft_model_config
        assert draft.hf_config.text_of == family
        assert member_vllm_config(config, "base").model_config.architectures == draft.architectures


def test_a_text_model_alone_may_still_ask_for_mrope(plain, tmp_path):
    """Checkpoints that were saved from Qwen3.5's text model do."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    path = write_model(tmp_path, "qwen3_5_text", seed=3, layers=3, rope_parameters=rope)
    config = engine_config({"base": str(path), "expert": str(path), "antiexpert": plain})
    members = [member_vllm_config(config, role).model_config for role in ROLES]
    for model in (config.model_config, *members):
        assert not model.uses_mrope
        assert "mrope_section" not in model.hf_text_config.rope_parameters


def test_chunked_attention_shares_one_cache_group(models, plain):
    """vLLM could not look up its prefixes beside members whose keys have other sizes."""
    members = {"base": str(models["llama4"]), "expert": plain, "antiexpert": plain}
    assert engine_config(members).scheduler_config.disable_hybrid_kv_cache_manager is True
    with pytest.raises(ValueError, match=r"`disable_hybrid_kv_cache_manager` is False: the base"):
        engine_config(members, disable_hybrid_kv_cache_manager=False)


def test_each_member_has_compiled_graphs_of_its_own(models, plain):
    small = str(models["qwen3_vl"])
    config = engine_config({"base": plain, "expert": small, "antiexpert": small})
    pair = [member_vllm_config(config, role).model_config for role in ("expert", "antiexpert")]
    assert pair[0].compute_hash() != pair[1].compute_hash()


@pytest.mark.parametrize("family", [name for name in WHOLE if "_moe" not in name])
def test_tensors_have_their_names_in_the_text_model(models, family):
    """As transformers saves them, and as older checkpoints have them.

    It saves the experts of Qwen3.5 one by one, and those of Qwen3-VL transposed, and has them as
    one tensor: they are loaded in `test_exactness.py` and `test_images.py`.
    """
    wanted = text_tensors(models[family])
    saved = load_file(models[family] / "model.safetensors")
    for tensors in (saved, old_names(saved)):
        found = dict(text_names().apply(tensors.items()))
        found = {
            name: tensor for name, tensor in found.items() if name in wanted or "scalar" not in name
        }
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_scales_have_the_names_of_layers():
    """As in vLLM's class for Mistral 3; in other families such a scale is one of blocks."""
    layer = "language_model.model.layers.0.mlp.up_proj"
    scale = f"{layer}.weight_scale_inv"
    own = scale.removeprefix("language_model.")
    assert text_names("mistral3").map_name(scale) == own.removesuffix("_inv")
    assert text_names("qwen3_vl").map_name(scale) == own


def test_what_is_missing_is_named(models, plain, tmp_path):
    """Unless it is a tower's: those are not loaded."""
    copy = tmp_path / "copy"
    shutil.copytree(models["qwen3_vl"], copy)

    def without(part: str) -> tuple[str, ...]:
        edit_tensors(lambda tensors: [tensors.pop(n) for n in [*tensors] if part in n])(copy)
        return run({"base": plain, "expert": str(copy), "antiexpert": plain}).problems

    assert without("visual.") == ()
    (problem,) = without("layers.1.mlp.up_proj")
    assert "1 tensor that the architecture needs not in the checkpoint: model.layers.1" in problem


def test_a_config_without_parts(models, plain, tmp_path):
    """Qwen2.5-VL's checkpoints say what the text model is at the top of config.json."""
    copy = tmp_path / "copy"
    shutil.copytree(models["qwen2_5_vl"], copy)
    path = copy / "config.json"
    values = json.loads(path.read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "model_type": values["model_type"]}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps({**text, **values}))
    reports = [
        run({"base": plain, "expert": str(model), "antiexpert": plain})
        for model in (copy, models["qwen2_5_vl"])
    ]
    assert [report.problems for report in reports] == [(), ()]
    members = [report.members[ROLES.index("expert")] for report in reports]
    assert members[0].parameters == members[1].parameters


def test_an_image_is_refused_before_it_is_fetched(models, plain):
    config = engine_config({"base": str(models["qwen3_vl"]), "expert": plain, "antiexpert": plain})
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    messages = [{"role": "user", "content": content}]
    parse = parse_chat_messages_async(messages, config.model_config, content_format="openai")
    with pytest.raises(ValueError, match=r"is not a multimodal model$"):
        asyncio.run(parse)


class TestAdapters:
    """Trained on the whole multimodal model."""

    def test_fit_the_text_model(self, models, plain, tmp_path):
        small = str(models["qwen3_vl"])
        path = write_adapter(Path(small), tmp_path / "adapter", target_modules=IN_TEXT_MODEL)
        merged_by_peft(Path(small), path).save_pretrained(tmp_path / "merged")
        wanted = text_tensors(tmp_path / "merged")
        expert = {"model": small, "lora": str(path)}
        assert run({"base": plain, "expert": expert, "antiexpert": plain}).problems == ()
        config = ProxyConfig(base=plain, expert=small, antiexpert=plain)
        text = read_all(config)["expert"].model_config.hf_text_config
        saved = load_file(Path(small) / "model.safetensors")
        merged = LoraAdapter.read(str(path)).merge(saved.items(), text)
        merged = dict(text_names().apply(merged))
        assert merged.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(merged[name], tensor)

    def test_of_a_tower_are_refused(self, models, plain, tmp_path):
        layers = r".*visual.*\.linear_fc1"
        path = write_adapter(models["qwen3_vl"], tmp_path / "adapter", target_modules=layers)
        expert = {"model": str(models["qwen3_vl"]), "lora": str(path)}
        (problem,) = run({"base": plain, "expert": expert, "antiexpert": plain}).problems
        assert "the checkpoint lacks" in problem
        assert "visual.blocks.0.mlp.linear_fc1" in problem
        with pytest.raises(ValueError, match=r"lacks 3 of the 3 tensors .*visual"):
            engine_config({"base": plain, "expert": expert, "antiexpert": plain})
