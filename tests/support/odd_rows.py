"""Lines that a job may meet: rows with any JSON value in any place, and any bytes."""

import json
import os
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROWS = int(os.environ.get("ROWS", "0"))
"""How many rows each property is tried on, at random; else a fixed number of fixed ones, as CI."""

_ODD = (
    *("NaN", "-Infinity", "1e400", "[NaN]", '{"a": [1, {"b": Infinity}]}', "-0.0", "1E5"),
    *("18446744073709551616", "-9223372036854775809", "9" * 400, "1" * 4300, "1" * 5000),
    *('"\\ud800"', '"\\ud83d\\ude00\\udc00"', '"\\u0000"', '""', '" "', '"\u2028"'),
    *("[" * depth + "]" * depth for depth in (190, 199, 210, 960, 992, 2000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (190, 985, 2000)),
)
_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["word", "adaptive", "linear", "user", "a\nb"])
)
_nested = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "role", "content", "steps"]), inner, max_size=3)
    ),
    max_leaves=6,
)
values = _nested.map(json.dumps) | st.sampled_from(_ODD)
"""JSON as text, with what Python writes and reads and JSON has not."""


def _row(places: dict[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in places.items()) + "}"


_MESSAGE = {"role": '"user"', "content": '"What?"'}
_KINDS = (
    {"prompt": '"The large model"'},
    {"prompt_token_ids": "[5, 6, 7]"},
    {"messages": f"[{_row(_MESSAGE)}]"},
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids")
_SAMPLING += ("max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "presence_penalty")
_SAMPLING += ("repetition_penalty", "bad_words", "logit_bias", "extra_args", "detokenize", "n")
_OWN = ("alpha", "weights", "filters", "expert_prompt", "antiexpert_prompt")


@st.composite
def own_rows(draw: Callable, ids: st.SearchStrategy[str] = values) -> str:
    """Rows of ours: valid ones, with some values that may be anything."""
    row = dict(draw(st.sampled_from(_KINDS)))
    for _ in range(draw(st.integers(0, 2))):
        value = draw(values)
        match draw(st.integers(0, 5)):
            case 0:
                row[draw(st.sampled_from([*row, *_OWN, "sampling"]))] = value
            case 1:
                row["sampling"] = _row({draw(st.sampled_from(_SAMPLING)): value})
            case 2:
                key = draw(st.sampled_from(["role", "content", "name", "tool_calls"]))
                row["messages"] = f"[{_row({**_MESSAGE, key: value})}]"
            case 3:
                key = draw(st.sampled_from(["alpha", "steps", "schedule"]))
                row["alpha"] = _row({"schedule": '"first"', "steps": "2", key: value})
            case 4:
                key = draw(st.sampled_from(["prompt_token_ids", "expert_prompt", "weights"]))
                row[key] = f"[{value}, 5, 6]"
            case _:
                row[draw(st.text(max_size=5))] = value
    return _row({**row, "id": draw(ids)})


@st.composite
def openai_rows(draw: Callable) -> str:
    """Rows of an OpenAI batch file: valid ones, with some values that may be anything."""
    body = {"prompt": '"The large model"', "max_tokens": "2", "temperature": "0"}
    row = {"custom_id": '"odd"', "url": '"/v1/completions"', "method": '"POST"'}
    if draw(st.booleans()):
        body |= {"messages": f"[{_row(_MESSAGE)}]"}
        del body["prompt"]
        row["url"] = '"/v1/chat/completions"'
    for _ in range(draw(st.integers(0, 2))):
        value = draw(values)
        match draw(st.integers(0, 3)):
            case 0:
                row[draw(st.sampled_from(list(row)))] = value
            case 1:
                body[draw(st.sampled_from([*body, "model", "user", "logprobs", "seed"]))] = value
            case 2:
                body["vllm_xargs"] = _row({"proxy_alpha": value})
            case _:
                body[draw(st.text(max_size=5))] = value
    row["body"] = draw(st.just(_row(body)) | values) if draw(st.integers(0, 9)) == 0 else _row(body)
    return _row(row)


@st.composite
def lines(draw: Callable, rows: st.SearchStrategy[str]) -> bytes:
    """A line without its end: as a rule a row, or a part of one, any JSON, any bytes, a blank."""
    line = draw(rows).encode()
    match draw(st.integers(0, 15)):
        case 0:
            line = line[: draw(st.integers(0, 60))]
        case 1:
            line = draw(values).encode()
        case 2:
            line = draw(st.binary(max_size=30))
        case 3:
            line = draw(st.sampled_from([b"", b" ", b"\t\r", b"\xef\xbb\xbf"]))
    return line.replace(b"\n", b"?")


def tried(rows: int, rows_at_once: int) -> settings:
    """Return settings for a property of *rows_at_once* rows: tried on *rows*, or on `ROWS`."""
    return settings(
        max_examples=(ROWS or rows) // rows_at_once,
        derandomize=not ROWS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def collected(strategy: st.SearchStrategy[bytes], rows: int, at_once: int = 20) -> list[bytes]:
    """Return *rows* examples, made *at_once*, which makes them differ: for one job of them all."""
    found: list[bytes] = []

    @tried(rows, at_once)
    @given(st.lists(strategy, min_size=at_once, max_size=at_once, unique=True))
    def collect(examples: list[bytes]) -> None:
        found.extend(examples)

    collect()
    return found
