"""Conversations at vLLM's server, at every endpoint that takes one: what each member sees (`chat`).

Chat completions and their batches, messages and responses, and `/render` and `/tokenize` of them,
all have vLLM's `OnlineRenderer` make the base's prompt. There the other members' prompts are made
as well, by the same arguments, and added to the values of the request.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import PREFIX
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.members.prompts import (
    as_plain,
    chat_prompts,
    copied,
    member_renderers,
    require_followed,
    require_text,
    require_variables,
)

if TYPE_CHECKING:
    from vllm.renderers import BaseRenderer, ChatParams, TokenizeParams
    from vllm.renderers.online_renderer import OnlineRenderer

BASE_ALONE = ("add_special_tokens", "chat_template", "truncate_prompt_tokens")
"""Fields that would change what the base sees, and not what the other members see."""
SERVER_TOOLS = frozenset({"code_interpreter", "container", "web_search_preview"})
"""Tools that vLLM calls itself: its next prompt goes with the `extra_args` of the first one."""


_params: ContextVar[list["ChatParams"]] = ContextVar("params")
"""The arguments of chat templates in the current request, once vLLM has them: at most one entry."""


class ServedConversations:
    """Makes members' prompts wherever a server renders a conversation; see the module.

    Args:
        online: the server's renderer; its methods are replaced.
        section: the members, and `chat`, which must not be None.
        validate: refuses values of a request.
        in_thread: runs a function that takes its time, with its arguments.
    """

    def __init__(
        self,
        online: "OnlineRenderer",
        section: ProxySection,
        validate: Callable[[Mapping[str, Any]], None],
        in_thread: Callable[..., Awaitable[Any]],
    ) -> None:
        self._online, self._section, self._chat = online, section, section.chat
        self._validate, self._in_thread = validate, in_thread
        self._is_plain = section.chat.of("base") == "plain"
        self._renderers: dict[Role, BaseRenderer] | None = None
        self._preprocess = online.preprocess_chat
        self._render = online.renderer.render_chat_async
        online.preprocess_chat = self.preprocess_chat
        online.renderer.render_chat_async = self.render_chat_async
        online.adjust_harmony_request = self.adjust_harmony_request

    async def preprocess_chat(
        self, request: Any, messages: list[Any], *arguments: Any, **options: Any
    ) -> Any:
        """Have vLLM make the base's prompt of *request*, and add the other members'.

        Raises:
            VLLMValidationError: the members cannot follow the request; names the field.
        """
        from vllm.exceptions import VLLMValidationError

        params: list[ChatParams] = []
        _params.set(params)
        try:
            self._require_followed(request)
            require_text(messages)
            conversation, inputs = await self._preprocess(request, messages, *arguments, **options)
            if "vllm_xargs" in type(request).model_fields:
                self._add(request, await self._seen(messages, params, inputs))
        except ProxyConfigError as error:
            raise VLLMValidationError(str(error)) from None
        return conversation, inputs

    async def render_chat_async(
        self,
        conversations: Any,
        chat_params: "ChatParams",
        tok_params: "TokenizeParams | None" = None,
        **options: Any,
    ) -> Any:
        """Render for the base, in its format."""
        require_followed(chat_params, self._chat, self._section.roles)
        _params.get().append(chat_params)
        tok_params = tok_params or self._online.renderer.default_chat_tok_params
        # For `/v1/responses` vLLM (0.32) adds a second BOS to a template's own.
        tok_params = replace(tok_params, add_special_tokens=self._is_plain)
        if self._is_plain:
            chat_params = as_plain(chat_params)
        return await self._render(conversations, chat_params, tok_params, **options)

    def adjust_harmony_request(self, request: Any) -> None:
        """Refuse what vLLM renders by no template of the model."""
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            "`chat`: this server renders conversations in gpt-oss' own format, so members cannot "
            "see them in formats of their own; use /v1/completions"
        )

    def _require_followed(self, request: Any) -> None:
        fields = [name for name in BASE_ALONE if name in request.model_fields_set]
        names = [name for name in fields if getattr(request, name) is not None]
        if getattr(request, "truncation", None) not in (None, "disabled"):
            names.append("truncation")
        if names:
            raise ProxyConfigError(
                f"`{names[0]}`: not possible where members see conversations in formats of their "
                "own (`chat`); remove it"
            )
        for tool in getattr(request, "tools", None) or ():
            if tool.type in SERVER_TOOLS:
                raise ProxyConfigError(
                    f"`tools` has {tool.type!r}, which the server calls itself: not possible where "
                    "members see conversations in formats of their own (`chat`); give functions"
                )
        require_variables(getattr(request, "chat_template_kwargs", None))

    async def _seen(
        self,
        messages: list[Any],
        params: "list[ChatParams]",
        inputs: Sequence[Mapping[str, Any]],
    ) -> dict[str, list[int]]:
        if not params:
            raise ProxyConfigError(
                "`kv_transfer_params.prompt_token_ids`: not possible where members see "
                "conversations in formats of their own (`chat`); remove it"
            )
        base_ids = inputs[0]["prompt_token_ids"]
        return await self._in_thread(self._rendered, messages, params[0], base_ids)

    def _rendered(
        self, messages: list[Any], params: "ChatParams", base_ids: list[int]
    ) -> dict[str, list[int]]:
        if self._renderers is None:
            template = None if self._is_plain else self._online.chat_template
            shared = self._online.renderer  # which vLLM's own threads use meanwhile
            base = type(shared)(shared.config, copied(shared.tokenizer))
            self._renderers = member_renderers(self._section, base, base_template=template)
        return chat_prompts(messages, self._chat, self._renderers, params, base_ids)

    def _add(self, request: Any, seen: Mapping[str, Any]) -> None:
        own = {**seen, **(request.vllm_xargs or {})}
        ours = [key for key in own if key.startswith(PREFIX)]
        if not ours:
            return
        if getattr(request, "use_beam_search", False):
            raise ProxyConfigError(
                "`use_beam_search`: not possible where members see conversations in formats of "
                "their own (`chat`): vLLM drops `vllm_xargs`; remove it"
            )
        # Again when the engine admits it; but then a streaming answer has begun, with 200.
        self._validate(own)
        request.vllm_xargs = own
