"""The directly tuned model: what the proxy is to come near to. An ordinary model of vLLM's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.schema import Member, ProxyConfig
from vllm_proxy.config.yaml_file import read_yaml
from vllm_proxy.members.read import BASE_ONLY

if TYPE_CHECKING:
    from vllm import LLM

_FIELDS = {*Member.model_fields, "engine"}
_NOT_ITS_OWN = {*BASE_ONLY, "speculative_config", "tokenizer", "tokenizer_revision"}
"""Engine arguments of a configuration that are about its base, or its members."""


@dataclass(frozen=True)
class Tuned:
    """A model, with an adapter or not, and its engine's own arguments."""

    member: Member
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.member)

    def engine_args(self, config: ProxyConfig) -> dict[str, Any]:
        """Return keyword arguments for `vllm.LLM`: those of *config*, and its own before them."""
        shared = {key: value for key, value in config.engine.items() if key not in _NOT_ITS_OWN}
        own = {"model": self.member.model, **shared, **self.engine}
        if self.member.revision:
            own["revision"] = self.member.revision
        if self.member.lora:
            from vllm_proxy.evaluate.merged import engine_args

            return engine_args(self.member.lora, own)
        return own


def read_tuned(text: str) -> Tuned:
    """Read `--tuned`: a model, or a YAML file with `model`, `revision`, `lora` and `engine`.

    Raises:
        ProxyConfigError: the file is missing or wrong.
    """
    if not text.endswith((".yaml", ".yml")):
        return Tuned(_member({"model": text}, text))
    values = read_yaml(text, f"--tuned {text!r}", "check the path, and see `{model: …, lora: …}`")
    if not isinstance(values, dict) or "model" not in values:
        raise ProxyConfigError(f"--tuned {text!r}: `model` is missing; add `model: <path or id>`")
    for key in values:
        if key not in _FIELDS:
            raise ProxyConfigError(
                f"--tuned {text!r}: unknown key `{key}`{did_you_mean(key, _FIELDS)}"
            )
    engine = values.pop("engine", {})
    if not isinstance(engine, dict):
        raise ProxyConfigError(f"--tuned {text!r}: `engine` is {engine!r}; it must be a mapping")
    return Tuned(_member(values, text), engine)


def _member(values: Mapping[str, Any], text: str) -> Member:
    return Member.parse(values, f"--tuned {text!r}")


def require_tuned(tuned: Tuned, config: ProxyConfig) -> None:
    """Find what would keep the tuned model from running beside *config*. Reads no weights.

    Its tokenizer must be the base's: scores of other tokens are not of the same answers.

    Raises:
        ProxyConfigError: naming the model, what is wrong, and the remedy.
    """
    from vllm_proxy.preflight.check.run import check

    engine = {**config.engine, **tuned.engine}
    pair = ProxyConfig.parse({"base": config.base, "expert": tuned.member, "engine": engine}, "")
    problems = check(pair).problems
    own = [problem for problem in problems if problem.startswith("expert ")]
    if problems:
        name = f"--tuned {str(tuned)!r}"
        first = (own or problems)[0].removeprefix(f"expert `{tuned.member}`: ")
        raise ProxyConfigError(f"{name}: {first.removeprefix('expert ')}")


@contextmanager
def tuned_engine(tuned: Tuned, config: ProxyConfig) -> "Iterator[LLM]":
    """Start the tuned model's engine, and shut it down. Raises what vLLM raises."""
    from vllm import LLM

    from vllm_proxy.llm.proxy_llm import tell_of_death

    llm = LLM(**tuned.engine_args(config))
    tell_of_death(llm.llm_engine.engine_core)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
