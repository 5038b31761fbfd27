"""What keeps an engine from starting, and that `check` says so first: a table.

A start goes through the engine's config, the members' model classes, attention kernels, the loading
of weights, the plan of the KV cache, and a first step. Each row of `FAILURES` fails in one of them.
Here `check` alone is asked, but for a few. With `STARTS=1` in the environment, an engine is started
for every row as stock vLLM starts it, which asks no `check`, and must fail. That was last done with
vLLM 0.32 on an x86 CPU without AMX, under model runner V1.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.models import registry

from support.checks import edit_tensors, run, set_config
from support.engines import run_engines
from support.reference import Reference
from support.tiny_models import write_model, write_triple
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig

ROPE = {"rope_theta": 1e4}
ON_CPU = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4}
ROOM = {"kv_cache_memory_bytes": 100_000_000}
STARTED = ("head size", "block size", "rope type", "consolidated beside shards")
"""Rows that are started in every run of the tests."""

Mutate = Callable[[Path], object]


def write(family: str, **config: Any) -> Mutate:
    """Return what replaces a member by another model."""

    def mutate(path: Path) -> None:
        shutil.rmtree(path)
        write_model(path, family, seed=5, **{"hidden_size": 128, "kv_heads": 2, **config})

    return mutate


def all_of(*mutates: Mutate) -> Mutate:
    def mutate(path: Path) -> None:
        for one in mutates:
            one(path)

    return mutate


def without_model_type(path: Path) -> None:
    values = json.loads((path / "config.json").read_text())
    del values["model_type"]
    (path / "config.json").write_text(json.dumps(values))


def consolidate(*, index: bool) -> Mutate:
    """Return what adds the weights once more, under the names that Mistral's own format has."""

    def mutate(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        own = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(own, path / "consolidated.safetensors", metadata={"format": "pt"})
        if index:
            weight_map = dict.fromkeys(tensors, "model.safetensors")
            text = json.dumps({"weight_map": weight_map})
            (path / "model.safetensors.index.json").write_text(text)

    return mutate


def own_code(package: str, file: str) -> Mutate:
    """Return what gives a checkpoint code of its own, one file of which imports *package*."""
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    code = {
        "configuration_own": (
            "from transformers import LlamaConfig\n"
            "class OwnConfig(LlamaConfig):\n"
            "    model_type = 'own'\n"
        ),
        "modeling_own": (
            "from transformers import LlamaForCausalLM\n"
            "from .configuration_own import OwnConfig\n"
            "class OwnForCausalLM(LlamaForCausalLM):\n"
            "    config_class = OwnConfig\n"
        ),
    }

    def mutate(path: Path) -> None:
        for name, text in code.items():
            imported = f"import {package}\n" * (name == file)
            (path / f"{name}.py").write_text(imported + text)
        set_config(model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)(path)

    return mutate


LFM2 = {
    **{"layer_types": ["conv", "full_attention"], "kv_heads": 4, "conv_dim": 128},
    **{"conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 256},
}


@dataclass(frozen=True)
class Failure:
    """A start that fails.

    Attributes:
        words: in `check`'s one line, after the member's name.
        change: of the member of `role`; None if the members are not at fault.
        role: whose line it is.
        engine: arguments.
        more: of the configuration.
    """

    words: str
    change: Mutate | None = None
    role: str = "expert"
    engine: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def is_of_one(self) -> bool:
        """Whether one member alone is at fault, which the line then names."""
        together = self.words.startswith(("members share", "`speculate`"))
        return self.change is not None and not together


FAILURES = {
    # model classes
    "linear attention, bamba": Failure(
        "Layer 0 (linear_attention) does not dispatch through the Transformers attention interface",
        write("bamba"),
    ),
    "linear attention, minimax": Failure(
        "(linear_attention) does not dispatch through the Transformers attention interface",
        write("minimax"),
        role="base",
    ),
    "rope type": Failure(
        "vLLM cannot build it: Unknown RoPE scaling type foo; check its config.json",
        set_config(rope_parameters={"rope_type": "foo", **ROPE}),
    ),
    "rope type of the base": Failure(
        "Unknown RoPE scaling type foo",
        set_config(rope_scaling={"rope_type": "foo", "factor": 2.0}, rope_parameters=None),
        role="base",
    ),
    "rope without its factor": Failure(
        "Missing required keys in `rope_parameters`",
        set_config(rope_parameters={"rope_type": "linear", **ROPE}),
    ),
    "rope factors, one too few": Failure(
        "vLLM cannot build it: RuntimeError: ",
        set_config(
            rope_parameters={
                **{"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 15},
                **ROPE,
            },
            original_max_position_embeddings=512,
        ),
    ),
    "rope of an override": Failure(
        "Unknown RoPE scaling type foo",
        role="base",
        engine={"hf_overrides": {"rope_parameters": {"rope_type": "foo", **ROPE}}},
    ),
    "odd head size": Failure("an even rotary dimension", set_config(head_dim=33)),
    "activation": Failure("Unsupported activation: no_such", set_config(hidden_act="no_such")),
    "config of another type": Failure("expected float, got str", set_config(rms_norm_eps="x")),
    "transformers' name of a class": Failure(
        "vLLM's Transformers backend fails at the first request to PhimoeForCausalLM; name "
        "PhiMoEForCausalLM as `architectures` in its config.json, which is vLLM's own class",
        set_config(architectures=["PhimoeForCausalLM"]),
    ),
    "a head that vLLM ties": Failure(
        "its checkpoint has a separate head, but vLLM's Lfm2ForCausalLM always uses the embedding "
        "as its head; use another model",
        write("lfm2", **LFM2),
    ),
    "no heads": Failure("integer modulo by zero", set_config(num_attention_heads=0)),
    "no model type": Failure("Should have a `model_type` key", without_model_type),
    "dtype of the checkpoint": Failure("no attribute 'float13'", set_config(dtype="float13")),
    # packages and code
    "code of its own": Failure(
        "its config.json names Python code that comes with the checkpoint (`auto_map`); set "
        "`engine.trust_remote_code: true` if you trust that code",
        own_code("os", "modeling_own"),
    ),
    "code that needs a package": Failure(
        "it needs the Python package `absent_package`, which is not installed; install it",
        own_code("absent_package", "modeling_own"),
        engine={"trust_remote_code": True},
    ),
    "config that needs a package": Failure(
        "it needs the Python package `absent_package`, which is not installed; install it",
        own_code("absent_package", "configuration_own"),
        engine={"trust_remote_code": True},
    ),
    # attention kernels
    "head size": Failure(
        "vLLM's CPU_ATTN cannot run its attention on this machine: heads of size 16 (",
        write("llama", heads=8),
    ),
    "head size of the base": Failure(
        "heads of size 40 (", write("llama", head_dim=40), role="base"
    ),
    "latent vectors": Failure(
        "latent vectors have 96 numbers, its kernel supports 576",
        write("deepseek_v2", kv_lora_rank=32),
        role="base",
    ),
    "sparse attention": Failure(
        "Sparse Attention is not supported on CPU",
        write("deepseek_v32"),
        role="base",
    ),
    "latent and linear attention": Failure(
        "vLLM cannot build it: ModuleNotFoundError: No module named 'cutlass'",
        write("kimi_linear"),
        role="base",
    ),
    "block size": Failure(
        "`block_size` is 16: the members' attention kernels do not support it (base, expert, "
        "antiexpert: CPU_ATTN, multiples of 32); leave it out",
        engine={"block_size": 16},
    ),
    "cache dtype": Failure(
        "`kv_cache_dtype` is 'int8_per_token_head': vLLM's CPU_ATTN has no kernel for it on a CPU; "
        "use one of auto, fp8",
        engine={"kv_cache_dtype": "int8_per_token_head"},
    ),
    # weights
    "consolidated beside shards": Failure(
        "There is no module or parameter named 'embed_tokens' in LlamaForCausalLM; use the "
        "config.json that belongs to these weights, or set `engine.load_format: safetensors`",
        consolidate(index=True),
    ),
    "consolidated beside one file": Failure(
        "or remove consolidated*.safetensors, which vLLM also reads", consolidate(index=False)
    ),
    "more layers than weights": Failure(
        "tensors that the architecture needs not in the checkpoint",
        set_config(num_hidden_layers=5),
    ),
    "more weights than layers": Failure(
        "tensors in the checkpoint that the architecture does not have",
        set_config(num_hidden_layers=1),
    ),
    "untied without a head": Failure(
        "1 tensor that the architecture needs not in the checkpoint: lm_head.weight",
        set_config(tie_word_embeddings=False),
    ),
    "another vocabulary": Failure(
        "model.embed_tokens.weight [512, 128] instead of [600, 128]", set_config(vocab_size=600)
    ),
    "weights vLLM renames": Failure(
        "vLLM cannot load model.layers.0.block_sparse_moe.gate.weight (",
        all_of(
            write("mixtral"),
            edit_tensors(lambda t: t.update({name: t[name][:, :64].clone() for name in gates(t)})),
        ),
        role="base",
    ),
    "no weights of the format": Failure(
        "the directory has no weights that `engine.load_format: pt` reads; add *.safetensors",
        lambda path: None,
        role="base",
        engine={"load_format": "pt"},
    ),
    "loader's options": Failure(
        "`engine`: Unexpected extra config keys for load format auto: {'foo'}; remove it",
        engine={"model_loader_extra_config": {"foo": 1}},
    ),
    # quantization
    "unknown quantization": Failure(
        "Unknown quantization method: zzz",
        set_config(quantization_config={"quant_method": "zzz"}),
    ),
    "bitsandbytes": Failure(
        "Unknown quantization method: bitsandbytes",
        set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    "dtype of a quantization": Failure(
        "torch.float32 is not supported for quantization method fp8",
        set_config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
    ),
    # arguments
    "room for one request": Failure(
        "`max_model_len` is 256: To serve at least one request with the model's max seq len (256)",
        engine={"kv_cache_memory_bytes": 1_000_000},
    ),
    "blocks for one request": Failure(
        "`max_model_len` is 1024: To serve at least one request",
        engine={"num_gpu_blocks_override": 2, "max_model_len": 1024},
    ),
    "tokens of a step": Failure(
        "max_num_batched_tokens (2) must be greater than or equal to max_num_seqs (4)",
        engine={"max_num_batched_tokens": 2},
    ),
    "absent processor": Failure(
        "`engine.logits_processors` is ['nowhere:Absent']: No module named 'nowhere'; correct it",
        engine={"logits_processors": ["nowhere:Absent"]},
    ),
    "absent scheduler": Failure(
        "`engine.scheduler_cls` is 'nowhere.Absent': No module named 'nowhere'; correct it",
        engine={"scheduler_cls": "nowhere.Absent"},
    ),
    "absent worker": Failure(
        "`engine.worker_cls` is 'nowhere.Absent': No module named 'nowhere'; correct it",
        engine={"worker_cls": "nowhere.Absent"},
    ),
    "absent extension": Failure(
        "`engine.worker_extension_cls` is 'nowhere.Absent': No module named 'nowhere'; correct it",
        engine={"worker_extension_cls": "nowhere.Absent"},
    ),
    "generation config": Failure(
        "`engine.generation_config` is '/none': no generation_config.json is read from there",
        engine={"generation_config": "/none"},
    ),
    "implementation": Failure(
        "`engine.model_impl` is 'transformers': the class that holds the members exists only for "
        "vLLM's implementation; remove it; to run a member in vLLM's Transformers backend, name",
        engine={"model_impl": "transformers"},
    ),
    "sleep": Failure(
        "`engine.enable_sleep_mode` is True: Sleep mode is not supported on current platform",
        engine={"enable_sleep_mode": True},
    ),
    "connector": Failure(
        "`engine.kv_transfer_config.kv_connector` is 'Absent': it does not tell engines with the",
        engine={"kv_transfer_config": {"kv_connector": "Absent", "kv_role": "kv_both"}},
    ),
    "experts of dense models": Failure(
        "Number of experts in the model must be greater than 0",
        engine={"enable_expert_parallel": True},
    ),
    "drafts of several windows": Failure(
        "`speculate`: members' sliding windows (none, 24) make several KV cache groups",
        write("mistral"),
        engine={"disable_hybrid_kv_cache_manager": False},
        more={"speculate": {"tokens": 3}},
    ),
}
"""Of a triple of Llamas, float32, with room for the cache: name -> what fails, and its words."""


def gates(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith("gate.weight")]


def inspect_here() -> None:
    """Have vLLM look at model classes in this process, not in a new one for each."""
    registry._run_in_subprocess = lambda function: function()
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # other tests' engines have; it would go first


@pytest.fixture(scope="module")
def problems_of() -> Iterator[Callable[[dict[str, Any]], tuple[str, ...]]]:
    """`check`, in a process that no other test has made an engine's worker."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, inspect_here) as pool:
        yield lambda config: pool.submit(run, config).result().problems


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_triple(tmp_path_factory.mktemp("triple"), "llama")


def failing(triple: dict[str, str], failure: Failure, path: Path) -> dict[str, Any]:
    """Return the configuration of a row; *path* is where its changed member goes."""
    own = dict(triple)
    if failure.change is not None:
        shutil.copytree(triple[failure.role], path)
        failure.change(path)
        own[failure.role] = str(path)
    return {**own, **failure.more, "engine": {**ON_CPU, **ROOM, **failure.engine}}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.slow
def test_check_says_it_first(triple, tmp_path, problems_of, name):
    failure = FAILURES[name]
    config = failing(triple, failure, tmp_path / "changed")
    problems = problems_of(config)
    named = str(tmp_path / "changed") if failure.is_of_one else ""
    found = [problem for problem in problems if failure.words in problem and named in problem]
    assert len(found) == 1, problems
    assert "\n" not in found[0]
    assert not failure.is_of_one or found[0].startswith(failure.role)


MISTRAL = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    **{f"{own}_proj": f"w{own}" for own in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def in_mistrals_own_format(path: Path) -> None:
    """Add a Mistral's weights once more, as Mistral publishes them: vLLM reads these."""
    write("mistral")(path)
    own = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for theirs, new in MISTRAL.items():
            name = name.replace(theirs, new)
        own[name] = tensor
    save_file(own, path / "consolidated.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        in_mistrals_own_format,
        write("hunyuan_v1_moe"),
        write("mellum", tied=True),
        write("llama", head_dim=48),  # which vLLM's backend does not list
        write("gpt_neox"),
    ],
    ids=[
        *("consolidated Mistral", "experts of a backend", "router of a backend", "head size 48"),
        "backend",
    ],
)
@pytest.mark.slow
def test_check_lets_pass_what_works(triple, tmp_path, problems_of, change):
    config = failing(triple, Failure("", change, role="base"), tmp_path / "changed")
    assert problems_of(config) == ()


@pytest.fixture(scope="module")
def starts(triple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Start the rows, and a triple of experts in vLLM's Transformers backend, which works."""
    root = tmp_path_factory.mktemp("starts")
    plan = []
    for name in FAILURES if os.environ.get("STARTS") else STARTED:
        config = failing(triple, FAILURES[name], root / name)
        arguments = ProxyConfig.parse(config, name).engine_args()
        question = {"name": "one", "prompts": [list(range(5, 17))], "params": {"max_tokens": 2}}
        plan.append({"name": name, "config": {"plain": arguments}, "questions": [question]})
    config = {"engine": {**ON_CPU, **ROOM, "skip_tokenizer_init": True}, **experts(root)}
    question = {"name": "all", "prompts": PROMPTS, "params": {"temperature": 0, "max_tokens": 8}}
    plan.append({"name": "experts", "config": config, "questions": [question]})
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**run_engines(plan, root / "engines", env=env), "members": config}


PROMPTS = [list(range(5, 17)), list(range(100, 171)), [400, 3, 77]]


def experts(root: Path) -> dict[str, str]:
    """Write mixtures of the backend: Mellum's router is a part of its experts there."""
    return write_triple(root / "experts", "backend-mixtures")


@pytest.mark.parametrize("name", FAILURES if os.environ.get("STARTS") else STARTED)
def test_a_start_fails(starts, name):
    assert "error" in starts[name], starts[name]


@pytest.mark.parametrize("name", ["head size", "block size", "rope type"])
def test_a_stock_start_says_the_same(starts, name):
    assert FAILURES[name].words in starts[name]["error"]


def test_members_with_experts_of_one_name(starts):
    """vLLM's Transformers backend gives the experts of all members the same names."""
    assert run(starts["members"]).problems == ()
    assert "error" not in starts["experts"], starts["experts"]["error"]
    reference = Reference(**{role: starts["members"][role] for role in ROLES})
    for prompt, answer in zip(PROMPTS, starts["experts"]["answers"]["all"], strict=True):
        assert answer["token_ids"][0] == reference.greedy(prompt, 8).token_ids
