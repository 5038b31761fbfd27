"""`ProxyLLM`: `vllm.LLM` for a proxy-tuned model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from vllm import LLM, SamplingParams

from vllm_proxy.check import require_valid
from vllm_proxy.config import ProxyConfig
from vllm_proxy.rows import sampling_params


class ProxyLLM(LLM):
    """A `vllm.LLM` whose model is `base + alpha * (expert - antiexpert)`.

    Every method is vLLM's own: `generate`, `chat`, `beam_search`, and scoring by
    `SamplingParams(prompt_logprobs=…)`, all of the fused distribution.

        llm = ProxyLLM(
            base="meta-llama/Llama-2-70b-hf",
            expert="meta-llama/Llama-2-7b-chat-hf",
            antiexpert="meta-llama/Llama-2-7b-hf",
            tensor_parallel_size=8,
        )

    Args:
        base: the large model: a path, a hub id, or a mapping `{"model": …, "revision": …}`.
        expert: the small model after fine-tuning.
        antiexpert: the same small model before it.
        alpha: strength, any finite number; 1.0 is the paper's, 0.0 gives the base.
        sampling: sampling parameters for calls that give none; by default the base's
            generation config, as in vLLM.
        **engine_args: any argument of `vllm.LLM`.

    Raises:
        ProxyConfigError: a member cannot be part of this model; raised before weights are read.
    """

    def __init__(
        self,
        base: str | Mapping[str, Any],
        expert: str | Mapping[str, Any],
        antiexpert: str | Mapping[str, Any],
        alpha: float = 1.0,
        *,
        sampling: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> None:
        values = {
            "base": base,
            "expert": expert,
            "antiexpert": antiexpert,
            "alpha": alpha,
            "engine": engine_args,
            "sampling": dict(sampling or {}),
        }
        self.proxy_config = ProxyConfig.parse(values, "ProxyLLM")
        require_valid(self.proxy_config)
        super().__init__(**self.proxy_config.engine_args())

    @classmethod
    def from_config(cls, config: str | Path | ProxyConfig) -> Self:
        """Build from a YAML file or a `ProxyConfig`. Raises `ProxyConfigError`."""
        if not isinstance(config, ProxyConfig):
            config = ProxyConfig.from_yaml(config)
        return cls(
            base=config.base.model_dump(),
            expert=config.expert.model_dump(),
            antiexpert=config.antiexpert.model_dump(),
            alpha=config.alpha,
            sampling=config.sampling,
            **config.engine,
        )

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of calls that give none: `sampling`, over the base's own."""
        params = super().get_default_sampling_params()
        if not self.proxy_config.sampling:
            return params
        defaults = self.default_sampling_params or {}
        return sampling_params({**defaults, **self.proxy_config.sampling})
