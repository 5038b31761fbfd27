"""`ProxyModelConfigHook`: checks an engine's configuration, and installs our classes in it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, cast

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.kv_transfer import with_our_nixl
from vllm_proxy.config.roles import Role
from vllm_proxy.engine.compatibility import require_supported_vllm
from vllm_proxy.engine.defaults import (
    avoid_wrong_kernels,
    caches_no_prefixes,
    set_cpu_defaults,
)
from vllm_proxy.engine.features import require_supported_features, weight_filter_problem
from vllm_proxy.engine.images import images_problem, see_images
from vllm_proxy.engine.limits import (
    PROXY_SCHEDULER,
    cache_groups_problem,
    can_choose_one_cache_group,
    chat_problem,
    drafts_problem,
    needs_one_cache_group,
    needs_our_worker,
    our_worker,
    pipeline_problem,
    prompts_problem,
    readable_ids,
    routed_experts_problem,
    scheduler_problem,
    states_problem,
    tensor_parallel_size_problem,
    transfer_problem,
)
from vllm_proxy.engine.member_hooks import run_member_hooks
from vllm_proxy.members.adapters import require_fitting_adapter, require_possible_adapter
from vllm_proxy.members.cache_dtype import describe_cache_dtype, engine_cache_dtype
from vllm_proxy.members.supported import (
    SATURATES_MESSAGE,
    count_experts,
    require_supported_member,
    saturates,
    verify_parallelism,
)
from vllm_proxy.members.text_part import take_text_part
from vllm_proxy.members.towers import require_one_image
from vllm_proxy.members.vllm_configs import (
    attention_windows,
    member_model_config,
    proxy_section,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.cache import CacheDType

logger = logging.getLogger(f"vllm.{__name__}")  # not by vLLM's `init_logger`: checks import this

WORKER_EXTENSION = "vllm_proxy.engine.requests.InspectedWorker"


class ProxyModelConfigHook:
    """Our entry in vLLM's `MODELS_CONFIG_MAP`: rejects what cannot work, before a process starts.

    It also covers users of plain `vllm serve` and `vllm.LLM`, who do not run our own checks.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Check the installed vLLM and the `proxy` section. Raises `ProxyConfigError`."""
        require_supported_vllm()
        proxy_section(model_config)
        if model_config.multimodal_config is None:
            take_text_part(model_config)
        else:
            see_images(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check every member under the engine's settings. Raises `ProxyConfigError`."""
        from vllm.platforms import current_platform

        require_supported_features(vllm_config)
        if current_platform.is_cpu():
            set_cpu_defaults()
        members = _supported_members(vllm_config)
        count_experts(vllm_config, members)
        if problem := images_problem(vllm_config, members):
            raise problem
        if vllm_config.model_config.multimodal_config is not None:
            require_one_image(vllm_config.model_config, members)
        if current_platform.is_cpu():
            avoid_wrong_kernels(vllm_config, members.values())
            if caches_no_prefixes(members["base"], members.values()):
                vllm_config.cache_config.enable_prefix_caching = False
        run_member_hooks(vllm_config, members)
        _settle_cache_dtype(vllm_config, members)
        _require_fitting_engine(vllm_config, members)
        install_request_hooks(vllm_config, members)
        from vllm_proxy.engine.metrics import meter_servers  # imports the engine's front end

        meter_servers()


def _supported_members(vllm_config: "VllmConfig") -> dict[Role, "ModelConfig"]:
    """Return the members' configurations. Raises `ProxyConfigError` if vLLM cannot run one."""
    parent, load_format = vllm_config.model_config, vllm_config.load_config.load_format
    section = proxy_section(parent)
    members = {role: member_model_config(parent, role, load_format) for role in section.roles}
    for role, member in members.items():
        require_supported_member(member, role, vllm_config.load_config)
        require_possible_adapter(member, role, section)
        for owner, lora in section.adapters_of(role).items() if load_format != "dummy" else ():
            require_fitting_adapter(member, lora, owner)
        if saturates(member, vllm_config.load_config):
            logger.warning("%s: %s", role, SATURATES_MESSAGE)
    return members


def _settle_cache_dtype(vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Set the dtype of the KV cache before vLLM would do it, layer by layer."""
    for note in describe_cache_dtype(vllm_config, members):
        logger.warning("%s", note)
    dtype = cast("CacheDType", engine_cache_dtype(vllm_config, members["base"]))
    vllm_config.cache_config.cache_dtype = dtype


def _choose_cache_groups(vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Keep all blocks of the KV cache where different prompts, drafts or chunks need them.

    Raises:
        ProxyConfigError: the user keeps groups separate that vLLM cannot.
    """
    scheduler = vllm_config.scheduler_config
    windows = set().union(*map(attention_windows, members.values()))
    # vLLM looks up prefixes of chunked attention only if the blocks of all groups have one size.
    chunked = [
        role
        for role, member in members.items()
        if getattr(member.hf_text_config, "attention_chunk_size", None)
    ]
    if chunked and scheduler.disable_hybrid_kv_cache_manager is False:
        raise ProxyConfigError(
            f"the {chunked[0]} has chunked attention, which must share one KV cache group with "
            "the other layers",
            field="disable_hybrid_kv_cache_manager",
            value=False,
            remedy="remove it",
        )
    if chunked:
        scheduler.disable_hybrid_kv_cache_manager = True
    needed = needs_one_cache_group(proxy_section(vllm_config.model_config), windows)
    if needed and can_choose_one_cache_group(vllm_config, windows):
        logger.warning(
            "disable_hybrid_kv_cache_manager is set: different prompts and drafts need KV cache "
            "blocks outside %s too, so requests take more of the cache",
            "sliding windows" if None in windows else "the smaller sliding windows",
        )
        scheduler.disable_hybrid_kv_cache_manager = True


def _require_fitting_engine(
    vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> None:
    """Reject engine arguments that do not fit the members. Raises `ProxyConfigError`."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    speculate = proxy_section(model).speculate
    size, scheduler = parallel.tensor_parallel_size, vllm_config.scheduler_config
    _choose_cache_groups(vllm_config, members)
    if problem := tensor_parallel_size_problem(members, size):
        raise ProxyConfigError(problem, field="tensor_parallel_size", value=size)
    if speculate and (problem := drafts_problem(vllm_config, members, speculate)):
        raise ProxyConfigError(problem, field="speculate")
    if found := states_problem(vllm_config, members):
        field, value, problem = found
        raise ProxyConfigError(problem, field=field, value=value, remedy="remove it")
    if problem := pipeline_problem(vllm_config):
        raise ProxyConfigError(problem, field="enforce_eager", value=model.enforce_eager)
    if problem := cache_groups_problem(vllm_config, members):
        raise ProxyConfigError(
            problem,
            field="disable_hybrid_kv_cache_manager",
            value=scheduler.disable_hybrid_kv_cache_manager,
        )
    if problem := scheduler_problem(vllm_config):
        raise ProxyConfigError(
            problem, field="scheduler_cls", value=scheduler.scheduler_cls, remedy="remove one"
        )
    if proxy_section(model).experts and scheduler.scheduler_cls not in (None, PROXY_SCHEDULER):
        raise ProxyConfigError(
            "`experts` need vllm-proxy's scheduler, whose hashes of blocks depend on the expert",
            field="scheduler_cls",
            value=scheduler.scheduler_cls,
            remedy="remove one",
        )
    routed = vllm_config.aux_output_config.enable_return_routed_experts
    if routed and (problem := routed_experts_problem(members)):
        raise ProxyConfigError(
            problem, field="enable_return_routed_experts", value=True, remedy="remove it"
        )
    if problem := weight_filter_problem(vllm_config, members):
        raise ProxyConfigError(
            problem, field="enable_ep_weight_filter", value=True, remedy="remove it"
        )
    for role, member in members.items():
        try:
            verify_parallelism(member, parallel)
        except ValueError as error:
            raise ProxyConfigError(one_line(error), field=f"{role} {member.model!r}") from error
    if problem := transfer_problem(vllm_config):
        raise ProxyConfigError(
            problem,
            field="weight_transfer_config.backend",
            value=vllm_config.weight_transfer_config.backend,
        )


def install_request_hooks(vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Set our scheduler, worker and validator, unless the user has set others.

    Raises:
        ProxyConfigError: what the user has set excludes different chat formats, or drafts.
    """
    from vllm_proxy.engine import admission

    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    if (transfer := vllm_config.kv_transfer_config) is not None:
        vllm_config.kv_transfer_config = replace(transfer, **with_our_nixl(asdict(transfer)))
    limit: int | str = prompts_problem(vllm_config, members) or model.max_model_len - 1
    if problem := chat_problem(vllm_config, members, proxy_section(model).chat):
        raise ProxyConfigError(problem, field="chat", remedy="or give all members one format")
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = PROXY_SCHEDULER
    if not _install_worker(vllm_config, members):
        limit = admission.NO_CONTROLS
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    model.logits_processors = [
        *(model.logits_processors or ()),
        admission.validator(runner, limit, readable_ids(members)),
    ]


def _install_worker(vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> bool:
    """Set our worker unless the user has set one; returns whether requests may have values."""
    parallel = vllm_config.parallel_config
    if (ours := our_worker(parallel)) is not None:
        parallel.worker_cls = ours
    else:
        _require_no_use_of_worker(vllm_config, members)
        if not vllm_config.use_v2_model_runner:
            return False
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = WORKER_EXTENSION
    return True


def _require_no_use_of_worker(
    vllm_config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> None:
    """Reject what our worker does, in an engine that runs another one."""
    section = proxy_section(vllm_config.model_config)
    windows = set().union(*map(attention_windows, members.values()))
    one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager or None
    uses = {
        ("speculate", "the expert drafts"): section.speculate,
        ("experts", "requests choose an adapter"): section.experts or None,
        ("weight_transfer_config", "new weights arrive"): vllm_config.weight_transfer_config,
        ("disable_hybrid_kv_cache_manager", "sliding windows of several sizes share a KV cache"): (
            one_group if needs_our_worker(windows) else None
        ),
    }
    for (field, what), used in uses.items():
        if used is not None:
            raise ProxyConfigError(
                f"{what} in vllm-proxy's worker, which this engine does not run (worker_cls is "
                f"{vllm_config.parallel_config.worker_cls!r}, or the platform is not supported)",
                field=field,
                remedy="remove one of them",
            )
