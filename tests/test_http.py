"""The middleware alone, before a small application that answers with the body it has received."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient
from tiny_models import write_tokenizer
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.tokenizers import get_tokenizer

from vllm_proxy.control import MEMBERS, PROMPT_KEYS
from vllm_proxy.http import OWN_VALUES, ProxyMiddleware
from vllm_proxy.runner.validation import validator

COMPLETIONS = "/v1/completions"
LIMIT, VOCAB_SIZE = 60, 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer of all members; where it is from is `name_or_path`."""
    path = str(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(path)
    return get_tokenizer(path)


def server(
    tokenizer,
    names=("q", "q:base", "q:expert", "q:antiexpert"),
) -> FastAPI:
    """Return an application with the state that vLLM's server would have."""
    members = dict.fromkeys(("expert", "antiexpert"), tokenizer.name_or_path)
    config = SimpleNamespace(
        hf_config=SimpleNamespace(proxy=members),
        logits_processors=[
            "other.Processor",
            validator("V1", LIMIT, dict.fromkeys(PROMPT_KEYS, VOCAB_SIZE)),
        ],
    )
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.vllm_config = SimpleNamespace(model_config=config)
    app.state.openai_serving_models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name=name) for name in names],
        model_name=lambda lora_request=None: names[0],
    )
    app.state.online_renderer = SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer))
    init_exception_handler(app)

    async def answer(request: Request):
        body = await request.body()
        return {
            "body": body.decode("latin-1"),
            "model": app.state.openai_serving_models.model_name(None),
        }

    app.post("/{path:path}")(answer)
    app.get("/{path:path}")(answer)
    app.add_middleware(ProxyMiddleware)
    return app


@pytest.fixture(scope="module")
def plain(tokenizer) -> TestClient:
    return TestClient(server(tokenizer))


def received(client: TestClient, body: object, path: str = COMPLETIONS) -> dict:
    """Send *body*; return what the server has been given."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["body"])


def refused(client: TestClient, body: object, path: str = COMPLETIONS) -> str:
    """Send *body*, which must be refused; return the message."""
    content = json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == 400
    return error["message"]


class TestMembers:
    @pytest.mark.parametrize("role", MEMBERS)
    @pytest.mark.parametrize(
        "path", [p for p, keys in OWN_VALUES.items() if keys == ("vllm_xargs",)]
    )
    def test_are_weights(self, plain, role, path):
        body = {"model": f"q:{role}", "vllm_xargs": {"mine": 1}}
        assert received(plain, body, path)["vllm_xargs"] == {
            "mine": 1,
            **MEMBERS[role].to_request(),
        }

    def test_of_tokens_in_tokens_out(self, plain):
        body = {"model": "q:expert", "sampling_params": {"temperature": 0}}
        params = received(plain, body, "/inference/v1/generate")["sampling_params"]
        assert params == {"temperature": 0, "extra_args": MEMBERS["expert"].to_request()}

    @pytest.mark.parametrize("path", [p for p, keys in OWN_VALUES.items() if not keys])
    def test_are_refused_where_a_request_has_no_values_of_its_own(self, plain, path):
        message = refused(plain, {"model": "q:expert"}, path)
        assert "q:expert" in message
        assert path in message

    @pytest.mark.parametrize("escaped", ["q\\u003aexpert", "q:exp\\u0065rt"])
    def test_however_the_name_is_written(self, plain, escaped):
        for body in (
            f'{{"model": "{escaped}"}}'.encode(),
            '{"model": "q:expert"}'.encode("utf-16"),
        ):
            answer = plain.post(
                COMPLETIONS, content=body, headers={"content-type": "application/json"}
            )
            assert "proxy_weights" in answer.json()["body"]

    def test_are_named_in_answers(self, plain):
        def name(model: str) -> str:
            return plain.post(COMPLETIONS, json={"model": model}).json()["model"]

        assert [name(m) for m in ("q:expert", "q", "q:base", "x")] == [
            "q:expert",
            "q",
            "q:base",
            "q",
        ]

    def test_are_names_that_are_served_and_whose_model_is(self, tokenizer):
        client = TestClient(server(tokenizer, names=("a", "b:expert", "a:base")))
        assert "vllm_xargs" in received(client, {"model": "a:base"})
        for name in ("b:expert", "a:expert", "a", ":expert", 5, None, ["a:base"]):
            assert received(client, {"model": name}) == {"model": name}

    @pytest.mark.parametrize(
        "own",
        [
            {"proxy_alpha": 1.0},
            {"proxy_weights": [1, 2, 3]},
            {"proxy_alpha_schedule": "linear", "proxy_alpha_steps": 3},
        ],
    )
    def test_go_with_no_other_weights(self, plain, own):
        message = refused(plain, {"model": "q:expert", "vllm_xargs": own})
        assert "q:expert" in message
        assert next(iter(own)) in message

    def test_go_with_their_own_weights_and_filters(self, plain):
        # What a rendered request has when it comes back to be generated.
        own = {**MEMBERS["expert"].to_request(), "proxy_top_p": 0.5}
        assert received(plain, {"model": "q:expert", "vllm_xargs": own})["vllm_xargs"] == own

    @pytest.mark.parametrize("body", [{"model": "q:expert"}, {"vllm_xargs": {"proxy_alpha": 2}}])
    def test_are_refused_in_beam_search(self, plain, body):
        assert "use_beam_search" in refused(plain, {**body, "use_beam_search": True})


class TestPassesOn:
    """Byte for byte, what does not concern us and what vLLM will refuse by itself."""

    @pytest.mark.parametrize(
        "body",
        [
            b'{"model" :  "q", "prompt": "x", "vllm_xargs": {"other": 1}}',
            b'{"model" :  "q", "vllm_xargs": {"proxy_alpha": 2e0}}',
            b'{"prompt": "proxy_, :expert\\" \\u00e9"  }',
            b'{"model": "q:expert"',
            b'{"model": "q:expert", "vllm_xargs": [1]}',
            b'["q:expert"]',
            b'"q:expert"',
            b"q:expert\xff\0",
            b'{"a": ' + b"[" * 100_000 + b'"q:expert"',
            b'{"model": "q:expert", "seed": ' + b"1" * 5000 + b"}",
            b"",
        ],
    )
    def test_bodies(self, plain, body):
        answer = plain.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert answer.json()["body"].encode("latin-1") == body

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
    def test_other_content(self, plain, kind):
        body = b'{"model": "q:expert"}'
        answer = plain.post(COMPLETIONS, content=body, headers={"content-type": kind})
        assert answer.json()["body"].encode() == body

    def test_other_endpoints(self, plain):
        assert received(plain, {"model": "q:expert"}, "/tokenize") == {"model": "q:expert"}
        assert plain.get(COMPLETIONS).status_code == 200

    def test_another_model(self, tokenizer):
        app = server(tokenizer)
        del app.state.vllm_config.model_config.hf_config.proxy
        assert received(TestClient(app), {"model": "q:expert"}) == {"model": "q:expert"}

    def test_a_websocket_and_a_body_that_nobody_reads(self):
        async def answers_unread(scope, receive, send):
            seen.append(scope["type"])

        async def receive():
            raise AssertionError("nobody asked")

        seen = []
        middleware = ProxyMiddleware(answers_unread)
        middleware.server = SimpleNamespace(section=object())
        post = {
            "type": "http",
            "method": "POST",
            "path": COMPLETIONS,
            "headers": [(b"content-type", b"application/json")],
        }
        asyncio.run(middleware({"type": "websocket", "path": COMPLETIONS}, receive, None))
        asyncio.run(middleware(post, receive, None))
        assert seen == ["websocket", "http"]

    def test_a_client_that_leaves(self, tokenizer):
        """Before its body is complete, and after."""

        async def reads(scope, receive, send):
            read.append([await receive() for _ in range(2)])

        async def run(*messages):
            queue = list(messages)

            async def receive():
                return queue.pop(0)

            await ProxyMiddleware(reads)(scope, receive, None)

        app, read = server(tokenizer), []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/root" + COMPLETIONS,
            "root_path": "/root",
            "headers": [(b"content-type", b"application/json; charset=utf-8")],
            "app": app,
        }
        start = {"type": "http.request", "body": b'{"model": "q:ex', "more_body": True}
        end = {"type": "http.request", "body": b'pert"}'}
        gone = {"type": "http.disconnect"}
        asyncio.run(run(start, gone, gone))
        asyncio.run(run(start, end, gone))
        assert read[0] == [gone, gone]
        assert b"proxy_weights" in read[1][0]["body"]
        assert not read[1][0]["more_body"]
        assert read[1][1] == gone


class TestPrompts:
    def test_text_becomes_ids(self, plain, tokenizer):
        own = {"proxy_expert_prompt": "The capital", "proxy_antiexpert_prompt": [5, 6], "mine": "x"}
        assert received(plain, {"model": "q", "vllm_xargs": own})["vllm_xargs"] == {
            **own,
            "proxy_expert_prompt": tokenizer.encode("The capital"),
        }

    def test_are_refused_without_a_tokenizer(self, tokenizer):
        app = server(tokenizer)
        app.state.online_renderer.renderer.tokenizer = None
        own = {"proxy_expert_prompt": "The capital"}
        assert "`proxy_expert_prompt`" in refused(TestClient(app), {"vllm_xargs": own})

    @pytest.mark.parametrize("key", ["proxy_expert_prompt", "proxy_antiexpert_prompt"])
    @pytest.mark.parametrize(
        "prompt",
        ["", [], "a b c d e f" * LIMIT, [1] * (LIMIT + 1), [VOCAB_SIZE], [-1], [1.0], [True], 5],
    )
    def test_that_are_wrong(self, plain, key, prompt):
        assert f"`{key}`" in refused(plain, {"vllm_xargs": {key: prompt}})


class TestValues:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("proxy_alpha", float("nan")),
            ("proxy_alpha", float("inf")),
            ("proxy_alpha", "0.5"),
            ("proxy_alpha", True),
            ("proxy_alpha", [1.0]),
            ("proxy_alpha", {"schedule": "linear"}),
            ("proxy_weights", [1, 2]),
            ("proxy_weights", [1, 2, float("nan")]),
            ("proxy_weights", [1, 2, "3"]),
            ("proxy_top_p", 0),
            ("proxy_plausibility", 1.5),
            ("proxy_alpha_steps", 3),
            ("proxy_alpa", 1),
        ],
    )
    def test_that_are_wrong(self, plain, key, value):
        assert f"`{key}`" in refused(plain, {"vllm_xargs": {key: value}})

    def test_in_the_wrong_place(self, plain):
        message = refused(plain, {"model": "q", "proxy_alpha": 2})
        assert "`proxy_alpha`" in message
        assert "`vllm_xargs`" in message
