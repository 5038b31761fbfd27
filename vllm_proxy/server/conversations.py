"""What each member sees of conversations (`chat`), at every endpoint of vLLM's server.

Chat completions and their batches, messages and responses, and `/render` and `/tokenize` of them,
all use vLLM's `OnlineRenderer` for the base's prompt. There we also make the other members' prompts
with the same arguments, and add them to the values of the request.
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
"""Fields that would change what the base sees, but not what the other members see."""
SERVER_TOOLS = frozenset({"code_interpreter", "container", "web_search_preview"})
"""Tools that vLLM calls itself: it sends the next prompt with the `extra_args` of the first one."""


_NOT_WITH_CHAT = "not supported if members see conversations in different formats (`chat`)"
_params: ContextVar[list["ChatParams"]] = ContextVar("params")
"""The arguments of chat templates in the current request: empty until vLLM renders it, then one."""


class ServedConversations:
    """Makes members' prompts wherever a server renders a conversation; see the module.

    Args:
        online: the server's renderer; some of its methods are replaced.
        section: the members, and `chat`, which must not be None.
        validate: rejects values of a request that the engine would reject.
        in_thread: runs a slow function with its arguments in a thread.
    """

    def __init__(
        self,
        online: "OnlineRenderer",
        section: ProxySection,
        validate: Callable[[Mapping[str, Any]], None],
        in_thread: Callable[..., Awaitable[Any]],
    ) -> None:
        assert section.chat is not None
        self._online = online
        self._section = section
        self._chat = section.chat
        self._validate = validate
        self._in_thread = in_thread
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
        """Let vLLM make the base's prompt of *request*, and add the other members' prompts.

        Raises:
            VLLMValidationError: a field of the request does not apply to all members; names it.
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
        """Render for the base, in the base's format."""
        require_followed(chat_params, self._chat, self._section.roles)
        _params.get().append(chat_params)
        tok_params = tok_params or self._online.renderer.default_chat_tok_params
        # For `/v1/responses` vLLM (0.32) would add a second BOS to that of the template.
        tok_params = replace(tok_params, add_special_tokens=self._is_plain)
        if self._is_plain:
            chat_params = as_plain(chat_params)
        return await self._render(conversations, chat_params, tok_params, **options)

    def adjust_harmony_request(self, request: Any) -> None:
        """Reject conversations that vLLM renders without a chat template."""
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            "`chat`: this server renders conversations in the format of gpt-oss, so members cannot "
            "see different formats; use /v1/completions"
        )

    def _require_followed(self, request: Any) -> None:
        fields = [name for name in BASE_ALONE if name in request.model_fields_set]
        names = [name for name in fields if getattr(request, name) is not None]
        if getattr(request, "truncation", None) not in (None, "disabled"):
            names.append("truncation")
        if names:
            raise ProxyConfigError(_NOT_WITH_CHAT, field=names[0], remedy="remove it")
        for tool in getattr(request, "tools", None) or ():
            if tool.type in SERVER_TOOLS:
                raise ProxyConfigError.worded(
                    f"`tools` has {tool.type!r}, which the server calls itself: {_NOT_WITH_CHAT}",
                    field="tools",
                    remedy="give functions",
                )
        require_variables(getattr(request, "chat_template_kwargs", None))

    async def _seen(
        self,
        messages: list[Any],
        params: "list[ChatParams]",
        inputs: Sequence[Mapping[str, Any]],
    ) -> dict[str, list[int]]:
        if not params:
            field = "kv_transfer_params.prompt_token_ids"
            raise ProxyConfigError(_NOT_WITH_CHAT, field=field, remedy="remove it")
        base_ids = inputs[0]["prompt_token_ids"]
        return await self._in_thread(self._rendered, messages, params[0], base_ids)

    def _rendered(
        self, messages: list[Any], params: "ChatParams", base_ids: list[int]
    ) -> dict[str, list[int]]:
        if self._renderers is None:
            template = None if self._is_plain else self._online.chat_template
            shared = self._online.renderer  # vLLM's own threads use it at the same time
            base = type(shared)(shared.config, copied(shared.tokenizer))
            self._renderers = member_renderers(self._section, base, base_template=template)
        return chat_prompts(messages, self._chat, self._renderers, params, base_ids)

    def _add(self, request: Any, seen: Mapping[str, Any]) -> None:
        values = {**seen, **(request.vllm_xargs or {})}
        if not any(key.startswith(PREFIX) for key in values):
            return
        if getattr(request, "use_beam_search", False):
            raise ProxyConfigError(
                f"{_NOT_WITH_CHAT}, because vLLM drops `vllm_xargs`",
                field="use_beam_search",
                remedy="remove it",
            )
        # The engine checks again when it admits the request, but a streaming answer has then begun,
        # with status 200.
        self._validate(values)
        request.vllm_xargs = values
