"""The middleware alone, before a small application that answers with the body it has received."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMNotFoundError
from vllm.tokenizers import get_tokenizer

from support.tiny_models import write_tokenizer
from vllm_proxy.config.request import BARE_KEYS, MEMBER_CONTROLS
from vllm_proxy.config.roles import ROLES
from vllm_proxy.engine.admission import validator
from vllm_proxy.server import middleware as http_module
from vllm_proxy.server.middleware import LONG_BODY, ProxyMiddleware
from vllm_proxy.server.rewriting import VALUE_PLACES

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
    experts=(),
) -> FastAPI:
    """Return an application with the state that vLLM's server would have."""
    members = dict.fromkeys(("expert", "antiexpert"), tokenizer.name_or_path)
    if experts:
        members["experts"] = dict.fromkeys(experts, "adapter")
        names = (*names, *(f"q:{name}" for name in experts))
    config = SimpleNamespace(
        hf_config=SimpleNamespace(proxy=members),
        logits_processors=[
            "other.Processor",
            validator("V1", LIMIT, dict.fromkeys(ROLES, VOCAB_SIZE)),
        ],
        max_model_len=LIMIT + 1,
        tokenizer_mode="auto",
        trust_remote_code=False,
        is_multimodal_model=False,
    )
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.vllm_config = SimpleNamespace(model_config=config)
    app.state.openai_serving_models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name=name) for name in names],
        model_name=lambda lora_request=None: names[0],
        is_base_model=lambda name: name in names,
    )
    app.state.online_renderer = SimpleNamespace(
        renderer=SimpleNamespace(tokenizer=tokenizer), preprocess_chat=None
    )
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


class TestExperts:
    @pytest.fixture(scope="class")
    def many(self, tokenizer) -> TestClient:
        return TestClient(server(tokenizer, experts=("legal", "terse")))

    def test_are_names_of_models(self, many):
        answer = many.post(COMPLETIONS, json={"model": "q:legal", "vllm_xargs": {"mine": 1}})
        assert json.loads(answer.json()["body"])["vllm_xargs"] == {
            "mine": 1,
            "proxy_expert": "legal",
        }
        assert answer.json()["model"] == "q:legal"

    def test_may_answer_alone(self, many):
        body = {"model": "q:expert", "vllm_xargs": {"proxy_expert": "terse"}}
        assert received(many, body)["vllm_xargs"] == {
            "proxy_expert": "terse",
            **MEMBER_CONTROLS["expert"].to_extra_args(),
        }

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (
                {"model": "q", "vllm_xargs": {"proxy_expert": "leagl"}},
                "`proxy_expert` is 'leagl': did you mean `legal`?",
            ),
            (
                {"model": "q", "vllm_xargs": {"proxy_expert": 7}},
                "`proxy_expert` is 7: it must be a valid string",
            ),
            (
                {"model": "q:legal", "vllm_xargs": {"proxy_expert": "terse"}},
                "`proxy_expert`: the model name 'q:legal' already sets the expert; "
                "remove one of them",
            ),
            (
                {"model": "q", "expert": "legal"},
                "`expert`: give `proxy_expert` in `vllm_xargs`",
            ),
        ],
    )
    def test_are_refused_in_one_line(self, many, body, message):
        assert refused(many, body) == message

    def test_are_refused_where_there_are_none(self, plain):
        message = "`proxy_expert` is 'legal': the configuration has no `experts`"
        assert refused(plain, {"model": "q", "vllm_xargs": {"proxy_expert": "legal"}}) == message


class TestMembers:
    @pytest.mark.parametrize("role", MEMBER_CONTROLS)
    @pytest.mark.parametrize(
        "path", [p for p, keys in VALUE_PLACES.items() if keys == ("vllm_xargs",)]
    )
    def test_are_weights(self, plain, role, path):
        body = {"model": f"q:{role}", "vllm_xargs": {"mine": 1}}
        assert received(plain, body, path)["vllm_xargs"] == {
            "mine": 1,
            **MEMBER_CONTROLS[role].to_extra_args(),
        }

    def test_of_tokens_in_tokens_out(self, plain):
        body = {"model": "q:expert", "sampling_params": {"temperature": 0}}
        params = received(plain, body, "/inference/v1/generate")["sampling_params"]
        assert params == {"temperature": 0, "extra_args": MEMBER_CONTROLS["expert"].to_extra_args()}

    @pytest.mark.parametrize("path", [p for p, keys in VALUE_PLACES.items() if not keys])
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

    @pytest.mark.parametrize(
        "kinds",
        [
            ("application/json", "text/plain"),
            ("text/plain", "application/json"),
            ("application/json; charset=utf-8",),
            ("application/vnd.api+json",),
            (),
        ],
        ids=str,
    )
    def test_whatever_the_headers_say(self, plain, kinds):
        """The server decides what it reads as JSON, and then a member's name must count."""
        for body in (b'{"model": "q:expert"}', b'\xef\xbb\xbf{"model": "q", "model": "q:expert"}'):
            headers = [("content-type", kind) for kind in kinds]
            answer = plain.post(COMPLETIONS, content=body, headers=headers)
            assert "proxy_weights" in answer.json()["body"]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("q:exprt", "; did you mean `q:expert`?"),
            ("q:x", "; known: q:antiexpert, q:base, q:expert"),
            ("qq", "; did you mean `q`?"),
        ],
    )
    def test_an_unknown_one_is_told_the_nearest(self, tokenizer, name, hint):
        """vLLM asks whether a name is served, and would list all there are."""
        app = server(tokenizer)
        TestClient(app).post(COMPLETIONS, json={})
        is_served = app.state.openai_serving_models.is_base_model
        assert is_served("q")
        assert is_served("q:expert")
        with pytest.raises(VLLMNotFoundError) as caught:
            is_served(name)
        assert str(caught.value) == f"The model `{name}` does not exist{hint}"

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
        own = {**MEMBER_CONTROLS["expert"].to_extra_args(), "proxy_top_p": 0.5}
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

    def test_other_content(self, plain):
        body = b"model=q:expert&proxy_alpha=1"
        kind = {"content-type": "application/x-www-form-urlencoded"}
        answer = plain.post(COMPLETIONS, content=body, headers=kind)
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

    def test_megabytes_are_refused_before_they_are_encoded(self, tokenizer):
        """As vLLM refuses such a prompt of the base's."""
        app = server(tokenizer)
        client = TestClient(app)
        text, shared = "The capital " * 2_500_000, app.state.online_renderer.renderer.tokenizer
        most = (LIMIT + 1) * shared.max_chars_per_token
        own = {"vllm_xargs": {"proxy_expert_prompt": text}}
        received(client, {"vllm_xargs": {"proxy_expert_prompt": "The"}})  # copies the tokenizer
        before = time.process_time()
        message = refused(client, own)
        assert (
            f"`proxy_expert_prompt` has {len(text)} characters, and at most {most} can" in message
        )
        assert time.process_time() - before < 3  # encoding takes ten times as long
        fits = {"proxy_expert_prompt": "capital" * LIMIT}
        assert "proxy_expert_prompt" in refused(client, {"vllm_xargs": fits})  # by its tokens

    def test_short_ones_do_not_wait_for_long_ones(self, tokenizer, monkeypatch):
        begun, let_go, threads = threading.Event(), threading.Event(), []

        def encode(own, tokenizer, max_model_len):
            threads.append((threading.current_thread().name, tokenizer))
            if len(own["proxy_expert_prompt"]) > LONG_BODY:
                begun.set()
                assert let_go.wait(60)
            return {**own, "proxy_expert_prompt": [5]}

        monkeypatch.setattr(http_module, "tokenized", encode)
        app = server(tokenizer)
        with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
            asked = {"vllm_xargs": {"proxy_expert_prompt": "x" * (LONG_BODY + 1)}}
            long = pool.submit(received, client, asked)
            assert begun.wait(60)
            short = received(client, {"vllm_xargs": {"proxy_expert_prompt": "The"}})
            assert not long.done()
            let_go.set()
            assert short == long.result()
        (_, first), (_, second) = threads
        shared = app.state.online_renderer.renderer.tokenizer
        assert len({id(first), id(second), id(shared)}) == 3  # vLLM's own threads use that one

    def test_are_refused_without_a_tokenizer(self, tokenizer):
        app = server(tokenizer)
        app.state.online_renderer.renderer.tokenizer = None
        own = {"proxy_expert_prompt": "The capital"}
        assert "`proxy_expert_prompt`" in refused(TestClient(app), {"vllm_xargs": own})

    @pytest.mark.parametrize("key", ["proxy_expert_prompt", "proxy_antiexpert_prompt"])
    @pytest.mark.parametrize(
        "prompt",
        [
            *("", [], "a b c d e f" * LIMIT, [1] * (LIMIT + 1), [VOCAB_SIZE], [-1], [1.0], [True]),
            *(5, "a\ud800", [10**400], [2**64], {"text": "a"}),
        ],
        ids=lambda prompt: ascii(prompt)[:20],
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
            ("proxy_alpha", 10**400),
            ("proxy_alpha", 3e38),
            ("proxy_weights", [1, 10**400, 0]),
            ("proxy_top_p", 10**400),
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
        assert f"`{key}" in refused(plain, {"vllm_xargs": {key: value}})

    @pytest.mark.parametrize("steps", [2**64, 10**400, 0, -1])
    def test_of_a_schedule_that_are_wrong(self, plain, steps):
        own = {"proxy_alpha_schedule": "linear", "proxy_alpha_steps": steps}
        assert "`proxy_alpha_steps`" in refused(plain, {"vllm_xargs": own})
        own = {"proxy_alpha": {"schedule": "linear", "steps": steps}}
        assert "`proxy_alpha.steps`" in refused(plain, {"vllm_xargs": own})

    def test_of_others_that_are_wrong_beside_ours(self, plain):
        message = refused(plain, {"model": "q:expert", "vllm_xargs": {"mine": 10**400}})
        assert message.startswith("`vllm_xargs`: ")

    def test_a_schedule_as_a_mapping(self, plain):
        """As a row has it; vLLM takes no mapping there."""
        schedule = {"alpha": 2, "schedule": "linear", "steps": 4}
        body = {"vllm_xargs": {"proxy_alpha": schedule, "proxy_top_p": 0.5, "mine": 1}}
        assert received(plain, body)["vllm_xargs"] == {
            "proxy_alpha": 2.0,
            "proxy_alpha_schedule": "linear",
            "proxy_alpha_steps": 4,
            "proxy_top_p": 0.5,
            "mine": 1,
        }

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            ({"proxy_alpha": 2}, "`proxy_alpha`"),
            ({"alpha": 2}, "`proxy_alpha`"),
            ({"weights": [1, 0, 0]}, "`proxy_weights`"),
            ({"filters": {"top_p": 1}}, "`proxy_top_p`"),
            ({"expert_prompt": "a"}, "`proxy_expert_prompt`"),
            ({"extra_args": {"proxy_alpha": 2}}, "`extra_args` has `proxy_alpha`"),
            ({"extra_args": {"alpha": 2}}, "`extra_args` has `alpha`"),
            ({"extra_body": {"vllm_xargs": {"proxy_alpha": 2}}}, "`extra_body` has `proxy_alpha`"),
            ({"sampling_params": {"extra_args": {"proxy_alpha": 2}}}, "`sampling_params` has"),
            ({"vllm_xargs": {"alpha": 2}}, "`proxy_alpha`"),
            ({"vllm_xargs": {"top_p": 0.5}}, "`proxy_top_p`"),
        ],
        ids=str,
    )
    def test_in_the_wrong_place(self, plain, body, named):
        """Where vLLM would pass over them without a word."""
        message = refused(plain, {"model": "q", **body})
        assert named in message
        if "vllm_xargs" not in body:
            assert "`vllm_xargs`" in message

    def test_in_the_wrong_place_of_tokens_in_tokens_out(self, plain):
        body = {"sampling_params": {}, "vllm_xargs": {"proxy_alpha": 2}}
        message = refused(plain, body, "/inference/v1/generate")
        assert message == "`vllm_xargs` has `proxy_alpha`: give it in `sampling_params.extra_args`"

    def test_vllm_has_no_field_of_these_names(self):
        """Or a request that uses it would be refused."""
        for protocol in (
            CompletionRequest,
            ChatCompletionRequest,
            ResponsesRequest,
            GenerateRequest,
        ):
            assert not protocol.model_fields.keys() & (BARE_KEYS.keys() - {"top_p"})

    def test_vllm_s_own_go_on(self, plain):
        body = {"top_p": 0.5, "extra_args": {"mine": 1}, "vllm_xargs": {"mine": "alpha"}}
        assert received(plain, body) == body
