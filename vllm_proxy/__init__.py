"""Proxy tuning (Liu et al. 2024, arXiv 2401.08565) as a vLLM plugin.

The formula is `model.fusion.fuse`: the base's logits, and alpha times the difference between the
expert's and the antiexpert's.

`ProxyLLM` is a `vllm.LLM`; `ProxyConfig` is the YAML file that the command line reads. Both are
imported on first use, so that `import vllm_proxy` imports neither torch nor vLLM.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_proxy.config.schema import ProxyConfig
    from vllm_proxy.llm.proxy_llm import ProxyLLM

__all__ = ["ProxyConfig", "ProxyLLM"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "ProxyConfig":
        from vllm_proxy.config.schema import ProxyConfig

        return ProxyConfig
    if name == "ProxyLLM":
        from vllm_proxy.llm.proxy_llm import ProxyLLM

        return ProxyLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
