"""`ProxyMiddleware`: members by model name, and members' prompts as text, over HTTP.

`vllm-proxy serve` gives it to vLLM's server by `--middleware`. It rewrites the JSON bodies of
requests to the endpoints of `OWN_VALUES` into what the engine understands by itself, and leaves
everything else alone: other endpoints, what is not JSON, answers. What members see of conversations
is the work of `conversations.py`, which the first request of all starts.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import (
    ALPHA_KEYS,
    BARE_KEYS,
    MEMBER_CONTROLS,
    PREFIX,
    PROMPT_KEYS,
    RequestControl,
)
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.members.prompts import copied, tokenized
from vllm_proxy.server.conversations import ServedConversations
from vllm_proxy.server.openapi import describe

if TYPE_CHECKING:
    from starlette.datastructures import State
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.tokenizers import TokenizerLike

XARGS = ("vllm_xargs",)
OWN_VALUES: dict[str, tuple[str, ...]] = {
    "/v1/completions": XARGS,
    "/v1/completions/render": XARGS,
    "/v1/chat/completions": XARGS,
    "/v1/chat/completions/batch": XARGS,
    "/v1/chat/completions/render": XARGS,
    "/v1/messages": XARGS,
    "/v1/messages/render": XARGS,
    "/v1/responses": XARGS,
    "/v1/responses/render": XARGS,
    "/invocations": XARGS,
    "/inference/v1/generate": ("sampling_params", "extra_args"),
    "/cohere/v2/chat": (),
    "/generative_scoring": (),
    "/v1/systemone": (),
}
"""Where a body has its request's own values: the keys that lead there, none if it can have none."""

UNFORMATTED = ("/v1/systemone",)
"""Conversations whose requests have no values of their own, so that all members see one format."""

# One of these is in every body that concerns us, whatever way its characters are written (a NUL is
# in UTF-16 and UTF-32), so that other bodies are not parsed twice.
_SIGNS = (b"proxy_", b':base"', b':expert"', b':antiexpert"', rb"\u00", b"\0", b"_xargs", b"extra_")
_SIGNS += tuple(f'"{key}"'.encode() for key in BARE_KEYS if key != "top_p")
LONG_BODY = 2**16
"""Bytes from which on a body's texts are encoded in a thread of their own."""


LAST_WORDS_SECONDS = 1
"""How long answers may take to reach their clients after the engine has stopped."""


class ProxyMiddleware:
    """An ASGI middleware for vLLM's server; see the module.

    A body is read and rewritten when the server asks for it, and no earlier: so requests without
    an API key are refused before, and an error in a body is answered by vLLM's own handlers, in
    its format (HTTP 400).
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
            if path in OWN_VALUES and self.server.section is not None:
                receive = _rewritten(receive, self.server, path)
        await self.app(scope, receive, send)

    def _describe(self, scope: "Scope") -> None:
        """Add a request's own values to the server's document, before it is first asked for."""
        app, path = scope["app"], scope["path"].removeprefix(scope.get("root_path", ""))
        if path != app.openapi_url or app.openapi_schema is not None:
            return
        if getattr(app.state.vllm_config.model_config.hf_config, "proxy", None) is not None:
            describe(app.openapi(), OWN_VALUES)


def _rewritten(receive: "Receive", server: "_Server", path: str) -> "Receive":
    """Return *receive* with the body as one message, rewritten."""
    is_read = False
    asked: list[str] = []
    _asked.set(asked)

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
            body = await server.rewrite(path, b"".join(parts), asked)
        except ProxyConfigError as error:
            raise HTTPException(400, str(error)) from None
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_rewritten


_asked: ContextVar[list[str]] = ContextVar("asked")
"""The member that the current request names, if it names one: at most one name."""


class _Server:
    """What there is to know of vLLM's server: its names, its model and its tokenizers."""

    def __init__(self, state: "State") -> None:
        self.state = state
        self.model_config = state.vllm_config.model_config
        self.section: ProxySection | None = None
        section = getattr(self.model_config.hf_config, "proxy", None)
        if section is None:
            return  # not our model
        require_part("HTTP")
        # vLLM stops its engine first. What then still waits for the engine would wait for ever.
        server = getattr(state, "server", None)  # uvicorn's
        if server is not None and server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = LAST_WORDS_SECONDS
        self.section = ProxySection.parse(section, "hf_overrides.proxy")
        models = state.openai_serving_models
        served = {path.name for path in models.base_model_paths}
        self.members = {
            f"{name}:{role}": role
            for name in served
            for role in ROLES
            if f"{name}:{role}" in served
        }
        models.model_name = _answering_by_name(models.model_name)
        models.is_base_model = _refusing_briefly(models.is_base_model, served, self.members)
        # Nobody's short text waits for a long one. A thread each, with tokenizers of its own: they
        # are not made for two at once, and vLLM's threads use the server's meanwhile.
        self._threads = [ThreadPoolExecutor(1, f"proxy-{name}-texts") for name in ("short", "long")]
        self._own = threading.local()
        if self.section.chat:
            ServedConversations(
                state.online_renderer,
                self.section,
                lambda own: self._validate(own),
                partial(self._in_thread, LONG_BODY + 1),
            )

    async def rewrite(self, path: str, raw: bytes, asked: list[str]) -> bytes:
        """Return the body in vLLM's terms; append the member's name to *asked* if it has one.

        What vLLM will refuse by itself is returned as it came.

        Raises:
            ProxyConfigError: naming the field and the remedy.
        """
        if self.section.chat and path in UNFORMATTED:
            raise ProxyConfigError(
                f"{path}: members see conversations in formats of their own (`chat`) elsewhere "
                "only; use /v1/chat/completions"
            )
        if not any(sign in raw for sign in _SIGNS):
            return raw
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return raw
        if not isinstance(body, dict):
            return raw
        if path == "/invocations":
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        _require_place(body, OWN_VALUES[path] or XARGS)
        model = body.get("model")
        role = self.members.get(model) if isinstance(model, str) else None
        *way, last = OWN_VALUES[path] or XARGS
        holder = body
        for key in way:
            holder = holder.get(key)
            if not isinstance(holder, dict):
                return raw
        given = holder.get(last)
        own = {} if given is None else given
        if not isinstance(own, dict):
            return raw
        if role is not None:
            own = _with_member(own, role, model)
            asked.append(model)
        ours = [key for key in own if key.startswith(PREFIX) or key in BARE_KEYS]
        if not ours:
            return raw
        named = f"`model` {model!r}" if role is not None else f"`{ours[0]}`"
        if not OWN_VALUES[path]:
            raise ProxyConfigError(f"{named}: {path} has no `{XARGS[0]}` in vLLM; use another")
        if body.get("use_beam_search"):
            raise ProxyConfigError(
                f"{named}: not possible with `use_beam_search`, where vLLM drops `{XARGS[0]}`; "
                "remove one of them"
            )
        control = RequestControl.from_extra_args(own)
        if isinstance(own.get("proxy_alpha"), dict):  # vLLM takes no mapping there
            own = {**own, **RequestControl(alpha=control.alpha).to_extra_args()}
        if any(isinstance(own.get(key), str) for key in PROMPT_KEYS.values()):
            own = await self._in_thread(len(raw), self._tokenized, own)
        # Again when the engine admits it; but then a streaming answer has begun, with 200.
        self._validate(own)
        if own is given:
            return raw
        holder[last] = own
        return json.dumps(body).encode()

    async def _in_thread(self, size: int, function: Callable, *args: Any) -> Any:
        thread = self._threads[size > LONG_BODY]
        return await asyncio.get_running_loop().run_in_executor(thread, function, *args)

    @property
    def _tokenizer(self) -> "TokenizerLike | None":
        """The base's, this thread's own."""
        if not hasattr(self._own, "tokenizer"):
            self._own.tokenizer = copied(self.state.online_renderer.renderer.tokenizer)
        return self._own.tokenizer

    def _tokenized(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return tokenized(own, self._tokenizer, self.model_config.max_model_len)

    @cached_property
    def _validate(self) -> Callable[[Mapping[str, Any]], None]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        from vllm_proxy.engine.validation import validator_of

        validator = validator_of(self.model_config)

        def validate(own: Mapping[str, Any]) -> None:
            try:
                params = SamplingParams(extra_args=dict(own))
            except VLLMClientError as error:  # an integer that no message to an engine holds
                raise ProxyConfigError(f"`{XARGS[0]}`: {error.args[0]}") from None
            validator.validate_params(params)

        return validate


def _answering_by_name(model_name: Callable[..., str]) -> Callable[..., str]:
    """Make vLLM, which calls itself by its first name in all answers, use a member's."""

    def answering(lora_request: Any = None) -> str:
        asked = _asked.get(None)
        return asked[0] if asked else model_name(lora_request)

    return answering


def _refusing_briefly(
    is_served: Callable[[str], bool], served: Iterable[str], members: Iterable[str]
) -> Callable[[str], bool]:
    """Make vLLM, which lists every name to whoever asks for another, name the nearest."""
    from vllm.exceptions import VLLMNotFoundError

    def is_served_or_refused(model_name: str) -> bool:
        if is_served(model_name):
            return True
        name = model_name.rpartition(":")[0]
        near = [member for member in members if member.rpartition(":")[0] == name]
        hint = did_you_mean(model_name, near or {*served} - {*members})
        raise VLLMNotFoundError(f"The model `{model_name}` does not exist{hint}")

    return is_served_or_refused


def _require_place(body: Mapping[str, Any], place: tuple[str, ...]) -> None:
    """Refuse values of ours where vLLM passes over them. Raises `ProxyConfigError`."""
    where = ".".join(place)
    for key, value in body.items():
        if key.startswith(PREFIX):
            raise ProxyConfigError(f"`{key}`: give it in `{where}`")
        if key in BARE_KEYS and key != "top_p":  # vLLM's own
            raise ProxyConfigError(f"`{key}`: give {BARE_KEYS[key]} in `{where}`")
        if key in _HOLDERS - {place[0]} and (name := _ours_in(value)):
            raise ProxyConfigError(f"`{key}` has `{name}`: give it in `{where}`")


_HOLDERS = {"extra_args", "extra_body", "sampling_params", "vllm_xargs", "xargs"}
"""Where users look for a place for values of ours."""


def _ours_in(holder: object) -> str | None:
    """Return the first name of ours in a body's field, or in a field of that."""
    if not isinstance(holder, dict):
        return None
    for key, value in holder.items():
        if key.startswith(PREFIX) or (key in BARE_KEYS and key != "top_p"):
            return key
        if key in _HOLDERS and (name := _ours_in(value)):
            return name
    return None


def _with_member(own: Mapping[str, Any], role: str, model: str) -> dict[str, Any]:
    member = MEMBER_CONTROLS[role].to_extra_args()
    for key in (*ALPHA_KEYS, "proxy_weights"):
        if key in own and own[key] != member.get(key):
            raise ProxyConfigError(
                f"`model` {model!r} and `{key}`: the name stands for weights already; remove one "
                "of them"
            )
    return {**own, **member}
