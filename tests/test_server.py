"""The OpenAI server, for real: `vllm-proxy serve` becomes stock `vllm serve`, asked over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from conftest import ENGINE_ENV
from transformers import AutoTokenizer

PROMPT = "Question: What is the capital of France? Answer:"
TOKENS = 12


@pytest.fixture(scope="module")
def server(members, tmp_path_factory) -> Iterator[str]:
    """The address of a running server."""
    directory: Path = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = directory / "config.yaml"
    engine = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    # The random weights would fill a JSON answer with blanks until the tokens run out.
    engine["structured_outputs_config"] = {
        "backend": "xgrammar",
        "disable_any_whitespace": True,
    }
    config.write_text(yaml.safe_dump({**members, "engine": engine}))
    log = directory / "log.txt"
    command = [str(Path(sys.executable).with_name("vllm-proxy")), "serve", str(config)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "proxy"],
            env={**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail(f"the server ended:\n{log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


@pytest.fixture(scope="module")
def tokenizer(members):
    return AutoTokenizer.from_pretrained(members["base"])


@pytest.fixture(scope="module")
def truth(reference, tokenizer):
    return reference.greedy(tokenizer.encode(PROMPT), TOKENS)


def complete(client, **options):
    settings = {"model": "proxy", "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS}
    ignore_eos = {"ignore_eos": True}
    return client.completions.create(**{**settings, "extra_body": ignore_eos, **options})


def test_completion_is_the_formula(client, truth, tokenizer):
    (choice,) = complete(client).choices
    assert choice.text == tokenizer.decode(truth.token_ids)
    assert choice.finish_reason == "length"


def test_streaming_gives_the_same_text(client, truth, tokenizer):
    parts = [part.choices[0].text for part in complete(client, stream=True) if part.choices]
    assert len(parts) > 1
    assert "".join(parts) == tokenizer.decode(truth.token_ids)


def test_logprobs_are_of_the_fused_distribution(client, truth):
    # Keyed by id: pieces of characters have the same text.
    options = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    (choice,) = complete(client, logprobs=3, extra_body=options).choices
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in truth.token_ids]
    for top, row in zip(choice.logprobs.top_logprobs, truth.logprobs, strict=True):
        values, ids = row.topk(3)
        best = {
            f"token_id:{id_}": pytest.approx(value, abs=1e-4)
            for id_, value in zip(ids.tolist(), values.tolist(), strict=True)
        }
        assert top == best


def test_n_choices(client, truth, tokenizer):
    greedy = {"ignore_eos": True, "top_k": 1}
    choices = complete(client, n=3, temperature=1.0, extra_body=greedy).choices
    assert [choice.text for choice in choices] == [tokenizer.decode(truth.token_ids)] * 3


def test_stop_string(client, truth, tokenizer):
    text = tokenizer.decode(truth.token_ids)
    stop = text[4:6]
    (choice,) = complete(client, stop=[stop]).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_chat_uses_the_base_template(client, reference, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = client.chat.completions.create(
        model="proxy",
        messages=messages,
        temperature=0,
        max_tokens=TOKENS,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage.prompt_tokens == len(ids)
    text = tokenizer.decode(reference.greedy(ids, TOKENS).token_ids)
    # The server holds back a character that is not complete yet.
    assert answer.choices[0].message.content == text.rstrip("\ufffd")


def test_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"known": {"type": "boolean"}, "place": {"enum": ["Paris", "Rome"]}},
        "required": ["known", "place"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="proxy",
        messages=[{"role": "user", "content": "Where?"}],
        max_tokens=120,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": schema, "strict": True},
        },
    )
    value = json.loads(answer.choices[0].message.content)
    assert value.keys() == {"known", "place"}
    assert value["place"] in ("Paris", "Rome")


def test_metrics_count_tokens(server, client):
    def generated() -> float:
        lines = httpx.get(f"{server}/metrics").text.splitlines()
        (line,) = (row for row in lines if row.startswith("vllm:generation_tokens_total"))
        return float(line.split()[-1])

    before = generated()
    complete(client)
    assert generated() == before + TOKENS


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": [5] * 400}, "256"),
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
        ({"prompt": PROMPT, "response_format": {"type": "nonsense"}}, "response_format"),
    ],
)
def test_bad_requests_get_400_and_the_server_lives(server, client, truth, tokenizer, body, words):
    answer = httpx.post(f"{server}/v1/completions", json={"model": "proxy", **body})
    assert answer.status_code == 400
    assert words in answer.text
    assert complete(client).choices[0].text == tokenizer.decode(truth.token_ids)
