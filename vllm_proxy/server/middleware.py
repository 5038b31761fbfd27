"""`ProxyMiddleware`: members and experts by model name, and members' prompts as text, over HTTP.

`vllm-proxy serve` passes it to vLLM's server by `--middleware`. It rewrites the JSON bodies of
requests to the paths of `VALUE_PLACES` (`rewriting.py`), and changes nothing else: other paths,
what is not JSON, answers. What members see of conversations is the work of `conversations.py`,
which starts with the first request.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import EXPERT_KEY, MEMBER_CONTROLS
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.members.prompts import copied, tokenized
from vllm_proxy.server.conversations import ServedConversations
from vllm_proxy.server.media import check_media
from vllm_proxy.server.openapi import describe
from vllm_proxy.server.rewriting import VALUE_PLACES, XARGS, Rewriter

if TYPE_CHECKING:
    from starlette.datastructures import State
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.tokenizers import TokenizerLike

LONG_BODY = 2**16
"""Bytes of a body from which on its texts are encoded in the thread for long ones."""
LAST_WORDS_SECONDS = 1
"""How long answers may take to reach their clients after the engine has stopped."""


class ProxyMiddleware:
    """An ASGI middleware for vLLM's server; see the module.

    A body is read and rewritten only when the server reads it. So a request without an API key is
    rejected before, and an error in a body is answered by vLLM's handlers, in vLLM's format (400).
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app
        self.server: _Server | None = None

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["method"] == "GET":
            self._describe(scope)
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            self.server = self.server or _Server(scope["app"].state)
            if path in VALUE_PLACES and self.server.section is not None:
                receive = _rewritten(receive, self.server, path)
        await self.app(scope, receive, send)

    def _describe(self, scope: "Scope") -> None:
        """Add the per-request values to the server's OpenAPI document, before it is first sent."""
        app, path = scope["app"], scope["path"].removeprefix(scope.get("root_path", ""))
        if path != app.openapi_url or app.openapi_schema is not None:
            return
        if getattr(app.state.vllm_config.model_config.hf_config, "proxy", None) is not None:
            describe(app.openapi(), VALUE_PLACES)


def _rewritten(receive: "Receive", server: "_Server", path: str) -> "Receive":
    """Return a *receive* that gives the rewritten body in one message."""
    is_read = False
    named: list[str] = []
    _named.set(named)

    async def receive_rewritten() -> "Message":
        nonlocal is_read
        if is_read:
            return await receive()
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return message
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        is_read = True
        try:
            body, member = await server.rewriter.rewrite(path, b"".join(parts))
        except ProxyConfigError as error:
            raise HTTPException(400, str(error)) from None
        named.extend(filter(None, [member]))
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_rewritten


_named: ContextVar[list[str]] = ContextVar("named")
"""The member's model name in the current request, if it has one: at most one entry."""


class _Server:
    """vLLM's server: its model names, its tokenizers, and what we replace in it."""

    def __init__(self, state: "State") -> None:
        self.state = state
        self.model_config = state.vllm_config.model_config
        self.section: ProxySection | None = None
        section = getattr(self.model_config.hf_config, "proxy", None)
        if section is None:
            return  # not our model
        require_part("HTTP")
        # vLLM stops its engine first. Requests that still wait for the engine would wait for ever.
        server = getattr(state, "server", None)  # uvicorn's
        if server is not None and server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = LAST_WORDS_SECONDS
        self.section = ProxySection.parse(section, "hf_overrides.proxy")
        models = state.openai_serving_models
        served = {path.name for path in models.base_model_paths}
        own: dict[str, dict[str, Any]] = {
            role: control.to_extra_args() for role, control in MEMBER_CONTROLS.items()
        }
        own |= {name: {EXPERT_KEY: name} for name in self.section.experts}
        self.models = {
            f"{name}:{part}": values
            for name in served
            for part, values in own.items()
            if f"{name}:{part}" in served
        }
        models.model_name = _answering_by_name(models.model_name)
        models.is_base_model = _refusing_briefly(models.is_base_model, served, self.models)
        # One thread for short texts and one for long ones, so that short ones do not wait. Each has
        # copies of the tokenizers, which are not thread-safe; vLLM's threads use the originals.
        self._threads = [ThreadPoolExecutor(1, f"proxy-{name}-texts") for name in ("short", "long")]
        self._local = threading.local()
        self.rewriter = Rewriter(
            self.models,
            self.section.chat is not None,
            lambda size, values: self._in_thread(size, self._tokenized, values),
            lambda values: self._validate(values),
        )
        check_media(state.online_renderer, sees=self.model_config.is_multimodal_model)
        if self.section.chat:
            ServedConversations(
                state.online_renderer,
                self.section,
                lambda values: self._validate(values),
                partial(self._in_thread, LONG_BODY + 1),
            )

    async def _in_thread(self, size: int, function: Callable[..., Any], *args: Any) -> Any:
        thread = self._threads[size > LONG_BODY]
        return await asyncio.get_running_loop().run_in_executor(thread, function, *args)

    @property
    def _tokenizer(self) -> "TokenizerLike | None":
        """The base's, copied for this thread."""
        if not hasattr(self._local, "tokenizer"):
            self._local.tokenizer = copied(self.state.online_renderer.renderer.tokenizer)
        return self._local.tokenizer

    def _tokenized(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return tokenized(values, self._tokenizer, self.model_config.max_model_len)

    @cached_property
    def _validate(self) -> Callable[[Mapping[str, Any]], None]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        from vllm_proxy.engine.admission import require_expert, validator_of

        validator = validator_of(self.model_config)
        assert validator is not None  # the model is ours

        def validate(values: Mapping[str, Any]) -> None:
            try:
                params = SamplingParams(extra_args=dict(values))
            except VLLMClientError as error:  # an integer that no message to an engine holds
                raise ProxyConfigError(f"`{XARGS[0]}`: {error.args[0]}") from None
            validator.validate_params(params)
            require_expert(values, self.model_config)

        return validate


def _answering_by_name(model_name: Callable[..., str]) -> Callable[..., str]:
    """Make answers carry the member's model name; vLLM puts its first name into all answers."""

    def answering(lora_request: Any = None) -> str:
        named = _named.get(None)
        return named[0] if named else model_name(lora_request)

    return answering


def _refusing_briefly(
    is_served: Callable[[str], bool], served: Iterable[str], members: Iterable[str]
) -> Callable[[str], bool]:
    """Make the answer to an unknown model name suggest the nearest one instead of listing all."""
    from vllm.exceptions import VLLMNotFoundError

    def is_served_or_refused(model_name: str) -> bool:
        if is_served(model_name):
            return True
        name = model_name.rpartition(":")[0]
        near = [member for member in members if member.rpartition(":")[0] == name]
        hint = did_you_mean(model_name, near or {*served} - {*members})
        problem = f"The model `{model_name}` does not exist"
        raise VLLMNotFoundError("; ".join(filter(None, (problem, hint))))

    return is_served_or_refused
