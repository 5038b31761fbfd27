"""`/openapi.json`: a request's own values are described as they are validated."""

import json
from types import SimpleNamespace

import pytest
from fastapi.openapi.models import OpenAPI
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import FIELDS, RequestControl
from vllm_proxy.server.command import MIDDLEWARE
from vllm_proxy.server.openapi import COMPONENT, value_schemas
from vllm_proxy.server.rewriting import VALUE_PLACES

SCHEMAS = value_schemas()


def is_accepted(key: str, value: object) -> bool:
    own = {key: value}
    if key == "proxy_alpha_steps":
        own["proxy_alpha_schedule"] = "first"
    if key == "proxy_alpha_schedule" and value != "constant":
        own["proxy_alpha_steps"] = 3
    try:
        return RequestControl.from_extra_args(own) is not None
    except ProxyConfigError:
        return False


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | st.sampled_from([0, 0.0, 1, 1.0])
WORDS = st.sampled_from(["", "adaptive", "constant", "first", "linear", "1", "text", "Adaptive"])
SCALARS = st.booleans() | NUMBERS | WORDS
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=4)
    | st.lists(NUMBERS, min_size=3, max_size=3)
    | st.lists(st.integers(-1, 9), min_size=1, max_size=4)
    | st.just({"schedule": "first", "steps": 3})
    | st.just({})
)


def has_whole_float(value: object) -> bool:
    """JSON's schema knows no difference between 1 and 1.0; for ids and steps we do."""
    parts = value if isinstance(value, list) else [value]
    return any(isinstance(part, float) and part.is_integer() for part in parts)


@given(st.sampled_from(sorted(FIELDS)), VALUES)
def test_a_schema_allows_what_validation_accepts(key, value):
    assume(not has_whole_float(value) or key in ("proxy_alpha", "proxy_weights"))
    assert Draft202012Validator(SCHEMAS[key]).is_valid(value) == is_accepted(key, value)


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_described(key):
    Draft202012Validator.check_schema(SCHEMAS[key])
    assert SCHEMAS[key]["description"]
    assert "arithmetic" not in SCHEMAS[key]["description"]


def test_every_key_has_something_that_it_accepts():
    samples = {
        "proxy_alpha": [0.5, "adaptive", -1],
        "proxy_alpha_schedule": ["constant", "first", "linear"],
        "proxy_alpha_steps": [1, 64],
        "proxy_weights": [[1, 0.5, -0.5]],
        "proxy_top_p": [0.5, 1],
        "proxy_plausibility": [0, 0.1],
        "proxy_expert": ["legal", "a-1.b_2"],
        "proxy_expert_prompt": ["text", [1, 2]],
        "proxy_antiexpert_prompt": ["text", [1, 2]],
    }
    assert samples.keys() == FIELDS.keys()
    for key, values in samples.items():
        for value in values:
            assert is_accepted(key, value)
            assert Draft202012Validator(SCHEMAS[key]).is_valid(value)


def application(section: dict | None):
    """vLLM's own application, with the state that a server's has."""
    words = ["--enable-scale-out", "--middleware", MIDDLEWARE]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    app = build_app(args, ("generate",), None)
    hf_config = SimpleNamespace(**({} if section is None else {"proxy": section}))
    app.state.vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    return app


def document(section: dict | None) -> dict:
    client = TestClient(application(section))
    first, again = (client.get("/openapi.json") for _ in range(2))
    assert first.status_code == 200
    assert first.content == again.content
    return first.json()


@pytest.fixture(scope="module")
def described() -> dict:
    return document({"expert": "x", "antiexpert": "y"})


def holders(path: str, described: dict) -> list[dict]:
    """Schemas of where a body of an endpoint has a request's own values."""

    def found(schema: dict) -> dict:
        if "$ref" in schema:
            return found(described["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        variants = [v for v in schema.get("anyOf", []) if v != {"type": "null"}]
        return found(variants[0]) if variants and "properties" not in schema else schema

    body = described["paths"][path]["post"].get("requestBody")
    if body is None:  # the document does not describe it
        return []
    schema = body["content"]["application/json"]["schema"]
    for key in VALUE_PLACES[path]:
        schema = found(schema)["properties"][key]
    return [schema]


def test_the_document_is_valid(described):
    OpenAPI.model_validate(described)
    assert described["openapi"].startswith("3.1")  # whose schemas are JSON Schema 2020-12
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(described)
    for name in {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert name in described["components"]["schemas"]


def test_every_endpoint_that_takes_values_says_which(described):
    taking = [path for path, keys in VALUE_PLACES.items() if keys and path in described["paths"]]
    assert len(taking) >= 8
    silent = []
    for path in taking:
        found = holders(path, described)
        if not found:
            silent.append(path)
            continue
        (holder,) = found
        assert {"$ref": f"#/components/schemas/{COMPONENT}"} in holder["anyOf"], path
        assert Draft202012Validator({**holder, "components": described["components"]}).is_valid(
            {"proxy_alpha": 0.5, "mine": "x"}
        )
        assert not Draft202012Validator({**holder, "components": described["components"]}).is_valid(
            {"proxy_top_p": 2}
        )
    assert silent == ["/invocations"]
    assert described["components"]["schemas"][COMPONENT]["properties"].keys() == FIELDS.keys()


def test_another_model_s_document_is_vllm_s():
    assert COMPONENT not in json.dumps(document(None))
