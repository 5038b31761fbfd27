"""What requests need besides a prompt: sampling parameters, known token ids, their names."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from vllm_proxy.config.errors import ProxyConfigError, unknown_key
from vllm_proxy.config.request import BARE_KEYS, FIELDS, PREFIX

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


@cache
def _sampling_schema() -> tuple[TypeAdapter[Any], dict[str, frozenset[str]]]:
    """Return vLLM's schema of sampling parameters, and the names of the fields that a user may set.

    The names are keyed by the path of a mapping; those of `SamplingParams` itself have the key "".
    """
    import msgspec
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        SamplingParams,
        StructuredOutputsParams,
    )

    set_by_us = {"output_kind", "stream_interval", "skip_clone", "output_text_buffer_length"}
    nested = {
        "structured_outputs": StructuredOutputsParams,
        "repetition_detection": RepetitionDetectionParams,
    }
    names = {"": {field.name for field in msgspec.structs.fields(SamplingParams)} - set_by_us}
    names |= {key: set(cls.__dataclass_fields__) for key, cls in nested.items()}
    public = {key: frozenset(n for n in fields if n[0] != "_") for key, fields in names.items()}
    return TypeAdapter(SamplingParams), public


def sampling_params(values: Mapping[str, Any], source: str = "sampling") -> "SamplingParams":
    """Build `vllm.SamplingParams` from values that a user wrote. Imports vLLM.

    Args:
        values: fields of `SamplingParams`; nested ones (`structured_outputs`) as mappings.
        source: prefix of the fields' names in errors.

    Raises:
        ProxyConfigError: an unknown field, a wrong type, a value that vLLM rejects, or a proxy
            value, which is not a sampling parameter.
    """
    from vllm.exceptions import VLLMClientError

    _require_no_proxy_values(values.get("extra_args"), source)
    adapter, known = _sampling_schema()
    for path, mapping in {"": values, **{key: values.get(key) for key in known if key}}.items():
        for key in mapping if isinstance(mapping, Mapping) else ():
            if key not in known[path]:
                where = ".".join(part for part in (source, path, str(key)) if part)
                raise unknown_key(where, known[path])
    for key, value in values.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ProxyConfigError(
                field=f"{source}.{key}", value=value, remedy="give a 64-bit integer"
            )
    try:
        # Through JSON, whatever the source: strict types, but lists and mappings become objects.
        return adapter.validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        first = max(error.errors(include_url=False), key=lambda e: _is_field(e, known[""]))
        field = next((str(part) for part in first["loc"] if part in known[""]), "")
        remedy = first["msg"].replace("Input should", "it must", 1)
        raise ProxyConfigError(
            field=f"{source}.{field}", value=values.get(field), remedy=remedy
        ) from None
    except (VLLMClientError, TypeError, ValueError) as error:
        message = error.args[0] if error.args else error  # without vLLM's "(parameter=…)"
        parameter = getattr(error, "parameter", None)
        field = f"{source}.{parameter}" if parameter in values else source
        raise ProxyConfigError(" ".join(str(message).split()), field=field) from None


def _require_no_proxy_values(extra_args: object, source: str) -> None:
    """Reject values of ours among sampling parameters. Raises `ProxyConfigError`."""
    for key in extra_args if isinstance(extra_args, Mapping) else ():
        if key.startswith(PREFIX) or key in BARE_KEYS:
            name = "filters" if key == "filters" else FIELDS.get(PREFIX + key.removeprefix(PREFIX))
            raise ProxyConfigError(
                "it is not a sampling parameter",
                field=f"{source}.extra_args.{key}",
                remedy=f"give `{name}` next to `{source}`" if name else "remove it",
            )


def _is_field(error: Mapping[str, Any], known: Iterable[str]) -> bool:
    # The schema is a union; its other branch (an instance of the class) always fails too.
    return any(part in known for part in error["loc"])


def request_name(request_id: str) -> str:
    """Return the name of a request in the engine's outputs.

    Args:
        request_id: as `enqueue` returns it: the name with a suffix that makes it unique.
    """
    return request_id.partition("-")[0]


def require_one_answer(n: object, field: str = "sampling.n") -> None:
    """Reject more than one answer per prompt. Raises `ProxyConfigError`, which names *field*."""
    if n != 1:
        raise ProxyConfigError(
            "it must be 1",
            field=field,
            value=n,
            remedy="repeat the prompt to get several answers",
        )


def require_known_ids(field: str, token_ids: Iterable[int], llm: "LLM") -> None:
    """Reject ids that a member does not have. Raises `ProxyConfigError`, which names *field*."""
    from vllm_proxy.engine.admission import validator_of

    validator = validator_of(llm.model_config)
    assert validator is not None  # the model is ours
    _, size = validator.fewest_ids()
    wrong = next((id_ for id_ in token_ids if not 0 <= id_ < size), None)
    if wrong is not None:
        raise ProxyConfigError(
            "not every member has this token id",
            field=field,
            value=wrong,
            remedy=f"give ids from 0 to {size - 1}",
        )
