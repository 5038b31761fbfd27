"""Requests that a careless or hostile client may send: valid ones with something wrong in a place.

They are drawn at random from a seed. Most are refused; some happen to be valid.
"""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

JSON = b"application/json"
VALUES = (
    *(None, True, False, 0, 1, 2, -1, 0.5, -0.0, 1e-320, 3e38, 1e400, float("nan")),
    *(2**31, 2**63, 2**64, 10**400, -(10**400)),
    *("", "a", "proxy", "adaptive", "\0", "\ud800", "\udfff\ud800", "\U0001f642", "x" * 5000),
    *([], {}, [None], [[]], [[5, 6]], [5], [511], [512], [-1], ["a", 5], {"": None}),
    *({"type": "text"}, {"alpha": 1}, [1, 0, 0], [1e38] * 3, [10**400] * 3, "DEEP", "DEEPER"),
)
DEEP = {b'"DEEP"': b"[" * 200 + b"]" * 200, b'"DEEPER"': b'{"a":' * 5000 + b"0" + b"}" * 5000}
"""What these values stand for; Python's `json` would not write it."""
PROXY_KEYS = (
    *("proxy_alpha", "proxy_alpha_schedule", "proxy_alpha_steps", "proxy_weights"),
    *("proxy_top_p", "proxy_plausibility", "proxy_expert_prompt", "proxy_antiexpert_prompt"),
    *("proxy_base_length", "proxy_inspected", "proxy_unknown", "alpha", "extra_args"),
)
KEYS = (
    *("model", "prompt", "messages", "input", "max_tokens", "min_tokens", "temperature", "stop"),
    *("top_p", "top_k", "seed", "logprobs", "prompt_logprobs", "logit_bias", "stop_token_ids"),
    *("allowed_token_ids", "bad_words", "response_format", "structured_outputs", "tools"),
    *("tool_choice", "stream", "stream_options", "echo", "user", "vllm_xargs", "chat_template"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "priority"),
    *("truncate_prompt_tokens", "echo", "suffix", "use_beam_search", "cache_salt", "lora"),
    *("documents", "reasoning_effort", "alpha", "weights", "extra_args", "previous_response_id"),
)
MODELS = ("proxy", "proxy:base", "proxy:expert", "proxy:antiexpert", "other", "proxy:x")


class Hostile(NamedTuple):
    """A request as it goes over the wire.

    Attributes:
        path: of the endpoint.
        headers: of the body's type; may be none or several.
        content: the body.
        patience: seconds after which the client leaves; None if it waits for the answer.
    """

    path: str
    headers: list[tuple[bytes, bytes]]
    content: bytes
    patience: float | None


def _bodies() -> dict[str, dict[str, Any]]:
    """Return a valid body for each endpoint that takes one."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = [5, 6, 7, 8]
    short = {"model": "proxy", "max_tokens": 4, "temperature": 0}
    own = {"vllm_xargs": {"proxy_alpha": 0.5}}
    return {
        "/v1/completions": {**short, "prompt": "The large model", **own},
        "/v1/completions/render": {**short, "prompt": "The large model", **own},
        "/v1/chat/completions": {**short, "messages": messages, **own},
        "/v1/chat/completions/batch": {**short, "messages": [messages], **own},
        "/v1/chat/completions/render": {**short, "messages": messages, **own},
        "/v1/messages": {**short, "messages": messages, **own},
        "/v1/responses": {"model": "proxy", "input": "Where?", "max_output_tokens": 4, **own},
        "/inference/v1/generate": {
            "model": "proxy",
            "token_ids": ids,
            "sampling_params": {"max_tokens": 4, "extra_args": {"proxy_alpha": 0.5}},
        },
        "/invocations": {**short, "prompt": "The large model", **own},
        "/tokenize": {"model": "proxy", "prompt": "The large model"},
        "/detokenize": {"model": "proxy", "tokens": ids},
    }


def draw(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Yield *count* requests."""
    rng = random.Random(seed)
    bodies = _bodies()
    for _ in range(count):
        path = rng.choice(list(bodies))
        body = deepcopy(bodies[path])
        if "model" in body:
            body["model"] = rng.choice(MODELS)
        if rng.random() < 0.2:
            body["stream"] = True
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if body:
                _spoil(rng, body)
        content = json.dumps(body).encode()
        for name, value in DEEP.items():
            content = content.replace(name, value)
        yield Hostile(
            path,
            _headers(rng),
            _damaged(rng, content) if rng.random() < 0.15 else content,
            rng.choice((0.01, 0.1, 0.5)) if rng.random() < 0.1 else None,
        )


def _spoil(rng: random.Random, body: dict[str, Any]) -> None:
    """Change one thing in *body*."""
    what = rng.randrange(4)
    if what == 0:
        body[rng.choice(KEYS)] = _value(rng)
    elif what == 1:
        holder = body if rng.random() < 0.2 else _arguments(body)
        holder[rng.choice(PROXY_KEYS)] = _value(rng)
    else:
        holder, key = rng.choice(list(_places(body)))
        if what == 2:
            holder[key] = _value(rng)
        else:
            del holder[key]


def _arguments(body: dict[str, Any]) -> dict[str, Any]:
    """Return where a body has its request's own values; a new place if that was spoilt."""
    params = body.get("sampling_params")
    holder, key = (params, "extra_args") if isinstance(params, dict) else (body, "vllm_xargs")
    if not isinstance(holder.get(key), dict):
        holder[key] = {}
    return holder[key]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a JSON value: its list or object, and its index or key there."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _places(value[key])


def _value(rng: random.Random) -> Any:
    value = rng.choice(VALUES)
    return [value] * rng.choice((1, 3)) if rng.random() < 0.2 else deepcopy(value)


def _headers(rng: random.Random) -> list[tuple[bytes, bytes]]:
    if rng.random() < 0.9:
        return [(b"content-type", JSON)]
    return rng.choice(
        (
            [],
            [(b"content-type", b"text/plain")],
            [(b"content-type", JSON + b"; charset=utf-16")],
            [(b"content-type", JSON), (b"content-type", b"text/plain")],
            [(b"content-type", b"text/plain"), (b"content-type", JSON)],
            [(b"content-type", JSON), (b"content-encoding", b"gzip")],
        )
    )


def _damaged(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content))
    return rng.choice(
        (
            b"",
            b"null",
            b"[" * 100_000,
            content[:at],
            content + content,
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            b"\xef\xbb\xbf" + content,
            content.decode().encode("utf-16"),
            rng.randbytes(50),
        )
    )
