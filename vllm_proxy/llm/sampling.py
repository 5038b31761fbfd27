"""Sampling parameters from users' mappings, and checks of them that need a running engine."""

import json
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import BARE_KEYS, FIELDS, PREFIX

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


@cache
def _sampling_schema() -> tuple[TypeAdapter, dict[str, frozenset[str]]]:
    """Return vLLM's own schema of sampling parameters, and the fields a user may set.

    The second is keyed by the path of a mapping: `""` are the fields of `SamplingParams`.
    """
    import msgspec
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        SamplingParams,
        StructuredOutputsParams,
    )

    ours = {"output_kind", "stream_interval", "skip_clone", "output_text_buffer_length"}
    nested = {
        "structured_outputs": StructuredOutputsParams,
        "repetition_detection": RepetitionDetectionParams,
    }
    names = {"": {field.name for field in msgspec.structs.fields(SamplingParams)} - ours}
    names |= {key: set(cls.__dataclass_fields__) for key, cls in nested.items()}
    public = {key: frozenset(n for n in fields if n[0] != "_") for key, fields in names.items()}
    return TypeAdapter(SamplingParams), public


def sampling_params(values: Mapping[str, Any], source: str = "sampling") -> "SamplingParams":
    """Build `vllm.SamplingParams` from values that a user wrote. Imports vLLM.

    Args:
        values: fields of `SamplingParams`; nested ones (`structured_outputs`) as mappings.
        source: prefix of the fields' names in errors.

    Raises:
        ProxyConfigError: an unknown field, a wrong type, a value that vLLM refuses, or one of
            ours, which are no parameters of sampling.
    """
    from vllm.exceptions import VLLMClientError

    extra_args = values.get("extra_args")
    for key in extra_args if isinstance(extra_args, Mapping) else ():
        if key.startswith(PREFIX) or key in BARE_KEYS:
            field = "filters" if key == "filters" else FIELDS.get(PREFIX + key.removeprefix(PREFIX))
            remedy = f"give `{field}` beside `{source}`" if field else "remove it"
            raise ProxyConfigError(
                f"`{source}.extra_args.{key}`: not a parameter of sampling; {remedy}"
            )
    adapter, known = _sampling_schema()
    for path, mapping in {"": values, **{key: values.get(key) for key in known if key}}.items():
        for key in mapping if isinstance(mapping, Mapping) else ():
            if key not in known[path]:
                where = ".".join(part for part in (source, path, str(key)) if part)
                raise ProxyConfigError(
                    f"unknown key `{where}`{did_you_mean(str(key), known[path])}"
                )
    for key, value in values.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            shown = reprlib.repr(value)
            raise ProxyConfigError(f"`{source}.{key}` is {shown}; give an integer of 64 bits")
    try:
        # As JSON, whatever the source: strict about types, yet lists and mappings build objects.
        return adapter.validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        first = max(error.errors(include_url=False), key=lambda e: _is_field(e, known[""]))
        field = next((str(part) for part in first["loc"] if part in known[""]), "")
        raise ProxyConfigError(
            f"`{source}.{field}` is {reprlib.repr(values.get(field))}: {first['msg']}"
        ) from None
    except (VLLMClientError, TypeError, ValueError) as error:
        message = error.args[0] if error.args else error  # without vLLM's "(parameter=…)"
        raise ProxyConfigError(f"`{source}`: {' '.join(str(message).split())}") from None


def _is_field(error: Mapping[str, Any], known: Iterable[str]) -> bool:
    # The schema is a union; its other branch (an instance of the class) always fails too.
    return any(part in known for part in error["loc"])


def require_known_ids(field: str, token_ids: Iterable[int], llm: "LLM") -> None:
    """Refuse ids that a member lacks. Raises `ProxyConfigError`, which names *field*."""
    from vllm_proxy.engine.admission import validator_of

    _, size = validator_of(llm.model_config).fewest_ids()
    wrong = next((id_ for id_ in token_ids if not 0 <= id_ < size), None)
    if wrong is not None:
        raise ProxyConfigError(
            f"`{field}` has {wrong}; ids that all members have go from 0 to {size - 1}"
        )
