"""The directly tuned model, which the proxy approximates: an ordinary model in vLLM."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, unknown_key
from vllm_proxy.config.schema import Member, ProxyConfig
from vllm_proxy.config.yaml_file import read_yaml
from vllm_proxy.members.read import BASE_ONLY

if TYPE_CHECKING:
    from vllm import LLM

_FIELDS = {*Member.model_fields, "engine"}
_BASE_OR_MEMBERS = {*BASE_ONLY, "speculative_config", "tokenizer", "tokenizer_revision"}
"""Engine arguments that concern the base or the members, and not the tuned model."""


@dataclass(frozen=True)
class Tuned:
    """A model, with or without an adapter, and the arguments that only its engine gets."""

    member: Member
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.member)

    def engine_args(self, config: ProxyConfig) -> dict[str, Any]:
        """Return keyword arguments for `vllm.LLM`: `engine`, and those of *config* as defaults.

        Of a multimodal model, vLLM builds the text model: tasks are text.
        """
        shared = {key: value for key, value in config.engine.items() if key not in _BASE_OR_MEMBERS}
        text = {"language_model_only": True}
        arguments = {"model": self.member.model, **text, **shared, **self.engine}
        if self.member.revision:
            arguments["revision"] = self.member.revision
        if self.member.lora:
            from vllm_proxy.evaluate.merged import engine_args

            return engine_args(self.member.lora, arguments)
        return arguments


def read_tuned(text: str) -> Tuned:
    """Read `--tuned`: a model, or a YAML file with `model`, `revision`, `lora` and `engine`.

    Raises:
        ProxyConfigError: the file is missing or wrong.
    """
    if not text.endswith((".yaml", ".yml")):
        return Tuned(_member({"model": text}, text))
    values = read_yaml(text, f"--tuned {text!r}", "check the path, and see `{model: …, lora: …}`")
    field = f"--tuned {text!r}"
    if not isinstance(values, dict) or "model" not in values:
        raise ProxyConfigError(
            "`model` is missing", field=field, remedy="add `model: <path or id>`"
        )
    for key in values:
        if key not in _FIELDS:
            raise unknown_key(key, _FIELDS).within(field)
    engine = values.pop("engine", {})
    if not isinstance(engine, dict):
        remedy = "give a mapping of engine arguments"
        raise ProxyConfigError(f"`engine` is {engine!r}", field=field, remedy=remedy)
    return Tuned(_member(values, text), engine)


def _member(values: Mapping[str, Any], text: str) -> Member:
    return Member.parse(values, f"--tuned {text!r}")


def require_tuned(tuned: Tuned, config: ProxyConfig) -> None:
    """Check that the tuned model can be compared with *config*. Reads no weights.

    Its tokenizer must be the base's: scores of different tokens cannot be compared.

    Raises:
        ProxyConfigError: names the model, the problem and the remedy.
    """
    from vllm_proxy.preflight.check.run import check

    engine = {**config.engine, **tuned.engine}
    pair = ProxyConfig.parse({"base": config.base, "expert": tuned.member, "engine": engine}, "")
    problems = check(pair).problems
    if problems:
        of_tuned = [problem for problem in problems if problem.startswith("expert ")]
        first = (of_tuned or problems)[0].removeprefix(f"expert `{tuned.member}`: ")
        raise ProxyConfigError(first.removeprefix("expert "), field=f"--tuned {str(tuned)!r}")


@contextmanager
def tuned_engine(tuned: Tuned, config: ProxyConfig) -> "Iterator[LLM]":
    """Start the tuned model's engine; shut it down at the end. Raises what vLLM raises."""
    from vllm import LLM

    from vllm_proxy.llm.proxy_llm import watch_engine_process

    llm = LLM(**tuned.engine_args(config))
    watch_engine_process(llm.llm_engine.engine_core)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
