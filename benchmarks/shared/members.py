"""The sets of members that benchmarks run: made on the spot, without a model hub.

- ``smollm2``: SmolLM2-135M and the demo's small models, cut to eight layers (real weights);
- ``smollm2-5x``, ``smollm2-10x``: the same, with a base of 5 and 10 times the bytes of a small
  model. Its MLPs get columns whose output is zero: the same function, at the paper's ratio of cost;
- ``profiles``, ``profiles-5x``, ``profiles-10x``: the same base, and small members of half its
  layers that are trained on the spot to describe cities (about twelve minutes on two cores, once).
  Such an expert predicts what a real expert would, token by token;
- ``vocabulary-N``: shapes of small models, to show how time grows;
- ``llama-2-13b``, ``llama-2-70b``, ``tiny``: shapes only, with random weights that vLLM draws
  while it starts (`load_format: dummy`), and members of 7B (tiny: of a size for tests). The 70B
  model has as many layers as fit into one GPU of 80 GB next to the small members;
- ``granite-4-h``: shapes of hybrids, drawn likewise: as Granite 4.0 H 1B with half of its layers,
  and small members as Granite 4.0 H 350M with ten layers, a fifth of the base's bytes;
- ``qwen3-vl``: shapes of vision-language models: as Qwen3-VL 2B with ten of its text model's
  layers, and small members of a fifth of its bytes (there is no Qwen3-VL of this size).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file, save_file

from demo import models as demo_models
from shared.options import Parser
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxyConfig, Speculate
from vllm_proxy.preflight.check.run import quiet
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes
from vllm_proxy.preflight.plan.shape import Shape

CACHE = Path(".cache/bench")
LAYERS = 8
"""Layers of SmolLM2's small members."""
WORKSPACE = 8 * 2**30
"""Memory of a GPU for activations, CUDA graphs and libraries."""
SMOLLM2 = {"smollm2": None, "smollm2-5x": 5, "smollm2-10x": 10}
PROFILES = {"profiles": None, "profiles-5x": 5, "profiles-10x": 10}
"""How many times the small members' bytes the base has; None: as it is."""
HEAL_STEPS, TUNE_STEPS = 200, 150
"""Of training the small members of `PROFILES`."""

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_13B = {
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_TINY_BASE = _TINY | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
_GROWTH = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
VOCABULARIES = (8192, 32768, 131072)


def _granite(hidden: int, intermediate: int, layers: int, state_heads: int) -> dict[str, Any]:
    """Return a hybrid of Granite 4.0 H's kind: one layer in ten has attention."""
    return {
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "hidden_size": hidden,
        "shared_intermediate_size": intermediate,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(layers)],
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "mamba_n_heads": state_heads,
        "mamba_d_head": 2 * hidden // state_heads,
        "mamba_d_state": 128,
        "position_embedding_type": "nope",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "vocab_size": 100352,
        "tie_word_embeddings": True,
    }


def _qwen3_vl(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """Return a vision-language model of Qwen3-VL's kind."""
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    return {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"out_hidden_size": hidden},
        "tie_word_embeddings": True,
    }


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (_TINY_BASE, _TINY),
    **{
        f"vocabulary-{n}": (
            _GROWTH | {"vocab_size": n, "num_hidden_layers": 12},
            _GROWTH | {"vocab_size": n},
        )
        for n in VOCABULARIES
    },
    "llama-2-13b": (LLAMA_13B, LLAMA_7B),
    "llama-2-70b": (LLAMA_70B | {"num_hidden_layers": 20}, LLAMA_7B),
    "granite-4-h": (_granite(1536, 4096, 20, 48), _granite(768, 2048, 10, 48)),
    "qwen3-vl": (_qwen3_vl(2048, 6144, 10, 16), _qwen3_vl(768, 2304, 6, 6)),
}
"""Base and small members, as fields of a `LlamaConfig` if they name no `model_type`."""
SETS = (*SMOLLM2, *PROFILES, *SHAPES)


@dataclass
class Members:
    """Members to run, and what they weigh.

    Attributes:
        config: of the proxy-tuned engine; its `base` is what runs alone.
        dtype: of weights and KV cache.
        kv_bytes: memory for each engine's KV cache.
    """

    config: ProxyConfig
    dtype: str
    kv_bytes: int

    @cached_property
    def shapes(self) -> dict[Role, Shape]:
        """What `vllm-proxy plan` reads of the members. Raises `ProxyConfigError`."""
        own = {"dtype": self.dtype, "enable_prefix_caching": False}  # as all systems have it
        config = self.config.model_copy(update={"engine": {**self.config.engine, **own}})
        with quiet():
            found = read_all(config)
            engine = read_engine(config, found)
            shapes = read_shapes(config, found, engine, here=True)
        return {shape.role: shape for shape in shapes}

    def _chosen(self, roles: Sequence[Role]) -> list[Shape]:
        return [self.shapes[role] for role in roles or self.config.roles]

    def drafting(self, tokens: int, *, adapt: bool) -> "Members":
        """Return these members; the expert drafts K tokens, or (*adapt*) at most K."""
        speculate = Speculate(tokens=tokens, adapt=None if adapt else False)
        return replace(self, config=self.config.model_copy(update={"speculate": speculate}))

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return getattr(torch, self.dtype).itemsize

    @property
    def vocab_size(self) -> int:
        """Ids that every member knows."""
        return min(shape.vocab_size for shape in self.shapes.values())

    def bytes_of(self, *roles: Role) -> int:
        """Return the memory that these members' weights take (of all, if none is named)."""
        return sum(shape.weight_bytes for shape in self._chosen(roles))

    def bytes_read(self, *roles: Role) -> int:
        """Return what a decode step reads of these members' weights (of all, if none is named).

        An input embedding that is not the head as well is looked up, not read.
        """
        looked_up = [shape.embedding.bytes for shape in self._chosen(roles) if not shape.tied]
        return self.bytes_of(*roles) - sum(looked_up)

    def state_bytes(self, *roles: Role) -> int:
        """Return what a request's states take in these members (of all, if none is named)."""
        return sum(sum(shape.states) for shape in self._chosen(roles))

    def require_context(self, parser: Parser, tokens: int) -> None:
        """End the program with one line if requests of this many tokens exceed the context."""
        own = [shape.context for shape in self.shapes.values()]
        context = min(self.config.engine.get("max_model_len") or min(own), *own)
        if tokens > context:
            parser.error(
                f"prompt and output of {tokens} tokens do not fit the members' context of "
                f"{context}; ask for fewer"
            )

    @property
    def bytes_ratio(self) -> float:
        """What a step of proxy tuning reads over what a step of the base alone reads."""
        return self.bytes_read() / self.bytes_read("base")

    def kv_bytes_per_token(self, *roles: Role) -> int:
        """Return the KV cache that one token takes in these members (of all, if none is named)."""
        return self.itemsize * sum(shape.kv_numbers() for shape in self._chosen(roles))


def prepare(
    parser: Parser, name: str, dtype: str, device: str, *, reference: bool, at_once: int = 1
) -> Members:
    """Return the set *name*, or the one of a YAML file, after making it if need be.

    Whatever cannot be run ends the program by one line: an unknown name, a wrong config, more
    memory than there is.

    Args:
        parser: ends the program.
        name: of the set or file.
        dtype: of weights and KV cache.
        device: what runs them.
        reference: whether the transformers loop will hold the members as well.
        at_once: requests whose recurrent states are to fit into each engine's KV cache.
    """
    if name in SETS:
        config = _made(name)
    elif Path(name).suffix in (".yaml", ".yml"):
        try:
            config = ProxyConfig.from_yaml(name)
        except ProxyConfigError as error:
            parser.error(f"--models: {error}")
    else:
        parser.error(f"--models {name}: unknown; use {', '.join(SETS)}, or a YAML config")
    members = Members(config, dtype, kv_bytes=2**30)
    try:
        # Pages are as large as the largest state, so that small members' take more than they have.
        members.kv_bytes += 2 * at_once * members.state_bytes()
    except ProxyConfigError as error:
        parser.error(f"--models {name}: {error}")
    if device == "cuda":  # what all members leave
        left = torch.cuda.mem_get_info()[0] - members.bytes_of() - WORKSPACE
        members.kv_bytes = max(members.kv_bytes, left)
    _require_memory(parser, name, members, device, reference=reference)
    return members


def _require_memory(
    parser: Parser, name: str, members: Members, device: str, *, reference: bool
) -> None:
    """On a CPU the systems are all in memory; on a GPU they take turns."""
    proxy, base = members.bytes_of(), members.bytes_of("base")
    if device == "cuda":
        there = torch.cuda.mem_get_info()[0]
        needed = proxy + members.kv_bytes + WORKSPACE
        kind = torch.cuda.get_device_name()
    else:
        there = psutil.virtual_memory().available
        needed = proxy + base + 2 * members.kv_bytes + (proxy if reference else 0)
        kind = "this machine"
    if needed > there:
        parser.error(
            f"--models {name}: {needed / 2**30:.1f} GiB are needed for weights and KV cache in "
            f"{members.dtype}, {there / 2**30:.1f} GiB are free on {kind}; choose a smaller set "
            f"({', '.join(SETS)})"
        )


def _made(name: str) -> ProxyConfig:
    path = CACHE / name
    recipe = path / "config.yaml"
    made = path / "made.json"
    if name in SHAPES:
        digest: object = [*SHAPES[name], 1]
    elif name in PROFILES:
        digest = [demo_models.recipe_digest(), HEAL_STEPS, TUNE_STEPS, PROFILES[name], 1]
    else:
        digest = [demo_models.recipe_digest(), LAYERS, SMOLLM2[name], 1]
    with demo_models.exclusive(_parent(CACHE / f"{name}.lock")):
        if not made.is_file() or json.loads(made.read_text()) != digest:
            shutil.rmtree(path, ignore_errors=True)
            makers = {
                **dict.fromkeys(SHAPES, _make_shapes),
                **dict.fromkeys(SMOLLM2, _make_smollm2),
            }
            config = makers.get(name, _make_profiles)(path, name)
            recipe.write_text(yaml.safe_dump(config))
            made.write_text(json.dumps(digest))
    return ProxyConfig.from_yaml(recipe)


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _make_shapes(path: Path, name: str) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base, small = SHAPES[name]
    vocabulary = base.get("text_config", base)["vocab_size"]
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    )
    for role, shape in (("base", base), ("expert", small), ("antiexpert", small)):
        write_shape(path / role, shape)
        fast.save_pretrained(path / role)
    return _config(path, load_format="dummy")


def write_shape(path: Path, shape: Mapping[str, Any]) -> None:
    """Write the config.json of a model: one like Llama-2, if *shape* names no `model_type`."""
    from transformers import AutoConfig

    settings = {"max_position_embeddings": 4096, "tie_word_embeddings": False, **shape}
    family = settings.pop("model_type", "llama")
    settings.setdefault("architectures", ["LlamaForCausalLM"])
    AutoConfig.for_model(family, **settings).save_pretrained(path)


def _config(path: Path, **engine: object) -> dict[str, Any]:
    roles = {role: str(path / role) for role in ("base", "expert", "antiexpert")}
    return {**roles, "engine": {"max_model_len": 2048, **engine}}


def _make_smollm2(path: Path, name: str) -> dict[str, Any]:
    source = demo_models.build()
    for role in ("expert", "antiexpert"):
        _cut(source / role, path / role)
    _make_base(source / "base", path, SMOLLM2[name])
    return _config(path)


def _make_profiles(path: Path, name: str) -> dict[str, Any]:
    from experiments.gap.profiles import profiles
    from experiments.gap.train import Recipe, healed, tuned

    source, task, stages = demo_models.build(), profiles(), CACHE / "stages"
    antiexpert = healed(stages, source / "base", [task], Recipe(HEAL_STEPS, 6e-4))
    expert = tuned(stages, antiexpert, "expert", task, 0, Recipe(TUNE_STEPS, 2e-4))
    shutil.copytree(antiexpert, path / "antiexpert")
    shutil.copytree(expert, path / "expert")
    _make_base(source / "base", path, PROFILES[name])
    return _config(path)


def _make_base(source: Path, path: Path, factor: int | None) -> None:
    """Write the base, with about *factor* times the weights of the expert that is there."""
    if factor is None:
        shutil.copytree(source, path / "base")
        return
    small = sum(t.numel() for t in load_file(path / "expert/model.safetensors").values())
    _widen(source, path / "base", factor * small)


def _cut(source: Path, target: Path) -> None:
    """Write a model with the first layers of another."""
    weights = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    _write(source, target, weights, num_hidden_layers=LAYERS)


def _widen(source: Path, target: Path, parameters: int) -> None:
    """Write a model that computes what another does, with about *parameters* weights.

    New columns of gate and up projection repeat the old ones; those of the down projection are 0.
    """
    weights = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    old, layers = config["intermediate_size"], config["num_hidden_layers"]
    more = parameters - sum(tensor.numel() for tensor in weights.values())
    width = old + more // (3 * layers * config["hidden_size"])
    width = -(-width // 64) * 64
    columns = torch.arange(width) % old
    for name, tensor in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = tensor[columns].contiguous()
        elif name.endswith("down_proj.weight"):
            weights[name] = torch.nn.functional.pad(tensor, (0, width - old))
    _write(source, target, weights, intermediate_size=width)


def _write(source: Path, target: Path, weights: dict[str, torch.Tensor], **changes: int) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((source / "config.json").read_text()) | changes
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    (target / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
