"""What vLLM cannot run as members of one engine, found out before any process is started."""

import json
import logging
import os
from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING

from vllm_proxy.compatibility import require_supported_vllm
from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ChatFormats, Member, Speculate
from vllm_proxy.members.adapters import require_fitting_adapter
from vllm_proxy.members.supported import SATURATES, require_supported_member, saturates
from vllm_proxy.members.vllm_configs import attention_windows, member_model_config, proxy_section

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # not by vLLM's `init_logger`: checks import this

PROXY_SCHEDULER = "vllm_proxy.runner.scheduler.ProxyScheduler"
WORKER_EXTENSION = "vllm_proxy.runner.extension.InspectedWorker"
FEW_CORES = 4
"""So many CPU cores are all given to workers, unless `VLLM_CPU_NUM_OF_RESERVED_CPU` is set. vLLM
leaves one to its scheduler, which needs little of it: on two cores, a batch takes 1.3 to 1.6 times
as long with one left idle (`benchmarks/LOG.md`)."""
LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "dummy")
"""Load formats that read `model.secondary_weights`, or (`dummy`) read nothing."""


class ProxyModelConfigHook:
    """`MODELS_CONFIG_MAP` entry: refuses, before any process is started, what cannot work.

    Covers users of the stock `vllm serve` and `vllm.LLM`, who never pass by our own checks.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Check the installed vLLM and the `proxy` section. Raises `ProxyConfigError`."""
        require_supported_vllm()
        proxy_section(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check every member under the engine's settings. Raises `ProxyConfigError`."""
        from vllm.platforms import current_platform

        parent = vllm_config.model_config
        if parent.enable_prompt_embeds:
            raise ProxyConfigError(
                "enable_prompt_embeds: members have embeddings of their own; send token ids"
            )
        load_format = vllm_config.load_config.load_format
        if load_format not in LOAD_FORMATS:
            raise ProxyConfigError(
                f"load_format {load_format!r} reads one checkpoint only; "
                f"use one of {', '.join(LOAD_FORMATS)}"
            )
        if vllm_config.lora_config is not None:
            raise ProxyConfigError(
                "enable_lora: no adapters a request; give one to the expert or the antiexpert: "
                '{"expert": {"model": …, "lora": …}}'
            )
        if current_platform.is_cpu():
            set_cpu_defaults()
        section = proxy_section(parent)
        members = {role: member_model_config(parent, role, load_format) for role in section.roles}
        for role, member in members.items():
            lora = None if role == "base" else getattr(section, role).lora
            require_supported_member(member, role, vllm_config.load_config, lora)
            if lora is not None and load_format != "dummy":
                require_fitting_adapter(member, lora, role)
            if saturates(member, vllm_config.load_config):
                logger.warning("%s: %s", role, SATURATES)
        size = vllm_config.parallel_config.tensor_parallel_size
        if reason := unfit_tensor_parallel_size(members, size):
            raise ProxyConfigError(f"tensor_parallel_size is {size}: {reason}")
        if reason := unfit_pipeline(vllm_config):
            raise ProxyConfigError(f"enforce_eager: {reason}")
        if reason := unfit_cache_groups(vllm_config, members):
            raise ProxyConfigError(f"disable_hybrid_kv_cache_manager: {reason}")
        for role, member in members.items():
            try:
                member.verify_with_parallel_config(vllm_config.parallel_config)
            except ValueError as error:
                raise ProxyConfigError(f"{role} {member.model!r}: {one_line(error)}") from error
        if section.speculate and (reason := unfit_drafts(vllm_config, members, section.speculate)):
            raise ProxyConfigError(f"speculate: {reason}")
        if vllm_config.parallel_config.enable_dbo:
            raise ProxyConfigError("enable_dbo: microbatches are not supported; leave it out")
        _let_requests_differ(vllm_config, members)
        from vllm_proxy.metrics import meter_servers  # imports the engine's front end

        meter_servers()


def set_cpu_defaults() -> None:
    """Set what vLLM on a CPU reads from the environment, where the user has not."""
    # vLLM (0.32) saves what it compiled ahead of time there but cannot load it back, and compiles
    # every model again at every start. Inductor's own cache does its work.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if (os.cpu_count() or 1) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


def _let_requests_differ(vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Put our scheduler, worker and validator in their places, where a user has not put others."""
    from vllm.platforms import current_platform

    from vllm_proxy.runner import validation

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    limit: int | str = unfit_prompts(vllm_config, members) or model.max_model_len - 1
    if reason := unfit_chat(vllm_config, members, proxy_section(model).chat):
        raise ProxyConfigError(f"chat: {reason}")
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = PROXY_SCHEDULER
    speculates = proxy_section(model).speculate is not None
    if not vllm_config.use_v2_model_runner or speculates:
        workers = {
            "v1_cpu.ProxyCPUWorker": current_platform.is_cpu(),
            "v1.ProxyWorker": current_platform.is_cuda() or current_platform.is_rocm(),
        }
        ours = next((name for name, fits in workers.items() if fits), None)
        if parallel.worker_cls == "auto" and ours is not None:
            parallel.worker_cls = f"vllm_proxy.runner.{ours}"
        elif not parallel.worker_cls.startswith("vllm_proxy."):
            if speculates:
                raise ProxyConfigError(
                    f"speculate: the expert drafts in our own worker, not in {parallel.worker_cls} "
                    "(worker_cls) or on this platform; remove one of them"
                )
            limit = validation.NO_CONTROLS
    if limit != validation.NO_CONTROLS and not parallel.worker_extension_cls:
        parallel.worker_extension_cls = WORKER_EXTENSION
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    model.logits_processors = [
        *(model.logits_processors or ()),
        validation.validator(runner, limit, readable_ids(members)),
    ]
    validation.check_admitted()


def unfit_chat(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"], chat: ChatFormats | None
) -> str | None:
    """Return why members cannot see conversations in formats of their own; None if they can."""
    from vllm_proxy.runner.validation import NO_PROMPTS

    unlike = chat is not None and len({chat.of(role) for role in members}) > 1
    if unlike and (reason := unfit_prompts(config, members)):
        return f"members would have prompts of their own, not possible with {NO_PROMPTS[reason]}"
    return None


def unfit_drafts(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"], speculate: Speculate
) -> str | None:
    """Return why the expert cannot draft in this engine, and the remedy; None if it can."""
    parallel, speculative = config.parallel_config, config.speculative_config
    wanted = speculate.engine_argument(Member(model=config.model_config.model))
    keys = ["method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size"]
    if parallel.data_parallel_size > 1:
        keys.pop()  # vLLM goes without, and says so
    found = {key: getattr(speculative, key) for key in keys} if speculative else None
    if found != {key: wanted.get(key) for key in keys}:
        return (
            f"the engine drafts as its speculative_config says ({found}), not as the expert does; "
            f"start it with vllm-proxy or from a ProxyConfig, or give it {json.dumps(wanted)}"
        )
    windows = set().union(*map(attention_windows, members.values()))
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            return f"not possible with {name} {size}, one rank would have to draft; remove one"
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        return "not possible with data parallel experts; remove one"
    if len(windows) > 1 and not config.scheduler_config.disable_hybrid_kv_cache_manager:
        listed = ", ".join(str(window or "none") for window in sorted(windows, key=bool))
        return (
            f"members' sliding windows ({listed}) make several groups of KV caches; set "
            "disable_hybrid_kv_cache_manager, or remove it"
        )
    return None


def readable_ids(members: Mapping[Role, "ModelConfig"]) -> dict[Role, int]:
    """Return how many ids each member's embedding has.

    An embedding that is tied to a head has the base's, as the fused head does.
    """
    sizes = {role: member.get_vocab_size() for role, member in members.items()}
    tied = {r for r, m in members.items() if getattr(m.hf_text_config, "tie_word_embeddings", 0)}
    return {
        role: min(size, sizes["base"]) if role in tied else size for role, size in sizes.items()
    }


def unfit_prompts(config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> str | None:
    """Return what keeps members from having prompts of their own: a key of `NO_PROMPTS`."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    parallel, speculative = config.parallel_config, config.speculative_config
    windows = set().union(*map(attention_windows, members.values()))
    hybrid = not config.scheduler_config.disable_hybrid_kv_cache_manager
    # The mode is settled later; what is full by default counts as full.
    graphs = config.compilation_config.cudagraph_mode
    eager = config.model_config.enforce_eager or current_platform.is_cpu()
    reasons = {
        # vLLM frees blocks behind a window by virtual positions. Without its hybrid manager it
        # frees none, if there is full attention beside.
        "windows": windows != {None} and (hybrid or None not in windows),
        "graphs": not eager and graphs not in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE),
        "context": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "experts": parallel.data_parallel_size > 1 and parallel.is_moe_model is not False,
        "speculation": speculative is not None and speculative.enable_adaptive_verification,
        "scheduler": config.scheduler_config.scheduler_cls not in (None, PROXY_SCHEDULER),
    }
    return next((reason for reason, found in reasons.items() if found), None)


def unfit_pipeline(config: "VllmConfig") -> str | None:
    """Return why vLLM would start pipeline ranks that fail at the first request, and the remedy.

    Its CPU runner V1 makes the buffers that a rank receives into while it warms up compiled code,
    and at no other time.
    """
    from vllm.platforms import current_platform

    size = config.parallel_config.pipeline_parallel_size
    eager = config.model_config.enforce_eager and not config.use_v2_model_runner
    if size > 1 and eager and current_platform.is_cpu():
        return f"on a CPU it cannot go with pipeline_parallel_size {size}; set it to false"
    return None


def unfit_cache_groups(config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> str | None:
    """Return why vLLM could not put the members' layers into one KV cache group, and the remedy.

    Layers of unlike windows go into groups of their own, unless that is turned off; then vLLM
    makes them one with a layer of full attention, if there is any.
    """
    windows = {role: attention_windows(member) for role, member in members.items()}
    every = set().union(*windows.values())
    hybrid = not config.scheduler_config.disable_hybrid_kv_cache_manager
    if hybrid or len(every) == 1 or None in every:
        return None
    listed = ", ".join(f"{role} {max(own)}" for role, own in windows.items())
    return f"sliding windows ({listed}) cannot share one KV cache group; leave it out"


def unfit_tensor_parallel_size(members: Mapping[Role, "ModelConfig"], size: int) -> str | None:
    """Return why *size* ranks cannot share every member's heads, and what to use; None if they can.

    vLLM's own check passes over KV heads; its layers then fail an assertion while they are built.
    """
    archs = {role: config.model_arch_config for role, config in members.items()}

    def fits(ranks: int, role: Role) -> bool:
        heads, kv_heads = archs[role].total_num_attention_heads, archs[role].total_num_kv_heads
        # KV heads are split, or copied evenly
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
