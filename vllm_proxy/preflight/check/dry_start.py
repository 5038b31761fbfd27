"""Start the engine without weights: vLLM builds its config and models, and loads shapes only.

Whether an engine can start is decided by vLLM's classes: its config, each architecture's
constructor and loader, attention kernels, the layout of the KV cache. They run here, instead of
being imitated, in a fork: so no models, process groups or GPU contexts are left in this process.
"""

import contextlib
import copy
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from vllm import EngineArgs, ModelRegistry
from vllm.config import ModelConfig, OffloadConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_proxy.config.errors import ProxyConfigError, is_proxy_error, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ARCHITECTURE, Member, ProxyConfig
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.engine.registered import ProxyTunedForCausalLM
from vllm_proxy.members.adapter_set import shared_adapters
from vllm_proxy.members.attempt import attempt
from vllm_proxy.members.read import ReadMember
from vllm_proxy.members.text_part import text_weights
from vllm_proxy.members.vllm_configs import member_vllm_config, proxy_section
from vllm_proxy.members.weights import MISTRAL, checkpoint_files
from vllm_proxy.model.build import build_member, load_member, required_parameters
from vllm_proxy.model.kernels import (
    PLENTY,
    attention_layers,
    require_attention_kernels,
    require_one_cache,
    separate_backends,
    settle_state_pages,
    take_latent_blocks,
)
from vllm_proxy.model.one_pass import can_pair

logger = logging.getLogger(f"vllm.{__name__}")

_SIZES = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "world_size"),
    *("decode_context_parallel_size", "prefill_context_parallel_size"),
)
_DTYPES = {"F64": "float64", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"} | {
    **{"F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U8": "uint8", "BOOL": "bool", "F32": "float32"},
}
"""safetensors' names of dtypes -> torch's names."""
_PATIENCE_S = 60
"""A longer start is given up, and nothing is reported."""
GIB = 1 << 30
_NO_DATA = re.compile(r"meta (tensor|device)|on meta|device type meta|'Meta'|device=.?meta", re.I)
"""In torch's error when code reads the values of a meta tensor."""


def start_problems(config: ProxyConfig, members: Mapping[Role, ReadMember]) -> list[str]:
    """Return what would keep the engine from starting, one line each; empty if it is not known.

    Args:
        config: a configuration without other problems.
        members: all members of *config*.
    """
    is_daemon = multiprocessing.current_process().daemon  # may not start a process
    # A fork of an engine's worker would inherit the process groups of that engine.
    is_worker = torch.cuda.is_initialized() or torch.distributed.is_initialized()
    if sys.platform != "linux" or is_worker or is_daemon:
        return []
    local: dict[str, Member] = {role: _local(member) for role, member in members.items()}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_report, args=(config.model_copy(update=local), members, sender), daemon=True
    )
    with warnings.catch_warnings():  # about threads: the child needs no lock that they may hold
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        problems = receiver.recv() if receiver.poll(_PATIENCE_S) else []
    except EOFError:  # it died, in vLLM or because of this dry start
        problems = []
    finally:
        process.kill()
        process.join()
    for role, member in members.items():
        given, found = repr(member.member.model), repr(local[role].model)
        problems = [problem.replace(found, given) for problem in problems]
    return problems


def _local(member: ReadMember) -> Member:
    """Return the member with its directory as its model: the hub is not asked again."""
    lora = member.member.lora
    return Member(model=str(member.files.directory), lora=lora)


def _report(config: ProxyConfig, members: Mapping[Role, ReadMember], sender: Connection) -> None:
    """Send the problems of a start."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    torch.set_num_threads(1)  # a fork lacks its parent's threads, but would wait for them
    problems = []
    try:
        for problem in _problems(config, members):
            problems.append(problem)
    except ProxyConfigError as error:
        problems.append(str(error))
    except Exception as error:  # noqa: BLE001 - the dry start failed; a real start may not
        logger.debug("No dry start: %s", error)
    sender.send(problems)


def _problems(config: ProxyConfig, members: Mapping[Role, ReadMember]) -> Iterator[str]:
    """Do the steps of a start up to the allocation of memory, and yield their problems."""
    require_part("start without weights")
    # the class instead of its name, which vLLM would inspect in another process again
    ModelRegistry.register_model(ARCHITECTURE, ProxyTunedForCausalLM)
    vllm_config = _engine_config(config)
    ranks = vllm_config.parallel_config.world_size
    yield from _unusable_arguments(config.engine, vllm_config)
    with _alone(vllm_config):
        built: dict[Role, nn.Module] = {}
        configs: dict[Role, ModelConfig] = {}
        for role in members:
            try:
                own = member_vllm_config(vllm_config, role)
                configs[role], built[role] = own.model_config, _build(own, role)
            except ProxyConfigError as error:
                if not _is_doubtful(error):
                    yield str(error)
        if len(built) < len(members):
            return
        models = {role: getattr(config, role).model for role in members}
        _require_a_pair(config, members, built)
        take_latent_blocks(vllm_config)
        separate_backends(attention_layers(vllm_config), configs)
        require_attention_kernels(vllm_config, models)
        current_platform.update_block_size_for_backend(vllm_config)
        settle_state_pages(vllm_config)
        if vllm_config.load_config.load_format != "dummy":
            for role, member in members.items():
                yield from _weight_problems(built[role], role, member, vllm_config)
        require_one_cache(vllm_config, _most_room(vllm_config, ranks, built))


def _require_a_pair(
    config: ProxyConfig, members: Mapping[Role, ReadMember], built: Mapping[Role, nn.Module]
) -> None:
    """Raise `ProxyConfigError` if the small members cannot run in one pass, but must."""
    dummy = config.engine.get("load_format") == "dummy"
    quantization = None
    if "antiexpert" in members:
        quantization = members["antiexpert"].model_config.quantization
    adapters = shared_adapters(config, dummy=dummy, quantization=quantization)
    if adapters is not None:
        model = built["antiexpert"]
        can_pair(adapters, model, must=config.one_pass, quantization=quantization)


def _engine_config(config: ProxyConfig) -> VllmConfig:
    """Have vLLM build the engine's config, including our hook. Raises `ProxyConfigError`."""
    try:
        return EngineArgs(**config.engine_args()).create_engine_config(UsageContext.LLM_CLASS)
    except ValueError as error:
        field = None if is_proxy_error(error) else "engine"  # our hook's message names the field
        raise ProxyConfigError(one_line(error), field=field) from error


def _unusable_arguments(engine: Mapping[str, Any], vllm_config: VllmConfig) -> Iterator[str]:
    """Yield engine arguments that name missing things, which vLLM looks up only when used."""
    for key in ("scheduler_cls", "worker_cls", "worker_extension_cls", "logits_processors"):
        given = engine.get(key) or ()
        for name in [given] if isinstance(given, str) else given:
            if not isinstance(name, str) or name == "auto":
                continue
            found = attempt(resolve_obj_by_qualname, name.replace(":", "."))
            if isinstance(found, Exception):
                yield f"`engine.{key}` is {given!r}: {one_line(found)}; correct it"
    loader = attempt(get_model_loader, vllm_config.load_config)
    if isinstance(loader, Exception):
        yield f"`engine`: {one_line(loader)}; remove it"
    generation = attempt(vllm_config.model_config.try_get_generation_config)
    if isinstance(generation, Exception):
        yield (
            f"`engine.generation_config` is {engine.get('generation_config')!r}: no "
            "generation_config.json is read from there; give the directory of one, or leave it out"
        )


@contextlib.contextmanager
def _alone(vllm_config: VllmConfig) -> Iterator[None]:
    """Make this process the only rank for the body; it has what several ranks would share."""
    for name in _SIZES:
        setattr(vllm_config.parallel_config, name, 1)
    with set_current_vllm_config(vllm_config), tempfile.TemporaryDirectory() as directory:
        init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
        initialize_model_parallel()
        yield


def _build(config: VllmConfig, role: Role) -> nn.Module:
    """Build a member without weights. *config*: as `member_vllm_config` returns it."""
    config.device_config = copy.copy(config.device_config)
    config.device_config.device = torch.device("meta")
    dtype: Any = config.model_config.dtype  # a torch dtype, once vLLM has read the config
    with config.device_config.device, set_default_torch_dtype(dtype):
        return build_member(config, role)


def _is_doubtful(error: ProxyConfigError) -> bool:
    """Whether the error may come from the dry start itself, not from the configuration."""
    cause = error.__cause__
    # On a GPU, the fork or the missing tensors may be the cause.
    of_device = type(cause) is RuntimeError and not current_platform.is_cpu()
    return of_device or bool(_NO_DATA.search(str(cause)))


def _weight_problems(
    model: nn.Module, role: Role, member: ReadMember, vllm_config: VllmConfig
) -> Iterator[str]:
    """Yield the error with which vLLM's loader fails on the checkpoint's names and shapes."""
    quantized = member.model_config.quantization is not None
    if not (files := checkpoint_files(member.files, vllm_config.load_config.load_format)):
        return  # files of another kind, or still on the hub
    try:
        required = required_parameters(model, quantized=quantized)
        shapes = text_weights(member.model_config.hf_config, _shapes(files))
        load_member(model, role, str(member.member.model), shapes, required=required)
    except ProxyConfigError as error:
        if not _is_doubtful(error):
            yield str(error) + _mistral_remedy(member, files)


def _mistral_remedy(member: ReadMember, files: Iterable[Path]) -> str:
    """Return a remedy if weights in Mistral's format may be the reason, or an empty text."""
    if not any(file.name.startswith(MISTRAL) for file in files):
        return ""
    directory = member.files.directory
    if (directory / "model.safetensors.index.json").is_file():
        return (
            f", or set `engine.load_format: safetensors`: vLLM reads {MISTRAL}*.safetensors "
            "before others"
        )
    return f", or remove {MISTRAL}*.safetensors, which vLLM also reads"


def _shapes(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of safetensors files, without their data."""
    for file in files:
        # for "pt", memory is reserved for the whole file
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                dtype = getattr(torch, _DTYPES.get(tensor.get_dtype(), "float32"))
                yield name, torch.empty(tensor.get_shape(), dtype=dtype, device="meta")


def _most_room(vllm_config: VllmConfig, ranks: int, built: Mapping[Role, nn.Module]) -> int:
    """Return the bytes of the KV cache on all ranks together, or an upper limit of them.

    Raises:
        ProxyConfigError: the weights alone do not fit.
    """
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None:
        return ranks * cache.kv_cache_memory_bytes
    try:
        total = current_platform.get_device_total_memory()
    except (NotImplementedError, RuntimeError):
        return PLENTY
    most = int(ranks * total * cache.gpu_memory_utilization)
    weights = _least_weights(vllm_config, built)
    if weights >= most:
        raise ProxyConfigError(
            f"the members' weights take {weights / GIB:.1f} GiB, and all devices together have "
            f"{most / GIB:.1f} GiB for them and the KV cache",
            remedy="use smaller or quantized members, or more devices",
        )
    return most - weights


def _least_weights(vllm_config: VllmConfig, built: Mapping[Role, nn.Module]) -> int:
    """Return the least bytes that the weights take; 0 where they may be offloaded or shrunk."""
    section, model = proxy_section(vllm_config.model_config), vllm_config.model_config
    shrinks = model.quantization is not None and not model.is_quantized
    if shrinks or vllm_config.offload_config != OffloadConfig():
        return 0
    once = {role: built[role] for role in built if role != "expert" or not section.may_run_as_one}
    return sum(p.numel() * p.element_size() for model in once.values() for p in model.parameters())
