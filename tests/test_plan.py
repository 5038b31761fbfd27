"""`plan`: Llama-2's figures by hand, what is copied and what is split, layouts, every refusal."""

import json
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig
from typer.testing import CliRunner

from support.quantized import write_quantized
from support.tiny_adapters import write_adapter
from support.tiny_models import write_model
from vllm_proxy.cli.app import app
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.attention import NO_ATTENTION, Attention
from vllm_proxy.preflight.plan import GPUS, Demand, Plan, as_record, plan
from vllm_proxy.preflight.plan.cost import EngineSettings, Load, Time, step, total
from vllm_proxy.preflight.plan.hardware import BatchLimits, Hardware, Link
from vllm_proxy.preflight.plan.launches import CAPTURED, captured
from vllm_proxy.preflight.plan.layout import Layout, layouts
from vllm_proxy.preflight.plan.memory import activation_bytes, request_bytes, room
from vllm_proxy.preflight.plan.pages import state_blocks
from vllm_proxy.preflight.plan.plan import possible
from vllm_proxy.preflight.plan.predict import (
    Choice,
    Prediction,
    best_latency,
    best_throughput,
    choose,
)
from vllm_proxy.preflight.plan.quantized import bits_per_weight
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes
from vllm_proxy.preflight.plan.roofline import Roofline, measure
from vllm_proxy.preflight.plan.shape import Shape, WeightSize

GIB, KIB = 2**30, 2**10
LLAMA_2 = {  # hidden, intermediate, layers, heads, KV heads
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}
KV_BYTES = {"7b": 512 * KIB, "13b": 800 * KIB, "70b": 320 * KIB}
EMBEDDING = {name: 32000 * shape[0] for name, shape in LLAMA_2.items()}


def activations(ranks: int, tokens: int) -> float:
    """Bytes of a step of Llama-2-70B and two 7B in float16: all hidden states, and the widest MLP.

    The logits of so many requests, two of 1024 x 32000 in float32, are less.
    """
    return 2 * tokens * (8192 + 2 * 4096 + 2 * 8192 + 3 * 28672 / ranks)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory) -> dict[str, str]:
    """Directories with the configs of Llama-2's models, and nothing else."""
    root = tmp_path_factory.mktemp("llama2")
    for name, (hidden, intermediate, layers, heads, kv_heads) in LLAMA_2.items():
        LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            architectures=["LlamaForCausalLM"],
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            dtype="float16",
        ).save_pretrained(root / name)
    return {name: str(root / name) for name in LLAMA_2}


def config_of(paths: dict[str, str], base: str = "70b", **engine: Any) -> ProxyConfig:
    members = {"base": paths[base], "expert": paths["7b"], "antiexpert": paths["7b"]}
    return ProxyConfig.parse({**members, "engine": engine}, "test")


def read(config: ProxyConfig) -> tuple[list[Shape], EngineSettings]:
    members = read_all(config)
    engine = read_engine(config, members)
    return read_shapes(config, members, engine), engine


def shapes_of(path: Path, **engine: Any) -> Shape:
    """Return the shape of one model, as base and expert."""
    values = {"base": str(path), "expert": str(path), "engine": engine}
    return read(ProxyConfig.parse(values, "test"))[0][0]


def save_config(path: Path, family: str, **values: Any) -> Path:
    """Write the config.json of a small model, and no weights."""
    config = AutoConfig.for_model(
        family, **{"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512, **values}
    )
    classes = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}
    config.architectures = [classes.get(family, f"{family.capitalize()}ForCausalLM")]
    config.save_pretrained(path)
    return path


# -- what members are ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["13b", "70b"])
def test_llama_2_is_as_large_as_is_known(llama2, base):
    shapes, engine = read(config_of(llama2, base))
    assert (engine.dtype, engine.itemsize, engine.kv_itemsize) == ("float16", 2, 2)
    for shape, name in zip(shapes, (base, "7b", "7b"), strict=True):
        assert shape.parameters == PARAMETERS[name]
        assert shape.weight_bytes == 2 * PARAMETERS[name]
        assert shape.kv_numbers() * engine.kv_itemsize == KV_BYTES[name]
        assert shape.embedding == shape.head == WeightSize(EMBEDDING[name], 2 * EMBEDDING[name])
        assert shape.active_parameters == PARAMETERS[name] - EMBEDDING[name]
        assert not shape.tied
        assert shape.context == 4096


def test_dtypes_are_the_engines(llama2):
    shapes, engine = read(config_of(llama2, dtype="float32", gpu_memory_utilization=0.5))
    assert shapes[0].weight_bytes == 4 * PARAMETERS["70b"]
    assert (engine.itemsize, engine.kv_itemsize, engine.utilization) == (4, 4, 0.5)
    _, engine = read(config_of(llama2, kv_cache_dtype="fp8", kv_cache_memory_bytes=GIB))
    assert (engine.itemsize, engine.kv_itemsize, engine.kv_cache_bytes) == (2, 1, GIB)


def test_a_tied_embedding_is_kept_once_and_read(tmp_path):
    shapes = {
        tied: shapes_of(
            save_config(
                tmp_path / str(tied), "llama", num_hidden_layers=2, tie_word_embeddings=tied
            )
        )
        for tied in (True, False)
    }
    assert shapes[False].parameters - shapes[True].parameters == 512 * 64
    assert shapes[True].active_parameters == shapes[False].active_parameters
    one, two = Layout(), Layout(pp=2)
    assert shapes[True].gpu_weight_bytes(one, 0) == shapes[True].weight_bytes
    # on two stages, both need it
    on_two = sum(shapes[True].gpu_weight_bytes(two, stage) for stage in (0, 1))
    assert on_two == shapes[False].weight_bytes


def test_experts_are_told_from_what_every_token_meets(tmp_path):
    layers, experts, width = 3, 8, 128
    path = save_config(
        tmp_path / "moe",
        "mixtral",
        num_hidden_layers=layers,
        intermediate_size=width,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    shape = shapes_of(path, dtype="bfloat16")
    of_experts = layers * experts * 3 * 64 * width
    assert shape.moe_weights == WeightSize(of_experts, 2 * of_experts)
    rest = layers * (2 * 64 * 64 + 2 * 64 * 32 + 64 * experts + 2 * 64) + 64
    assert shape.layers == WeightSize(rest, 2 * rest)
    assert shape.active_parameters == rest + of_experts / 4 + 512 * 64
    # One token reads the two that it picks; two read 2 + 2 - 4/8 on average; very many read all.
    assert shape.touched_moe_bytes(1) == pytest.approx(shape.moe_weights.bytes * 2 / 8)
    assert shape.touched_moe_bytes(2) == pytest.approx(shape.moe_weights.bytes * 3.5 / 8)
    assert shape.touched_moe_bytes(1000) == pytest.approx(shape.moe_weights.bytes)


def test_windows_bound_the_cache_layer_by_layer(tmp_path):
    path = save_config(
        tmp_path / "gemma",
        "gemma2",
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        intermediate_size=128,
    )
    shape = shapes_of(path)
    assert [layer.window for layer in shape.attention] == [32, None, 32, None]
    a_token = 2 * 2 * 16
    assert shape.gpu_kv_numbers(Layout(), 0, 100, windows=True) == a_token * 2 * (32 + 100)
    assert shape.gpu_kv_numbers(Layout(), 0, 100, windows=False) == a_token * 4 * 100
    # Beside full attention, vLLM keeps all of it if its hybrid manager is off.
    config = {"base": str(path), "expert": str(path)}
    off = {"engine": {"disable_hybrid_kv_cache_manager": True}}
    assert read(ProxyConfig.parse(config, "test"))[1].windows
    assert not read(ProxyConfig.parse({**config, **off}, "test"))[1].windows


def test_layers_in_one_group_keep_the_largest_window(tmp_path):
    """With drafts, and members of several windows; attention has each layer's own."""
    paths = {
        role: str(save_config(tmp_path / role, "mistral", num_hidden_layers=2, sliding_window=size))
        for role, size in (("base", 32), ("expert", 64))
    }
    apart, alone = read(ProxyConfig.parse(paths, "test"))
    together, drafting = read(ProxyConfig.parse({**paths, "speculate": {"tokens": 2}}, "test"))
    assert (alone.window, drafting.window) == (None, 64)
    assert drafting.windows
    a_token = 2 * 2 * (2 * 8 * 16)  # bytes in two layers
    of_two = [request_bytes([one], Layout(), 0, 100, alone) for one in apart]
    assert of_two == [a_token * 32, a_token * 64]
    of_two = [request_bytes([one], Layout(), 0, 100, drafting) for one in together]
    assert of_two == [a_token * 64] * 2


@pytest.mark.parametrize("method", ["gptq", "w8a8"])
def test_quantized_weights_are_as_large_as_their_files_say(tmp_path, method):
    source = write_model(tmp_path / "source", seed=0, hidden_size=128)
    path = write_quantized(source, tmp_path / "quantized", tmp_path / "twin", method)
    shape = shapes_of(path, dtype="bfloat16")
    plain = shapes_of(source, dtype="bfloat16")
    linear = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    bits = {"gptq": 4, "w8a8": 8}[method]
    assert shape.parameters == plain.parameters
    assert shape.embedding == plain.embedding
    assert shape.head == plain.head
    stored = 0
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.startswith(("model.layers.", "model.norm.")):
            norm = name.endswith("norm.weight")  # in the engine's dtype, not the file's
            stored += 2 * tensor.numel() if norm else tensor.nbytes
    assert shape.layers.bytes == stored
    # weights, and less than a third as much for scales, zeros, indices and norms
    assert linear * bits / 8 < stored < 1.3 * linear * bits / 8
    for file in path.glob("*.safetensors"):  # the same, by config.json alone
        file.unlink()
    by_config = shapes_of(path, dtype="bfloat16").layers.bytes
    assert by_config == pytest.approx(stored, rel=0.1)
    assert by_config != stored


@pytest.mark.parametrize(
    ("section", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, 4 + 16 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 4 + 20 / 64),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 8, "group_size": None}}},
            },
            8,
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
        ({"quant_method": "new"}, None),
    ],
)
def test_bits_by_config(section, bits):
    assert bits_per_weight(section) == bits


# -- what a GPU holds ------------------------------------------------------------------------------


def made(role: str = "base", layers: int = 4, **changes: Any) -> Shape:
    """A member of round numbers: 100 bytes of layers each, 10 of embedding and of head."""
    values = {
        "role": role,
        "model": role,
        "hidden_size": 8,
        "vocab_size": 16,
        "context": 4096,
        "attention": (Attention(heads=8, kv_heads=4, head_size=2),) * layers,
        "layers": WeightSize(50 * layers, 100 * layers),
        "embedding": WeightSize(5, 10),
        "head": WeightSize(5, 10),
    }
    return Shape(**{**values, **changes})


ENGINE = EngineSettings("bfloat16", itemsize=2, kv_itemsize=2)


def gpu(memory: float = 1e6, bandwidth: float = 1.0, flops: float = 1e9, **link: float) -> Hardware:
    links = Link("wire", **{"bytes_per_second": 1e9, "latency": 0.0, **link})
    return Hardware("GPU", memory, Roofline(bandwidth, flops), links, workspace=0.0)


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_kv_heads_are_split_and_then_copied(tp, heads):
    kv = made().gpu_kv_numbers(Layout(tp), 0, tokens=3, windows=True)
    assert kv == 4 * 3 * 2 * heads * 2
    assert made().gpu_weight_bytes(Layout(tp), 0) == 420 / tp


def test_latent_keys_are_on_every_rank():
    latent = (Attention(heads=8, kv_heads=1, head_size=576, latent=True),) * 2
    shape = made(attention=latent)
    assert {shape.gpu_kv_numbers(Layout(tp), 0, 1, windows=True) for tp in (1, 4)} == {2 * 576}


def test_stages_have_the_layers_that_vllm_gives_them():
    """vLLM's own function is the reference: the rest goes to stages before the last."""
    from vllm.distributed.utils import get_pp_indices

    for total_layers in (4, 30, 32, 80):
        for pp in (1, 2, 3, 4):
            for stage in range(pp):
                own = Layout(pp=pp).layers(total_layers, stage)
                assert (own.start, own.stop) == get_pp_indices(total_layers, stage, pp)
    shape, layout = made(layers=5), Layout(pp=3)
    weights = [shape.gpu_weight_bytes(layout, stage) for stage in range(3)]
    assert weights == [100 + 10 + 100, 200, 100 + 10]
    assert sum(shape.gpu_kv_numbers(layout, s, 1, windows=True) for s in range(3)) == 5 * 16


def test_requests_fill_what_weights_leave():
    shapes = [made(), made("expert", layers=2)]
    weights, a_token = 420 + 220, (4 + 2) * 16 * 2
    for requests in (0, 1, 7):
        memory = weights + requests * 32 * a_token + 1
        found = room(shapes, Layout(), 30, ENGINE, gpu(memory))  # whole blocks of 16 tokens
        assert found.requests == requests
        assert found.lacking == (0 if requests else 32 * a_token - 1)
        assert found.needed == weights + 32 * a_token
    half = EngineSettings("bfloat16", 2, 2, utilization=0.5)
    assert room(shapes, Layout(), 30, half, gpu(2 * memory)).requests == 7
    fixed = EngineSettings("bfloat16", 2, 2, utilization=0.5, kv_cache_bytes=3 * 32 * a_token)
    assert room(shapes, Layout(), 30, fixed, gpu(memory)).requests == 3
    assert room(shapes, Layout(), 30, fixed, gpu(weights)).lacking == 3 * 32 * a_token


STATES = (48, 48, 0, 48)
"""Bytes of the states of four layers, of which the third has attention."""


def recurrent(role: str = "base", **changes: Any) -> Shape:
    attention = tuple(NO_ATTENTION if size else made().attention[0] for size in STATES)
    return made(role, attention=attention, states=STATES, **changes)


def test_blocks_hold_the_largest_state():
    """By hand: a token of attention is 2 x 4 x 2 numbers, 32 bytes; vLLM's groups have one size."""
    engine = replace(ENGINE, block=1, states=2)
    found = state_blocks([recurrent(), made("expert", layers=2)], Layout(), 0, engine)
    # 48 bytes need two tokens; three layers of each kind fit one group.
    assert (found.tokens, found.page, found.layers) == (2, 64, 3)
    assert found.of_request(5, states=2) == ceil(5 / 2) + 2
    assert state_blocks([made()], Layout(), 0, engine) is None
    # On two ranks a state is half as large, and so is a token; 9 of the other kind are 3 groups.
    many = made("expert", layers=8)
    found = state_blocks([recurrent(), many], Layout(tp=2), 0, engine)
    assert (found.tokens, found.page, found.layers) == (2, 32, 3)
    assert found.of_request(5, states=1) == 3 * ceil(5 / 2) + 1
    # Whole blocks of vLLM's are not cut; smaller pages are blocks of more tokens.
    few = replace(many, attention=(Attention(heads=8, kv_heads=1, head_size=2),) * 3)
    found = state_blocks([recurrent(), few], Layout(), 0, replace(engine, block=16))
    assert (found.tokens, found.page, found.layers) == (16, 16 * 32, 1)
    assert {of_block for _, of_block in found.attention} == {16, 64}
    assert found.of_request(65, states=2) == ceil(65 / 16) + 3 * ceil(65 / 64) + 3 * 2


def test_states_take_memory_and_time():
    shapes, engine = [recurrent()], replace(ENGINE, block=1, states=2)
    # Attention in one layer, states in three: four groups of one layer, of 64 bytes a block.
    one = 64 * (ceil(5 / 2) + 3 * 2)
    weights = 420
    assert room(shapes, Layout(), 5, engine, gpu(weights + 3 * one)).requests == 3
    assert room(shapes, Layout(), 5, engine, gpu(weights + 3 * one - 1)).requests == 2
    load = Load(requests=7, new=1, tokens=5)
    plain = total(step([replace(shapes[0], states=())], Layout(), load, engine, gpu())).seconds
    states = total(step(shapes, Layout(), load, engine, gpu())).seconds
    assert states - plain == pytest.approx(2 * 7 * sum(STATES))  # a byte a second


def test_the_table_has_states(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    kinds = ["mamba", "attention", "mamba"]
    path = write_model(tmp_path / "base", "granitemoehybrid", seed=7, layers=3)
    small = write_model(tmp_path / "small", "mamba2", seed=8, head_dim=32)
    file = tmp_path / "own.yaml"
    members = {"base": str(small), "expert": str(path), "antiexpert": str(path)}
    file.write_text(yaml.safe_dump({**members, "engine": {"dtype": "float32"}}))
    result = run(file, "--gpu", "A100-80G", "--context", "100", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    # 8 heads of 32 x 16 numbers, and 3 columns of 256 + 2 x 16 channels
    size = 4 * (8 * 32 * 16 + 3 * (256 + 2 * 16))
    sizes = [one["state_bytes"] for one in record["members"].values()]
    assert sizes == [2 * size, kinds.count("mamba") * size, kinds.count("mamba") * size]
    # A token of attention is 2 x 4 heads of 32 numbers.
    tokens = 16 * ceil(size / (16 * 4 * 2 * 4 * 32))
    assert record["layouts"][0]["gpu_kv_block"]["tokens"] == tokens
    rows = {line[2:40].strip(): line.split() for line in result.stderr.splitlines()}
    in_mib = f"{2 * 2 * size / 2**20:.1f}"
    assert rows["states of a request (MiB)"][-5:-2] == [in_mib] * 3
    assert rows["tokens in a block"][-1] == str(tokens)
    assert "A request has 2 states in each recurrent layer" in result.stderr


def test_a_step_holds_hidden_states_and_the_widest_layer_or_the_logits():
    shapes = [made(width=40), made("expert", width=12, hidden_size=4)]
    few = replace(ENGINE, batch=BatchLimits(tokens=100, requests=2))
    hidden = 2 * 100 * (8 + 4)
    assert activation_bytes(shapes, Layout(), 0, few) == hidden + 2 * 100 * (2 * 8 + 40)
    assert activation_bytes(shapes, Layout(tp=4), 0, few) == hidden + 2 * 100 * (2 * 8 + 10)
    many = replace(few, batch=BatchLimits(100, 500))  # 16 ids in float32, and their probabilities
    assert activation_bytes(shapes, Layout(), 0, many) == hidden + 500 * 16 * 4 * 2
    first = activation_bytes(shapes, Layout(pp=2), 0, many)  # which has no logits
    assert first == activation_bytes(shapes, Layout(), 0, few)
    drafting = replace(many, drafts=3)
    assert activation_bytes(shapes, Layout(), 0, drafting) == hidden + 500 * 16 * 4 * (2 * 4 + 3)
    # Only ten have drafts, which are fewer rows than the others have; but their own probabilities.
    drafting = replace(many, drafts=3, drafting=10)
    logits = 16 * 4 * (2 * 500 + 10 * 3)
    assert activation_bytes(shapes, Layout(), 0, drafting) == hidden + logits


def test_in_one_pass_a_step_holds_both_members_rows_and_the_adapter_s_part():
    antiexpert = made("antiexpert", width=30)
    shapes = [made(width=40), beside(antiexpert), antiexpert]
    few = replace(ENGINE, batch=BatchLimits(tokens=100, requests=2))
    wanted = 2 * 100 * (3 * 8 + 2 * (2 * 8 + 30) + 20)
    assert activation_bytes(shapes, Layout(), 0, few) == pytest.approx(wanted)


def test_activations_take_room_from_the_cache():
    shapes, a_token = [made(width=40)], 4 * 16 * 2
    busy = replace(ENGINE, batch=BatchLimits(100, 2))
    held = activation_bytes(shapes, Layout(), 0, busy)
    memory = 420 + 5 * 32 * a_token
    assert room(shapes, Layout(), 30, ENGINE, gpu(memory)).requests == 5
    assert room(shapes, Layout(), 30, busy, gpu(memory + held)).requests == 5
    assert room(shapes, Layout(), 30, busy, gpu(memory + held - 1)).requests == 4


# -- what a step takes -----------------------------------------------------------------------------


def seconds(shape: Shape, layout: Layout, load: Load, device: Hardware) -> Time:
    return total(step([shape], layout, load, ENGINE, device))


def test_the_roofline_is_the_slower_of_reading_and_multiplying():
    roofline = Roofline(bytes_per_second=10.0, flops=100.0)
    assert roofline.seconds(bytes_moved=50, operations=20) == 5.0
    assert roofline.seconds(bytes_moved=50, operations=2000) == 20.0


def test_a_decode_step_reads_weights_and_keys():
    """Not the embedding, which is looked up: 400 of layers, 10 of the head."""
    time = seconds(made(), Layout(), Load(requests=3, new=1, tokens=20), gpu())
    assert time.memory == pytest.approx(400 + 10 + 3 * 20 * 4 * 16 * 2)
    assert time.compute == time.communication == 0
    assert time.bound == "memory"


def test_a_prefill_multiplies_every_token_with_every_weight():
    """And every query with the keys before it: 2 for q k, 2 for p v; the head sees the last."""
    n = 20
    time = seconds(made(), Layout(), Load(1, n, n), gpu(bandwidth=1e12, flops=1.0))
    attention = 4 * 4 * 8 * 2 * n * (n + 1) / 2
    assert time.compute == pytest.approx(2 * n * 200 + attention + 2 * 5)
    assert time.memory == 0
    assert time.bound == "compute"


def test_a_window_bounds_what_is_read_and_multiplied():
    assert Attention(1, 1, 1, window=8).kept(20) == 8
    for new, tokens in ((20, 20), (1, 20), (5, 7)):
        wanted = sum(min(8, i) for i in range(tokens - new + 1, tokens + 1))
        assert Attention(1, 1, 1, window=8).pairs(new, tokens) == wanted
        assert Attention(1, 1, 1).pairs(new, tokens) == sum(range(tokens - new + 1, tokens + 1))


def test_ranks_share_the_work_and_send():
    load = Load(requests=2, new=1, tokens=16)
    device = gpu(bytes_per_second=4.0, latency=0.5)
    one, two = (seconds(made(), Layout(tp), load, device) for tp in (1, 2))
    assert two.memory == pytest.approx(one.memory / 2)
    # Nine sums of 2 rows of 8 numbers of 2 bytes, half of it sent twice; 2 rows of 16 logits.
    sums, gather = 9 * (0.5 + 2 * 0.5 * 32 / 4), 0.5 + 0.5 * 2 * 16 * 4 / 4
    assert two.communication == pytest.approx(sums + gather)
    assert one.communication == 0


def test_stages_work_side_by_side_on_parts_of_the_requests():
    """Two stages halve neither the time that one request takes nor, of two, that of weights."""
    shape = made(head=WeightSize(0, 0), embedding=WeightSize(0, 0))
    device = gpu(bytes_per_second=1e30)
    weights, kv = 400, 16 * 4 * 16 * 2
    for requests, memory in ((1, weights + kv), (2, weights + kv), (8, weights + 4 * kv)):
        time = seconds(shape, Layout(pp=2), Load(requests, 1, 16), device)
        assert time.memory == pytest.approx(memory)


def test_a_stage_sends_hidden_states_and_residuals_to_the_next():
    device = gpu(bytes_per_second=4.0, latency=0.5)
    time = seconds(made(), Layout(pp=4), Load(1, 1, 16), device)
    assert time.communication == pytest.approx(3 * (0.5 + 2 * 8 * 2 / 4))


def test_members_come_one_after_the_other():
    shapes = [made(), made("expert", layers=2), made("antiexpert", layers=2)]
    load = Load(2, 1, 16)
    times = step(shapes, Layout(tp=2), load, ENGINE, gpu())
    assert [*times] == ["base", "expert", "antiexpert"]
    for shape in shapes:
        assert times[shape.role] == seconds(shape, Layout(tp=2), load, gpu())


def beside(antiexpert: Shape, parameters: int = 2) -> Shape:
    """An expert that is an adapter of so many parameters."""
    own = WeightSize(parameters, 2 * parameters)
    nothing = dict.fromkeys(("embedding", "head"), WeightSize(0, 0))
    return replace(antiexpert, role="expert", layers=own, runs_with=antiexpert, **nothing)


def test_in_one_pass_weights_are_read_once():
    """Beside the antiexpert, the expert adds its adapter, and its keys and values."""
    antiexpert = made("antiexpert")
    shapes, load = [made(), beside(antiexpert), antiexpert], Load(3, 1, 20)
    times = step(shapes, Layout(), load, ENGINE, gpu())
    kv = 3 * 20 * 4 * 16 * 2
    assert times["antiexpert"].memory == pytest.approx(400 + 10 + kv)
    assert times["expert"].memory == pytest.approx(4 + kv)
    assert shapes[1].gpu_weight_bytes(Layout(), 0) == 4
    assert shapes[1].active_parameters == 2 + 205


def test_in_one_pass_rows_are_multiplied_by_both_members_weights():
    """Bound by arithmetic, the expert's cost as much as the antiexpert's, and the adapter's."""
    antiexpert = made("antiexpert")
    shapes, load = [beside(antiexpert), antiexpert], Load(1, 7, 7)
    fast = gpu(bandwidth=1e12, flops=1.0)
    times = step(shapes, Layout(), load, ENGINE, fast)
    attention = 4 * 4 * 8 * 2 * 7 * 8 / 2
    assert times["antiexpert"].compute == pytest.approx(2 * 7 * 200 + attention + 2 * 5)
    assert times["expert"].compute == pytest.approx(2 * 7 * (200 + 2) + attention)
    # Where reading takes longer than the antiexpert's rows alone, and less than both: the rest.
    between = gpu(bandwidth=1.0, flops=2 * 7 * 200 * 1.5 / 400)
    alone = step([antiexpert], Layout(), load, ENGINE, between)["antiexpert"]
    pair = total(step(shapes, Layout(), load, ENGINE, between))
    kv_and_head = alone.seconds - 400
    layers = pair.seconds - kv_and_head - (kv_and_head - 10)
    assert layers == pytest.approx(2 * 7 * 402 / between.roofline.flops)


def test_a_pass_verifies_drafts_that_the_expert_has_drawn():
    """By hand, bound by memory: all weights once, the expert's k times more, and keys each time."""
    expert = made("expert", layers=2, drafts=True)
    shapes, kv = [made(), expert, made("antiexpert", layers=2)], 2 * 16 * 16 * 2
    engine = replace(ENGINE, drafts=3, drafting=2)
    found = choose(shapes, Layout(), Demand(9, 16, 16), engine, gpu()).drafting
    assert (found.drafts, found.running) == (3, 2)
    base, small = 410 + 4 * kv, 210 + 2 * kv
    assert {role: time.memory for role, time in found.times.items()} == pytest.approx(
        {"base": base, "expert": small * 4, "antiexpert": small}
    )
    assert (found.plain, found.base) == pytest.approx((base + 2 * small, base))
    assert found.tokens(0.5) == 1.875
    for tokens, least in ((found.seconds / found.plain, found.acceptance_to_pay), (2.5, None)):
        least = found.acceptance(tokens) if least is None else least
        assert found.tokens(least) == pytest.approx(tokens)
    assert found.acceptance(4.1) is None
    assert choose(shapes, Layout(), Demand(9, 16, 16), ENGINE, gpu()).drafting is None


def test_the_last_stage_drafts_alone():
    """By hand, bound by memory: the expert's layers are there, and drafts pass through no other."""
    layout, kv = Layout(pp=2), 16 * 4 * 2 * 2 * 2
    expert = made("expert", layers=2, drafts=True)
    shapes = [made(), expert, made("antiexpert", layers=2)]
    for tied, whole in ((False, 220), (True, 210)):
        tied_expert = replace(expert, tied=tied)
        bytes_ = [tied_expert.gpu_weight_bytes(layout, stage) for stage in (0, 1)]
        assert bytes_ == [0, whole]
    numbers = [expert.gpu_kv_numbers(layout, stage, 16, windows=True) for stage in (0, 1)]
    assert numbers == [0, 2 * 16 * 16]
    engine = replace(ENGINE, drafts=3)
    # Of one request: base and antiexpert on both stages, and the expert four times on the last.
    one = choose(shapes, layout, Demand(1, 16, 16), engine, gpu()).drafting
    parts = {"base": 410 + 4 * kv, "expert": 4 * (210 + 2 * kv), "antiexpert": 210 + 2 * kv}
    assert {r: t.memory for r, t in one.times.items()} == pytest.approx(parts)
    # Of two: the last stage works on both, one after the other.
    two = choose(shapes, layout, Demand(5, 16, 16), replace(engine, drafting=1), gpu()).drafting
    assert two.running == 2
    parts = {"base": 210 + 2 * kv, "expert": 4 * (210 + 2 * kv), "antiexpert": 110 + kv}
    assert {r: t.memory / 2 for r, t in two.times.items()} == pytest.approx(parts)


def test_in_one_pass_the_antiexpert_goes_along_with_drafts():
    antiexpert = made("antiexpert", drafts=True)
    shapes, kv = [made(), beside(antiexpert), antiexpert], 16 * 4 * 16 * 2
    engine = replace(ENGINE, drafts=3)
    found = choose(shapes, Layout(), Demand(1, 16, 16), engine, gpu()).drafting
    assert found.times["antiexpert"].memory == pytest.approx(4 * (410 + kv))
    assert found.times["expert"].memory == pytest.approx(4 * (4 + kv))


# -- what is launched, not replayed ----------------------------------------------------------------


def host(layers: int, kernels: int = 12) -> float:
    """Seconds by hand: launches of 5 µs, two operators in Python of 45 µs per layer."""
    return layers * (kernels * 5e-6 + 2 * 45e-6) + 25 * 5e-6


@pytest.mark.parametrize("graphs", ["none", "full"])
def test_a_draft_takes_its_launches_where_it_is_not_captured(llama2, graphs):
    """At TP 8 a 7B reads its weights in less time than the host needs to launch its kernels."""
    shapes, settings = read(config_of(llama2))
    shapes = [replace(shape, drafts=shape.role == "expert") for shape in shapes]
    batch = BatchLimits(8192, 256)
    engine = replace(settings, drafts=4, batch=batch, graphs={**CAPTURED, "drafts": graphs})
    found = choose(shapes, Layout(8), Demand(8, 512, 512), engine, GPUS["H100-80G"]).drafting
    one = step(shapes, Layout(8), Load(8, 1, 512), engine, GPUS["H100-80G"])["expert"].seconds
    passed = step(shapes, Layout(8), Load(8, 5, 512, 5), engine, GPUS["H100-80G"])["expert"].seconds
    assert host(32) == pytest.approx(4.9e-3, rel=0.02)
    assert one < 0.4 * host(32)
    each = one if graphs == "full" else host(32)
    assert found.times["expert"].seconds == pytest.approx(passed + 4 * each)
    assert found.times["expert"].host == (0 if graphs == "full" else pytest.approx(4 * host(32)))
    assert found.times["base"].host == 0


def test_a_draft_of_a_slow_device_takes_the_device_s_time():
    engine = replace(ENGINE, drafts=3, graphs={**CAPTURED, "drafts": "none"})
    shapes = [made(), made("expert", drafts=True), made("antiexpert")]
    found = choose(shapes, Layout(), Demand(1, 16, 16), engine, gpu()).drafting
    assert found.times["expert"].host == 0


@pytest.mark.parametrize(
    ("engine", "chat", "kernels", "base_alone"),
    [
        ({}, None, 0, 0),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, None, 0, 0),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, None, 5, 5),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, None, 12, 12),
        ({"enforce_eager": True}, None, 12, 12),
        ({"enforce_eager": True}, {"expert": "template"}, 12, 12),
        ({}, {"expert": "template"}, 0, 0),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, {"expert": "template"}, 5, 5),
        ({}, dict.fromkeys(("base", "expert", "antiexpert"), "template"), 0, 0),
    ],
)
def test_decode_steps_take_their_launches_where_they_are_not_captured(
    llama2, engine, chat, kernels, base_alone
):
    values = config_of(llama2, **engine).model_dump(mode="json", exclude_none=True)
    config = ProxyConfig.parse({**values, **({"chat": chat} if chat else {})}, "test")
    found = plan(config, "H100-80G", Demand(1, 512, 512), tp=8).throughput
    for role, layers in (("base", 80), ("expert", 32), ("antiexpert", 32)):
        least = host(layers, kernels) if kernels else 0
        assert found.proxy.step[role].host == pytest.approx(least), role
    assert found.base.step["base"].host == (
        pytest.approx(host(80, base_alone)) if base_alone else 0
    )


def test_piecewise_graphs_are_for_decode_steps():
    decode = {"decode": "piecewise", "prompts": "piecewise"}
    assert captured(False, "PIECEWISE") == {**captured(True, None), **decode}
    assert captured(False, "NONE") == captured(True, "FULL") == dict.fromkeys(CAPTURED, "none")
    assert captured(False, "FULL_AND_PIECEWISE") == captured(False, None) == CAPTURED


def test_stages_launch_their_own_layers():
    shapes = [made(layers=4)]
    engine = replace(ENGINE, graphs=captured(True, None))
    device = gpu(bandwidth=1e12, flops=1e18)
    found = step(shapes, Layout(pp=2), Load(2, 1, 16), engine, device)["base"]
    assert found.seconds == pytest.approx(2 * host(2))  # two parts, one after the other
    assert step(shapes, Layout(), Load(2, 1, 16), engine, replace(device, launches=False))[
        "base"
    ].seconds == pytest.approx(0, abs=1e-6)


def test_the_table_says_what_is_launched(config, llama2, tmp_path):
    line = "Without FULL CUDA graphs: prefills. There the host launches each kernel (5 µs each"
    assert line in run(config, "--gpu", "H100-80G", "--tp", 8).stdout
    file = tmp_path / "own.yaml"
    values = config_of(llama2, enforce_eager=True).model_dump(mode="json", exclude_none=True)
    file.write_text(yaml.safe_dump({**values, "speculate": {"tokens": 2}}))
    result = run(file, "--gpu", "H100-80G", "--tp", 8, "--concurrency", 1, "--json")
    record = json.loads(result.stdout)
    assert "Without FULL CUDA graphs: decode steps, drafts, prefills." in result.stderr
    time = record["layouts"][0]["proxy"]["step_by_member"]["expert"]
    assert (time["bound"], time["host_seconds"]) == ("host", pytest.approx(host(32)))


@pytest.mark.parametrize(("base", "pp", "ratio"), [("13b", 1, 27 / 13), ("70b", 4, 84 / 70)])
def test_one_request_takes_the_papers_ratio_of_weights(llama2, base, pp, ratio):
    """arXiv 2401.08565: Llama-2 with two 7B, on A100s. Each weight is read once a token."""
    found = plan(config_of(llama2, base), "A100-80G", Demand(1, 512, 512), tp=1, pp=pp)
    choice = found.throughput
    assert choice.step_overhead == pytest.approx(ratio, rel=0.03)
    # By hand: all weights but the embedding, and 512 tokens of keys, at 2039 GB/s.
    read = 2 * (PARAMETERS[base] - EMBEDDING[base]) + 512 * KV_BYTES[base]
    messages = 0 if pp == 1 else 3 * (10e-6 + 2 * 2 * 8192 / 300e9)
    assert choice.base.step_seconds == pytest.approx(read / 2039e9 + messages, rel=1e-3)


# -- layouts ---------------------------------------------------------------------------------------


def test_layouts_of_some_gpus_are_all_their_factors():
    assert {*layouts(4)} == {
        *(Layout(4, 1, 1), Layout(2, 2, 1), Layout(1, 4, 1)),
        *(Layout(2, 1, 2), Layout(1, 2, 2)),
        Layout(1, 1, 4),
    }
    assert len({*layouts(12)}) == len([*layouts(12)]) == 18


def test_the_best_layout_is_the_one_found_by_hand():
    """Two GPUs, two requests, no time for messages: weights 410, keys of a request 2048.

    TP 2 halves both: (410 + 2 x 2048) / 2 a step. Two replicas read all weights for one request
    each: 410 + 2048. With messages of 2000 s a step, replicas are best at both.
    """
    shapes, demand = [made(), made("expert", layers=4)], Demand(2, 16, 16)
    fast = gpu(bytes_per_second=1e30)
    found = {
        layout: choose(shapes, layout, demand, ENGINE, fast)
        for layout in (Layout(2), Layout(1, 1, 2))
    }
    steps = [choice.proxy.step_seconds for choice in found.values()]
    assert steps == pytest.approx([410 + 2 * 2048, 2 * (410 + 2048)])
    assert (
        best_throughput(found.values()).layout == best_latency(found.values()).layout == Layout(2)
    )
    slow = [choose(shapes, layout, demand, ENGINE, gpu(latency=2000 / 9)) for layout in found]
    assert best_throughput(slow).layout == best_latency(slow).layout == Layout(1, 1, 2)
    assert [choice.step_overhead for choice in found.values()] == pytest.approx([2, 2])


def test_requests_that_do_not_fit_wait():
    """Four asked for, two fit beside both members, five beside the base alone."""
    shapes, one = [made(), made("expert")], 4 * 16 * 2 * 16
    device = gpu(memory=840 + 2 * 2 * one)
    choice = choose(shapes, Layout(), Demand(4, 16, 16), ENGINE, device)
    assert (choice.proxy.fit, choice.proxy.running) == (2, 2)
    assert (choice.base.fit, choice.base.running) == ((840 + 4 * one - 420) // one, 2)
    assert choice.base_at_most.running == 4
    assert choice.step_overhead == pytest.approx(2)
    assert choice.proxy.tokens_per_second == pytest.approx(2 / (2 * (410 + 2 * one)))
    assert choice.base_at_most.tokens_per_second == pytest.approx(4 / (410 + 4 * one))


def choice(running: int, time: float) -> Choice:
    one = Prediction(running, running, {"base": Time(memory=time)}, {"base": Time(memory=1)})
    return Choice(Layout(), one, one, one)


def test_the_record_says_which_layout_is_best_for_what():
    """Most tokens a second with four requests running, though nine run on the other."""
    choices = (choice(4, 1.0), choice(9, 3.0))
    record = as_record(Plan((made(),), ENGINE, gpu(), Demand(9, 16, 16), choices))
    assert (record["best_throughput"], record["best_latency"]) == (0, 1)


def test_the_fastest_step_counts_only_where_most_requests_run():
    """A replica with little room has short steps, but others wait."""
    few, slow, best = choice(1, 1.0), choice(9, 3.0), choice(9, 2.0)
    assert best_latency([few, slow, best]) is best
    assert best_throughput([few, slow, best]) is best
    assert best_throughput([choice(2, 1.0), choice(4, 2.0)]).proxy.running == 2  # of equals


def test_stages_without_a_layer_are_no_layout():
    shapes = [made(), made("expert", layers=2)]
    assert {*possible(shapes, 4, lambda tp: "odd" if tp == 4 else None)} == {
        *(Layout(2, 2, 1), Layout(2, 1, 2), Layout(1, 2, 2), Layout(1, 1, 4))
    }


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, monkeypatch, llama2) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "proxy.yaml"
    file.write_text(yaml.safe_dump(config_of(llama2).model_dump(mode="json", exclude_none=True)))
    return str(file)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def test_the_table_has_the_figures(config):
    result = run(config, "--gpu", "H100-80G", "--tp", 8)
    assert result.exit_code == 0, result.output
    rows = {
        line.split("  ")[1].strip(): line for line in result.stdout.splitlines() if "  " in line
    }
    assert "68,976,648,192" in rows["parameters"]
    assert rows["weights (GiB)"].split()[2:] == ["128.48", "12.55", "12.55", "153.58", "1.20"]
    kv = ["320.0", "512.0", "512.0", "1,344.0", "4.20"]
    assert rows["KV per token (KiB)"].split()[-5:] == kv
    # (80 x 0.92 - 3) GiB less an eighth of the weights, in requests of 2048 x 168 KiB
    left = 70.6 * GIB - activations(8, 8192)
    fits = int((left - 2 * (PARAMETERS["70b"] + 2 * PARAMETERS["7b"]) / 8) / (2048 * 168 * KIB))
    assert rows["activations (GiB)"].split()[-1] == f"{activations(8, 8192) / GIB:.2f}"
    (line,) = (line for line in result.stdout.splitlines() if "that fit" in line)
    assert line.split()[-2] == str(fits)
    assert "3,350 GB/s and 989 TFLOP/s (data sheet" in result.stdout
    assert "a step of 8,192 tokens and 1,024 requests, and 3 GiB per GPU for" in result.stdout
    assert "10 µs (assumed)" in result.stdout


def test_json_is_alone_on_standard_output(config):
    result = run(config, "--gpu", "H100-80G", "--gpus", 8, "--concurrency", 32, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert "best for" in result.stderr
    assert record["members"]["base"]["parameters"] == PARAMETERS["70b"]
    assert record["members"]["expert"]["kv_bytes_per_token"] == KV_BYTES["7b"]
    assert (record["concurrency"], record["context"], record["prompt"]) == (32, 2048, 2048)
    sizes = {(one["tp"], one["pp"], one["replicas"]) for one in record["layouts"]}
    assert sizes == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)}
    speeds = [one["proxy"]["tokens_per_second"] for one in record["layouts"]]
    assert speeds.index(max(speeds)) == record["best_throughput"]
    steps = [one["proxy"]["step"]["seconds"] for one in record["layouts"]]
    assert steps.index(min(steps)) == record["best_latency"]
    for one in record["layouts"]:
        parts = [one["proxy"]["step_by_member"][role]["seconds"] for role in record["members"]]
        assert sum(parts) == pytest.approx(one["proxy"]["step"]["seconds"])
        ratio = one["proxy"]["step"]["seconds"] / one["base"]["step"]["seconds"]
        assert one["step_overhead"] == pytest.approx(ratio)


def test_the_layout_may_be_the_configurations(config, llama2, tmp_path):
    file = tmp_path / "own.yaml"
    own = config_of(llama2, tensor_parallel_size=4, pipeline_parallel_size=2)
    file.write_text(yaml.safe_dump(own.model_dump(mode="json", exclude_none=True)))
    (one,) = json.loads(run(file, "--gpu", "H100-80G", "--json").stdout)["layouts"]
    assert (one["tp"], one["pp"]) == (4, 2)
    (one,) = json.loads(run(file, "--gpu", "H100-80G", "--tp", 8, "--json").stdout)["layouts"]
    assert (one["tp"], one["pp"]) == (8, 2)


@pytest.mark.slow
def test_this_machine_is_measured(tmp_path, monkeypatch):
    """Real bandwidth and arithmetic, of a model that fits anywhere."""
    path = save_config(tmp_path / "small", "llama", num_hidden_layers=2)
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"base": str(path), "expert": str(path)}))
    words = (file, "--gpu", "here", "--concurrency", 1, "--context", 64)
    record = json.loads(run(*words, "--json").stdout)
    assert record["gpu"]["bytes_per_second"] > 1e8
    assert record["gpu"]["flops"] > 1e8
    assert record["gpu"]["memory_bytes"] > 1e8
    assert record["layouts"][0]["step_overhead"] == pytest.approx(2, rel=0.01)


@pytest.mark.slow
def test_measuring_says_what_the_device_can_do():
    found = measure("cpu", "float32")
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flops < 1e15


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu", "H100"), f"--gpu is 'H100': use one of {', '.join(GPUS)}, here"),
        (("--gpu", "A100-80G", "--tp", "0"), "--tp is 0: give at least 1"),
        (("--gpu", "A100-80G", "--pp", "-1"), "--pp is -1: give at least 1"),
        (("--gpu", "A100-80G", "--gpus", "0"), "--gpus is 0: give at least 1"),
        (("--gpu", "A100-80G", "--concurrency", "0"), "--concurrency is 0: give at least 1"),
        (("--gpu", "A100-80G", "--context", "0"), "--context is 0: give at least 1"),
        (("--gpu", "A100-80G", "--prompt", "0"), "--prompt is 0: give at least 1"),
        (
            ("--gpu", "A100-80G", "--prompt", "3000"),
            "--prompt is 3000: longer than --context 2048; make it shorter",
        ),
        (
            ("--gpu", "A100-80G", "--gpus", "8", "--tp", "2"),
            "--gpus is 8: it tries all layouts, but --tp is given, too; leave one of them out",
        ),
        (
            ("--gpu", "A100-80G", "--gpus", "8", "--pp", "2"),
            "--gpus is 8: it tries all layouts, but --pp is given, too; leave one of them out",
        ),
        (
            ("--gpu", "A100-80G", "--context", "5000"),
            "--context is 5000: longer than the context of base 4096, expert 4096, antiexpert 4096;"
            " use at most 4096",
        ),
        (
            ("--gpu", "A100-80G", "--tp", "3"),
            "--tp is 3: it does not divide the attention and KV heads of base (64 and 8), expert "
            "(32 and 32), antiexpert (32 and 32); use 1 or 2 or 4 or 8 or 16 or 32",
        ),
        (
            ("--gpu", "A100-80G", "--tp", "64"),
            "--tp is 64: it does not divide the attention and KV heads of expert (32 and 32), ",
        ),
        (
            ("--gpu", "A100-80G", "--tp", "2", "--pp", "33"),
            "--pp is 33: expert has 32 layers; use at most 32",
        ),
        (
            ("--gpu", "here", "--tp", "2"),
            "--gpu is 'here': a layout of 2 devices cannot be planned, because links between them",
        ),
    ],
)
def test_a_wrong_option_is_one_line(config, monkeypatch, words, says):
    monkeypatch.setattr(
        "vllm_proxy.preflight.plan.hardware.measure", lambda *_: Roofline(1e10, 1e11)
    )  # takes seconds, and is not what is tested
    result = run(config, *words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {says}")


def needed(tp: int, pp: int = 1) -> float:
    """Bytes of weights, 3 GiB and one request of 2048 tokens on the fullest GPU; pp 1."""
    weights = 2 * (PARAMETERS["70b"] + 2 * PARAMETERS["7b"])
    kv = 2048 * (KV_BYTES["70b"] + 2 * KV_BYTES["7b"])
    return (weights + kv) / tp / pp + 3 * GIB + activations(tp, 2048)


def test_members_that_do_not_fit_are_one_line_with_the_least_that_does(config):
    result = run(config, "--gpu", "A100-80G", "--tp", 1)
    take, over = needed(1) / GIB, needed(1) / GIB - 80 * 0.92
    # Of 1, 2, 4, 8, …: the first on which a GPU has enough.
    least = next(tp for tp in (1, 2, 4, 8) if needed(tp) <= 80 * GIB * 0.92)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --tp is 1: weights, a step's tensors, workspace and one request of 2048 tokens "
        f"take {take:.1f} GiB per GPU, {over:.1f} GiB more than A100-80G gives (80.0 GiB x "
        f"gpu_memory_utilization 0.92); use --tp {least}\n"
    )
    assert least == 4


def test_no_layout_that_fits_is_one_line_with_the_fewest_gpus(config):
    result = run(config, "--gpu", "A100-80G", "--gpus", 2)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    beside = 3 + activations(1, 2048) / GIB
    fewest = ceil((needed(1) / GIB - beside) / (80 * 0.92 - beside))
    lacks = needed(2) / GIB - 80 * 0.92
    assert "--gpus is 2: no layout has room for weights, a step's tensors, workspace and" in line
    assert f"the nearest, TP 2 x PP 1, lacks {lacks:.1f} GiB per GPU" in line
    assert line.endswith(f"use --tp 1 --pp {fewest}, or --gpus {fewest}")


def test_the_stages_that_were_asked_for_are_kept(config):
    """On 16 GPUs of 22.5 GiB; eight ranks in two stages are the fewest that do."""
    result = run(config, "--gpu", "L4-24G", "--tp", 1, "--pp", 2)
    assert result.exit_code == 2
    assert result.stderr.endswith("; use --tp 8\n")
    assert run(config, "--gpu", "L4-24G", "--tp", 8, "--pp", 2).exit_code == 0


def test_one_device_is_not_told_to_be_more(config, monkeypatch):
    """There are no ranks to add where links are not known."""
    monkeypatch.setattr(
        "vllm_proxy.preflight.plan.hardware.measure", lambda *_: Roofline(1e10, 1e11)
    )
    result = run(config, "--gpu", "here")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith("; use larger GPUs, a shorter --context or smaller members")


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        (
            {"max_model_len": 1024},
            "--context is 2048: longer than `engine.max_model_len` 1024; use at most 1024",
        ),
        ({"tensor_parallel_size": 3}, "`engine.tensor_parallel_size` is 3: it does not divide"),
        ({"dtype": "float8"}, "`engine.dtype` is 'float8': "),
        ({"kv_cache_dtype": "int3"}, "`engine.kv_cache_dtype` is 'int3': its size is not known"),
        ({"gpu_memory_utilization": 1.5}, "`engine` has {'gpu_memory_utilization': 1.5}: Input"),
        ({"tensor_paralel_size": 2}, "unknown key `engine.tensor_paralel_size`; did you mean"),
    ],
)
def test_a_wrong_engine_is_one_line(llama2, tmp_path, engine, says):
    file = tmp_path / "own.yaml"
    values = config_of(llama2).model_dump(mode="json", exclude_none=True)
    file.write_text(yaml.safe_dump({**values, "engine": engine}))
    result = run(file, "--gpu", "H100-80G")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {says}")


def test_a_missing_member_is_one_line(llama2, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"base": "/no/such", "expert": llama2["7b"]}))
    result = run(file, "--gpu", "H100-80G")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: base `/no/such`: no such directory; check the path")


def test_the_data_sheets():
    """NVIDIA's data sheets: GB/s, and TFLOP/s without sparsity."""
    figures = {
        name: (one.roofline.bytes_per_second / 1e9, one.roofline.flops / 1e12)
        for name, one in GPUS.items()
    }
    assert figures["A100-80G"] == (2039, 312)
    assert figures["H100-80G"] == (3350, 989)
    assert figures["H200-141G"] == (4800, 989)
    assert {one.link.kind for name, one in GPUS.items() if name[0] in "LR"} == {"PCIe"}


# -- in one pass, and with drafts ------------------------------------------------------------------


@pytest.mark.parametrize("apart", [{"one_pass": False}, {"engine": {"load_format": "dummy"}}, None])
def test_an_expert_beside_the_antiexpert_is_as_large_as_its_adapter(tmp_path, apart):
    model = write_model(tmp_path / "small", seed=0)
    lora = write_adapter(model, tmp_path / "lora")
    values = {
        "base": str(model),
        "expert": {"model": str(model), "lora": str(lora)},
        "antiexpert": str(model),
        **(apart or {}),
    }
    (base, expert, antiexpert), _ = read(ProxyConfig.parse(values, "test"))
    assert antiexpert.parameters == base.parameters
    assert expert.kv_numbers() == antiexpert.kv_numbers()
    if apart:
        assert expert.runs_with is None
        assert expert.parameters == base.parameters
    else:
        assert expert.runs_with is antiexpert
        tensors = load_file(lora / "adapter_model.safetensors").values()
        assert expert.parameters == sum(tensor.numel() for tensor in tensors)


def test_the_table_says_when_drafts_pay(llama2, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "own.yaml"
    values = config_of(llama2).model_dump(mode="json", exclude_none=True)
    file.write_text(yaml.safe_dump({**values, "speculate": {"tokens": 4, "requests": 8}}))
    result = run(file, "--gpu", "H100-80G", "--tp", 8, "--json")
    assert result.exit_code == 0, result.output
    drafting = json.loads(result.stdout)["layouts"][0]["drafting"]
    assert "pass after 4 drafts, of 8 (ms)" in result.stderr
    for purpose in ("pay", "beat_base"):
        least = drafting[f"acceptance_to_{purpose}"]
        tokens = sum(least**i for i in range(5))
        other = drafting["step_seconds" if purpose == "pay" else "base_step_seconds"]
        assert drafting["pass"]["seconds"] / other == pytest.approx(tokens)
        assert f"from {least:.0%}" in result.stderr
    assert "the acceptance p it yields 1 + p + … + p^4 tokens" in result.stderr
    result = run(file, "--gpu", "H100-80G", "--tp", 4, "--pp", 2, "--json")
    assert json.loads(result.stdout)["layouts"][0]["drafting"]["drafts"] == 4
    assert "all layers of the expert are on the last one" in result.stderr
    file.write_text(yaml.safe_dump({**values, "engine": {"max_num_seqs": 0}}))
    assert "`engine.max_num_seqs` is 0: give a count" in run(file, "--gpu", "H100-80G").stderr
