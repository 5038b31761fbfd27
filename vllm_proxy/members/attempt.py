"""Have vLLM build something from the user's values, and find out which of them it rejects."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_proxy.config.errors import one_line, pydantic_detail
from vllm_proxy.config.redaction import shown_argument

if TYPE_CHECKING:
    from vllm import EngineArgs

T = TypeVar("T")


def attempt(make: Callable[..., T], *args: Any, **kwargs: Any) -> T | Exception:
    """Return the result of *make*, or the exception that it raises.

    vLLM and the libraries that it uses have no common exception for invalid input: pydantic,
    transformers, huggingface_hub and tokenizers raise different ones, or fail by accident.
    """
    try:
        return make(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return error


def make_config(
    arguments: Mapping[str, Any], make: Callable[["EngineArgs"], T]
) -> tuple[T | Exception, list[str]]:
    """Have vLLM build a config from engine arguments, without those that it rejects.

    vLLM stops at the first wrong argument: it is left out, and the rest is checked again.

    Returns:
        The config, or the exception if no single argument is at fault; and one problem for each
        argument that was left out.
    """
    from vllm import EngineArgs

    problems: list[str] = []
    arguments = dict(arguments)
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
    location = (pydantic_detail(error) or {"loc": ()})["loc"]
    return location[0] if location and location[0] in arguments else None


def _tried_argument(error: Exception, arguments: Mapping[str, Any]) -> str | None:
    """Return the argument that gives the same error alone; None if the model does, or none.

    For arguments whose name vLLM's error does not contain.
    """
    from vllm import EngineArgs

    # without trust_remote_code, a model whose checkpoint contains code would fail differently
    given = ("model", "max_model_len", "trust_remote_code")
    candidates = [key for key in arguments if key not in given]
    for key in ("model", *candidates) if candidates else ():
        tried = {
            name: arguments[name]
            for name in ("model", "trust_remote_code", key)
            if name in arguments
        }
        other = attempt(lambda given: EngineArgs(**given).create_engine_config(), tried)
        if isinstance(other, Exception) and one_line(other) == one_line(error):
            return None if key == "model" else key
    return None
