"""Images in conversations, at every endpoint of vLLM's server: refused in one line if need be.

As in `conversations.py`, at the place where vLLM renders all conversations.
"""

from typing import TYPE_CHECKING, Any

from vllm_proxy.config.media import no_media

if TYPE_CHECKING:
    from vllm.renderers.online_renderer import OnlineRenderer


def check_media(online: "OnlineRenderer", *, sees: bool) -> None:
    """Answer HTTP 400 to images that this server cannot read.

    Args:
        online: the server's renderer, of which a method is replaced.
        sees: whether members read images. If not, vLLM would say that the model is not multimodal,
            and not how to allow images. If they do, vLLM answers 500 where a file is missing, no
            directory is allowed, or another server fails.
    """
    from aiohttp import ClientError
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import has_non_text_content

    preprocess = online.preprocess_chat

    async def preprocess_chat(
        request: Any, messages: list[Any], *arguments: Any, **options: Any
    ) -> Any:
        has_media = has_non_text_content(messages)
        if has_media and not sees:
            raise VLLMValidationError(str(no_media("messages")))
        try:
            return await preprocess(request, messages, *arguments, **options)
        except (OSError, ClientError, RuntimeError) as error:
            if not has_media:
                raise
            raise VLLMValidationError(f"`messages`: an image cannot be read ({error})") from None

    online.preprocess_chat = preprocess_chat
