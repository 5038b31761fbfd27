"""Rewrites a request's JSON body into what the engine understands.

Three things are rewritten: the model name of a member or an expert becomes its values, a mapping as
`proxy_alpha` becomes flat keys, and members' prompts that are text become token ids.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import (
    ALPHA_KEYS,
    BARE_KEYS,
    EXPERT_KEY,
    PREFIX,
    PROMPT_KEYS,
    RequestControl,
)

XARGS = ("vllm_xargs",)
VALUE_PLACES: dict[str, tuple[str, ...]] = {
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
"""Where the body of each path has a request's values: the keys that lead there; none if it has no
such place."""

UNFORMATTED = ("/v1/systemone",)
"""Paths of conversations that have no place for values, so that all members see one format."""

# Every body that concerns us has one of these, in any encoding (UTF-16 and UTF-32 have a NUL).
# Other bodies are not parsed here.
_SIGNS = (
    *(b"proxy_", rb"\u00", b"\0", b"_xargs", b"extra_"),
    *(f'"{key}"'.encode() for key in BARE_KEYS if key != "top_p"),
)


class Rewriter:
    """Rewrites bodies for one server.

    Args:
        models: by model name that stands for a member or an expert, the values that it sets.
        has_formats: whether members see conversations in different formats (`chat`).
        tokenize: returns a request's values with text prompts as token ids; takes the length of the
            body, too.
        validate: rejects values that the engine would reject. Raises `ProxyConfigError`.
    """

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Any]],
        has_formats: bool,
        tokenize: Callable[[int, Mapping[str, Any]], Awaitable[dict[str, Any]]],
        validate: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._models = models
        self._signs = (*_SIGNS, *{f':{name.rpartition(":")[2]}"'.encode() for name in models})
        self._has_formats = has_formats
        self._tokenize = tokenize
        self._validate = validate

    async def rewrite(self, path: str, raw: bytes) -> tuple[bytes, str | None]:
        """Return the body in vLLM's terms, and its model name if that is a member's or an expert's.

        A body that vLLM will reject is returned unchanged.

        Raises:
            ProxyConfigError: naming the field and the remedy.
        """
        if self._has_formats and path in UNFORMATTED:
            raise ProxyConfigError(
                "here the members cannot see conversations in different formats (`chat`)",
                field=path,
                remedy="use /v1/chat/completions",
            )
        body = _parsed(raw, self._signs)
        if body is None:
            return raw, None
        if path == "/invocations":
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        place = VALUE_PLACES[path] or XARGS
        _require_place(body, place)
        given = _values_at(body, place)
        if given is None:
            return raw, None
        model = str(body.get("model"))  # one that is not text is no member's
        own = self._models.get(model)
        values = given if own is None else _with_own(given, own, model)
        ours = [key for key in values if key.startswith(PREFIX) or key in BARE_KEYS]
        if not ours:
            return raw, None
        _require_supported(body, path, f"`model` {model!r}" if own else f"`{ours[0]}`")
        control = RequestControl.from_extra_args(values)
        if control and isinstance(values.get("proxy_alpha"), dict):  # vLLM takes no mapping there
            values = {**values, **RequestControl(alpha=control.alpha).to_extra_args()}
        if any(isinstance(values.get(key), str) for key in PROMPT_KEYS.values()):
            values = await self._tokenize(len(raw), values)
        # The engine checks again when it admits the request, but a streaming answer has then begun,
        # with status 200.
        self._validate(values)
        name = model if own else None
        if values is given:
            return raw, name
        *way, last = place
        holder = body
        for key in way:
            holder = holder[key]
        holder[last] = values
        return json.dumps(body).encode(), name


def _parsed(raw: bytes, signs: Iterable[bytes]) -> dict[str, Any] | None:
    """Return a body that may concern us; None for all others, and for what is no JSON object."""
    if not any(sign in raw for sign in signs):
        return None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _values_at(body: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any] | None:
    """Return a body's values, {} if it has none; None where vLLM will reject the body."""
    *way, last = place
    holder: Any = body
    for key in way:
        holder = holder.get(key)
        if not isinstance(holder, dict):
            return None
    values = holder.get(last)
    if values is None:
        return {}
    return values if isinstance(values, dict) else None


def _require_supported(body: Mapping[str, Any], path: str, named: str) -> None:
    """Reject values, the first of which is *named*, where vLLM drops them."""
    if not VALUE_PLACES[path]:
        raise ProxyConfigError(
            f"vLLM's {path} does not accept `{XARGS[0]}`",
            field=named,
            remedy="use /v1/completions or /v1/chat/completions",
        )
    if body.get("use_beam_search"):
        raise ProxyConfigError(
            f"cannot be combined with `use_beam_search`, where vLLM drops `{XARGS[0]}`",
            field=named,
            remedy="remove one of them",
        )


def _require_place(body: Mapping[str, Any], place: tuple[str, ...]) -> None:
    """Reject our values where vLLM would ignore them. Raises `ProxyConfigError`."""
    where = ".".join(place)
    for key, value in body.items():
        if key.startswith(PREFIX):
            raise ProxyConfigError(field=key, remedy=f"give it in `{where}`")
        if key in BARE_KEYS and key != "top_p":  # vLLM's own
            raise ProxyConfigError(field=key, remedy=f"give {BARE_KEYS[key]} in `{where}`")
        if key in _HOLDERS - {place[0]} and (name := _ours_in(value)):
            raise ProxyConfigError(field=f"`{key}` has `{name}`", remedy=f"give it in `{where}`")


_HOLDERS = {"extra_args", "extra_body", "sampling_params", "vllm_xargs", "xargs"}
"""Where users may put our values by mistake."""


def _ours_in(holder: object) -> str | None:
    """Return the first of our names in a field of a body, or in a field of that."""
    if not isinstance(holder, dict):
        return None
    for key, value in holder.items():
        if key.startswith(PREFIX) or (key in BARE_KEYS and key != "top_p"):
            return key
        if key in _HOLDERS and (name := _ours_in(value)):
            return name
    return None


def _with_own(given: Mapping[str, Any], own: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the values with those of the model name. Raises `ProxyConfigError`."""
    replaced = (EXPERT_KEY,) if EXPERT_KEY in own else (*ALPHA_KEYS, "proxy_weights")
    for key in replaced:
        if key in given and given[key] != own.get(key):
            what = "expert" if key == EXPERT_KEY else "members' weights"
            raise ProxyConfigError(
                f"the model name {model!r} already sets the {what}",
                field=key,
                remedy="remove one of them",
            )
    return {**given, **own}
