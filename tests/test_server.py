"""The OpenAI server, for real: `vllm-proxy serve` becomes stock `vllm serve`, asked over HTTP."""

import asyncio
import importlib
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from support import forks
from support.commands import COMMAND_ENV, VLLM_PROXY
from support.engines import with_tests_paths
from support.hostile_requests import Hostile, draw
from support.reference import Reference
from support.servers import serving
from support.tiny_models import with_template

PROMPT = "Question: What is the capital of France? Answer:"
TOKENS = 12


# A user's own middleware, beside ours.
USERS = """
class Signs:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def signed(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-signed", b"yes")]
            await send(message)

        await self.app(scope, receive, signed)
"""


COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}
"""The random weights would fill a JSON answer with blanks until the tokens run out."""


@pytest.fixture(scope="module")
def server(members, tmp_path_factory) -> Iterator[str]:
    """The address of a running server."""
    directory: Path = tmp_path_factory.mktemp("server")
    config = directory / "config.yaml"
    engine = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    engine["structured_outputs_config"] = COMPACT
    config.write_text(yaml.safe_dump({**members, "engine": engine}))
    (directory / "users.py").write_text(USERS)
    flags = ["--served-model-name", "proxy", "other", "--middleware", "users.Signs"]
    flags += ["--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    env = {"PYTHONPATH": with_tests_paths(str(directory))}
    with serving([VLLM_PROXY, "serve", str(config), *flags], directory, env) as address:
        yield address


def pasted(config: Path, *flags: str) -> list[str]:
    """Return the words of the command that is printed for *config*, as a shell reads it."""
    printed = forks.run(["serve", str(config), "--dry-run", *flags], COMMAND_ENV).stdout.strip()
    shell = ["bash", "-c", f"printf '%s\\0' {printed}"]
    read = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    script, *words = read.split("\0")[:-1]
    assert Path(script).name == "vllm"
    return ["vllm", *words]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


@pytest.fixture(scope="module")
def tokenizer(members):
    return AutoTokenizer.from_pretrained(members["base"])


@pytest.fixture(scope="module")
def truth(reference, tokenizer):
    return reference.greedy(tokenizer.encode(PROMPT), TOKENS)


def converse(client, tokenizer, extra_body):
    """Ask one question; return its ids by the base's chat template, and the answer."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    settings = {"model": "proxy", "temperature": 0, "max_tokens": TOKENS}
    answer = client.chat.completions.create(messages=messages, extra_body=extra_body, **settings)
    return ids, answer


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
    ids, answer = converse(client, tokenizer, {"ignore_eos": True})
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


def counted(server: str, metric: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    text = httpx.get(f"{server}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == metric and labels.items() <= s.labels.items())


class TestMetrics:
    @pytest.mark.parametrize(
        ("options", "labels"),
        [
            ({}, {"member": "proxy", "strength": "constant"}),
            ({"model": "proxy:expert"}, {"member": "expert", "strength": "weights"}),
            ({"extra_body": {"vllm_xargs": {"proxy_alpha": 0}}}, {"member": "base"}),
            (
                {"extra_body": {"vllm_xargs": {"proxy_alpha": "adaptive"}}},
                {"member": "proxy", "strength": "adaptive"},
            ),
        ],
    )
    def test_count_requests_and_tokens_by_member(self, server, client, options, labels):
        def figures() -> list[float]:
            member = {"member": labels["member"]}
            return [
                counted(server, "vllm_proxy_requests_total", **labels),
                counted(server, "vllm_proxy_prompt_tokens_total", **member),
                counted(server, "vllm_proxy_generation_tokens_total", **member),
                counted(server, "vllm_proxy_generation_tokens_total"),
                counted(server, "vllm:generation_tokens_total"),
            ]

        before = figures()
        usage = complete(client, **options).usage
        new = usage.completion_tokens
        difference = [after - b for after, b in zip(figures(), before, strict=True)]
        assert difference == [1, usage.prompt_tokens, new, new, new]

    def test_count_strengths_and_filters(self, server, client):
        def figures() -> list[float]:
            return [
                counted(server, "vllm_proxy_alpha_bucket", le="-1.0"),
                counted(server, "vllm_proxy_alpha_bucket", le="-0.5"),
                counted(server, "vllm_proxy_alpha_count"),
                counted(server, "vllm_proxy_filtered_requests_total", filter="top_p"),
                counted(server, "vllm_proxy_prompted_requests_total", member="antiexpert"),
            ]

        before = figures()
        own = {"proxy_alpha": -0.7, "proxy_top_p": 0.9, "proxy_antiexpert_prompt": [5]}
        complete(client, extra_body=xargs(**own))
        complete(client, model="proxy:base")
        difference = [after - b for after, b in zip(figures(), before, strict=True)]
        assert difference == [0, 1, 1, 1, 1]

    def test_leave_no_label_to_clients(self, server):
        """A name of nobody, a wrong value: no series of their own."""
        series = httpx.get(f"{server}/metrics").text.count("vllm_proxy_requests_total{")
        for body in ({"model": "proxy:x"}, {"vllm_xargs": {"proxy_alpha": "x"}}):
            answer = httpx.post(f"{server}/v1/completions", json={"prompt": "a", **body})
            assert answer.status_code in (400, 404)
        assert httpx.get(f"{server}/metrics").text.count("vllm_proxy_requests_total{") == series

    def test_name_the_members(self, server, members):
        for role, path in members.items():
            assert counted(server, "vllm_proxy_member_info", member=role, model=path) == 1


def test_the_servers_document_has_a_request_s_own_values(server):
    document = httpx.get(f"{server}/openapi.json").json()
    values = document["components"]["schemas"]["ProxyValues"]["properties"]
    assert values["proxy_top_p"]["maximum"] == 1
    assert "ProxyValues" in json.dumps(document["components"]["schemas"]["CompletionRequest"])


def test_metrics_count_tokens(server, client):
    def generated() -> float:
        lines = httpx.get(f"{server}/metrics").text.splitlines()
        (line,) = (row for row in lines if row.startswith("vllm:generation_tokens_total"))
        return float(line.split()[-1])

    before = generated()
    complete(client)
    assert generated() == before + TOKENS


def greedy(
    reference: Reference,
    prompt: list[int],
    weights: tuple[float, ...] = (1, 1, -1),
    tokens: int = TOKENS,
    **prompts: list[int],
) -> list[int] | None:
    """Return the greedy tokens of the members' weighted logits; None if one came near a tie.

    *prompts* are those of members that do not read the base's.
    """
    own = {f"proxy_{role}_prompt": ids for role, ids in prompts.items()}
    decoded = reference.greedy(prompt, tokens, {"proxy_weights": weights, **own})
    return decoded.token_ids if decoded.margin >= 1e-3 else None


MEMBER_WEIGHTS = {
    "proxy": (1, 1, -1),
    "proxy:base": (1, 0, 0),
    "proxy:expert": (0, 1, 0),
    "proxy:antiexpert": (0, 0, 1),
}


def whole(text: str) -> str:
    """Return *text* without a last character that is not complete, which the server holds back."""
    return text.rstrip("\ufffd")


@pytest.fixture(scope="module")
def say(reference, tokenizer):
    """Answer PROMPT, or ids, by the reference."""

    def say(weights=(1, 1, -1), prompt=None, tokens=TOKENS, **prompts) -> str:
        ids = prompt or tokenizer.encode(PROMPT)
        found = greedy(reference, ids, weights, tokens, **prompts)
        assert found is not None, "a tie: choose another prompt"
        return whole(tokenizer.decode(found, skip_special_tokens=True))

    return say


def xargs(**own) -> dict:
    return {"ignore_eos": True, "vllm_xargs": own}


class TestStrengths:
    @pytest.mark.parametrize(
        ("own", "weights"),
        [
            ({"proxy_alpha": 2.5}, (1, 2.5, -2.5)),
            ({"proxy_alpha": 0}, (1, 0, 0)),
            ({"proxy_alpha": -1}, (1, -1, 1)),
            ({"proxy_weights": [0.5, 1.5, -1]}, (0.5, 1.5, -1)),
            ({"proxy_alpha": {"alpha": 0.5, "schedule": "first", "steps": 99}}, (1, 0.5, -0.5)),
        ],
    )
    def test_of_a_request(self, client, say, own, weights):
        (choice,) = complete(client, extra_body=xargs(**own)).choices
        assert whole(choice.text) == say(weights)
        parts = complete(client, extra_body=xargs(**own), stream=True)
        text = "".join(part.choices[0].text for part in parts if part.choices)
        assert whole(text) == say(weights)

    def test_of_a_chat(self, client, say, tokenizer):
        ids, answer = converse(client, tokenizer, xargs(proxy_alpha=0.5))
        text = say((1, 0.5, -0.5), ids)
        assert whole(answer.choices[0].message.content) == text

    def test_of_several_prompts_and_choices(self, client, say, tokenizer):
        own = {**xargs(proxy_alpha=2.5), "top_k": 1}
        prompts = [PROMPT, "The large model"]
        choices = complete(client, prompt=prompts, n=2, temperature=1, extra_body=own).choices
        texts = [say((1, 2.5, -2.5), tokenizer.encode(prompt)) for prompt in prompts]
        assert [whole(choice.text) for choice in choices] == [texts[0]] * 2 + [texts[1]] * 2


class TestNames:
    def test_are_all_listed(self, client):
        listed = [model.id for model in client.models.list()]
        roles = ("", ":base", ":expert", ":antiexpert")
        assert listed[0] == "proxy"
        assert sorted(listed) == sorted(n + r for n in ("proxy", "other") for r in roles)

    @pytest.mark.parametrize("name", MEMBER_WEIGHTS)
    def test_are_members(self, client, say, tokenizer, name):
        answer = complete(client, model=name)
        assert whole(answer.choices[0].text) == say(MEMBER_WEIGHTS[name])
        assert answer.model == name
        parts = list(complete(client, model=name, stream=True))
        assert whole("".join(p.choices[0].text for p in parts)) == say(MEMBER_WEIGHTS[name])
        assert {part.model for part in parts} == {name}

    @pytest.mark.parametrize("name", MEMBER_WEIGHTS)
    def test_are_members_in_every_kind_of_chat(self, server, client, say, tokenizer, name):
        question = "What is the capital of France?"
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = say(MEMBER_WEIGHTS[name], ids)
        common = {"model": name, "temperature": 0, "ignore_eos": True}
        chat = {**common, "messages": messages, "max_tokens": TOKENS}
        asked = {
            "chat/completions": chat,
            "chat/completions/batch": {**chat, "messages": [messages]},
            "messages": chat,
            "responses": {**common, "input": question, "max_output_tokens": TOKENS},
        }
        for path, body in asked.items():
            answer = httpx.post(f"{server}/v1/{path}", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            assert json.dumps(text)[1:-1] in json.dumps(answer.json()), path

    def test_of_tokens_in_tokens_out(self, server, reference, tokenizer):
        ids = tokenizer.encode(PROMPT)
        params = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        body = {"model": "other:expert", "token_ids": ids, "sampling_params": params}
        answer = httpx.post(f"{server}/inference/v1/generate", json=body)
        assert answer.json()["choices"][0]["token_ids"] == greedy(reference, ids, (0, 1, 0))

    def test_of_nobody(self, server):
        answer = httpx.post(f"{server}/v1/completions", json={"model": "proxy:x", "prompt": "a"})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["type"] == "NotFoundError"
        message = "The model `proxy:x` does not exist; did you mean `proxy:expert`?"
        assert error["message"] == message

    def test_of_a_request_with_two_content_types(self, server, say):
        """vLLM takes the first; a name that was lost would be answered as if it were `proxy`."""
        body = {"model": "proxy:expert", "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS}
        kinds = [("content-type", "application/json"), ("content-type", "text/plain")]
        content = json.dumps({**body, "ignore_eos": True})
        answer = httpx.post(f"{server}/v1/completions", content=content, headers=kinds).json()
        assert answer["model"] == "proxy:expert"
        assert whole(answer["choices"][0]["text"]) == say((0, 1, 0))

    def test_stand_beside_a_users_own_middleware(self, server):
        assert httpx.get(f"{server}/health").headers["x-signed"] == "yes"


class TestPrompts:
    EXPERT = "You know every capital. What is the capital of France? You say:"

    def test_are_text_or_ids(self, client, say, tokenizer):
        ids = tokenizer.encode(self.EXPERT)
        for prompt in (self.EXPERT, ids):
            own = xargs(proxy_expert_prompt=prompt, proxy_antiexpert_prompt=ids[:5])
            answer = complete(client, extra_body=own)
            assert whole(answer.choices[0].text) == say(expert=ids, antiexpert=ids[:5])
            assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))

    def test_of_a_member_alone(self, client, say, tokenizer):
        own = xargs(proxy_expert_prompt=self.EXPERT)
        answer = complete(client, model="proxy:expert", extra_body=own)
        assert whole(answer.choices[0].text) == say((0, 1, 0), tokenizer.encode(self.EXPERT))


BAD_VALUES = [
    {"proxy_alpha": float("nan")},
    {"proxy_alpha": float("-inf")},
    {"proxy_alpha": "1"},
    {"proxy_alpha": True},
    {"proxy_alpha": 3e38},
    {"proxy_alpha": 10**400},
    {"proxy_alpha": {"schedule": "linear", "steps": 2**64}},
    {"alpha": 1},
    {"proxy_alpha_steps": 3},
    {"proxy_weights": [1, 2]},
    {"proxy_weights": [1, 2, float("nan")]},
    {"proxy_plausibility": 2},
    {"proxy_alfa": 1},
    {"proxy_expert_prompt": [512]},
    {"proxy_expert_prompt": [1] * 300},
    {"proxy_antiexpert_prompt": ""},
    {"proxy_antiexpert_prompt": "a\ud800"},
    {"proxy_antiexpert_prompt": "The capital " * 100_000},
]


async def stream(http: httpx.AsyncClient, body: dict, *, leave_after: int | None = None) -> str:
    """Return the text of a streamed completion; close the connection after so many parts."""
    body = {**body, "stream": True, "temperature": 0, "ignore_eos": True}
    texts = []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                texts.append(json.loads(line[6:])["choices"][0]["text"])
            if len(texts) == leave_after:
                break
    return whole("".join(texts))


@pytest.fixture(scope="module")
def crowd(reference, tokenizer) -> list[tuple[dict, str]]:
    """Requests of random strengths, and their texts by the reference."""
    draw = random.Random(0)
    prompts = [PROMPT, "The large model", "A record:", "What fine-tuning changed in the"]
    found = []
    while len(found) < 16:
        alpha, prompt = draw.uniform(-2, 2), draw.choice(prompts)
        tokens = greedy(reference, tokenizer.encode(prompt), (1, alpha, -alpha), 24)
        if tokens is not None:
            body = {"model": "proxy", "prompt": prompt, "max_tokens": 24}
            body["vllm_xargs"] = {"proxy_alpha": alpha}
            found.append((body, whole(tokenizer.decode(tokens, skip_special_tokens=True))))
    return found


class TestManyAtOnce:
    def test_bad_requests_harm_no_others(self, server, crowd):

        async def refuse(http: httpx.AsyncClient, own: dict, streamed: bool) -> None:
            body = {"model": "proxy", "prompt": PROMPT, "stream": streamed, "vllm_xargs": own}
            content = json.dumps(body)  # httpx would refuse NaN by itself
            headers = {"content-type": "application/json"}
            answer = await http.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 400, (own, answer.text)
            assert f"`{next(iter(own))}" in answer.json()["error"]["message"]

        async def run() -> list[str]:
            async with httpx.AsyncClient(base_url=server, timeout=120) as http:
                streams = [asyncio.create_task(stream(http, body)) for body, _ in crowd]
                bad = [(own, streamed) for own in BAD_VALUES for streamed in (False, True)]
                await asyncio.gather(*(refuse(http, *each) for each in bad))
                assert not all(task.done() for task in streams), "they met no one"
                return await asyncio.gather(*streams)

        assert asyncio.run(run()) == [text for _, text in crowd]
        assert httpx.get(f"{server}/health").status_code == 200

    def test_clients_that_leave_harm_no_others(self, server, client, crowd):
        everyone = [*crowd, *reversed(crowd)]

        async def run() -> list[str]:
            async with httpx.AsyncClient(base_url=server, timeout=120) as http:
                return await asyncio.gather(
                    *(
                        stream(http, body, leave_after=1 + i % 7 if i % 2 else None)
                        for i, (body, _) in enumerate(everyone)
                    )
                )

        for i, (said, (_, text)) in enumerate(zip(asyncio.run(run()), everyone, strict=True)):
            assert (text.startswith(said) and said != text) if i % 2 else said == text
        complete(client)  # the gauges are of the last step
        for gauge in GAUGES:
            assert by_engine(server, gauge) == {"0": 0}


@pytest.fixture(scope="module")
def stock(members, tmp_path_factory) -> Iterator[str]:
    """The address of a stock server of the base alone, with our names."""
    options = {"dtype": "float32", "max-model-len": "256"}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    names = ["--served-model-name", *MEMBER_WEIGHTS, "other"]
    command = ["vllm", "serve", members["base"], *flags, "--enforce-eager", *names]
    with serving([*command, "--enable-scale-out"], tmp_path_factory.mktemp("stock")) as address:
        yield address


class TestHostileClients:
    """`hostile_requests.py`: whatever they send, others get their answers, and all are answered."""

    REQUESTS = int(os.environ.get("HOSTILE", "2000"))
    SEED = int(os.environ.get("HOSTILE_SEED", "0"))
    AT_ONCE = 64
    # A server closes a connection after an error of its own; the next request must not meet that.
    LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def answer(self, http: httpx.AsyncClient, hostile: Hostile) -> int | None:
        """Return the status; None if the client left before."""
        try:
            async with asyncio.timeout(hostile.patience):
                answer = await http.post(
                    hostile.path, content=hostile.content, headers=hostile.headers
                )
        except TimeoutError:
            return None
        return answer.status_code

    async def assault(self, server: str, crowd) -> tuple[list[Hostile], Counter, int]:
        """Send all requests beside good streams; return the failures and what became of both."""
        failures, statuses, right = [], Counter(), 0
        waiting = draw(self.REQUESTS, self.SEED)
        running = self.AT_ONCE

        async def be_hostile() -> None:
            nonlocal running
            for hostile in waiting:
                status = await self.answer(http, hostile)
                statuses[status] += 1
                if status is not None and status >= 500:
                    failures.append(hostile)
            running -= 1

        async def be_good(number: int) -> None:
            nonlocal right
            while running:
                body, text = crowd[number % len(crowd)]
                assert await stream(http, body) == text
                right += 1

        async with (
            httpx.AsyncClient(base_url=server, timeout=300, limits=self.LIMITS) as http,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self.AT_ONCE):
                group.create_task(be_good(number))
                group.create_task(be_hostile())
        return failures, statuses, right

    def test_harm_no_others(self, server, stock, client, crowd):
        failures, statuses, right = asyncio.run(self.assault(server, crowd))
        assert statuses.total() == self.REQUESTS
        assert min(statuses[200], statuses[400], statuses[None]) > self.REQUESTS / 40
        assert right >= self.AT_ONCE

        async def fail_elsewhere() -> list[Hostile]:
            async with httpx.AsyncClient(base_url=stock, timeout=60, limits=self.LIMITS) as http:
                return [h for h in failures if (await self.answer(http, h) or 500) < 500]

        assert asyncio.run(fail_elsewhere()) == []
        complete(client)  # the gauges are of the last step
        for gauge in GAUGES:
            assert by_engine(server, gauge) == {"0": 0}


GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def by_engine(server: str, metric: str, label: str = "") -> dict[str, float]:
    """Return what each engine of a server says of a metric, where it has the label."""
    return {
        line.split('engine="')[1].partition('"')[0]: float(line.split()[-1])
        for line in httpx.get(f"{server}/metrics").text.splitlines()
        if line.startswith(f"vllm:{metric}{{") and label in line
    }


@pytest.fixture(scope="module")
def two(members, tmp_path_factory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("two")
    config = directory / "config.yaml"
    engine = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    config.write_text(yaml.safe_dump({**members, "engine": engine}))
    flags = ["--served-model-name", "proxy", "--data-parallel-size", "2"]
    with serving(pasted(config, *flags), directory) as address:
        yield address


class TestDataParallel:
    """Two engines, each with all members, behind one server."""

    STREAMS = 200

    def test_many_streams_some_of_which_leave(self, two, crowd):
        """None fails, each says what the formula says, and nothing stays in the KV caches."""
        everyone = [crowd[i % len(crowd)] for i in range(self.STREAMS)]

        async def run() -> list[str]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=two, timeout=300, limits=limits) as http:
                return await asyncio.gather(
                    *(
                        stream(http, body, leave_after=None if i % 4 else 1 + i % 7)
                        for i, (body, _) in enumerate(everyone)
                    )
                )

        for i, (said, (_, text)) in enumerate(zip(asyncio.run(run()), everyone, strict=True)):
            assert said == text if i % 4 else text.startswith(said)
        body, text = crowd[0]
        for _ in range(4):  # the gauges are of each engine's last step
            answer = httpx.post(
                f"{two}/v1/completions",
                json={**body, "temperature": 0, "ignore_eos": True},
                timeout=60,
            )
            assert whole(answer.json()["choices"][0]["text"]) == text
        for gauge in GAUGES:
            assert by_engine(two, gauge) == {"0": 0, "1": 0}
        done = by_engine(two, "request_success_total", 'finished_reason="length"')
        assert all(count > self.STREAMS / 5 for count in done.values())
        assert sum(done.values()) >= self.STREAMS * 3 / 4 + 4

    def test_metrics_are_those_of_all_api_servers(self, two):
        metrics = ("requests", "generation_tokens", "prompt_tokens")
        names = [f"vllm_proxy_{metric}_total" for metric in metrics]
        before = [counted(two, name, member="expert") for name in names]
        served = {}
        for _ in range(8):
            body = {"model": "proxy:expert", "prompt": [5, 6, 7], "max_tokens": 4}
            answer = httpx.post(f"{two}/v1/completions", json={**body, "ignore_eos": True})
            served[answer.json()["usage"]["total_tokens"]] = answer.status_code
        after = [counted(two, name, member="expert") for name in names]
        assert served == {7: 200}
        assert [a - b for a, b in zip(after, before, strict=True)] == [8, 32, 24]
        tokens = counted(two, "vllm_proxy_generation_tokens_total")
        assert tokens == counted(two, "vllm:generation_tokens_total")


@pytest.fixture(scope="module")
def template_expert(members, tmp_path_factory) -> str:
    """The expert, with a chat template that is not the base's."""
    return with_template(members["expert"], tmp_path_factory.mktemp("template") / "expert")


@pytest.fixture(scope="module")
def formatted(members, template_expert, tmp_path_factory) -> Iterator[str]:
    """The address of a server that was started by the printed command, pasted."""
    directory = tmp_path_factory.mktemp("formats")
    config = directory / "config.yaml"
    engine = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    engine |= {"structured_outputs_config": COMPACT, "served_model_name": "it's"}
    values = {**members, "expert": template_expert, "chat": {"expert": "template"}}
    values["speculate"] = {"tokens": 3, "requests": 64, "adapt": False}
    config.write_text(yaml.safe_dump({**values, "engine": engine}))
    words, env = pasted(config, "--enable-scale-out"), {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with serving(words, directory, env) as address:
        yield address


def metric_names(expression: str) -> set[str]:
    """Return the metrics that a query of Prometheus names."""
    return set(re.findall(r"\bvllm[:_]\w+", expression))


class TestDashboard:
    FILE = Path(__file__).parents[1] / "configs/grafana/vllm-proxy.json"

    def test_shows_only_what_a_server_counts(self, formatted):
        dashboard = json.loads(self.FILE.read_text())
        shown = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
        queries = [target["expr"] for panel in shown for target in panel["targets"]]
        queries += [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
        used = set().union(*map(metric_names, queries))
        body = {"messages": [{"role": "user", "content": "What is the capital?"}], "max_tokens": 9}
        body = {**body, "model": "it's:expert", "temperature": 0, "ignore_eos": True}
        assert httpx.post(f"{formatted}/v1/chat/completions", json=body).status_code == 200
        text = httpx.get(f"{formatted}/metrics").text
        there = {s.name for f in text_string_to_metric_families(text) for s in f.samples}
        assert used <= there
        assert len(used & {name for name in there if name.startswith("vllm_proxy_")}) >= 9
        assert counted(formatted, "vllm_proxy_draft_length_sum") == counted(
            formatted, "vllm:spec_decode_num_draft_tokens_total"
        )
        assert counted(formatted, "vllm_proxy_draft_length_bucket", le="3.0") > 0

    def test_imports_as_it_is(self):
        dashboard = json.loads(self.FILE.read_text())
        assert dashboard["schemaVersion"] >= 36
        assert dashboard["id"] is None
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids))
        sources = {v["name"]: v for v in dashboard["templating"]["list"]}
        assert sources["datasource"]["type"] == "datasource"
        cells = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            own = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not own & cells
            assert all(0 <= x < 24 for x, _ in own)
            cells |= own
            for part in (panel, *panel.get("targets", ())):
                if panel["type"] != "row":
                    assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(scope="module")
def forms():
    """The forms of `benchmarks/measurements/structured.py`, which asks larger models for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("measurements.forms")


STRUCTURED = {
    "nothing": {},
    "base": {"proxy_weights": [1, 0, 0]},
    "strong": {"proxy_alpha": 50},
    "adaptive": {"proxy_alpha": "adaptive"},
    "falling": {"proxy_alpha": 2, "proxy_alpha_schedule": "linear", "proxy_alpha_steps": 9},
    # Only one token is kept at every step, hardly ever one that the form allows.
    "top_p": {"proxy_top_p": 1e-6},
    "plausibility": {"proxy_plausibility": 1, "proxy_alpha": "adaptive"},
    "prompts": {"proxy_expert_prompt": [5, 6, 7], "proxy_antiexpert_prompt": [8] * 40},
    "all": {
        "proxy_weights": [0.5, 2, -1],
        "proxy_top_p": 0.3,
        "proxy_plausibility": 0.2,
        "proxy_expert_prompt": [5, 6, 7],
    },
}


@pytest.mark.engine
class TestStructuredOutput:
    """Every answer that ends before its token limit has the form that was asked for."""

    def outcomes(self, forms, url: str, names: list[str]) -> dict[tuple[str, str, float], str]:
        async def run() -> dict:
            async with httpx.AsyncClient(base_url=url, timeout=300) as http:
                asked = [
                    (form, own, temperature)
                    for form in names
                    for own in STRUCTURED
                    for temperature in (0.0, 1.0)
                ]
                found = await asyncio.gather(
                    *(
                        forms.outcome(
                            http,
                            form,
                            "What is the capital?",
                            {
                                "max_tokens": 200,
                                "temperature": temperature,
                                "vllm_xargs": STRUCTURED[own],
                            },
                        )
                        for form, own, temperature in asked
                    )
                )
            return dict(zip(asked, found, strict=True))

        return asyncio.run(run())

    @pytest.mark.parametrize("url", ["server", "formatted"])
    def test_has_its_form_through_every_door(self, request, forms, url):
        """`formatted` drafts, and its members see conversations in formats of their own."""
        names = [name for name in forms.FORMS if url == "server" or name != "chat tools"]
        found = self.outcomes(forms, request.getfixturevalue(url), names)
        assert {k: v for k, v in found.items() if v not in ("right", "cut")} == {}
        for name in names:
            right = [v == "right" for (form, *_), v in found.items() if form == name]
            assert sum(right) >= len(right) / 2, name  # tools' JSON may have blanks without end


class TestChatFormats:
    MESSAGES = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Paris?"},
    )
    PLAIN = "Be brief.\n\nWhere is Paris?"
    COMMON = {"temperature": 0, "ignore_eos": True}  # noqa: RUF012

    @pytest.fixture
    def chat(self, formatted):
        return {"messages": list(self.MESSAGES), "max_tokens": TOKENS, **self.COMMON}

    @pytest.fixture(scope="class")
    def seen(self, template_expert):
        """What transformers makes of a conversation for the expert alone."""
        expert = AutoTokenizer.from_pretrained(template_expert)

        def seen(messages=self.MESSAGES, **arguments) -> list[int]:
            arguments = {"add_generation_prompt": True, **arguments}
            return expert.apply_chat_template(list(messages), return_dict=False, **arguments)

        return seen

    @pytest.fixture
    def ask(self, formatted):
        def ask(path: str, body: dict) -> dict:
            answer = httpx.post(f"{formatted}{path}", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()

        return ask

    @pytest.mark.parametrize("name", MEMBER_WEIGHTS)
    def test_the_expert_sees_its_template_the_others_text(
        self, ask, chat, say, seen, tokenizer, name
    ):
        plain, model = tokenizer.encode(self.PLAIN), name.replace("proxy", "it's")
        answer = ask("/v1/chat/completions", {**chat, "model": model, "return_token_ids": True})
        assert answer["prompt_token_ids"] == plain
        text = say(MEMBER_WEIGHTS[name], plain, expert=seen())
        assert whole(answer["choices"][0]["message"]["content"]) == text
        assert answer["model"] == model

    @pytest.mark.parametrize(
        "given",
        [
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        ],
        ids=str,
    )
    def test_arguments_of_templates(self, ask, chat, say, seen, tokenizer, given):
        arguments = {k: v for k, v in given.items() if k not in ("tool_choice",)}
        arguments |= arguments.pop("chat_template_kwargs", {})
        text = say(prompt=tokenizer.encode(self.PLAIN), expert=seen(**arguments))
        answer = ask("/v1/chat/completions", {**chat, **given})
        assert whole(answer["choices"][0]["message"]["content"]) == text

    def test_at_every_endpoint(self, formatted, ask, chat, say, seen, tokenizer):
        """With an argument of templates where the endpoint has one; whole, and streamed."""
        thinking = {"chat_template_kwargs": {"enable_thinking": False}}
        plain = tokenizer.encode(self.PLAIN)
        text = say(prompt=plain, expert=seen(enable_thinking=False))
        parts = [{"type": "text", "text": message["content"]} for message in self.MESSAGES]
        asked = {
            "chat/completions": {**chat, **thinking},
            "chat/completions/batch": {**chat, **thinking, "messages": [chat["messages"]]},
            "messages": {
                **{**chat, **thinking, "model": "it's", "system": parts[:1]},
                "messages": [{"role": "user", "content": parts[1:]}],
            },
            "responses": {
                **{**self.COMMON, **thinking, "max_output_tokens": TOKENS},
                **{"instructions": "Be brief.", "input": self.MESSAGES[1]["content"]},
            },
        }
        for path, body in asked.items():
            assert json.dumps(text)[1:-1] in json.dumps(ask(f"/v1/{path}", body)), path
            if path.endswith("batch"):
                continue
            streamed = httpx.post(f"{formatted}/v1/{path}", json={**body, "stream": True})
            assert whole(streamed_text(streamed.text)).startswith(text), path
        thoughtless = {**asked["messages"], "thinking": {"type": "disabled"}}
        del thoughtless["chat_template_kwargs"]
        assert json.dumps(text)[1:-1] in json.dumps(ask("/v1/messages", thoughtless))
        rendered = ask("/v1/chat/completions/render", {**chat, **thinking})
        assert rendered["token_ids"] == plain
        generated = ask("/inference/v1/generate", rendered)["choices"][0]["token_ids"]
        assert whole(tokenizer.decode(generated, skip_special_tokens=True)) == text

    def test_a_response_goes_on_from_another(self, ask, say, seen, tokenizer):
        common = {**self.COMMON, "max_output_tokens": TOKENS}
        first = ask("/v1/responses", {**common, "input": "a", "store": True})
        said = first["output"][0]["content"][0]["text"]
        second = ask("/v1/responses", {**common, "input": "b", "previous_response_id": first["id"]})
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "b"},
        ]
        plain = tokenizer.encode("\n\n".join(m["content"] for m in messages))
        text = say(prompt=plain, expert=seen(messages))
        assert whole(second["output"][0]["content"][0]["text"]) == text

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_refused(self, formatted, chat, stream):
        high = {"reasoning_effort": "high"}
        for path, body, says in (
            ("chat/completions", {"chat_template": "x"}, "--trust-request-chat-template"),
            ("chat/completions", {"truncate_prompt_tokens": 5}, "`truncate_prompt_tokens`: not"),
            ("chat/completions", {"chat_template_kwargs": 3}, "chat_template_kwargs"),
            ("chat/completions", {"chat_template_kwargs": {"messages": 1}}, "kwargs.messages`: no"),
            ("chat/completions", {"continue_final_message": True}, "`add_generation_prompt` to fa"),
            ("chat/completions", high, "`reasoning_effort`: they cannot be rendered for the"),
            ("messages", {"chat_template_kwargs": high}, "rendered for the expert: no such effort"),
            ("responses", {"truncation": "auto", "input": "x"}, "`truncation`: not supported if"),
            ("systemone", {}, "`/v1/systemone`: here the members cannot"),
        ):
            body = {"model": "it's", **chat, **body, "stream": stream}
            answer = httpx.post(f"{formatted}/v1/{path}", json=body)
            assert answer.status_code == 400, answer.text
            assert says in answer.json()["error"]["message"]


def streamed_text(events: str) -> str:
    """Return the text in a stream of chat completions, of messages or of responses."""
    found = []
    for line in events.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        for choice in event.get("choices", ()):
            found.append(choice["delta"].get("content") or "")
        delta = event.get("delta", "")
        if event.get("type") in ("content_block_delta", "response.output_text.delta"):
            found.append(delta if isinstance(delta, str) else delta.get("text", ""))
    return "".join(found)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": [5] * 400}, "256"),
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
        ({"prompt": PROMPT, "allowed_token_ids": [1], "min_tokens": 2}, "`min_tokens` leave no"),
        ({"prompt": PROMPT, "allowed_token_ids": [67], "bad_words": ["a"]}, "`bad_words` leave no"),
        ({"prompt": PROMPT, "extra_args": {"proxy_alpha": 1}}, "give it in `vllm_xargs`"),
        ({"prompt": PROMPT, "response_format": {"type": "nonsense"}}, "response_format"),
    ],
)
def test_bad_requests_get_400_and_the_server_lives(server, client, truth, tokenizer, body, words):
    answer = httpx.post(f"{server}/v1/completions", json={"model": "proxy", **body})
    assert answer.status_code == 400
    assert words in answer.text
    assert complete(client).choices[0].text == tokenizer.decode(truth.token_ids)


def test_an_image_is_refused(server):
    """vLLM does not fetch it."""
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    body = {"model": "proxy", "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("`messages`: it has more than text, and this engine reads text only")
    assert message.endswith("or allow images by `engine: {limit_mm_per_prompt: {image: 1}}`")


class TestShutdown:
    """The last class of the file, for it ends the server."""

    def test_clients_with_open_streams_do_not_wait(self, server):
        """Whether the engine says a last word before vLLM ends it or not."""
        body = {"model": "proxy", "prompt": PROMPT, "max_tokens": 240, "stream": True}
        port = server.rpartition(":")[2]
        (process,) = [p for p in psutil.Process().children() if port in p.cmdline()]

        async def follow(http: httpx.AsyncClient, begun: asyncio.Semaphore) -> bool:
            """Return whether the answer was cut short."""
            try:
                async with http.stream(
                    "POST", "/v1/completions", json={**body, "ignore_eos": True}
                ) as answer:
                    async for _ in answer.aiter_lines():
                        begun.release()
            except httpx.RemoteProtocolError:
                return True
            return False

        async def run() -> list[bool]:
            begun = asyncio.Semaphore(0)
            async with httpx.AsyncClient(base_url=server, timeout=60) as http:
                streams = [asyncio.create_task(follow(http, begun)) for _ in range(8)]
                for _ in range(16):
                    await begun.acquire()
                process.terminate()
                async with asyncio.timeout(20):
                    return await asyncio.gather(*streams)

        asyncio.run(run())
        process.wait(20)
