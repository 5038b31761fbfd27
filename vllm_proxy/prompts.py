"""Prompts of the members: text to token ids, and conversations to what each member sees of them.

Imports neither torch nor vLLM until a tokenizer is loaded.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_proxy.config import ChatFormats, Member, ProxyConfig, ProxySection, Role
from vllm_proxy.control import PROMPT_KEYS
from vllm_proxy.errors import ProxyConfigError, one_line

if TYPE_CHECKING:
    from vllm.tokenizers import TokenizerLike

PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | select | join('\\n\\n') }}"
"""The chat template by which vLLM renders a conversation for a base whose format is `plain`; to be
encoded with `add_special_tokens`."""


def tokenized(
    extra_args: Mapping[str, Any] | None,
    tokenizer: "TokenizerLike | None",
    max_model_len: int,
) -> dict[str, Any] | None:
    """Return a request's `extra_args` with the members' text prompts as token ids.

    They are encoded as vLLM encodes the base's: special tokens (BOS) are added.

    Args:
        extra_args: of the request's `SamplingParams`; not changed.
        tokenizer: the base's; None if the engine has none (`skip_tokenizer_init`).
        max_model_len: the most tokens that the engine takes.

    Raises:
        ProxyConfigError: text that is no token, or too long, or no tokenizer for it; names the key.
    """
    if extra_args is None:
        return None
    ids = {}
    for key in PROMPT_KEYS.values():
        if not isinstance(text := extra_args.get(key), str):
            continue
        if tokenizer is None:
            raise ProxyConfigError(
                f"`{key}` is text, and the engine has no tokenizer; give token ids, or remove "
                "`engine.skip_tokenizer_init`"
            )
        require_fitting(f"`{key}`", text, tokenizer, max_model_len)
        ids[key] = tokenizer(text, add_special_tokens=True)["input_ids"] if text else []
        if not ids[key]:
            raise ProxyConfigError(f"`{key}` is {text!r}: no token; give at least one")
    return {**extra_args, **ids}


def require_fitting(name: str, text: str, tokenizer: "TokenizerLike", max_model_len: int) -> None:
    """Refuse text that is too long whatever its tokens, before it is encoded: megabytes take long.

    The bound is vLLM's for the base's prompt. Raises `ProxyConfigError`, which begins with *name*.
    """
    most = max_model_len * tokenizer.max_chars_per_token
    if len(text) > most:
        raise ProxyConfigError(
            f"{name} has {len(text)} characters; at most {most} can be {max_model_len} tokens, the "
            "context of this engine"
        )


def member_tokenizers(
    section: ProxySection,
    base: "TokenizerLike | None",
    *,
    base_template: str | None = None,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
) -> "dict[Role, TokenizerLike]":
    """Return the tokenizer of each member, for `chat_prompts`. Reads no weights.

    Args:
        section: the members, and `chat`, which must not be None.
        base: the base's tokenizer; the others' ids are the same.
        base_template: the engine's `chat_template`, instead of the one in the base's tokenizer.
        tokenizer_mode: as the engine's.
        trust_remote_code: as the engine's.

    Raises:
        ProxyConfigError: a member whose format is `template` has no chat template.
    """
    if base is None:
        raise ProxyConfigError(
            "`chat` is given, and the engine has no tokenizer; remove `chat`, or "
            "`engine.skip_tokenizer_init`"
        )
    tokenizers: dict[Role, TokenizerLike] = {}
    for role in section.roles:
        tokenizers[role] = base
        if section.chat.of(role) == "plain" or (role == "base" and base_template is not None):
            continue
        if role != "base":
            member = getattr(section, role)
            tokenizers[role] = _load(role, member, tokenizer_mode, trust_remote_code)
        if not getattr(tokenizers[role], "chat_template", None):
            raise ProxyConfigError(
                f"`chat.{role}` is 'template': the {role}'s tokenizer has no chat template; add "
                f"one to its files, or set `chat: {{{role}: plain}}`"
            )
    return tokenizers


def chat_tokenizers(config: ProxyConfig) -> "dict[Role, TokenizerLike]":
    """Return `member_tokenizers` of *config*, read as its engine would read them."""
    engine, base = config.engine, None
    options = {key: engine[key] for key in ("tokenizer_mode", "trust_remote_code") if key in engine}
    if not engine.get("skip_tokenizer_init"):
        member = config.base
        if "tokenizer" in engine:
            member = Member(model=engine["tokenizer"], revision=engine.get("tokenizer_revision"))
        base = _load("base", member, **options)
    return member_tokenizers(config, base, **options)


def _load(
    role: Role, member: Member, tokenizer_mode: str = "auto", trust_remote_code: bool = False
) -> "TokenizerLike":
    from vllm.tokenizers import get_tokenizer

    try:
        return get_tokenizer(
            member.model,
            tokenizer_mode=tokenizer_mode,
            trust_remote_code=trust_remote_code,
            revision=member.revision,
        )
    except Exception as error:  # noqa: BLE001 - files may be wrong in any way
        raise ProxyConfigError(
            f"`chat`: no tokenizer of the {role} can be read from {str(member)!r} "
            f"({one_line(error)}); add its tokenizer files, or remove `chat`"
        ) from None


def chat_prompts(
    messages: Sequence[Mapping[str, Any]],
    chat: ChatFormats,
    tokenizers: "Mapping[Role, TokenizerLike]",
    max_model_len: int,
    *,
    base_template: str | None = None,
    **template_arguments: Any,
) -> dict[str, list[int]]:
    """Return the `extra_args` of a conversation that members see in formats of their own.

    Args:
        messages: the conversation, of text alone; a content is a string or a list of parts.
        chat: each member's format.
        tokenizers: of each member there is, by role (`member_tokenizers`).
        max_model_len: the most tokens that the engine takes.
        base_template: the chat template of the base, instead of the one in its tokenizer.
        **template_arguments: as of `apply_chat_template`, for members whose format is `template`;
            by default a generation prompt is added.

    Returns:
        Token ids by key, of the members that do not see what the base sees.

    Raises:
        ProxyConfigError: messages that are not text, or too long, or that a chat template refuses.
    """
    texts = [{**message, "content": _text(message)} for message in messages]
    arguments = {"add_generation_prompt": True, **template_arguments}
    ids = {}
    for role, tokenizer in tokenizers.items():
        is_plain = chat.of(role) == "plain"
        if is_plain:
            text = "\n\n".join(filter(None, (message["content"] for message in texts)))
        else:
            arguments["chat_template"] = base_template if role == "base" else None
            text = apply_template(role, tokenizer, texts, **arguments)
        require_fitting("`messages`", text, tokenizer, max_model_len)
        # A chat template writes its own BOS.
        ids[role] = list(tokenizer(text, add_special_tokens=is_plain)["input_ids"])
        if not ids[role]:
            raise ProxyConfigError(f"`messages` are no token to the {role}; give some text")
    return {
        key: ids[role]
        for role, key in PROMPT_KEYS.items()
        if role in ids and ids[role] != ids["base"]
    }


def apply_template(
    role: str,
    tokenizer: "TokenizerLike",
    messages: Sequence[Mapping[str, Any]],
    **arguments: Any,
) -> str:
    """Return *messages* as the chat template of *role* has them.

    Raises:
        ProxyConfigError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except Exception as error:  # noqa: BLE001 - a template raises what it likes
        raise ProxyConfigError(
            f"`messages`: the {role}'s chat template refuses them: {one_line(error)}"
        ) from None


def _text(message: Mapping[str, Any]) -> str:
    """Return a message's content as vLLM gives it to templates that know no parts."""
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if content is not None and not all(isinstance(text, str) for text in texts):
        raise ProxyConfigError(
            f"`messages` have the content {reprlib.repr(content)}; members that see formats of "
            "their own (`chat`) read text alone"
        )
    return "" if content is None else "\n".join(texts)
