"""Tokens, keys and passwords are neither written nor printed."""

import pytest

from vllm_proxy.config.redaction import shown_argument, shown_words, without_secrets

SECRETS = ("hf_token", "api_key", "api-key", "apiKey", "aws_secret_access_key", "PASSWORD")
OTHERS = ("max_tokens", "stop_token_ids", "tokenizer", "num_speculative_tokens", "seed", "key")


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_left_out_however_deep(name):
    assert without_secrets({"a": [{name: "xyz", "b": 1}]}) == {"a": [{"b": 1}]}
    assert shown_argument(name, "xyz") == "***"
    assert shown_argument("model_loader_extra_config", {name: "xyz", "b": 1}) == "{'b': 1}"


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_stay(name):
    assert without_secrets({name: "xyz"}) == {name: "xyz"}
    assert shown_argument(name, "xyz") == "'xyz'"


def test_a_switch_is_no_secret():
    assert without_secrets({"hf_token": True, "api_key": None}) == {
        "hf_token": True,
        "api_key": None,
    }


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["--api-key", "a b", "c", "--port", "1"], ["--api-key", "***", "***", "--port", "1"]),
        (["--api_key=a", "-O3"], ["--api_key=***", "-O3"]),
        (["--hf-token", "--port", "1"], ["--hf-token", "--port", "1"]),
        (["--x", '{"api_key": "a", "b": 1}'], ["--x", '{"b": 1}']),
        (["--x.api_key", "a"], ["--x.api_key", "***"]),
        (["--ssl-keyfile", "key.pem"], ["--ssl-keyfile", "key.pem"]),
    ],
)
def test_commands(words, printed):
    assert shown_words(["vllm", "serve", *words]) == ["vllm", "serve", *printed]
