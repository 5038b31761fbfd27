"""Prompts of the members: text to token ids, and conversations to each member's token ids.

Imports neither torch nor vLLM until a tokenizer is loaded.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.request import PROMPT_KEYS
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ChatFormats, Member, ProxyConfig, ProxySection

if TYPE_CHECKING:
    from vllm.renderers import ChatParams
    from vllm.renderers.base import BaseRenderer
    from vllm.tokenizers import TokenizerLike

PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | select | join('\\n\\n') }}"
"""The chat template by which vLLM renders a conversation for a member whose format is `plain`; the
result is encoded with `add_special_tokens`."""


def tokenized(
    extra_args: Mapping[str, Any],
    tokenizer: "TokenizerLike | None",
    max_model_len: int,
) -> dict[str, Any]:
    """Return a request's `extra_args` with the members' text prompts as token ids.

    They are encoded like vLLM encodes the base's prompt: special tokens (BOS) are added.

    Args:
        extra_args: `extra_args` of the request's `SamplingParams`; not changed.
        tokenizer: the base's; None if the engine has none (`skip_tokenizer_init`).
        max_model_len: the engine's context length in tokens.

    Raises:
        ProxyConfigError: a text encodes to zero tokens or is too long, or there is no tokenizer.
    """
    ids = {}
    for key in PROMPT_KEYS.values():
        if not isinstance(text := extra_args.get(key), str):
            continue
        if tokenizer is None:
            raise ProxyConfigError.worded(
                f"`{key}` is text, and the engine has no tokenizer",
                field=key,
                remedy="give token ids, or remove `engine.skip_tokenizer_init`",
            )
        require_fitting(key, text, tokenizer, max_model_len)
        ids[key] = tokenizer(text, add_special_tokens=True)["input_ids"] if text else []
        if not ids[key]:
            raise ProxyConfigError(
                "it encodes to zero tokens", field=key, value=text, remedy="add some text"
            )
    return {**extra_args, **ids}


def copied(tokenizer: "TokenizerLike | None") -> "TokenizerLike | None":
    """Return a tokenizer for another thread: a fast one must not be used by two at once."""
    return deepcopy(tokenizer) if getattr(tokenizer, "is_fast", False) else tokenizer


def require_fitting(field: str, text: str, tokenizer: "TokenizerLike", max_model_len: int) -> None:
    """Reject text that is too long however it is tokenized, before the slow encoding.

    The limit is vLLM's for the base's prompt. Raises `ProxyConfigError`.
    """
    most = max_model_len * tokenizer.max_chars_per_token
    if len(text) > most:
        raise ProxyConfigError.worded(
            f"`{field}` has {len(text)} characters, and at most {most} can be {max_model_len} "
            "tokens, the context of this engine",
            field=field,
            remedy="shorten it",
        )


def member_tokenizers(
    section: ProxySection,
    base: "TokenizerLike | None",
    *,
    base_template: str | None = None,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
) -> "dict[Role, TokenizerLike]":
    """Return the tokenizer of each member, for `chat`. Reads no weights.

    Args:
        section: the members, and `chat`, which must not be None.
        base: the base's tokenizer; the other members use the same ids.
        base_template: the engine's `chat_template`, instead of the one in the base's tokenizer.
        tokenizer_mode: the engine's.
        trust_remote_code: the engine's.

    Raises:
        ProxyConfigError: a member whose format is `template` has no chat template.
    """
    chat = section.chat
    assert chat is not None
    if base is None:
        raise ProxyConfigError.worded(
            "`chat` is given, and the engine has no tokenizer",
            field="chat",
            remedy="remove `chat`, or `engine.skip_tokenizer_init`",
        )
    tokenizers: dict[Role, TokenizerLike] = {}
    for role in section.roles:
        tokenizers[role] = base
        if chat.of(role) == "plain" or (role == "base" and base_template is not None):
            continue
        if role != "base":
            member = getattr(section, role)
            tokenizers[role] = _load(role, member, tokenizer_mode, trust_remote_code)
        if not getattr(tokenizers[role], "chat_template", None):
            raise ProxyConfigError(
                f"the {role}'s tokenizer has no chat template",
                field=f"chat.{role}",
                value="template",
                remedy=f"add one to its files, or set `chat: {{{role}: plain}}`",
            )
    return tokenizers


def chat_tokenizers(config: ProxyConfig) -> "dict[Role, TokenizerLike]":
    """Return `member_tokenizers` of *config*, loaded as its engine would load them."""
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
            f"no tokenizer of the {role} can be read from {str(member)!r} ({one_line(error)})",
            field="chat",
            remedy="add its tokenizer files, or remove `chat`",
        ) from None


def member_renderers(
    section: ProxySection, base: "BaseRenderer", *, base_template: str | None = None
) -> "dict[Role, BaseRenderer]":
    """Return a renderer of conversations for each member other than the base. Reads no weights.

    Args:
        section: the members, and `chat`, which must not be None.
        base: the engine's renderer; the others have its class and the member's tokenizer.
        base_template: the engine's `chat_template`, instead of the one in the base's tokenizer.

    Raises:
        ProxyConfigError: a member whose format is `template` has no chat template.
    """
    tokenizers = member_tokenizers(
        section,
        base.tokenizer,
        base_template=base_template,
        tokenizer_mode=base.model_config.tokenizer_mode,
        trust_remote_code=base.model_config.trust_remote_code,
    )
    return {
        role: base if tokenizer is base.tokenizer else type(base)(base.config, tokenizer)
        for role, tokenizer in tokenizers.items()
        if role != "base"
    }


def as_plain(params: "ChatParams") -> "ChatParams":
    """Return *params* for a member whose format is `plain`, without the arguments of templates.

    The text ends after the last message, whether that is to be continued or answered.
    """
    return replace(params, chat_template=PLAIN_TEMPLATE, chat_template_kwargs={"tokenize": False})


def require_text(messages: Sequence[Any]) -> None:
    """Reject a conversation with images or sound, before vLLM fetches them.

    Raises:
        ProxyConfigError: a message has a content that is not text.
    """
    from vllm.renderers.chat_utils import has_non_text_content

    if has_non_text_content(messages):
        raise ProxyConfigError(
            "a content is not text, and members with different formats (`chat`) can only read text",
            field="messages",
            remedy="send text only",
        )


def require_variables(given: object) -> None:
    """Reject `chat_template_kwargs` that are not a mapping of a chat template's variables.

    Raises:
        ProxyConfigError: names the key and the remedy.
    """
    key = "chat_template_kwargs"
    if given is not None and not isinstance(given, Mapping):
        raise ProxyConfigError(field=key, value=given, remedy="give a mapping of names to values")
    for name in given or ():
        if name in _PROMPT_ARGUMENTS:
            raise ProxyConfigError(field=f"{key}.{name}", remedy=f"give `{name}` outside `{key}`")
        if name in _NOT_VARIABLES:
            raise ProxyConfigError(
                "not a variable of a chat template", field=f"{key}.{name}", remedy="remove it"
            )


def require_followed(params: "ChatParams", chat: ChatFormats, roles: Sequence[Role]) -> None:
    """Reject arguments of chat templates that cannot be applied for these members.

    Args:
        params: the arguments.
        chat: each member's format.
        roles: the configured members.

    Raises:
        ProxyConfigError: names the argument and the remedy.
    """
    arguments = params.chat_template_kwargs
    if all(arguments.get(name) for name in _PROMPT_ARGUMENTS):
        raise ProxyConfigError.worded(
            "`continue_final_message` and `add_generation_prompt` are both true",
            field="add_generation_prompt",
            remedy="set `add_generation_prompt` to false to continue the last message",
        )
    if any(chat.of(role) == "template" for role in roles):
        return
    for name in ("tools", "documents"):
        if arguments.get(name):
            raise ProxyConfigError(
                "every member sees plain text (`chat`), which has no place for them",
                field=name,
                remedy="remove them, or set a member to 'template'",
            )


_PROMPT_ARGUMENTS = ("add_generation_prompt", "continue_final_message")
_NOT_VARIABLES = frozenset(
    {
        # arguments of `apply_chat_template` other than the variables of templates
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
        # arguments of vLLM's function around it
        "model_config",
        "tokenizer",
    }
)


def chat_prompts(
    messages: Sequence[Mapping[str, Any]],
    chat: ChatFormats,
    renderers: "Mapping[Role, BaseRenderer]",
    params: "ChatParams",
    base_ids: Sequence[int],
) -> dict[str, list[int]]:
    """Return the `extra_args` of a conversation that members see in different formats.

    Each member sees the prompt that vLLM would make if that member were served alone.

    Args:
        messages: the conversation (`require_text`).
        chat: each member's format.
        renderers: role -> renderer, for each member other than the base (`member_renderers`).
        params: arguments of chat templates, for members whose format is `template`.
        base_ids: the base's token ids of the conversation.

    Returns:
        Key of `PROMPT_KEYS` -> token ids, for the members whose ids differ from the base's.

    Raises:
        ProxyConfigError: a chat template rejects the messages, or they are too long.
    """
    base_ids, ids = list(base_ids), {}
    for role, renderer in renderers.items():
        if chat.of(role) == chat.of("base") == "plain":
            continue
        seen = _rendered(messages, role, chat.of(role) == "plain", renderer, params)
        if seen != base_ids:
            ids[PROMPT_KEYS[role]] = seen
    return ids


def _rendered(
    messages: Sequence[Mapping[str, Any]],
    role: Role,
    is_plain: bool,
    renderer: "BaseRenderer",
    params: "ChatParams",
) -> list[int]:
    arguments = params.chat_template_kwargs
    try:
        if is_plain:
            params = as_plain(params)
        else:
            # Without it, vLLM would look for a processor's template, at the base's revision.
            tokenizer: Any = renderer.tokenizer
            template = tokenizer.get_chat_template(tools=arguments.get("tools"))
            params = replace(params, chat_template=template, chat_template_content_format="auto")
        _, (prompt,) = renderer.render_chat(
            [list(messages)],
            params,
            # A chat template writes BOS itself.
            replace(renderer.default_chat_tok_params, add_special_tokens=is_plain),
        )
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        names = sorted(
            f"`{name}`"
            for name, value in arguments.items()
            if value not in (None, False) and name not in ("add_generation_prompt", "tokenize")
        )
        given = f", with {', '.join(names)}" if names and not is_plain else ""
        raise ProxyConfigError.worded(
            f"`messages`{given}: they cannot be rendered for the {role}: {one_line(error)}",
            field="messages",
        ) from None
    ids = list(prompt["prompt_token_ids"])
    if not ids:
        raise ProxyConfigError.worded(
            f"`messages` encode to zero tokens for the {role}",
            field="messages",
            remedy="add some text",
        )
    return ids


def apply_template(
    role: str,
    tokenizer: "TokenizerLike",
    messages: Sequence[Mapping[str, Any]],
    **arguments: Any,
) -> str:
    """Return *messages* as text, by the chat template of *role*.

    Raises:
        ProxyConfigError: the template rejects them.
    """
    try:
        return str(tokenizer.apply_chat_template([*messages], tokenize=False, **arguments))
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        raise ProxyConfigError(
            f"the {role}'s chat template rejects them: {one_line(error)}", field="messages"
        ) from None
