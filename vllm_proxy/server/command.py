"""`vllm-proxy serve`: the `vllm serve` command that is equivalent to a configuration."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from vllm_proxy.config.engine_arguments import SERVER_SAMPLING
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.media import LIMITS
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.prompts import PLAIN_TEMPLATE

MIDDLEWARE = "vllm_proxy.server.middleware.ProxyMiddleware"
NO_VLLM_MESSAGE = "vllm is not installed; install vllm-proxy[gpu], or vllm-proxy[cpu] without a GPU"


_MEMBER_FLAGS = {
    "--hf-overrides": "set `engine.hf_overrides` in the configuration",
    "--model": "set `base` in the configuration",
    "--revision": "set `base: {model: …, revision: …}` in the configuration",
}


def vllm_command() -> list[str]:
    """Return the first words of a vLLM command in this environment.

    Raises:
        ProxyConfigError: vLLM is not installed.
    """
    script = Path(sys.executable).with_name("vllm")
    if script.exists():
        return [str(script)]
    if found := shutil.which("vllm"):
        return [found]
    if find_spec("vllm") is None:
        raise ProxyConfigError(NO_VLLM_MESSAGE)
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def serve_command(config: ProxyConfig, flags: Sequence[str]) -> list[str]:
    """Return the stock command that serves *config*, and each member under its own model name.

    Args:
        config: the members, the strength and the engine's arguments. Of its sampling parameters,
            those for which a server has defaults are used.
        flags: further arguments of `vllm serve`; they come last and take precedence. Each name in
            `--served-model-name` is also served as `name:role` for every member.

    Returns:
        The words of the command, to be run with the variables of `environment`.

    Raises:
        ProxyConfigError: a flag would change the members or how they see conversations, a name
            already belongs to a member, or vLLM is not installed.
    """
    for word in flags:
        # vLLM takes `--hf_overrides`, `--hf-overrides=…` and `--hf-overrides.proxy.alpha=…` too.
        flag = word.partition("=")[0].partition(".")[0].replace("_", "-")
        if word.startswith("--") and flag in _MEMBER_FLAGS:
            raise ProxyConfigError(
                "the configuration sets it", field=word, remedy=_MEMBER_FLAGS[flag]
            )
    names, flags = _names(config, flags)
    # The names are among our own words below, and the token is passed in the environment.
    separate = {"served_model_name"} | ({"hf_token"} if environment(config) else set())
    engine = {k: v for k, v in config.engine.items() if k not in separate}
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
        # Otherwise vLLM compares what the base sees for each effort: here always the same text.
        words += ["--anthropic-disabled-thinking-effort", "none"]
        for word in flags:
            if word.startswith(("--chat-template", "--chat_template")):
                raise ProxyConfigError(
                    "the base sees conversations as plain text (`chat` in the configuration)",
                    field=word,
                    remedy="set `chat: {base: template}`, or remove the flag",
                )
    return [*vllm_command(), "serve", *config.serve_arguments(), *words, *flags]


_LIMITS_FLAG = f"--{LIMITS.replace('_', '-')}"


def with_media_limits(config: ProxyConfig, flags: Sequence[str]) -> tuple[ProxyConfig, list[str]]:
    """Return *config* with the flag `--limit-mm-per-prompt`, if it is given, and the other flags.

    The flag decides whether the members' towers are loaded, which is part of our own arguments.

    Raises:
        ProxyConfigError: its value is not JSON.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(_LIMITS_FLAG, f"--{LIMITS}")
    try:
        known, others = parser.parse_known_args(flags)
        given = getattr(known, LIMITS)
        limits = None if given is None else json.loads(given)
    except (argparse.ArgumentError, ValueError):
        limits, others = None, [f"{_LIMITS_FLAG}."]
    for word in others:
        if word.replace("_", "-").startswith(f"{_LIMITS_FLAG}."):
            raise ProxyConfigError(
                field=_LIMITS_FLAG, remedy="""give its value as JSON: '{"image": 1}'"""
            )
    if limits is None:
        return config, others
    engine = {**config.engine, LIMITS: limits}
    return config.model_copy(update={"engine": engine}), others


def environment(config: ProxyConfig) -> dict[str, str]:
    """Return the additional environment variables of the process of `serve_command`.

    A Hub token is passed here because every user of the machine can read a process's arguments.
    """
    token = config.engine.get("hf_token")
    return {"HF_TOKEN": token} if isinstance(token, str) else {}


def _names(config: ProxyConfig, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the model names to serve, members' and experts' last, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--served-model-name", "--served_model_name", nargs="+")
    try:
        known, flags = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ProxyConfigError(str(error)) from None
    given = known.served_model_name or config.engine.get("served_model_name") or config.base.model
    names = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    members = [f"{n}:{part}" for n in names for part in (*config.roles, *config.experts)]
    for name in names:
        if name in members:
            raise ProxyConfigError(
                "a member or an expert already has this name",
                field=f"--served-model-name {name}",
                remedy="choose another",
            )
    return [*names, *members], flags


def unserved(config: ProxyConfig) -> str | None:
    """Return a note about the sampling parameters for which a server has no defaults, if any."""
    keys = sorted(config.sampling.keys() - SERVER_SAMPLING)
    if not keys:
        return None
    names = ", ".join(f"`sampling.{key}`" for key in keys)
    return f"note: {names}: used by `generate` only; clients of a server send their own values"


def become(command: Sequence[str], additions: Mapping[str, str]) -> NoReturn:
    """Replace this process by *command*, so that signals reach the server itself.

    Args:
        command: the words of the new process.
        additions: additional environment variables.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], list(command), {**os.environ, **additions})
