"""Notes: what will run, and what happens where the members differ."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.config.strength import ADAPTIVE
from vllm_proxy.members.attention import attention_layers
from vllm_proxy.members.cache_dtype import describe_cache_dtype, engine_cache_dtype
from vllm_proxy.members.read import PLAIN_CACHE_DTYPES, ReadMember, end_ids
from vllm_proxy.members.recurrent import state_bytes
from vllm_proxy.members.supported import SATURATES_MESSAGE, saturates
from vllm_proxy.preflight.check.tokenizers import Tokenizer
from vllm_proxy.preflight.check.weights import CheckpointInfo

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def describe_shift(config: ProxyConfig) -> Iterator[str]:
    """Yield the formula with its alpha, and the cases in which it has no effect."""
    expert, antiexpert = config.effective_role("expert"), config.effective_role("antiexpert")
    missing = next((role for role in ROLES if role not in config.roles), None)
    replaced = f", the base instead of the missing {missing}" if missing else ""
    alpha = config.alpha if isinstance(config.alpha, float) else "alpha"
    yield f"logits = base + {alpha} * ({expert} - {antiexpert}){replaced}."
    if alpha == "alpha":
        yield f"`alpha` is {config.alpha}."
    for name, value in config.filters.model_dump(exclude_none=True).items():
        yield f"`filters.{name}` is {value}: by the base's probabilities."
    if config.chat is not None:
        seen = ", ".join(f"{role} {config.chat.of(role)}" for role in config.roles)
        yield f"Conversations are seen by {seen}."
    if config.alpha == 0:
        yield "`alpha` is 0: the logits are the base's alone."
    if config.alpha in (1, ADAPTIVE) and missing == "antiexpert":
        yield f"`alpha` is {config.alpha} without an antiexpert: the logits are the expert's alone."
    if config.experts:
        default = "by the base alone" if config.adapters[None] is None else "with `expert`"
        yield f"Requests choose from {len(config.experts)} experts; others are answered {default}."
    elif config.member(expert) == config.member(antiexpert):
        yield (
            f"{expert} and {antiexpert} are the same model: the shift is always zero, except for "
            "requests that give them different prompts."
        )


def describe_checkpoints(
    members: Mapping[Role, ReadMember], checkpoints: Mapping[Role, CheckpointInfo]
) -> Iterator[str]:
    """Yield what is unusual about how each member's weights are used."""
    from vllm.config import LoadConfig

    for role, member in members.items():
        if saturates(member.model_config, LoadConfig()):
            yield f"{member.name}: {SATURATES_MESSAGE}."
        if member.model_config.word_embeddings_untied_by_checkpoint:
            yield (
                f"{member.name}: its config ties the head to the embedding "
                "(`tie_word_embeddings`), but its checkpoint has a separate head, which is used."
            )
        if note := checkpoints[role].note:
            yield f"{member.name}: {note}."


def describe_vocabularies(members: Mapping[Role, ReadMember]) -> Iterator[str]:
    """Yield which ids are never generated because not every member has them."""
    sizes = {role: member.model_config.get_vocab_size() for role, member in members.items()}
    smallest, base = min(sizes.values()), sizes["base"]
    if len(set(sizes.values())) == 1:
        return
    listed = ", ".join(f"{role} {size:,}" for role, size in sizes.items())
    if smallest < base:
        ids = f"ids {smallest:,} to {base - 1:,}, which not every member has"
    else:
        ids = f"ids from {base:,} on, which the base does not have"
    yield f"Vocabularies differ ({listed}): {ids}, are never generated."


def describe_ends(
    config: ProxyConfig,
    members: Mapping[Role, ReadMember],
    tokenizers: Mapping[Role, Tokenizer],
) -> Iterator[str]:
    """Yield which of the expert's end-of-text tokens do not stop the engine: it knows the base's.

    A chat expert ends its turns with a special token (`<|im_end|>`), and so does the proxy.
    """
    ends = {role: end_ids(member.model_config) for role, member in members.items()}
    known = ends["base"] | {*config.sampling.get("stop_token_ids", ())}
    if unknown := sorted(ends[config.effective_role("expert")] - known):
        tokens = tokenizers["expert"].tokens if "expert" in tokenizers else {}
        listed = ", ".join(f"{i} ({tokens[i]!r})" if i in tokens else str(i) for i in unknown)
        yield (
            f"The expert ends texts with id {listed}, at which the base does not stop; set "
            f"`sampling.stop_token_ids: {unknown}` to stop there."
        )


def describe_engine(members: Mapping[Role, ReadMember], vllm_config: "VllmConfig") -> Iterator[str]:
    """Yield dtype, size of the KV cache and longest sequence of the engine that will run."""
    dtypes = {role: member.dtype for role, member in members.items()}
    running = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if set(dtypes.values()) != {running}:
        listed = ", ".join(f"{role} {dtype}" for role, dtype in dtypes.items())
        yield f"Checkpoints are {listed}; all members run in {running}."
    yield from _describe_kv_cache(members, vllm_config)
    configs = {role: member.model_config for role, member in members.items()}
    yield from describe_cache_dtype(vllm_config, configs)
    yield from _describe_states(configs, vllm_config)
    longest = vllm_config.model_config.max_model_len
    yield f"A sequence (prompt and completion) has at most {longest:,} tokens."
    for member in members.values():
        if (original := _long_rope(member.model_config)) is not None and longest > original:
            yield (
                f"{member.name} has LongRoPE: vLLM uses the factors for long texts in all texts, "
                f"because sequences may be longer than {original:,} tokens, while transformers "
                f"decides for each text; set `engine.max_model_len: {original}` to use the factors "
                "for short texts."
            )


def _long_rope(config: "ModelConfig") -> int | None:
    """Return the length up to which LongRoPE uses its factors for short texts; None without it."""
    rope = getattr(config.hf_text_config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # by layer type
    lengths = [
        one.get("original_max_position_embeddings")
        for one in each
        if one.get("rope_type") == "longrope"
    ]
    return min(filter(None, lengths), default=None)


def _describe_kv_cache(
    members: Mapping[Role, ReadMember], vllm_config: "VllmConfig"
) -> Iterator[str]:
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    cache_dtype = engine_cache_dtype(vllm_config, members["base"].model_config)
    if cache_dtype not in PLAIN_CACHE_DTYPES:
        return
    dtype = kv_cache_dtype_str_to_dtype(cache_dtype, vllm_config.model_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    sizes = {
        role: dtype.itemsize * ranks * sum(layer.kv_numbers(ranks) for layer in layers)
        for role, member in members.items()
        if (layers := attention_layers(member.model_config))
    }
    listed = ", ".join(f"{role} {size:,}" for role, size in sizes.items())
    shared = f", over {ranks} tensor-parallel ranks" if ranks > 1 else ""
    name = str(dtype).removeprefix("torch.") if cache_dtype == "auto" else cache_dtype
    yield (
        f"All members share one block table, and each has a separate KV cache: {listed}, "
        f"{sum(sizes.values()):,} bytes per token in total ({name}{shared})."
    )


def _describe_states(
    members: Mapping[Role, "ModelConfig"], vllm_config: "VllmConfig"
) -> Iterator[str]:
    """Yield how large the states of recurrent layers are, if there are any."""
    sizes = {role: sum(state_bytes(vllm_config, member)) for role, member in members.items()}
    if not any(sizes.values()):
        return
    listed = ", ".join(f"{role} {size:,}" for role, size in sizes.items() if size)
    caching = vllm_config.cache_config.enable_prefix_caching
    kept = "two of them, and some for prefixes that are cached" if caching else "one of each"
    yield (
        f"Recurrent layers have states: {listed}, {sum(sizes.values()):,} bytes in total on each "
        f"rank. A running request has {kept}; pages of the KV cache are as large as the largest."
    )
