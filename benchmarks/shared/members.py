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
  model has as many layers as fit into one GPU of 80 GB next to the small members.
"""

import json
import shutil
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
SHAPES = {
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
}
"""Base and small members, as fields of a `LlamaConfig`."""
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
    def _models(self) -> dict[Role, Any]:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            return {
                role: AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(self.config.member(role).model)
                )
                for role in self.config.roles
            }

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
        return min(model.config.vocab_size for model in self._models.values())

    def bytes_of(self, *roles: Role) -> int:
        """Return the memory that these members' weights take (of all, if none is named)."""
        chosen = [self._models[role] for role in roles or self.config.roles]
        return self.itemsize * sum(p.numel() for model in chosen for p in model.parameters())

    def bytes_read(self, *roles: Role) -> int:
        """Return what a decode step reads of these members' weights (of all, if none is named).

        An input embedding that is not the head as well is looked up, not read.
        """
        total = self.bytes_of(*roles)
        for role in roles or self.config.roles:
            model = self._models[role]
            if not model.config.tie_word_embeddings:
                total -= self.itemsize * model.get_input_embeddings().weight.numel()
        return total

    def require_context(self, parser: Parser, tokens: int) -> None:
        """End the program with one line if requests of this many tokens exceed the context."""
        own = [model.config.max_position_embeddings for model in self._models.values()]
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
        configs = [self._models[role].config for role in roles or self.config.roles]
        return sum(
            2 * self.itemsize * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
            for c in configs
        )


def prepare(parser: Parser, name: str, dtype: str, device: str, *, reference: bool) -> Members:
    """Return the set *name*, or the one of a YAML file, after making it if need be.

    Whatever cannot be run ends the program by one line: an unknown name, a wrong config, more
    memory than there is. *reference*: whether the transformers loop will hold the members as well.
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
    words = {f"w{i}": i for i in range(base["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    )
    for role, shape in (("base", base), ("expert", small), ("antiexpert", small)):
        write_shape(path / role, shape)
        fast.save_pretrained(path / role)
    return _config(path, load_format="dummy")


def write_shape(path: Path, shape: dict[str, int]) -> None:
    """Write the config.json of a model like Llama-2."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **shape,
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config.save_pretrained(path)


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
