"""`vllm-proxy serve`: the stock `vllm serve`, with the words that a configuration stands for."""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from vllm_proxy.config.engine_arguments import SERVER_SAMPLING
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.prompts import PLAIN_TEMPLATE

MIDDLEWARE = "vllm_proxy.server.middleware.ProxyMiddleware"
NO_VLLM = "vllm is not installed; install vllm-proxy[gpu], or vllm-proxy[cpu] without a GPU"


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
    """Return the stock command that serves *config*, each member under a name of its own.

    Args:
        config: the members, the strength and the engine's arguments; of its sampling parameters
            those that a server has defaults for.
        flags: further arguments of `vllm serve`; they come last, so they win. Of the names in
            `--served-model-name` each gets its members.

    Returns:
        The words, to be run in an environment that has those of `environment`.

    Raises:
        ProxyConfigError: a flag would change the members or how they see conversations, a name is
            a member's already, or vLLM is not installed.
    """
    for word in flags:
        # vLLM takes `--hf_overrides`, `--hf-overrides=…` and `--hf-overrides.proxy.alpha=…` too.
        flag = word.partition("=")[0].partition(".")[0].replace("_", "-")
        if word.startswith("--") and flag in _MEMBER_FLAGS:
            raise ProxyConfigError(f"{word}: set by the members; {_MEMBER_FLAGS[flag]}")
    names, flags = _names(config, flags)
    elsewhere = {"served_model_name"} | ({"hf_token"} if environment(config) else set())
    engine = {k: v for k, v in config.engine.items() if k not in elsewhere}
    defaults = {k: v for k, v in config.sampling.items() if k in SERVER_SAMPLING}
    if defaults:
        engine["override_generation_config"] = {
            **engine.get("override_generation_config", {}),
            **defaults,
        }
    config = config.model_copy(update={"engine": engine})
    words = ["--served-model-name", *names, "--middleware", MIDDLEWARE]
    if config.chat is not None and config.chat.of("base") == "plain":
        words += ["--chat-template", PLAIN_TEMPLATE]
        # vLLM's own choice compares what the base sees of each effort: plain text, always the same.
        words += ["--anthropic-disabled-thinking-effort", "none"]
        for word in flags:
            if word.startswith(("--chat-template", "--chat_template")):
                raise ProxyConfigError(
                    f"{word}: the base sees conversations as plain text (`chat`); set "
                    "`chat: {base: template}` in the configuration, or remove the flag"
                )
    return [*vllm_command(), "serve", *config.serve_arguments(), *words, *flags]


def environment(config: ProxyConfig) -> dict[str, str]:
    """Return what the process of `serve_command` needs in its environment.

    A token there is not in the list of processes, which every user of the machine can read.
    """
    token = config.engine.get("hf_token")
    return {"HF_TOKEN": token} if isinstance(token, str) else {}


def _names(config: ProxyConfig, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names to serve, the members' last, and the flags that are left."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--served-model-name", "--served_model_name", nargs="+")
    try:
        known, flags = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ProxyConfigError(str(error)) from None
    given = known.served_model_name or config.engine.get("served_model_name") or config.base.model
    names = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    members = [f"{name}:{role}" for name in names for role in config.roles]
    for name in names:
        if name in members:
            raise ProxyConfigError(
                f"--served-model-name {name}: the name of a member already; choose another"
            )
    return [*names, *members], flags


def unserved(config: ProxyConfig) -> str | None:
    """Return a line that names the sampling parameters a server has no defaults for, if any."""
    keys = sorted(config.sampling.keys() - SERVER_SAMPLING)
    if not keys:
        return None
    names = ", ".join(f"`sampling.{key}`" for key in keys)
    return f"note: {names}: of `generate` only; a server's clients send their own"


def become(command: Sequence[str], additions: Mapping[str, str]) -> NoReturn:
    """Replace this process by *command*, so that signals reach the server itself.

    Args:
        command: its words.
        additions: to its environment.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, {**os.environ, **additions})
