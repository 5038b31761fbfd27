"""Have vLLM make something of the user's values, and learn which of them it refuses."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_proxy.config.errors import one_line
from vllm_proxy.config.redaction import shown_argument

if TYPE_CHECKING:
    from vllm import EngineArgs

T = TypeVar("T")


def attempt(make: Callable[..., T], *args: Any, **kwargs: Any) -> T | Exception:
    """Return what *make* gives, or the exception it raises.

    vLLM and the libraries under it have no common exception for input they do not accept: pydantic,
    transformers, huggingface_hub and tokenizers each raise their own, or what they stumble over.
    """
    try:
        return make(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return error


def make_config(
    arguments: Mapping[str, Any], make: Callable[["EngineArgs"], T]
) -> tuple[T | Exception, list[str]]:
    """Have vLLM make a config of engine arguments, without those it refuses.

    vLLM stops at the first wrong one: it is taken out and the rest is checked again.

    Returns:
        The config, or the exception if no single argument is at fault; and one problem for each
        argument that was taken out.
    """
    from vllm import EngineArgs

    arguments, problems = dict(arguments), []
    while True:
        config = attempt(lambda given: make(EngineArgs(**given)), arguments)
        if not isinstance(config, Exception):
            return config, problems
        key = _named_argument(config, arguments) or _tried_argument(config, arguments)
        if key is None:
            return config, problems
        value = shown_argument(key, arguments.pop(key))
        problems.append(f"`engine.{key}` is {value}: {one_line(config)}")


def _named_argument(error: Exception, arguments: Iterable[str]) -> str | None:
    """Return the argument that a pydantic error names."""
    errors = getattr(error, "errors", None)
    location = errors()[0]["loc"] if callable(errors) else ()
    return location[0] if location and location[0] in arguments else None


def _tried_argument(error: Exception, arguments: Mapping[str, Any]) -> str | None:
    """Return the argument that alone gives the same error: vLLM names some fields otherwise."""
    from vllm import EngineArgs

    # a checkpoint's own code is run, and may then fail, because the user lets it
    given = ("model", "max_model_len", "trust_remote_code")
    candidates = [key for key in arguments if key not in given]
    for key in (None, *candidates) if candidates else ():
        tried = {
            name: arguments[name]
            for name in ("model", "trust_remote_code", key)
            if name in arguments
        }
        other = attempt(lambda given: EngineArgs(**given).create_engine_config(), tried)
        if isinstance(other, Exception) and one_line(other) == one_line(error):
            return key  # None: it is the model
    return None
