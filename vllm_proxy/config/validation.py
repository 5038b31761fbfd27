"""What pydantic finds wrong with a user's values, as our one line."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vllm_proxy.config.errors import ProxyConfigError, unknown_key


def validation_error(
    model: type[BaseModel],
    error: ValidationError,
    name: Callable[[Sequence[str]], str] = ".".join,
) -> ProxyConfigError:
    """Return the first problem that pydantic found; an unknown key before all others.

    An unknown key may be the reason why another one is missing.

    Args:
        model: what was validated.
        error: what its validation raised.
        name: returns the user's name for the path of a field: `("filters", "top_p")`, say.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda entry: entry["type"] != "extra_forbidden")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, ProxyConfigError):
        return raised
    path = [str(part) for part in first["loc"]]
    if path[:1] == ["alpha"]:  # the next part is pydantic's tag for the kind of strength
        del path[1:2]
    field = name([part for part in path if part != "[key]"])
    if first["type"] == "extra_forbidden":
        for part in path[:-1]:
            model = _nested_model(model.model_fields[part].annotation) or model
        return unknown_key(field, model.model_fields)
    if first["type"] == "missing":
        return ProxyConfigError.worded(
            f"`{field}` is missing", field=field, remedy=f"add `{field}: <value>`"
        )
    if path[-1:] == ["[key]"] or first["type"] == "invalid_key":
        return ProxyConfigError.worded(
            f"`{field}` is not text", field=field, remedy="write the key in quotes"
        )
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it must", 1)
    if not path:
        return ProxyConfigError(message)
    return ProxyConfigError(field=field, value=first["input"], remedy=message)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model in a field's type, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_nested_model(part) for part in get_args(annotation))
    return next(filter(None, found), None)
