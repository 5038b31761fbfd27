"""Triples whose members come in other shapes than a directory with one safetensors file."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.quantized import write_quantized
from support.tiny_adapters import merged_by_peft, write_adapter
from support.tiny_models import write_model, write_triple

HUB = "hub"
"""Name of the directory beside the members of `write_triple_of_many_makes` that stands for the
cache of a hub, to be named by `HF_HUB_CACHE`."""

LEFT_ALONE = ["model.layers.1.mlp.down_proj"]
"""Layers of quantized members that are not quantized."""


def write_lora_triple(
    root: Path, family: str = "llama", method: str | None = None
) -> dict[str, object]:
    """Write a triple whose expert is the antiexpert with an adapter; the reference's is merged.

    With a *method* of `write_quantized` the antiexpert is quantized, but for one layer. The
    reference's is its twin.
    """
    triple = write_triple(root, family)
    small, twin, merged = Path(triple["antiexpert"]), Path(triple["antiexpert"]), root / "merged"
    if method is not None:
        small, twin = root / method, root / "twin"
        write_quantized(Path(triple["antiexpert"]), small, twin, method, plain=LEFT_ALONE)
    adapter = write_adapter(
        twin, root / "adapter", target_modules="all-linear", rank_pattern={"q_proj": 2}
    )
    merged_by_peft(twin, adapter).save_pretrained(merged)
    reference = {**triple, "expert": str(merged), "antiexpert": str(twin)}
    expert = {"model": str(small), "lora": str(adapter)}
    return {**triple, "expert": expert, "antiexpert": str(small), "reference": reference}


def write_triple_with_trained_tokens(root: Path) -> dict[str, object]:
    """Write a triple whose expert has an adapter with tokens of its own, in a head that is tied."""
    triple = write_triple(root, "qwen3")
    small, merged = Path(triple["expert"]), root / "merged"
    trained = {"trainable_token_indices": [*range(3, 103)]}
    adapter = write_adapter(small, root / "adapter", target_modules=["q_proj"], **trained)
    merged_by_peft(small, adapter).save_pretrained(merged)
    expert = {"model": str(small), "lora": str(adapter)}
    return {**triple, "expert": expert, "reference": {**triple, "expert": str(merged)}}


def write_triple_of_odd_configs(root: Path) -> dict[str, object]:
    """Write a triple whose configs are not the whole truth of what vLLM and transformers make.

    All say that the head is the embedding, and the checkpoints have heads of their own, which
    count. The expert has factors for long and short texts (LongRoPE): vLLM takes those for long
    ones wherever `max_model_len` is beyond the short ones, as the reference's twin does.
    """
    small = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
    factors = [1 + 0.5 * i for i in range(16)]
    rope = {"rope_type": "longrope", "long_factor": factors, "short_factor": [1.0] * 16}
    long = {"original_max_position_embeddings": 64, "sliding_window": None, "rope_scaling": rope}
    triple = {
        "base": write_model(root / "base", seed=0, **{**small, "hidden_size": 256, "layers": 3}),
        "expert": write_model(root / "expert", "phi3", seed=1, **small, **long),
        "antiexpert": write_model(root / "antiexpert", seed=2, **small),
    }
    for model in triple.values():
        give_head(model)
    twin = root / "twin"
    shutil.copytree(triple["expert"], twin)
    config = json.loads((twin / "config.json").read_text())
    config["rope_parameters"]["short_factor"] = factors
    (twin / "config.json").write_text(json.dumps(config))
    paths = {role: str(path) for role, path in triple.items()}
    return {**paths, "reference": {**paths, "expert": str(twin)}}


def give_head(model: Path, *, copy: bool = False) -> None:
    """Give a checkpoint without one a head of its own: another one, or a *copy*."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    torch.manual_seed(9)
    head = embedding.clone() if copy else torch.randn_like(embedding) * embedding.std()
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})


def write_triple_of_many_makes(root: Path) -> dict[str, object]:
    """Write a triple whose files differ in dtype, number, format and place.

    The base is bfloat16 in several safetensors files; the small members are two revisions of one
    model in a hub's cache, pickled: float16 in one file, and float32.
    """
    triple = write_triple(root / "written", "llama")
    load(triple["base"], torch.bfloat16).save_pretrained(root / "base", max_shard_size="200KB")
    assert len(list((root / "base").glob("*.safetensors"))) > 2
    repository = root / HUB / "models--tiny--pair"
    (repository / "refs").mkdir(parents=True)
    for role, revision, dtype in (
        ("expert", "tuned", torch.float16),
        ("antiexpert", "main", torch.float32),
    ):
        commit = f"{len(revision):040x}"
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        shutil.copytree(triple[role], snapshot)
        (snapshot / "model.safetensors").unlink()
        torch.save(load(triple[role], dtype).state_dict(), snapshot / "pytorch_model.bin")
        load(triple[role], dtype).save_pretrained(root / role)  # for the reference
    reference = {role: str(root / role) for role in triple}
    own = {"expert": {"model": "tiny/pair", "revision": "tuned"}, "antiexpert": "tiny/pair"}
    return {"base": reference["base"], **own, "reference": reference}


def write_quantized_triple(
    root: Path, method: str, roles: Sequence[str], *, lm_head: bool = False
) -> dict[str, object]:
    """Write a triple with *roles* quantized but for one layer; the reference's are their twins.

    The others are bfloat16.
    """
    triple = write_triple(root / "written", "llama")
    for role in triple.keys() - set(roles):
        load(triple[role], torch.bfloat16).save_pretrained(triple[role])
    quantized, twins = dict(triple), dict(triple)
    for role in roles:
        path, twin = root / role, root / f"{role}-twin"
        write_quantized(Path(triple[role]), path, twin, method, lm_head=lm_head, plain=LEFT_ALONE)
        quantized[role], twins[role] = str(path), str(twin)
    return {**quantized, "reference": twins}


def load(path: str, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
