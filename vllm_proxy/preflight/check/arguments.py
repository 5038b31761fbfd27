"""Checks of the free-form sections `engine` and `sampling` against vLLM and the members."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.engine_arguments import unsupported_argument
from vllm_proxy.config.errors import one_line, unknown_key
from vllm_proxy.config.roles import Role
from vllm_proxy.engine.defaults import caches_no_prefixes
from vllm_proxy.engine.limits import (
    cache_groups_problem,
    pipeline_problem,
    routed_experts_problem,
    scheduler_problem,
    tensor_parallel_size_problem,
)
from vllm_proxy.members.attempt import attempt, make_config
from vllm_proxy.members.read import BASE_ONLY, ReadMember
from vllm_proxy.members.supported import verify_parallelism
from vllm_proxy.members.text_part import is_text_part, with_text_part

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def sampling_problems(sampling: Mapping[str, Any]) -> list[str]:
    """Have vLLM check the sampling parameters, each separately and then together."""
    from vllm import SamplingParams

    known = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    problems, good = [], {}
    for key, value in sampling.items():
        if key not in known:
            error = unknown_key(
                f"sampling.{key}", known, remedy="see the fields of vllm.SamplingParams"
            )
            problems.append(str(error))
            continue
        params = attempt(SamplingParams, **{key: value})
        if isinstance(params, Exception):
            problems.append(f"`sampling.{key}` is {value!r}: {one_line(params)}; change it")
        else:
            good[key] = value
    params = attempt(SamplingParams, **good)
    if isinstance(params, Exception):
        problems.append(f"`sampling` is {good!r}: {one_line(params)}; change one")
    return problems


def supported_arguments(engine: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the engine arguments that vLLM still has to check, and the problems of the others."""
    from vllm import EngineArgs

    known = [f.name for f in fields(EngineArgs)]
    arguments, problems = {}, []
    for key, value in engine.items():
        if key not in known:
            error = unknown_key(f"engine.{key}", known, remedy="see `vllm serve --help`")
            problems.append(str(error))
        elif problem := unsupported_argument(key, value, "engine."):
            problems.append(str(problem))
        else:
            arguments[key] = value
    return arguments, problems


def engine_config(
    arguments: Mapping[str, Any], members: Mapping[Role, ReadMember]
) -> tuple["VllmConfig | None", list[str]]:
    """Have vLLM build the engine's config for the base alone, without starting anything.

    Args:
        arguments: those that `supported_arguments` returned.
        members: at least one; without the base, the first of the others is used instead.

    Returns:
        The config for the arguments that vLLM accepts, or None if it cannot build one; and the
        problems, including those of members that vLLM's check of the base does not examine.
    """
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    role, member = next(iter(members.items()))
    arguments = {**arguments, "model": str(member.files.directory)}
    if is_text_part(member.model_config.hf_config):
        arguments = with_text_part(arguments)
    if isinstance(arguments.get("tokenizer"), str):  # checked by `load_tokenizers`
        del arguments["tokenizer"]
    if role != "base":
        arguments = {key: value for key, value in arguments.items() if key not in BASE_ONLY}
    if not member.model_config.is_moe and any(m.model_config.is_moe for m in members.values()):
        arguments.pop("enable_expert_parallel", None)  # vLLM would refuse it for the base alone
    problems = []
    if problem := _parallelism_problem(arguments, members):
        problems.append(problem)
        del arguments["tensor_parallel_size"]
    arguments["max_model_len"], problem = _max_model_len(arguments.get("max_model_len"), members)
    problems += [problem] if problem else []
    alone = member.model_config
    if current_platform.is_cpu() and caches_no_prefixes(alone, [alone]):
        arguments["enable_prefix_caching"] = False
    config, wrong = make_config(
        arguments, lambda args: args.create_engine_config(UsageContext.LLM_CLASS)
    )
    problems += wrong
    problems += routing_problems(arguments, members)
    if isinstance(config, MemoryError):  # from a broken file, which is reported with its member
        return None, problems
    if isinstance(config, Exception):
        return None, [*problems, f"`engine`: {one_line(config)}"]
    if reason := pipeline_problem(config):
        problems.append(f"`engine.enforce_eager` is true: {reason}")
    if reason := scheduler_problem(config):
        given = config.scheduler_config.scheduler_cls
        problems.append(f"`engine.scheduler_cls` is {given!r}: {reason}; remove one")
    configs = {role: member.model_config for role, member in members.items()}
    if reason := cache_groups_problem(config, configs):
        problems.append(f"`engine.disable_hybrid_kv_cache_manager` is true: {reason}")
    for member in members.values():
        result = attempt(verify_parallelism, member.model_config, config.parallel_config)
        if isinstance(result, Exception):
            problems.append(f"{member.name}: {one_line(result)}")
    return config, problems


def routing_problems(
    arguments: Mapping[str, Any], members: Mapping[Role, ReadMember]
) -> Iterator[str]:
    """Yield the problem of `enable_return_routed_experts`, if it is set and does not fit."""
    key, found = "enable_return_routed_experts", arguments.get("aux_output_config")
    configs = {role: member.model_config for role, member in members.items()}
    is_set = arguments.get(key) or (isinstance(found, Mapping) and found.get(key))
    if is_set and (reason := routed_experts_problem(configs)):
        yield f"`engine.{key}` is true: {reason}; remove it"


def _parallelism_problem(
    arguments: Mapping[str, Any], members: Mapping[Role, ReadMember]
) -> str | None:
    size = arguments.get("tensor_parallel_size", 1)
    if not isinstance(size, int) or size < 1:
        return None  # vLLM's parser reports it
    configs = {role: member.model_config for role, member in members.items()}
    reason = tensor_parallel_size_problem(configs, size)
    return f"`engine.tensor_parallel_size` is {size}: {reason}" if reason else None


def _max_model_len(given: Any, members: Mapping[Role, ReadMember]) -> tuple[Any, str | None]:
    """Return the length for vLLM to check, and the problem of members with a shorter context."""
    length = int(given) if isinstance(given, str) and given.isdecimal() else given
    if length is not None and not isinstance(length, int):
        return given, None  # vLLM's parser reports it
    source = "`engine.max_model_len` is"
    if length is None or length < 1:  # vLLM uses the base's
        if "base" not in members:
            return given, None
        length = members["base"].model_config.max_model_len
        source = "`engine.max_model_len` is not set and the base's context is"
    contexts = {role: member.model_config.max_model_len for role, member in members.items()}
    short = [role for role, member in members.items() if not _reaches(member, length)]
    if not short:
        return length, None
    listed = ", ".join(f"{role} {contexts[role]}" for role in short)
    largest = min(contexts.values())
    return largest, (
        f"{source} {length}, longer than the context of {listed}; "
        f"set `engine.max_model_len: {largest}`"
    )


def _reaches(member: ReadMember, length: int) -> bool:
    """Whether vLLM would run the member on sequences of *length* tokens."""
    reached = attempt(member.model_config.get_and_verify_max_len, length)
    return not isinstance(reached, Exception)
