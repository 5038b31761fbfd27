"""The per-request values in `/openapi.json`, derived from the models that validate them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from vllm_proxy.config.request import FIELDS, PREFIX, RequestControl
from vllm_proxy.config.strength import Filters, Schedule

Json = dict[str, Any]

COMPONENT = "ProxyValues"
"""Name of our schema in a document."""


def value_schemas() -> dict[str, Json]:
    """Return the JSON schema of each key of `FIELDS`, as `RequestControl` accepts it."""
    values = _properties(RequestControl)
    filters, schedule = _properties(Filters), _properties(Schedule)
    number = _schema_of(schedule["alpha"])
    (strength,) = (v for v in values["alpha"]["anyOf"] if "oneOf" in v)
    words = [v["const"] for v in strength["oneOf"] if "const" in v]
    mapping = {k: v for k, v in Schedule.model_json_schema().items() if k != "title"}
    of_alpha: dict[str, Json] = {
        "proxy_alpha": {"anyOf": [number, {"type": "string", "enum": words}, mapping]},
        "proxy_alpha_schedule": {
            "type": "string",
            "enum": ["constant", *schedule["schedule"]["enum"]],
        },
        "proxy_alpha_steps": _schema_of(schedule["steps"]),
    }
    result = {}
    for key, field in FIELDS.items():
        model: type[BaseModel] = RequestControl
        name = field
        if key in of_alpha:
            schema = of_alpha[key]
            if key != "proxy_alpha":
                model, name = Schedule, key.removeprefix("proxy_alpha_")
        elif field == "filters":
            model, name = Filters, key.removeprefix(PREFIX)
            schema = _schema_of(filters[name])
        else:
            schema = _schema_of(values[field])
            if field == "weights":
                schema = {**schema, "prefixItems": [number] * 3}
        result[key] = {**schema, "description": _descriptions(model)[name]}
    return result


def _properties(model: type[BaseModel]) -> dict[str, Json]:
    return model.model_json_schema()["properties"]


_OF_THE_FIELD = ("anyOf", "default", "description", "title")


def _schema_of(field: Json) -> Json:
    """Return a field's schema; for a field that can be null, the schema of its other values."""
    others = [v for v in field.get("anyOf", ()) if v != {"type": "null"}]
    schema = {k: v for k, v in field.items() if k not in _OF_THE_FIELD}
    return others[0] if len(others) == 1 else {**schema, **({"anyOf": others} if others else {})}


def _descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the descriptions of a model's fields, without names of functions in parentheses.

    Those are for readers of the code.
    """
    return {
        name: re.sub(r" \(`.+?`\)", "", " ".join((field.description or "").split()))
        for name, field in model.model_fields.items()
    }


def describe(document: Json, holders: Mapping[str, Sequence[str]]) -> None:
    """Add the per-request values to an OpenAPI document, in place.

    Args:
        document: of OpenAPI 3.1, as FastAPI makes it.
        holders: by path, the keys that lead to the place of the values in a body. Nothing is added
            to a path without such keys, and paths that the document does not have are ignored.
    """
    components = document.setdefault("components", {}).setdefault("schemas", {})
    reference = {"$ref": f"#/components/schemas/{COMPONENT}"}
    for path, keys in holders.items():
        body = document["paths"].get(path, {}).get("post", {}).get("requestBody", {})
        schema = body.get("content", {}).get("application/json", {}).get("schema")
        if schema is None or not keys:
            continue
        *way, last = keys
        for key in way:
            schema = _object(document, _object(document, schema)["properties"][key])
        properties = _object(document, schema).setdefault("properties", {})
        holder = properties.setdefault(last, {"title": last, "anyOf": [{"type": "object"}]})
        variants = holder.get("anyOf", [holder])
        place = next((i for i, v in enumerate(variants) if v.get("type") == "object"), None)
        if place is None:
            continue  # described already: several endpoints share the model
        components.setdefault(COMPONENT, {**variants[place], "properties": value_schemas()})
        holder.pop("type", None)
        holder["anyOf"] = [reference if i == place else v for i, v in enumerate(variants)]


def _object(document: Json, schema: Json) -> Json:
    """Return the object schema that *schema* is, refers to, or has among its alternatives."""
    if "$ref" in schema:
        node = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        return _object(document, node)
    variants = [v for v in schema.get("anyOf", ()) if v != {"type": "null"}]
    return _object(document, variants[0]) if variants else schema
