"""Merging an adapter gives what PEFT's own `merge_and_unload` gives, for every tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from support.tiny_adapters import (
    edit_config,
    edit_weights,
    load_model,
    merged_by_peft,
    write_adapter,
)
from support.tiny_models import VOCAB_SIZE, write_model
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.members.lora import LoraAdapter

HIDDEN = 64
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]  # attention's c_proj is square

# What is tested -> the model's family and PEFT's configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ATTENTION + MLP}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION + MLP,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
            "alpha_pattern": {"o_proj": 32, "layers.0.self_attn.q_proj": 5},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    ),
    "one layer": ("llama", {"target_modules": MLP, "layers_to_transform": [1]}),
    "dora": ("llama", {"target_modules": ATTENTION + MLP, "use_dora": True}),
    "dora with rslora": (
        "llama",
        {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True},
    ),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora of an embedding": (
        "llama",
        {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True},
    ),
    "modules to save": (
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "trained biases": ("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "biases of what is adapted": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained tokens": (
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [9, 5, 511]},
    ),
    "trained tokens of both": (
        "llama",
        {
            "target_modules": ATTENTION,
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]},
        },
    ),
    "trained tokens of a tied head": (
        "tied",
        {"target_modules": MLP, "trainable_token_indices": [5, 9]},
    ),
    "trained tokens of gpt2": (
        "gpt2",
        {"target_modules": CONV1D, "fan_in_fan_out": True, "trainable_token_indices": [3]},
    ),
    "tied head": ("tied", {"target_modules": ATTENTION + MLP}),
    "conv1d": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    # PEFT notes in the adapter that weights are not transposed: the last module decides.
    "conv1d and a linear head": ("gpt2", {"target_modules": [*CONV1D, "lm_head"]}),
    "square conv1d and a linear head": (
        "gpt2",
        {"target_modules": r".*\.attn\.c_proj|lm_head", "fan_in_fan_out": True},
    ),
    "dora of conv1d": (
        "gpt2",
        {"target_modules": CONV1D, "fan_in_fan_out": True, "use_dora": True},
    ),
    "embeddings of gpt2": ("gpt2", {"target_modules": ["wte", "wpe"]}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One float32 checkpoint a family."""
    root = tmp_path_factory.mktemp("models")
    small = {"hidden_size": HIDDEN, "heads": 4, "kv_heads": 2}
    gpt2 = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=32,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(gpt2, dtype=torch.float32).save_pretrained(root / "gpt2")
    return {
        "llama": write_model(root / "llama", "llama", seed=0, **small),
        "qwen2": write_model(root / "qwen2", "qwen2", seed=1, **small),
        "tied": write_model(root / "tied", "llama", seed=2, tied=True, **small),
        "gpt2": root / "gpt2",
    }


def checkpoint(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def merged_by_us(
    model: Path, adapter: Path, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    weights = (checkpoint(model) if tensors is None else tensors).items()
    return dict(LoraAdapter.read(str(adapter)).merge(weights, AutoConfig.from_pretrained(model)))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


# -- what is supported -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # PEFT's, on what it saves and how it transposes
@pytest.mark.parametrize(("family", "config"), VARIANTS.values(), ids=VARIANTS)
def test_merge_is_pefts(models, tmp_path, family, config):
    model = models[family]
    adapter = write_adapter(model, tmp_path / "adapter", **config)
    before, theirs = checkpoint(model), merged_by_peft(model, adapter).state_dict()
    ours = merged_by_us(model, adapter)
    assert [*ours] == [*before]
    assert theirs.keys() - ours.keys() == ({"lm_head.weight"} if family == "tied" else set())
    assert_same(ours, theirs)
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == len(LoraAdapter.read(str(adapter))._targets())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "config"), VARIANTS.values(), ids=VARIANTS)
def test_merge_is_on_the_device_of_the_weights(models, tmp_path, family, config):
    """Where vLLM's fast loaders put them; torch rejects operands on two devices, as on a GPU."""
    adapter = write_adapter(models[family], tmp_path / "adapter", **config)
    elsewhere = {name: tensor.to("meta") for name, tensor in checkpoint(models[family]).items()}
    ours = merged_by_us(models[family], adapter, elsewhere)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in elsewhere.items()
    }
    assert {tensor.device.type for tensor in ours.values()} == {"meta"}


def test_merge_is_in_float32_and_leaves_other_tensors_alone(models, tmp_path):
    adapter = write_adapter(models["llama"], tmp_path / "a", target_modules=["q_proj"])
    half = {name: tensor.bfloat16() for name, tensor in checkpoint(models["llama"]).items()}
    ours = merged_by_us(models["llama"], adapter, half)
    model = load_model(models["llama"]).bfloat16().float()
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, tensor in ours.items():
        if name.endswith("q_proj.weight"):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)
        else:
            assert tensor is half[name]


def test_merged_in_another_order_and_twice(models, tmp_path):
    adapter = LoraAdapter.read(str(write_adapter(models["llama"], tmp_path / "a", r=3)))
    config = AutoConfig.from_pretrained(models["llama"])
    weights = checkpoint(models["llama"])
    first = dict(adapter.merge(weights.items(), config))
    second = dict(adapter.merge(reversed(weights.items()), config))
    assert_same(second, first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoint_of_the_bare_decoder(models, tmp_path, family):
    modules = {"llama": ATTENTION, "gpt2": CONV1D}[family]
    model = models[family]
    adapter = write_adapter(
        model, tmp_path / "a", target_modules=modules, fan_in_fan_out=family == "gpt2"
    )
    prefix = {"llama": "model.", "gpt2": "transformer."}[family]
    bare = {name.removeprefix(prefix): tensor for name, tensor in checkpoint(model).items()}
    ours = merged_by_us(model, adapter, bare)
    theirs = merged_by_peft(model, adapter).state_dict()
    assert_same(ours, {name.removeprefix(prefix): tensor for name, tensor in theirs.items()})


def test_pickled_adapter(models, tmp_path):
    adapter = write_adapter(models["llama"], tmp_path / "a", target_modules=MLP)
    theirs = merged_by_peft(models["llama"], adapter).state_dict()
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    shapes = LoraAdapter.read(str(adapter), device="meta").shapes
    file.unlink()
    assert_same(merged_by_us(models["llama"], adapter), theirs)
    assert LoraAdapter.read(str(adapter), device="meta").shapes == shapes


def test_relative_path(models, tmp_path, monkeypatch):
    write_adapter(models["llama"], tmp_path / "a", target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    assert LoraAdapter.read("a").modules.keys() == LoraAdapter.read("./a").modules.keys()


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def adapter(models, tmp_path) -> Path:
    return write_adapter(models["llama"], tmp_path / "adapter", target_modules=ATTENTION)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ProxyConfigError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{error.value.field}: ")
    assert error.value.field.startswith("adapter `")
    assert message.endswith(f"; {error.value.remedy}")
    return message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LOHA"}, "`peft_type` is 'LOHA', not 'LORA'"),
        ({"peft_type": None}, "`peft_type` is None"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "`target_parameters` is ['experts"),
        ({"use_bdlora": {"nblocks": 2}}, "`use_bdlora` is {'nblocks': 2}"),
        ({"use_qalora": True}, "`use_qalora` is True"),
        ({"kasa_config": {"beta": 1}}, "`kasa_config` is {'beta': 1}"),
        ({"use_tomorrow": True}, "`use_tomorrow` is True, which is not supported"),
        ({"r": 0}, "must be a positive integer, got 0"),
        ({"r": "4"}, "adapter_config.json"),
    ],
)
def test_unsupported_kind(adapter, values, words):
    edit_config(adapter, **values)
    message = refusal(lambda: LoraAdapter.read(str(adapter)))
    assert words in message
    assert "merge it into its model with PEFT" in message


def test_initial_weights_that_leave_the_model_alone(models, tmp_path, adapter):
    before = merged_by_us(models["llama"], adapter)
    edit_config(adapter, init_lora_weights="gaussian", loftq_config={"loftq_bits": 4})
    assert_same(merged_by_us(models["llama"], adapter), before)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: (p / "adapter_config.json").unlink(), "has no adapter_config.json; give one"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "adapter_config.json").write_text("[]"), "is not a JSON object"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (
            lambda p: (p / "adapter_model.safetensors").write_bytes(b"x" * 20),
            "adapter_model.safetensors cannot be read",
        ),
        (
            lambda p: (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"),
            "adapter_model.bin cannot be read",
        ),
        (lambda p: edit_weights(p, dict.clear), "its file has no tensors"),
    ],
)
def test_broken_adapter(adapter, break_it, words):
    break_it(adapter)
    assert words in refusal(lambda: LoraAdapter.read(str(adapter)))


@pytest.mark.parametrize("location", ["/no/such/adapter", "nobody/none"])
def test_missing_adapter(monkeypatch, location):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(lambda: LoraAdapter.read(location))
    assert message.startswith(f"adapter `{location}`: it is neither a local directory nor on the")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.pop(f"{Q0}.lora_B.weight"),
            "layers.0.self_attn.q_proj does not have the tensors",
        ),
        (
            lambda t: t.pop(f"{Q0}.lora_A.weight"),
            "layers.0.self_attn.q_proj does not have the tensors",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(HIDDEN)}),
            "layers.0.self_attn.q_proj does not have the tensors",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(3, HIDDEN)}),
            "q_proj has tensors of [3, 64] and [64, 4], which is not a LoRA of a matrix of rank 4; "
            "use the adapter_config.json that belongs",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, HIDDEN, 1)}),
            "q_proj has tensors of [4, 64, 1] and [64, 4]",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_diag": torch.ones(4)}),
            f"its tensor {Q0}.lora_diag is of an unknown kind",
        ),
    ],
)
def test_tensors_that_are_no_lora(adapter, edit, words):
    edit_weights(adapter, edit)
    assert words in refusal(lambda: LoraAdapter.read(str(adapter)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([5], "`trainable_token_indices` [5]; use the adapter_config.json that belongs"),
        (None, "`trainable_token_indices` None"),
        ({"lm_head": [5, 9]}, "`trainable_token_indices` None"),
        ([5, -1], "`trainable_token_indices` [5, -1]"),
        ([5, "x"], "`trainable_token_indices` [5, 'x']"),
    ],
)
def test_trained_tokens_that_are_not_the_configs(models, tmp_path, given, words):
    adapter = write_adapter(
        models["llama"], tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[5, 9]
    )
    edit_config(adapter, trainable_token_indices=given)
    message = refusal(lambda: LoraAdapter.read(str(adapter)))
    assert "model.embed_tokens has trained tokens of [2, 64]" in message
    assert words in message


def test_trained_tokens_that_the_model_lacks(models, tmp_path):
    larger = write_model(
        tmp_path / "larger", seed=6, hidden_size=HIDDEN, kv_heads=2, vocab_size=VOCAB_SIZE + 8
    )
    adapter = write_adapter(
        larger, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[5, 515]
    )
    message = refusal(lambda: merged_by_us(models["llama"], adapter))
    assert "embed_tokens needs a weight of [516, 64], and the checkpoint has [512, 64]" in message


def test_dora_without_magnitudes(models, adapter):
    edit_config(adapter, use_dora=True)
    assert "does not have the tensors" in refusal(lambda: LoraAdapter.read(str(adapter)))


def test_adapter_of_a_wider_model(models, tmp_path, adapter):
    wide = write_model(tmp_path / "wide", seed=4, hidden_size=2 * HIDDEN, heads=4, kv_heads=2)
    message = refusal(lambda: merged_by_us(wide, adapter))
    assert "layers.0.self_attn.k_proj needs a weight of [32, 64]" in message
    assert "the checkpoint has [64, 128]" in message
    assert f"give as `model` the one that it was trained on ('{models['llama']}'," in message


def test_shapes_are_not_swapped_where_no_layer_is_conv1d(models, tmp_path):
    """Only GPT-2 keeps its matrices transposed: elsewhere a transposed one is a wrong one."""
    adapter = write_adapter(models["llama"], tmp_path / "a", target_modules=["down_proj"])
    name = "model.layers.0.mlp.down_proj.weight"
    weights = checkpoint(models["llama"])
    weights[name] = weights[name].T
    message = refusal(lambda: merged_by_us(models["llama"], adapter, weights))
    assert "needs a weight of [64, 128], and the checkpoint has [128, 64]" in message


def test_adapter_of_a_deeper_model(models, tmp_path):
    deep = write_model(tmp_path / "deep", seed=5, hidden_size=HIDDEN, layers=3, kv_heads=2)
    adapter = write_adapter(deep, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    message = refusal(lambda: merged_by_us(models["llama"], adapter))
    assert (
        "the checkpoint lacks 2 of the 6 tensors that it changes: "
        "model.layers.2.self_attn.q_proj.weight, model.layers.2.self_attn.v_proj.weight; give as "
    ) in message


def test_bias_where_the_model_has_none(models, tmp_path):
    adapter = write_adapter(
        models["qwen2"], tmp_path / "a", target_modules=["q_proj"], lora_bias=True
    )
    message = refusal(lambda: merged_by_us(models["llama"], adapter))
    assert "2 of the 4 tensors" in message
    assert "q_proj.bias" in message


@pytest.mark.filterwarnings("ignore")  # transformers', on what is resized
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_resized_embedding(models, tmp_path, family):
    """The model that it was trained on is the one that was given; the remedy makes a larger one."""
    resized = load_model(models[family])
    resized.resize_token_embeddings(VOCAB_SIZE + 8)
    adapter = tmp_path / "a"
    get_peft_model(resized, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    message = refusal(lambda: merged_by_us(models[family], adapter))
    assert "it was trained with 520 rows of " in message
    assert ".weight, and the model has 512: its vocabulary was resized; with PEFT" in message
    assert "`resize_token_embeddings(520)`, merge the adapter, and give the result" in message
    assert "give as `model` the one" not in message


@pytest.mark.filterwarnings("ignore")  # PEFT's, on the same
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        (
            {
                "target_modules": ["q_proj"],
                "trainable_token_indices": {"embed_tokens": [5], "lm_head": [7]},
            },
            "lm_head",
        ),
    ],
)
def test_tied_embedding(models, tmp_path, config, name):
    adapter = write_adapter(models["tied"], tmp_path / "a", **config)
    message = refusal(lambda: merged_by_us(models["tied"], adapter))
    assert f"{name}.weight, and the model has one tensor for embedding and head" in message
    assert "give a copy of the model that has two" in message
