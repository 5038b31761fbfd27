"""What vLLM cannot run as members of one engine, found out before any process is started."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.engine.compatibility import require_supported_vllm
from vllm_proxy.engine.defaults import set_cpu_defaults
from vllm_proxy.engine.limits import (
    LOAD_FORMATS,
    PROXY_SCHEDULER,
    cache_groups_problem,
    chat_problem,
    drafts_problem,
    pipeline_problem,
    prompts_problem,
    readable_ids,
    tensor_parallel_size_problem,
)
from vllm_proxy.members.adapters import require_fitting_adapter
from vllm_proxy.members.supported import SATURATES_MESSAGE, require_supported_member, saturates
from vllm_proxy.members.vllm_configs import member_model_config, proxy_section

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # not by vLLM's `init_logger`: checks import this

WORKER_EXTENSION = "vllm_proxy.engine.requests.InspectedWorker"


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
                logger.warning("%s: %s", role, SATURATES_MESSAGE)
        size = vllm_config.parallel_config.tensor_parallel_size
        if reason := tensor_parallel_size_problem(members, size):
            raise ProxyConfigError(f"tensor_parallel_size is {size}: {reason}")
        if reason := pipeline_problem(vllm_config):
            raise ProxyConfigError(f"enforce_eager: {reason}")
        if reason := cache_groups_problem(vllm_config, members):
            raise ProxyConfigError(f"disable_hybrid_kv_cache_manager: {reason}")
        for role, member in members.items():
            try:
                member.verify_with_parallel_config(vllm_config.parallel_config)
            except ValueError as error:
                raise ProxyConfigError(f"{role} {member.model!r}: {one_line(error)}") from error
        if section.speculate and (
            reason := drafts_problem(vllm_config, members, section.speculate)
        ):
            raise ProxyConfigError(f"speculate: {reason}")
        if vllm_config.parallel_config.enable_dbo:
            raise ProxyConfigError("enable_dbo: microbatches are not supported; leave it out")
        install_request_hooks(vllm_config, members)
        from vllm_proxy.engine.metrics import meter_servers  # imports the engine's front end

        meter_servers()


def install_request_hooks(vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Put our scheduler, worker and validator in their places, where a user has not put others."""
    from vllm.platforms import current_platform

    from vllm_proxy.engine import admission

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    limit: int | str = prompts_problem(vllm_config, members) or model.max_model_len - 1
    if reason := chat_problem(vllm_config, members, proxy_section(model).chat):
        raise ProxyConfigError(f"chat: {reason}")
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = PROXY_SCHEDULER
    speculates = proxy_section(model).speculate is not None
    if not vllm_config.use_v2_model_runner or speculates:
        workers = {
            "worker_cpu.ProxyCPUWorker": current_platform.is_cpu(),
            "worker.ProxyWorker": current_platform.is_cuda() or current_platform.is_rocm(),
        }
        ours = next((name for name, fits in workers.items() if fits), None)
        if parallel.worker_cls == "auto" and ours is not None:
            parallel.worker_cls = f"vllm_proxy.engine.{ours}"
        elif not parallel.worker_cls.startswith("vllm_proxy."):
            if speculates:
                raise ProxyConfigError(
                    f"speculate: the expert drafts in our own worker, not in {parallel.worker_cls} "
                    "(worker_cls) or on this platform; remove one of them"
                )
            limit = admission.NO_CONTROLS
    if limit != admission.NO_CONTROLS and not parallel.worker_extension_cls:
        parallel.worker_extension_cls = WORKER_EXTENSION
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    model.logits_processors = [
        *(model.logits_processors or ()),
        admission.validator(runner, limit, readable_ids(members)),
    ]
