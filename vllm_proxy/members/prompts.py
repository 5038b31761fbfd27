"""Prompts of the members: text to token ids, and conversations to what each member sees of them.

Imports neither torch nor vLLM until a tokenizer is loaded.
"""

import reprlib
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


def copied(tokenizer: "TokenizerLike | None") -> "TokenizerLike | None":
    """Return a tokenizer for a thread of its own: a fast one is not made for two at once."""
    return deepcopy(tokenizer) if getattr(tokenizer, "is_fast", False) else tokenizer


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
    """Return the tokenizer of each member, for `chat`. Reads no weights.

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


def member_renderers(
    section: ProxySection, base: "BaseRenderer", *, base_template: str | None = None
) -> "dict[Role, BaseRenderer]":
    """Return what renders conversations for each member other than the base. Reads no weights.

    Args:
        section: the members, and `chat`, which must not be None.
        base: the engine's renderer; the others are of its class, with the member's tokenizer.
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

    Its text ends after the last message, whether that is to be continued or answered.
    """
    return replace(params, chat_template=PLAIN_TEMPLATE, chat_template_kwargs={"tokenize": False})


def require_text(messages: Sequence[Any]) -> None:
    """Refuse a conversation that has more than text, before vLLM fetches what it refers to.

    Raises:
        ProxyConfigError: it has.
    """
    from vllm.renderers.chat_utils import has_non_text_content

    if has_non_text_content(messages):
        raise ProxyConfigError(
            "`messages` have a content that is not text; members that see formats of their own "
            "(`chat`) read text alone"
        )


def require_variables(given: object) -> None:
    """Refuse what is no mapping of a chat template's variables, as `chat_template_kwargs`.

    Raises:
        ProxyConfigError: naming the key and the remedy.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ProxyConfigError(
            f"`chat_template_kwargs` is {reprlib.repr(given)}: give a mapping of names to values"
        )
    for name in given or ():
        if name in _PROMPT_ARGUMENTS:
            raise ProxyConfigError(
                f"`chat_template_kwargs.{name}`: give `{name}` outside `chat_template_kwargs`"
            )
        if name in _NOT_VARIABLES:
            raise ProxyConfigError(
                f"`chat_template_kwargs.{name}`: not a variable of a chat template; remove it"
            )


def require_followed(params: "ChatParams", chat: ChatFormats, roles: Sequence[Role]) -> None:
    """Refuse arguments of chat templates that members cannot follow.

    Args:
        params: the arguments.
        chat: each member's format.
        roles: the members there are.

    Raises:
        ProxyConfigError: naming the argument and the remedy.
    """
    arguments = params.chat_template_kwargs
    if all(arguments.get(name) for name in _PROMPT_ARGUMENTS):
        raise ProxyConfigError(
            "`continue_final_message` and `add_generation_prompt` are both true; set "
            "`add_generation_prompt` to false to continue the last message"
        )
    if any(chat.of(role) == "template" for role in roles):
        return
    for name in ("tools", "documents"):
        if arguments.get(name):
            raise ProxyConfigError(
                f"`{name}`: every member sees plain text (`chat`), which has no place for them; "
                "remove them, or set a member to 'template'"
            )


_PROMPT_ARGUMENTS = ("add_generation_prompt", "continue_final_message")
_NOT_VARIABLES = frozenset(
    {
        # what `apply_chat_template` is given besides the variables of templates
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
        # of vLLM's function around it
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
    """Return the `extra_args` of a conversation that members see in formats of their own.

    Each member sees what vLLM would make of the conversation for that member alone.

    Args:
        messages: the conversation (`require_text`).
        chat: each member's format.
        renderers: of each member other than the base, by role (`member_renderers`).
        params: arguments of chat templates, for members whose format is `template`.
        base_ids: what the base sees of the conversation.

    Returns:
        Token ids by key, of the members that do not see what the base sees.

    Raises:
        ProxyConfigError: messages that a chat template refuses, or that are too long.
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
            # By name, or vLLM looks for a processor's, at the base's revision.
            template = renderer.tokenizer.get_chat_template(tools=arguments.get("tools"))
            params = replace(params, chat_template=template, chat_template_content_format="auto")
        _, (prompt,) = renderer.render_chat(
            [list(messages)],
            params,
            # A chat template writes its own BOS.
            replace(renderer.default_chat_tok_params, add_special_tokens=is_plain),
        )
    except Exception as error:  # noqa: BLE001 - a template raises what it likes
        names = sorted(
            f"`{name}`"
            for name, value in arguments.items()
            if value not in (None, False) and name not in ("add_generation_prompt", "tokenize")
        )
        given = f", with {', '.join(names)}" if names and not is_plain else ""
        raise ProxyConfigError(
            f"`messages`{given}: not possible as the {role} sees them: {one_line(error)}"
        ) from None
    ids = list(prompt["prompt_token_ids"])
    if not ids:
        raise ProxyConfigError(f"`messages` encode to no token for the {role}; add some text")
    return ids


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
