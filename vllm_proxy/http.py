"""`ProxyMiddleware`: members by model name, members' prompts as text, chat formats, over HTTP.

`vllm-proxy serve` gives it to vLLM's server by `--middleware`. It rewrites the JSON bodies of
requests to the endpoints of `OWN_VALUES` into what the engine understands by itself, and leaves
everything else alone: other endpoints, what is not JSON, answers.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from vllm_proxy.compatibility import require_part
from vllm_proxy.config import ROLES, ProxySection, Role
from vllm_proxy.control import ALPHA_KEYS, MEMBERS, PREFIX, PROMPT_KEYS
from vllm_proxy.errors import ProxyConfigError
from vllm_proxy.openapi import describe
from vllm_proxy.prompts import PLAIN_TEMPLATE, chat_prompts, member_tokenizers, tokenized

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

FORMATTED = ("/v1/chat/completions", "/v1/chat/completions/render")
"""Conversations that each member may see in a format of its own (`chat`)."""
UNFORMATTED = (
    "/v1/chat/completions/batch",
    "/v1/messages",
    "/v1/messages/render",
    "/v1/responses",
    "/v1/responses/render",
    "/cohere/v2/chat",
    "/v1/systemone",
)
"""Conversations that all members see in one format."""
ONE_FORMAT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "reasoning_effort": (None,),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
}
"""Fields that change one format, and the values that do not; the others are refused with `chat`."""

# One of these is in every body that concerns us, whatever way its characters are written (a NUL is
# in UTF-16 and UTF-32), so that other bodies are not parsed twice.
_SIGNS = (b"proxy_", b':base"', b':expert"', b':antiexpert"', rb"\u00", b"\0")


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
            if path in OWN_VALUES and _is_json(scope):
                self.server = self.server or _Server(scope["app"].state)
                if self.server.section is not None:
                    receive = _rewritten(receive, self.server, path)
        await self.app(scope, receive, send)

    def _describe(self, scope: "Scope") -> None:
        """Add a request's own values to the server's document, before it is first asked for."""
        app, path = scope["app"], scope["path"].removeprefix(scope.get("root_path", ""))
        if path != app.openapi_url or app.openapi_schema is not None:
            return
        if getattr(app.state.vllm_config.model_config.hf_config, "proxy", None) is not None:
            describe(app.openapi(), OWN_VALUES)


def _is_json(scope: "Scope") -> bool:
    content_type = dict(scope["headers"]).get(b"content-type", b"")
    return content_type.lower().partition(b";")[0].strip() == b"application/json"


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
        self._tokenizers: dict[Role, TokenizerLike] | None = None
        # One thread: the members' tokenizers are not made for more.
        self.tokenizing = ThreadPoolExecutor(1, "proxy-tokenizer")

    async def rewrite(self, path: str, raw: bytes, asked: list[str]) -> bytes:
        """Return the body in vLLM's terms; append the member's name to *asked* if it has one.

        What vLLM will refuse by itself is returned as it came.

        Raises:
            ProxyConfigError: naming the field and the remedy.
        """
        is_chat = self.section.chat and path in (*FORMATTED, *UNFORMATTED, "/invocations")
        if not is_chat and not any(sign in raw for sign in _SIGNS):
            return raw
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return raw
        if not isinstance(body, dict):
            return raw
        if path == "/invocations":
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        for key in body:
            if key.startswith(PREFIX):
                raise ProxyConfigError(f"`{key}`: give it in `{'.'.join(XARGS)}`")
        if self.section.chat and path in UNFORMATTED:
            raise ProxyConfigError(
                f"{path}: members see conversations in formats of their own (`chat`) at "
                f"{FORMATTED[0]} only; use that"
            )
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
        if self.section.chat and path in FORMATTED:
            messages = _conversation(body)
            if messages is None:
                return raw
            own = await self._in_thread(self._formatted, messages) | own
            if self.section.chat.of("base") == "plain":
                body["add_special_tokens"] = True
        ours = [key for key in own if key.startswith(PREFIX)]
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
        if any(isinstance(own.get(key), str) for key in PROMPT_KEYS.values()):
            own = await self._in_thread(self._tokenized, own)
        # Again when the engine admits it; but then a streaming answer has begun, with 200.
        self._validate(own)
        if own is given:
            return raw
        holder[last] = own
        return json.dumps(body).encode()

    async def _in_thread(self, function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, *args)

    def _tokenized(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return tokenized(own, self.state.online_renderer.renderer.tokenizer)

    def _formatted(self, messages: list[dict[str, Any]]) -> dict[str, list[int]]:
        template = self.state.online_renderer.chat_template
        if self.section.chat.of("base") == "plain":
            if template != PLAIN_TEMPLATE:
                raise ProxyConfigError(
                    "`chat.base` is 'plain', and the server has another chat template; start it "
                    "with vllm-proxy serve"
                )
            template = None
        if self._tokenizers is None:
            self._tokenizers = member_tokenizers(
                self.section,
                self.state.online_renderer.renderer.tokenizer,
                base_template=template,
                tokenizer_mode=self.model_config.tokenizer_mode,
                trust_remote_code=self.model_config.trust_remote_code,
            )
        return chat_prompts(messages, self.section.chat, self._tokenizers, base_template=template)

    @cached_property
    def _validate(self) -> Callable[[Mapping[str, Any]], None]:
        from vllm import SamplingParams

        from vllm_proxy.runner import validation

        ours = f"{validation.__name__}:"
        names = [p for p in self.model_config.logits_processors if str(p).startswith(ours)]
        validator = getattr(validation, names[0].removeprefix(ours))
        return lambda own: validator.validate_params(SamplingParams(extra_args=dict(own)))


def _answering_by_name(model_name: Callable[..., str]) -> Callable[..., str]:
    """Make vLLM, which calls itself by its first name in all answers, use a member's."""

    def answering(lora_request: Any = None) -> str:
        asked = _asked.get(None)
        return asked[0] if asked else model_name(lora_request)

    return answering


def _with_member(own: Mapping[str, Any], role: str, model: str) -> dict[str, Any]:
    member = MEMBERS[role].to_request()
    for key in (*ALPHA_KEYS, "proxy_weights"):
        if key in own and own[key] != member.get(key):
            raise ProxyConfigError(
                f"`model` {model!r} and `{key}`: the name stands for weights already; remove one "
                "of them"
            )
    return {**own, **member}


def _conversation(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a body's messages; None if they are not messages, which vLLM will refuse.

    Raises:
        ProxyConfigError: a field asks for what the members' own formats cannot follow.
    """
    for field, neutral in ONE_FORMAT.items():
        if body.get(field) not in neutral:
            raise ProxyConfigError(
                f"`{field}`: not possible where members see conversations in formats of their own "
                "(`chat`); remove it"
            )
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else 0
        parts = content if isinstance(content, list) else ()
        if not isinstance(content, str | list | None) or not all(
            isinstance(part, str | dict) for part in parts
        ):
            return None
    return messages
