"""Members' shapes and the engine's settings, read from configs; no weights are read."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role, drafting_roles
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.limits import needs_one_cache_group
from vllm_proxy.members.attempt import attempt, make_config
from vllm_proxy.members.attention import attention_layers
from vllm_proxy.members.location import Unreadable
from vllm_proxy.members.read import PLAIN_CACHE_DTYPES, ReadMember, read_members
from vllm_proxy.members.recurrent import recurrent_roles, state_bytes
from vllm_proxy.members.text_part import is_text_part, text_weights, with_text_part
from vllm_proxy.members.vllm_configs import layer_windows
from vllm_proxy.members.weights import checkpoint_files, meta_model
from vllm_proxy.preflight.check.arguments import routing_problems, supported_arguments
from vllm_proxy.preflight.check.images import read_towers
from vllm_proxy.preflight.plan.cost import BLOCK, EngineSettings
from vllm_proxy.preflight.plan.hardware import BatchLimits, Hardware
from vllm_proxy.preflight.plan.launches import captured
from vllm_proxy.preflight.plan.quantized import bits_per_weight, is_routed_expert, stored_bytes
from vllm_proxy.preflight.plan.shape import NO_WEIGHTS, Shape, WeightSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.config import ModelConfig


def read_all(config: ProxyConfig) -> dict[Role, ReadMember]:
    """Return all members as vLLM reads their configs. Raises `ProxyConfigError`."""
    _, problems = supported_arguments(config.engine)
    members, wrong = read_members(config, elsewhere=True)
    _, blind = read_towers(members, config.engine)
    routing = routing_problems(config.engine, members)
    problems = [*dict.fromkeys([*problems, *wrong, *blind, *routing])]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ProxyConfigError(f"{problems[0]}{more}; run `vllm-proxy check`")
    return members


def read_engine(config: ProxyConfig, members: Mapping[Role, ReadMember]) -> EngineSettings:
    """Return the engine's dtypes and memory limits, as vLLM reads the configuration.

    Raises:
        ProxyConfigError: vLLM rejects one of them, or the size of the KV cache's dtype is unknown.
    """
    from vllm import EngineArgs
    from vllm.config import CacheConfig
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    engine = config.engine
    base = members["base"]
    arguments = {"model": str(base.files.directory)}
    arguments |= _given(engine, "dtype", "trust_remote_code")
    if is_text_part(base.model_config.hf_config):
        arguments = with_text_part(arguments)
    model, problems = make_config(arguments, EngineArgs.create_model_config)
    if problems:
        raise ProxyConfigError(problems[0])
    if isinstance(model, Exception):
        raise ProxyConfigError(one_line(model), field="engine")
    limits = _given(engine, "gpu_memory_utilization", "kv_cache_memory_bytes")
    cache_dtype = engine.get("kv_cache_dtype") or "auto"
    if cache_dtype not in PLAIN_CACHE_DTYPES:
        raise ProxyConfigError(
            "its size is not known",
            field="engine.kv_cache_dtype",
            value=cache_dtype,
            remedy=f"use one of {', '.join(PLAIN_CACHE_DTYPES)}",
        )
    cache = attempt(CacheConfig, **limits)
    if isinstance(cache, Exception):
        raise ProxyConfigError.worded(
            f"`engine` has {limits}: {one_line(cache)}", field="engine", remedy="change it"
        )
    windows = {w for member in members.values() for w in layer_windows(member.model_config)}
    keeps_all = engine.get("disable_hybrid_kv_cache_manager")
    if keeps_all is None:
        keeps_all = needs_one_cache_group(config, windows)
    dtype: Any = model.dtype  # a torch dtype, once vLLM has read the config
    return EngineSettings(
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        kv_itemsize=kv_cache_dtype_str_to_dtype(cache_dtype, model).itemsize,
        utilization=cache.gpu_memory_utilization,
        kv_cache_bytes=cache.kv_cache_memory_bytes,
        windows=not keeps_all or None not in windows,
        window=max(filter(None, windows)) if keeps_all and None not in windows else None,
        block=engine.get("block_size") or BLOCK,
        states=1 if engine.get("enable_prefix_caching") is False else 2,
        drafts=config.speculate.tokens if config.speculate else 0,
        drafting=config.speculate.requests if config.speculate else None,
        different_prompts=config.chat is not None and config.chat.differ(members),
        graphs=captured(bool(engine.get("enforce_eager")), _graph_mode(engine)),
    )


def _graph_mode(engine: Mapping[str, Any]) -> str | None:
    """Return the name of the configuration's `cudagraph_mode`, None if it has none."""
    given = engine.get("compilation_config")
    mode = given.get("cudagraph_mode") if isinstance(given, Mapping) else None
    return None if mode is None else str(getattr(mode, "name", mode)).upper()


def read_batch(config: ProxyConfig, gpu: Hardware) -> BatchLimits:
    """Return the largest batch: the configuration's, or else vLLM's default for the GPU.

    Raises:
        ProxyConfigError: the configuration's is not a count.
    """
    sizes = gpu.batch._asdict()
    for name, key in (("tokens", "max_num_batched_tokens"), ("requests", "max_num_seqs")):
        given = config.engine.get(key)
        if given is not None:
            if not isinstance(given, int) or given < 1:
                raise ProxyConfigError(field=f"engine.{key}", value=given, remedy="give a count")
            sizes[name] = given
    return BatchLimits(**sizes)


def _given(engine: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: engine[key] for key in keys if engine.get(key) is not None}


def read_shapes(
    config: ProxyConfig,
    members: Mapping[Role, ReadMember],
    engine: EngineSettings,
    *,
    here: bool = False,
) -> list[Shape]:
    """Return the members' shapes in an engine; *here*: on this machine.

    If the expert runs in one pass with the antiexpert, its shape is that of its adapter, and its
    drafts run through the layers of both.

    Raises:
        ProxyConfigError: as `read_shape` does, or an adapter cannot be read.
    """
    from vllm_proxy.members.adapter_set import shared_adapters

    itemsize = engine.itemsize
    shapes = {role: read_shape(member, itemsize) for role, member in members.items()}
    for role, states in _states(config, members, engine, here=here).items():
        shapes[role] = replace(shapes[role], states=states)
    for role, tower in read_towers(members, config.engine)[0].items():
        count = tower.parameters
        shapes[role] = replace(shapes[role], tower=WeightSize(count, count * itemsize))
    dummy = config.engine.get("load_format") == "dummy"
    quantization = shapes["antiexpert"].quantization if "antiexpert" in shapes else None
    adapters = shared_adapters(config, dummy=dummy, quantization=quantization)
    if config.speculate is not None:
        for role in drafting_roles(is_shared=adapters is not None):
            shapes[role] = replace(shapes[role], drafts=True)
    if adapters is not None:
        count = adapters.parameters
        shapes["expert"] = replace(
            shapes["expert"],
            layers=WeightSize(count, count * itemsize),
            moe_weights=NO_WEIGHTS,
            embedding=NO_WEIGHTS,
            head=NO_WEIGHTS,
            moe_experts=0,
            quantization=None,
            runs_with=shapes["antiexpert"],
        )
    return [*shapes.values()]


def read_shape(member: ReadMember, itemsize: int) -> Shape:
    """Return a member's shape in an engine whose numbers have *itemsize* bytes.

    Raises:
        ProxyConfigError: transformers lacks its architecture, or it is quantized and neither files
            nor config show the size.
    """
    config = member.model_config
    model = meta_model(config)
    if model is None:
        raise ProxyConfigError(
            f"the sizes of {config.architecture} are not known, because it is not in transformers",
            field=member.name,
            remedy="plan with a model of the same size that is",
        )
    weights = _weights(member, model, itemsize)
    return Shape(
        role=member.role,
        model=str(member.member),
        hidden_size=config.get_hidden_size(),
        vocab_size=config.get_vocab_size(),
        context=config.max_model_len,
        attention=attention_layers(config),
        tied=_is_tied(model),
        moe_experts=config.get_num_experts() if weights["moe_weights"].parameters else 0,
        moe_experts_per_token=config.get_num_experts_per_tok()
        if weights["moe_weights"].parameters
        else 0,
        quantization=None if config.quantization is None else str(config.quantization),
        width=_width(config),
        layers=weights["layers"],
        moe_weights=weights["moe_weights"],
        embedding=weights["embedding"],
        head=weights["head"],
    )


def _states(
    config: ProxyConfig,
    members: Mapping[Role, ReadMember],
    engine: EngineSettings,
    *,
    here: bool,
) -> dict[Role, tuple[int, ...]]:
    """Return the bytes of each layer's state, of members that have some.

    For one rank. Several ranks divide them, but for a few columns of Mamba 2's convolutions. On a
    CPU with AVX512-BF16, vLLM keeps states of Mamba in float32.
    """
    import torch
    from vllm.config import CacheConfig, VllmConfig

    models = {role: member.model_config for role, member in members.items()}
    if not (roles := recurrent_roles(models)):
        return {}
    # vLLM's classes ask an engine's configuration, of which only this matters.
    given = _given(config.engine, "mamba_cache_dtype", "mamba_ssm_cache_dtype")
    view = VllmConfig(cache_config=CacheConfig(**given))
    if not here:
        view.cache_config = CacheConfig(**given)  # without what this machine's platform changed
    view.model_config = copy.copy(models["base"])
    view.model_config.dtype = getattr(torch, engine.dtype)
    return {role: state_bytes(view, models[role]) for role in roles}


def _width(config: "ModelConfig") -> int:
    """Return the numbers per token in the widest MLP: gate, up and product, for each MoE expert."""
    text = config.hf_text_config
    dense = getattr(text, "intermediate_size", None) or 4 * config.get_hidden_size()
    dense = max(dense) if isinstance(dense, list | tuple) else dense
    if not config.get_num_experts():
        return 3 * dense
    routed = getattr(text, "moe_intermediate_size", None) or dense
    experts = config.get_num_experts_per_tok()
    return max(3 * dense, experts * (3 * routed + config.get_hidden_size()))


def _is_tied(model: "PreTrainedModel") -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _weights(member: ReadMember, model: "PreTrainedModel", itemsize: int) -> dict[str, WeightSize]:
    """Return the size of a member's weights by part: the field of `Shape` that they belong to."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {id(embedding): "embedding", id(head): "head"}
    places = {name: modules[id(m)] for name, m in model.named_modules() if id(m) in modules}

    def part(name: str) -> str:
        if (place := places.get(name.rpartition(".")[0])) is not None:
            return place
        return "moe_weights" if is_routed_expert(name) else "layers"

    numbers = dict.fromkeys(("layers", "moe_weights", "embedding", "head"), 0)
    packed = dict.fromkeys(numbers, 0)  # how many of them a quantization packs
    for name, parameter in model.named_parameters(remove_duplicate=False):
        numbers[part(name)] += parameter.numel()
        if parameter.ndim > 1 and part(name) in ("layers", "moe_weights"):
            packed[part(name)] += parameter.numel()
    sizes = {kind: count * itemsize for kind, count in numbers.items()}
    if member.model_config.is_quantized:
        sizes = _headers(member, part, itemsize) or _packed(member, numbers, packed, itemsize)
    if _is_tied(model):
        sizes["head"] = sizes["embedding"]
    return {kind: WeightSize(numbers[kind], sizes[kind]) for kind in numbers}


def _headers(
    member: ReadMember, part: Callable[[str], str], itemsize: int
) -> dict[str, int] | None:
    """Return bytes by part from the checkpoint's headers; None if there are no files."""
    try:
        files = checkpoint_files(member.files, "auto")
    except Unreadable as error:
        raise ProxyConfigError(str(error), field=member.name) from None
    if not files:
        return None
    sizes = dict.fromkeys(("layers", "moe_weights", "embedding", "head"), 0)
    stored = stored_bytes(files, itemsize).items()
    for name, size in text_weights(member.model_config.hf_config, stored):
        sizes[part(name)] += size
    return sizes


def _packed(
    member: ReadMember, numbers: Mapping[str, int], packed: Mapping[str, int], itemsize: int
) -> dict[str, int]:
    """Return bytes by part from the quantization in config.json; embedding and head have none."""
    section = getattr(member.model_config.hf_config, "quantization_config", None) or {}
    section = section if isinstance(section, Mapping) else section.to_dict()
    bits = bits_per_weight(section)
    if bits is None:
        raise ProxyConfigError(
            "its config.json does not say how many bits its weights have "
            f"({member.model_config.quantization}), and its files are not here",
            field=member.name,
            remedy="download them",
        )
    return {
        kind: round(packed[kind] * bits / 8) + (count - packed[kind]) * itemsize
        for kind, count in numbers.items()
    }
