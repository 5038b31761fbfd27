"""Check before loading: configs, tokenizers and safetensors headers, never weights.

What a user can get wrong is found here, in seconds and all at once, instead of one error a start
of the engine. What is right is reported too: the members, and what happens where they differ.
"""

import contextlib
import logging
from collections.abc import Iterator

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.compatibility import require_supported_vllm
from vllm_proxy.engine.limits import chat_problem
from vllm_proxy.members.prompts import chat_tokenizers
from vllm_proxy.members.read import ReadMember, read_members
from vllm_proxy.members.supported import SATURATES_MESSAGE, saturates
from vllm_proxy.preflight.check.adapters import inspect_adapters
from vllm_proxy.preflight.check.arguments import (
    engine_config,
    sampling_problems,
    supported_arguments,
)
from vllm_proxy.preflight.check.cluster import cluster_problem
from vllm_proxy.preflight.check.describe import (
    describe_ends,
    describe_engine,
    describe_shift,
    describe_vocabularies,
)
from vllm_proxy.preflight.check.report import CheckReport, MemberReport, render
from vllm_proxy.preflight.check.tokenizers import (
    describe_tokenizers,
    load_tokenizers,
    tokenizer_problems,
)
from vllm_proxy.preflight.check.weights import inspect_weights

__all__ = ["CheckReport", "MemberReport", "check", "render", "require_valid"]


def check(config: ProxyConfig) -> CheckReport:
    """Read what the members' files say and find everything that would keep them from running.

    Never raises for a user's mistake: it becomes a problem of the report.
    """
    with quiet():
        try:
            require_supported_vllm()
        except ProxyConfigError as error:
            return CheckReport((), (), (str(error),))
        return _check(config)


def _check(config: ProxyConfig) -> CheckReport:
    from vllm.config import LoadConfig

    problems = sampling_problems(config.sampling)
    arguments, wrong = supported_arguments(config.engine)
    problems += wrong
    members, wrong = read_members(config)
    problems += wrong
    if not members:
        return CheckReport((), (), tuple(dict.fromkeys(problems)))
    vllm_config, wrong = engine_config(arguments, members)
    problems += wrong
    load_format = str(config.engine.get("load_format", "auto"))
    dummy = load_format == "dummy"
    weights = inspect_weights(members, load_format)
    for role, member in members.items():
        problems += [f"{member.name}: {problem}" for problem in weights[role].problems]
    adapters, wrong = inspect_adapters(members, weights, dummy=dummy, config=config)
    problems += wrong
    tokenizers, wrong = load_tokenizers(members, config.engine)
    problems += wrong
    problems += tokenizer_problems(members, tokenizers)
    if config.chat is not None and not problems:
        try:
            chat_tokenizers(config)
        except ProxyConfigError as error:
            problems.append(str(error))
        configs = {role: member.model_config for role, member in members.items()}
        if vllm_config is not None and (reason := chat_problem(vllm_config, configs, config.chat)):
            problems.append(f"`chat`: {reason}")
    if vllm_config is not None and not problems and (reason := cluster_problem(vllm_config)):
        problems.append(reason)
    if vllm_config is not None and not problems:
        from vllm_proxy.preflight.check.dry_start import start_problems  # imports torch and vLLM

        problems += start_problems(config, members)

    sentences: list[str] = []
    if len(members) == len(config.roles):
        sentences += describe_shift(config)
        sentences += adapters
        sentences += describe_vocabularies(members)
        if vllm_config is not None and not problems:  # only of what will run
            sentences += describe_engine(members, vllm_config)
    for role, member in members.items():
        if saturates(member.model_config, LoadConfig()):
            sentences.append(f"{member.name}: {SATURATES_MESSAGE}.")
        if member.model_config.word_embeddings_untied_by_checkpoint:
            sentences.append(
                f"{member.name}: its config ties the head to the embedding "
                "(`tie_word_embeddings`), but its checkpoint has a head of its own, which is used."
            )
        if note := weights[role].note:
            sentences.append(f"{member.name}: {note}.")
    if config.engine.get("skip_tokenizer_init"):
        sentences.append(
            "Tokenizers were not compared (`engine.skip_tokenizer_init`): requests carry token "
            "ids, which must mean the same to every member."
        )
    sentences += describe_tokenizers(members, tokenizers)
    if len(members) == len(config.roles):
        sentences += describe_ends(config, members, tokenizers)
    reports = tuple(
        _report(
            member,
            parameters=weights[role].parameters,
            tokenizer_size=tokenizers[role].size if role in tokenizers else 0,
        )
        for role, member in members.items()
    )
    # a wrong engine argument is found once for every member that is read with it
    return CheckReport(reports, tuple(sentences), tuple(dict.fromkeys(problems)))


def _report(member: ReadMember, parameters: int | None, tokenizer_size: int) -> MemberReport:
    config = member.model_config
    return MemberReport(
        role=member.role,
        model=str(member.member),
        architecture=config.architecture,
        parameters=parameters,
        vocabulary=config.get_vocab_size(),
        tokenizer_size=tokenizer_size,
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
    """Keep the libraries' log lines out of the report, which says what is wrong itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # not by logger: vLLM sets its own up on the way
    try:
        yield
    finally:
        logging.disable(before)
