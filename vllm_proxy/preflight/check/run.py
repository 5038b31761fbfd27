"""`check`: reads configs, tokenizers and safetensors headers, never weights.

It finds a user's mistakes in seconds and all at once, instead of one per start of the engine. It
also reports what is right: the members, and what happens where they differ.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.compatibility import require_supported_vllm
from vllm_proxy.engine.limits import chat_problem
from vllm_proxy.members.prompts import chat_tokenizers
from vllm_proxy.members.read import ReadMember, read_members
from vllm_proxy.members.towers import Tower
from vllm_proxy.preflight.check.adapters import inspect_adapters
from vllm_proxy.preflight.check.arguments import (
    engine_config,
    sampling_problems,
    supported_arguments,
)
from vllm_proxy.preflight.check.cluster import cluster_problem
from vllm_proxy.preflight.check.describe import (
    describe_checkpoints,
    describe_ends,
    describe_engine,
    describe_shift,
    describe_vocabularies,
)
from vllm_proxy.preflight.check.images import context_problem, describe_images, read_towers
from vllm_proxy.preflight.check.report import CheckReport, MemberReport, render
from vllm_proxy.preflight.check.tokenizers import (
    Comparison,
    Tokenizer,
    compare_tokenizers,
    describe_tokenizers,
    load_tokenizers,
    tokenizer_problems,
)
from vllm_proxy.preflight.check.weights import CheckpointInfo, inspect_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["CheckReport", "MemberReport", "check", "render", "require_valid"]


def check(config: ProxyConfig) -> CheckReport:
    """Read the members' files and report everything that would keep them from running.

    Never raises for a user's mistake: it becomes a problem of the report.
    """
    with quiet():
        try:
            require_supported_vllm()
        except ProxyConfigError as error:
            return CheckReport((), (), (str(error),))
        return _check(config)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was read for a check.

    Attributes:
        members: the members that can be used, at least one.
        vllm_config: the engine's config; None if vLLM cannot build one.
        checkpoints: what is known of each member's weights.
        adapters: notes on adapters.
        tokenizers: the tokenizers that can be read.
        comparisons: how they differ from the base's.
        towers: how members see images, if the configuration allows them.
    """

    members: Mapping[Role, ReadMember]
    vllm_config: "VllmConfig | None"
    checkpoints: Mapping[Role, CheckpointInfo]
    adapters: Sequence[str]
    tokenizers: Mapping[Role, Tokenizer]
    comparisons: Mapping[Role, Comparison]
    towers: Mapping[Role, Tower]


def _check(config: ProxyConfig) -> CheckReport:
    found, problems = _read(config)
    if found is not None and not problems:
        problems = _start_problems(config, found)
    notes = _notes(config, found, starts=not problems) if found is not None else ()
    reports = [_report(member, found) for member in found.members.values()] if found else ()
    # a wrong engine argument is found once for every member that is read with it
    return CheckReport(tuple(reports), tuple(notes), tuple(dict.fromkeys(problems)))


def _read(config: ProxyConfig) -> tuple[_Found | None, list[str]]:
    """Read all files. Returns what was found, None if no member can be used; and the problems."""
    problems = sampling_problems(config.sampling)
    arguments, wrong = supported_arguments(config.engine)
    problems += wrong
    members, wrong = read_members(config)
    problems += wrong
    if not members:
        return None, problems
    vllm_config, wrong = engine_config(arguments, members)
    problems += wrong
    load_format = str(config.engine.get("load_format", "auto"))
    checkpoints = inspect_weights(members, load_format)
    for role, member in members.items():
        problems += [f"{member.name}: {problem}" for problem in checkpoints[role].problems]
    dummy = load_format == "dummy"
    adapters, wrong = inspect_adapters(members, checkpoints, dummy=dummy, config=config)
    problems += wrong
    tokenizers, wrong = load_tokenizers(members, config.engine)
    problems += wrong
    comparisons = compare_tokenizers(tokenizers)
    problems += tokenizer_problems(members, tokenizers, comparisons)
    towers, wrong = read_towers(members, config.engine)
    problems += wrong
    if vllm_config and (problem := context_problem(towers, vllm_config.model_config.max_model_len)):
        problems.append(problem)
    found = _Found(members, vllm_config, checkpoints, adapters, tokenizers, comparisons, towers)
    return found, problems


def _start_problems(config: ProxyConfig, found: _Found) -> list[str]:
    """Return what would keep the engine from starting, although all files fit."""
    problems = []
    if config.chat is not None:
        try:
            chat_tokenizers(config)
        except ProxyConfigError as error:
            problems.append(str(error))
        configs = {role: member.model_config for role, member in found.members.items()}
        if found.vllm_config and (reason := chat_problem(found.vllm_config, configs, config.chat)):
            problems.append(f"`chat`: {reason}")
    if problems or found.vllm_config is None:
        return problems
    if reason := cluster_problem(found.vllm_config):
        return [reason]
    from vllm_proxy.preflight.check.dry_start import start_problems  # imports torch and vLLM

    return start_problems(config, found.members)


def _notes(config: ProxyConfig, found: _Found, *, starts: bool) -> Iterator[str]:
    """Yield sentences on what will run. *starts*: whether the engine will, as far as is known."""
    members = found.members
    is_complete = len(members) == len(config.roles)
    if is_complete:
        yield from describe_shift(config)
        yield from found.adapters
        yield from describe_vocabularies(members)
        if starts and found.vllm_config is not None:
            yield from describe_engine(members, found.vllm_config)
            model = found.vllm_config.model_config
            itemsize = model.dtype.itemsize
            yield from describe_images(members, found.towers, itemsize, model.max_model_len)
    yield from describe_checkpoints(members, found.checkpoints)
    if config.engine.get("skip_tokenizer_init"):
        yield (
            "Tokenizers were not compared (`engine.skip_tokenizer_init`): requests carry token "
            "ids, which must have the same meaning for every member."
        )
    yield from describe_tokenizers(members, found.tokenizers, found.comparisons)
    if is_complete:
        yield from describe_ends(config, members, found.tokenizers)


def _report(member: ReadMember, found: _Found) -> MemberReport:
    config, tokenizer = member.model_config, found.tokenizers.get(member.role)
    parameters, tower = found.checkpoints[member.role].parameters, found.towers.get(member.role)
    if parameters is not None and tower is not None:
        parameters += tower.parameters
    return MemberReport(
        role=member.role,
        model=str(member.member),
        architecture=config.architecture,
        parameters=parameters,
        vocabulary=config.get_vocab_size(),
        tokenizer_size=tokenizer.size if tokenizer else 0,
        context_length=config.max_model_len,
        dtype=member.dtype,
        quantization=None if config.quantization is None else str(config.quantization),
        tied=bool(getattr(config.hf_text_config, "tie_word_embeddings", False)),
    )


def require_valid(config: ProxyConfig) -> CheckReport:
    """Return the report of a configuration that has no problem.

    Raises:
        ProxyConfigError: the first problem, and how many more there are.
    """
    report = check(config)
    if report.problems:
        more = len(report.problems) - 1
        rest = f" (and {more} more; run `vllm-proxy check`)" if more else ""
        raise ProxyConfigError(report.problems[0] + rest)
    return report


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' log lines, because the report contains what is wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # not per logger: vLLM configures its loggers later
    try:
        yield
    finally:
        logging.disable(before)
