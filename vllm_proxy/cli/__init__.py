"""The command `vllm-proxy`: options in, exit codes out.

Knows options, terminals, signals and exit codes; not tensors or vLLM's names.
"""

from vllm_proxy.cli.app import app

__all__ = ["app"]
