"""What an engine of these members cannot do: each rule returns problem and remedy, or None."""

import json
import os
from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING

from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ChatFormats, Member, ProxySection, Speculate
from vllm_proxy.members.recurrent import recurrent_roles
from vllm_proxy.members.vllm_configs import attention_windows

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig


PROXY_SCHEDULER = "vllm_proxy.engine.scheduler.ProxyScheduler"


def chat_problem(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"], chat: ChatFormats | None
) -> str | None:
    """Return why members cannot use different chat formats; None if they can, or need not."""
    from vllm_proxy.engine.admission import NO_PROMPTS_REASONS

    differ = chat is not None and chat.differ(members)
    if differ and (reason := prompts_problem(config, members)):
        return (
            f"members would have different prompts, not possible with {NO_PROMPTS_REASONS[reason]}"
        )
    return None


def drafts_problem(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"], speculate: Speculate
) -> str | None:
    """Return why the expert cannot draft in this engine; None if it can."""
    from vllm import envs

    parallel, speculative = config.parallel_config, config.speculative_config
    wanted = speculate.engine_argument(Member(model=config.model_config.model))
    keys = ["method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size"]
    if parallel.data_parallel_size > 1:
        keys.pop()  # vLLM ignores it then, with a warning
    found = {key: getattr(speculative, key) for key in keys} if speculative else None
    if found != {key: wanted.get(key) for key in keys}:
        return (
            f"the engine's speculative_config ({found}) does not make the expert draft; start it "
            f"with vllm-proxy or from a ProxyConfig, or set it to {json.dumps(wanted)}"
        )
    if recurrent := recurrent_roles(members):
        return (
            f"the {recurrent[0]} has recurrent layers, and their states cannot go back to before a "
            "rejected draft here; remove it"
        )
    windows = set().union(*map(attention_windows, members.values()))
    if parallel.pipeline_parallel_size > 1 and not config.use_v2_model_runner:
        return (
            f"not possible with pipeline_parallel_size {parallel.pipeline_parallel_size} under "
            "Model Runner V1, whose other stages do not learn which drafts were accepted; remove "
            "one of them, or use Model Runner V2"
        )
    if parallel.pipeline_parallel_size > 1 and envs.VLLM_PP_LAYER_PARTITION is not None:
        return (
            "the last pipeline stage has all layers of the expert, and VLLM_PP_LAYER_PARTITION "
            "divides every member's; unset it"
        )
    sizes = {
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            return f"not possible with {name} {size}, since one rank drafts; remove one of them"
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        return "not possible with data parallel experts; remove one of them"
    if len(windows) > 1 and not config.scheduler_config.disable_hybrid_kv_cache_manager:
        listed = ", ".join(str(window or "none") for window in sorted(windows, key=bool))
        return (
            f"members' sliding windows ({listed}) make several KV cache groups; remove it, or "
            "disable_hybrid_kv_cache_manager"
        )
    return None


def readable_ids(members: Mapping[Role, "ModelConfig"]) -> dict[Role, int]:
    """Return how many ids each member's embedding has.

    An embedding that is tied to a head has at most as many as the base's head, since the fused head
    has those.
    """
    sizes = {role: member.get_vocab_size() for role, member in members.items()}
    tied = {r for r, m in members.items() if getattr(m.hf_text_config, "tie_word_embeddings", 0)}
    return {
        role: min(size, sizes["base"]) if role in tied else size for role, size in sizes.items()
    }


def prompts_problem(config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> str | None:
    """Return why members cannot have different prompts: a key of `NO_PROMPTS_REASONS`, or None."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    parallel, speculative = config.parallel_config, config.speculative_config
    windows = set().union(*map(attention_windows, members.values()))
    hybrid = not config.scheduler_config.disable_hybrid_kv_cache_manager
    # vLLM chooses the mode later. Its default is full graphs, so None counts as full.
    graphs = config.compilation_config.cudagraph_mode
    eager = config.model_config.enforce_eager or current_platform.is_cpu()
    # Under Model Runner V2 our worker chooses graphs by prompts.
    fits = eager or (config.use_v2_model_runner and our_worker(parallel) is not None)
    reasons = {
        # Images stand in the base's prompt, and other prompts have their places elsewhere.
        "images": config.model_config.multimodal_config is not None,
        # Of several KV cache groups, Model Runner V1 gives us the tables of one; and blocks that a
        # window has left are freed by virtual positions.
        "states": bool(recurrent_roles(members))
        and (not config.use_v2_model_runner or bool(windows - {None})),
        # A member's blocks are found in one KV cache group.
        "windows": len(windows) > 1 and (hybrid or not _can_share(config, windows)),
        # Our worker keeps the blocks that a window of shifted positions needs.
        "window": windows != {None} and our_worker(parallel) is None,
        "graphs": not fits and graphs not in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE),
        # Such a graph holds the whole pass of all members, and ignores what their inputs are.
        "breakable": not fits
        and graphs != CUDAGraphMode.NONE
        and (is_breakable_cudagraph_enabled() or _may_turn_breakable()),
        "routing": config.aux_output_config.enable_return_routed_experts,
        # A block is sent or stored when its last token is computed. Its last slots are those of
        # tokens behind it, for members whose prompts are shifted (`model/alignment.py`).
        "transfer": transfers(config),
        "context": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "experts": parallel.data_parallel_size > 1 and parallel.is_moe_model is not False,
        "speculation": speculative is not None and speculative.enable_adaptive_verification,
        "scheduler": config.scheduler_config.scheduler_cls not in (None, PROXY_SCHEDULER),
    }
    return next((reason for reason, found in reasons.items() if found), None)


def needs_one_cache_group(section: ProxySection, windows: set[int | None]) -> bool:
    """Whether vLLM should keep the blocks of all layers in one KV cache group.

    It must if layers have different windows, and members have different prompts or the expert
    drafts.
    """
    differ = section.chat is not None and section.chat.differ(section.roles)
    wanted = differ or section.speculate is not None
    return wanted and len(windows) > 1


def can_choose_one_cache_group(config: "VllmConfig", windows: set[int | None]) -> bool:
    """Whether the user left open how KV caches are grouped, and one group is possible."""
    is_open = config.scheduler_config.disable_hybrid_kv_cache_manager is None
    return is_open and _can_share(config, windows)


def _can_share(config: "VllmConfig", windows: set[int | None]) -> bool:
    """Whether layers of these windows can be in one KV cache group.

    If some have full attention, vLLM then frees no blocks. Else our worker gives all of them the
    largest window (`model/kernels.py`), about which pipeline ranks might disagree.
    """
    stages = config.parallel_config.pipeline_parallel_size
    return stages == 1 or not needs_our_worker(windows)


def needs_our_worker(windows: set[int | None]) -> bool:
    """Whether vLLM alone cannot put layers of these windows into one KV cache group."""
    return len(windows) > 1 and None not in windows


def our_worker(parallel: "ParallelConfig") -> str | None:
    """Return the name of our worker; None if the user has set another one or none fits."""
    from vllm.platforms import current_platform

    if parallel.worker_cls.startswith("vllm_proxy."):
        return parallel.worker_cls
    if parallel.worker_cls != "auto":
        return None
    workers = {
        "worker_cpu.ProxyCPUWorker": current_platform.is_cpu(),
        "worker.ProxyWorker": current_platform.is_cuda() or current_platform.is_rocm(),
    }
    name = next((name for name, fits in workers.items() if fits), None)
    return name and f"vllm_proxy.engine.{name}"


def _may_turn_breakable() -> bool:
    """Whether vLLM may turn breakable CUDA graphs on later, for batch-invariant kernels."""
    from vllm import envs

    return envs.VLLM_BATCH_INVARIANT and "VLLM_USE_BREAKABLE_CUDAGRAPH" not in os.environ


def transfers(config: "VllmConfig") -> bool:
    """Whether the engine's KV cache leaves it: to other engines, or to a store."""
    offloads = config.cache_config.kv_offloading_size is not None  # vLLM makes a connector later
    return config.kv_transfer_config is not None or offloads


def scheduler_problem(config: "VllmConfig") -> str | None:
    """Return why a scheduler of the user's cannot run here; None if it can."""
    if config.scheduler_config.scheduler_cls in (None, PROXY_SCHEDULER) or not transfers(config):
        return None
    return (
        "a KV connector (kv_transfer_config or kv_offloading_size) needs vllm-proxy's scheduler, "
        "whose hashes of blocks depend on the members"
    )


def states_problem(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> tuple[str, object, str] | None:
    """Return what cannot go with recurrent layers: the argument, its value, and why."""
    if not (recurrent := recurrent_roles(members)):
        return None
    stages = config.parallel_config.pipeline_parallel_size
    offloading, transfer = config.cache_config.kv_offloading_size, config.kv_transfer_config
    alone = config.scheduler_config.disable_hybrid_kv_cache_manager or None
    whole_images = config.scheduler_config.disable_chunked_mm_input
    cached = config.cache_config.mamba_cache_mode == "align"
    drafter = config.speculative_config
    back = "their states cannot go back to before a rejected draft here"
    moved = "no connector has moved several members' states"
    arguments = {
        "speculative_config.method": (drafter and drafter.method, back),
        "kv_offloading_size": (offloading, moved),
        "kv_transfer_config": (transfer and transfer.kv_connector, moved),
        "pipeline_parallel_size": (
            stages if stages > 1 else None,
            "stages would choose blocks of different sizes",
        ),
        "disable_hybrid_kv_cache_manager": (
            alone,
            "states and attention cannot share one KV cache group",
        ),
        "disable_chunked_mm_input": (
            (whole_images and cached) or None,
            "with prefix caching prompts are cut at the ends of blocks, also amid an image",
        ),
    }
    found = (
        (field, value, f"the {recurrent[0]} has recurrent layers, and {why}")
        for field, (value, why) in arguments.items()
        if value is not None
    )
    return next(found, None)


def routed_experts_problem(members: Mapping[Role, "ModelConfig"]) -> str | None:
    """Return why vLLM could not return the base's choice of experts; None if it can.

    It stores the choice by the number of the layer, so another member's would replace the base's.
    """
    others = [role for role, member in members.items() if role != "base" and member.is_moe]
    if not others:
        return None
    return f"the {others[0]} also is a mixture of experts, and its choice would replace the base's"


def pipeline_problem(config: "VllmConfig") -> str | None:
    """Return why vLLM would start pipeline ranks that fail at the first request.

    Its CPU runner V1 makes the buffers into which a rank receives only while it warms up compiled
    code.
    """
    from vllm.platforms import current_platform

    size = config.parallel_config.pipeline_parallel_size
    eager = config.model_config.enforce_eager and not config.use_v2_model_runner
    if size > 1 and eager and current_platform.is_cpu():
        return f"not possible on a CPU with pipeline_parallel_size {size}; set it to false"
    return None


def cache_groups_problem(config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> str | None:
    """Return why the members' layers could not be in one KV cache group, if they must.

    vLLM makes a group for each window size. If that is turned off, it makes one group of all
    layers.
    """
    windows = {role: attention_windows(member) for role, member in members.items()}
    hybrid = not config.scheduler_config.disable_hybrid_kv_cache_manager
    if hybrid or _can_share(config, set().union(*windows.values())):
        return None
    listed = ", ".join(f"{role} {max(filter(None, sizes))}" for role, sizes in windows.items())
    return (
        f"sliding windows ({listed}) cannot share one KV cache group with pipelines; leave it out"
    )


def tensor_parallel_size_problem(members: Mapping[Role, "ModelConfig"], size: int) -> str | None:
    """Return why *size* ranks cannot split every member's attention heads; None if they can.

    vLLM's own check ignores KV heads; its layers then fail an assertion while they are built.
    """
    archs = {role: config.model_arch_config for role, config in members.items()}

    def fits(ranks: int, role: Role) -> bool:
        heads, kv_heads = archs[role].total_num_attention_heads, archs[role].total_num_kv_heads
        # KV heads are split evenly, or each is copied to as many ranks.
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    bad = [role for role in archs if not fits(size, role)]
    if not bad:
        return None
    most = gcd(*(arch.total_num_attention_heads for arch in archs.values()))
    sizes = [str(n) for n in range(1, most + 1) if all(fits(n, role) for role in archs)]
    listed = ", ".join(
        f"{role} ({archs[role].total_num_attention_heads} and {archs[role].total_num_kv_heads})"
        for role in bad
    )
    return f"it does not divide the attention and KV heads of {listed}; use {' or '.join(sizes)}"


IN_PLACE_TRANSFERS = "sparse_nccl", "sharded_rdt", "nccl_m2n", "modelexpress"
"""Backends of vLLM's weight transfer that write to a model's parameters themselves."""


def transfer_problem(config: "VllmConfig") -> str | None:
    """Return why new weights cannot arrive by the configured backend; None if they can."""
    transfer = config.weight_transfer_config
    if transfer is None or transfer.backend not in IN_PLACE_TRANSFERS:
        return None
    return (
        "it writes to parameters in place, so that half an update could be served; use 'nccl' or "
        "'ipc'"
    )
