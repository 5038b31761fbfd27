"""Members' shapes and the engine's settings, from configs: no weights are read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.attempt import attempt, make_config
from vllm_proxy.members.location import Unreadable
from vllm_proxy.members.read import PLAIN_CACHE_DTYPES, ReadMember, read_members
from vllm_proxy.members.vllm_configs import attention_windows
from vllm_proxy.members.weights import checkpoint_files, meta_model
from vllm_proxy.preflight.check.arguments import supported_arguments
from vllm_proxy.preflight.plan.cost import EngineSettings
from vllm_proxy.preflight.plan.hardware import HERE, BatchLimits, Hardware
from vllm_proxy.preflight.plan.predict import Choice, Demand
from vllm_proxy.preflight.plan.quantized import bits_per_weight, is_routed_expert, stored_bytes
from vllm_proxy.preflight.plan.shape import NO_WEIGHTS, Attention, Shape, WeightSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.config import ModelConfig


def read_all(config: ProxyConfig) -> dict[Role, ReadMember]:
    """Return what vLLM makes of all members' configs. Raises `ProxyConfigError`."""
    _, problems = supported_arguments(config.engine)
    members, wrong = read_members(config, elsewhere=True)
    problems = [*dict.fromkeys([*problems, *wrong])]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ProxyConfigError(f"{problems[0]}{more}; run `vllm-proxy check`")
    return members


def read_engine(config: ProxyConfig, members: Mapping[Role, ReadMember]) -> EngineSettings:
    """Return dtypes and memory limits that the configuration's engine has, in vLLM's reading.

    Raises:
        ProxyConfigError: vLLM refuses one of them, or packs the KV cache in its own way.
    """
    from vllm import EngineArgs
    from vllm.config import CacheConfig
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    engine = config.engine
    directory = str(members["base"].files.directory)
    arguments = {"model": directory, **_given(engine, "dtype", "trust_remote_code")}
    model, problems = make_config(arguments, EngineArgs.create_model_config)
    if problems or isinstance(model, Exception):
        raise ProxyConfigError(problems[0] if problems else f"`engine`: {one_line(model)}")
    own = _given(engine, "gpu_memory_utilization", "kv_cache_memory_bytes")
    cache_dtype = engine.get("kv_cache_dtype") or "auto"
    if cache_dtype not in PLAIN_CACHE_DTYPES:
        raise ProxyConfigError(
            f"`engine.kv_cache_dtype` is {cache_dtype!r}, whose size is not known here; use one of "
            f"{', '.join(PLAIN_CACHE_DTYPES)}"
        )
    cache = attempt(CacheConfig, **own)
    if isinstance(cache, Exception):
        raise ProxyConfigError(f"`engine` has {own}: {one_line(cache)}; change it")
    windows = set().union(*(attention_windows(m.model_config) for m in members.values()))
    return EngineSettings(
        dtype=str(model.dtype).removeprefix("torch."),
        itemsize=model.dtype.itemsize,
        kv_itemsize=kv_cache_dtype_str_to_dtype(cache_dtype, model).itemsize,
        utilization=cache.gpu_memory_utilization,
        kv_cache_bytes=cache.kv_cache_memory_bytes,
        windows=not engine.get("disable_hybrid_kv_cache_manager") or None not in windows,
        drafts=config.speculate.tokens if config.speculate else 0,
        drafting=config.speculate.requests if config.speculate else None,
    )


def read_batch(config: ProxyConfig, gpu: Hardware) -> BatchLimits:
    """Return the largest batch: the configuration's, else what vLLM has for the GPU.

    Raises:
        ProxyConfigError: the configuration's is no count.
    """
    sizes = gpu.batch._asdict()
    for name, key in (("tokens", "max_num_batched_tokens"), ("requests", "max_num_seqs")):
        given = config.engine.get(key)
        if given is not None:
            if not isinstance(given, int) or given < 1:
                raise ProxyConfigError(f"`engine.{key}` is {given!r}; give a count")
            sizes[name] = given
    return BatchLimits(**sizes)


def _given(engine: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: engine[key] for key in keys if engine.get(key) is not None}


def read_shapes(
    config: ProxyConfig, members: Mapping[Role, ReadMember], itemsize: int
) -> list[Shape]:
    """Return the members' shapes in an engine whose numbers have *itemsize* bytes.

    Of an expert that runs in one pass with the antiexpert, those of its adapter.

    Raises:
        ProxyConfigError: as `read_shape` does, or an adapter cannot be read.
    """
    from vllm_proxy.members.lora import shared_adapter

    shapes = {role: read_shape(member, itemsize) for role, member in members.items()}
    dummy = config.engine.get("load_format") == "dummy"
    if (adapter := shared_adapter(config, dummy=dummy)) is not None:
        count = sum(m.a.numel() + m.b.numel() for m in adapter.modules.values())
        shapes["expert"] = replace(
            shapes["expert"],
            layers=WeightSize(count, count * itemsize),
            **dict.fromkeys(("moe_weights", "embedding", "head"), NO_WEIGHTS),
            moe_experts=0,
            beside=shapes["antiexpert"],
        )
    return [*shapes.values()]


def read_shape(member: ReadMember, itemsize: int) -> Shape:
    """Return a member's shape in an engine whose numbers have *itemsize* bytes.

    Raises:
        ProxyConfigError: its architecture is not transformers' own, or it is quantized in a way
            whose size neither files nor config tell.
    """
    config = member.model_config
    model = meta_model(config)
    if model is None:
        raise ProxyConfigError(
            f"{member.name}: the sizes of {config.architecture} are not known, it is not one of "
            "transformers'; plan with a model of the same size that is"
        )
    weights = _weights(member, model, itemsize)
    return Shape(
        role=member.role,
        model=str(member.member),
        hidden_size=config.get_hidden_size(),
        vocab_size=config.get_vocab_size(),
        context=config.max_model_len,
        attention=_attention(config),
        tied=_is_tied(model),
        moe_experts=config.get_num_experts() if weights["moe_weights"].parameters else 0,
        moe_experts_per_token=config.get_num_experts_per_tok()
        if weights["moe_weights"].parameters
        else 0,
        quantization=None if config.quantization is None else str(config.quantization),
        width=_width(config),
        **weights,
    )


def notes(
    config: ProxyConfig,
    shapes: Sequence[Shape],
    engine: EngineSettings,
    gpu: Hardware,
    demand: Demand,
    choices: Sequence[Choice],
) -> Iterator[str]:
    """Yield what this configuration has that the figures do not."""
    if engine.dtype == "float32" and gpu.name != HERE:
        yield "Arithmetic is counted at the 16-bit peak; in float32 it is several times slower."
    if any(shape.beside for shape in shapes):
        yield (
            "Expert and antiexpert run in one pass: the expert's weights are its adapter's, its "
            "times what its rows add to the antiexpert's."
        )
    if engine.drafts:
        yield (
            f"Of a pass after {engine.drafts} drafts, all members verify, and the expert has "
            f"drafted; with the acceptance p it makes 1 + p + … + p^{engine.drafts} tokens."
        )
        if any(choice.layout.pp > 1 for choice in choices):
            yield "With pipeline stages the expert cannot draft: engines refuse `speculate` there."
    if config.engine.get("speculative_config"):
        yield "Speculation is not counted: neither its drafts nor the steps that they save."
    most = config.engine.get("max_num_seqs")
    if isinstance(most, int) and any(c.proxy.running > most * c.layout.replicas for c in choices):
        yield f"`engine.max_num_seqs` is {most}: an engine will not run more requests at once."
    if any(choice.proxy.running < demand.concurrency for choice in choices):
        yield f"Where fewer than {demand.concurrency} requests fit, the others wait."


def _attention(config: "ModelConfig") -> tuple[Attention, ...]:
    arch, window = config.model_arch_config, config.get_sliding_window()
    count = config.get_total_num_hidden_layers()
    # as `attention_windows` has it, but layer by layer
    kinds = getattr(config.hf_text_config, "layer_types", None) or ["sliding_attention"] * count
    return tuple(
        Attention(
            heads=arch[i].total_num_attention_heads,
            kv_heads=arch[i].total_num_kv_heads,
            head_size=arch[i].head_size,
            window=window if kinds[i] == "sliding_attention" else None,
            latent=config.use_mla,
        )
        for i in range(count)
    )


def _width(config: "ModelConfig") -> int:
    """Return what the widest MLP holds of a token: gate, up and their product, of each expert."""
    text = config.hf_text_config
    dense = getattr(text, "intermediate_size", None) or 4 * config.get_hidden_size()
    dense = max(dense) if isinstance(dense, list | tuple) else dense
    if not config.get_num_experts():
        return 3 * dense
    own = getattr(text, "moe_intermediate_size", None) or dense
    return max(3 * dense, config.get_num_experts_per_tok() * (3 * own + config.get_hidden_size()))


def _is_tied(model: "PreTrainedModel") -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _weights(member: ReadMember, model: "PreTrainedModel", itemsize: int) -> dict[str, WeightSize]:
    """Return a member's weights by the part of the model that they are in."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {id(embedding): "embedding", id(head): "head"}
    places = {name: modules[id(m)] for name, m in model.named_modules() if id(m) in modules}

    def part(name: str) -> str:
        if (place := places.get(name.rpartition(".")[0])) is not None:
            return place
        return "moe_weights" if is_routed_expert(name) else "layers"

    numbers = dict.fromkeys(("layers", "moe_weights", "embedding", "head"), 0)
    packed = dict.fromkeys(numbers, 0)  # weights that quantization makes smaller
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


def _headers(member: ReadMember, part: Any, itemsize: int) -> dict[str, int] | None:
    """Return bytes by part as the checkpoint's headers have them; None if there are no files."""
    try:
        files = checkpoint_files(member.files, "auto")
    except Unreadable as error:
        raise ProxyConfigError(f"{member.name}: {error}") from None
    if not files:
        return None
    sizes = dict.fromkeys(("layers", "moe_weights", "embedding", "head"), 0)
    for name, size in stored_bytes(files, itemsize).items():
        sizes[part(name)] += size
    return sizes


def _packed(
    member: ReadMember, numbers: Mapping[str, int], packed: Mapping[str, int], itemsize: int
) -> dict[str, int]:
    """Return bytes by part as config.json's quantization says; embedding and head are as ever."""
    section = getattr(member.model_config.hf_config, "quantization_config", None) or {}
    section = section if isinstance(section, Mapping) else section.to_dict()
    bits = bits_per_weight(section)
    if bits is None:
        raise ProxyConfigError(
            f"{member.name}: its config.json does not say how many bits its weights have "
            f"({member.model_config.quantization}), and its files are not here; download them"
        )
    return {
        kind: round(packed[kind] * bits / 8) + (count - packed[kind]) * itemsize
        for kind, count in numbers.items()
    }
