"""`vllm-proxy serve`: the stock `vllm serve`, with the words that a configuration stands for."""

import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from vllm_proxy.config import ProxyConfig
from vllm_proxy.errors import ProxyConfigError

NO_VLLM = "vllm is not installed; install vllm-proxy[gpu], or vllm-proxy[cpu] without a GPU"

SERVER_SAMPLING = frozenset(
    {
        "frequency_penalty",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Sampling parameters for which a vLLM server takes defaults (`get_diff_sampling_param`). It takes
`max_new_tokens` too, but as the most that a request may ask for, which `max_tokens` is not."""

_MEMBER_FLAGS = {
    "--hf-overrides": "set `engine.hf_overrides` in the configuration",
    "--model": "set `base` in the configuration",
    "--revision": "set `base: {model: …, revision: …}` in the configuration",
}


def vllm_command() -> list[str]:
    """Return the words that start vLLM's command line in this environment.

    Raises:
        ProxyConfigError: vLLM is not installed.
    """
    beside = Path(sys.executable).with_name("vllm")
    if beside.exists():
        return [str(beside)]
    if found := shutil.which("vllm"):
        return [found]
    if find_spec("vllm") is None:
        raise ProxyConfigError(NO_VLLM)
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def serve_command(config: ProxyConfig, flags: Sequence[str]) -> list[str]:
    """Return the stock command that serves *config*.

    Args:
        config: the members, the strength and the engine's arguments; of its sampling parameters
            those that a server has defaults for.
        flags: further arguments of `vllm serve`; they come last, so they win.

    Raises:
        ProxyConfigError: a flag would change the members, or vLLM is not installed.
    """
    for word in flags:
        # vLLM takes `--hf_overrides`, `--hf-overrides=…` and `--hf-overrides.proxy.alpha=…` too.
        flag = word.partition("=")[0].partition(".")[0].replace("_", "-")
        if word.startswith("--") and flag in _MEMBER_FLAGS:
            raise ProxyConfigError(f"{word}: set by the members; {_MEMBER_FLAGS[flag]}")
    defaults = {k: v for k, v in config.sampling.items() if k in SERVER_SAMPLING}
    if defaults:
        override = {**config.engine.get("override_generation_config", {}), **defaults}
        engine = {**config.engine, "override_generation_config": override}
        config = config.model_copy(update={"engine": engine})
    return [*vllm_command(), "serve", *config.serve_arguments(), *flags]


def unserved(config: ProxyConfig) -> str | None:
    """Return a line that names the sampling parameters a server has no defaults for, if any."""
    keys = sorted(config.sampling.keys() - SERVER_SAMPLING)
    if not keys:
        return None
    names = ", ".join(f"`sampling.{key}`" for key in keys)
    return f"note: {names}: of `generate` only; a server's clients send their own"


def become(command: Sequence[str]) -> NoReturn:
    """Replace this process by *command*, so that signals reach the server itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(command[0], command)
