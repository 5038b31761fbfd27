"""Images over HTTP and in a batch job: answers, mistakes, and what goes on after them."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from support.commands import VLLM_PROXY, Command
from support.forks import Fork
from support.image_reference import ImageReference
from support.random_images import random_image
from support.servers import serving
from support.tiny_images import IMAGE, WORDS, write_seeing_triple

TOKENS = 6
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.1,
    "limit_mm_per_prompt": {"image": 2},
}
GREEDY = {"temperature": 0, "ignore_eos": True, "allowed_token_ids": WORDS}
QUESTION = "What is the capital?"
ALONE = {"base": (1.0, 0.0, 0.0), "expert": (0.0, 1.0, 0.0), "antiexpert": (0.0, 0.0, 1.0)}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> dict[str, str]:
    return write_seeing_triple(tmp_path_factory.mktemp("seeing"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def reference(seeing) -> ImageReference:
    return ImageReference(**seeing)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A directory with images `0.png` to `2.png`, and with what is none."""
    directory = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        random_image(seed, 24 + 8 * seed, 16).save(directory / f"{seed}.png")
    (directory / "text.png").write_text("no image")
    return directory


def conversation(*urls: str, text: str = QUESTION) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def prompt(images: int) -> str:
    """Return what the chat template makes of a conversation with so many images.

    A line break after a block is not part of a template.
    """
    return f"[user] {IMAGE * images}{QUESTION}[assistant] "


def expected(
    reference: ImageReference,
    seeds: list[int],
    weights: tuple[float, float, float] = (1.0, 1.0, -1.0),
) -> list[int]:
    images = [random_image(seed, 24 + 8 * seed, 16) for seed in seeds]
    return reference.greedy(prompt(len(seeds)), images, TOKENS, weights).token_ids


def data_url(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


@pytest.fixture(scope="module")
def server(seeing, pictures, tmp_path_factory) -> Iterator[str]:
    """The address of a running server, which may read `pictures`."""
    directory = tmp_path_factory.mktemp("server")
    config = directory / "config.yaml"
    engine = {key: value for key, value in ENGINE.items() if key != "limit_mm_per_prompt"}
    config.write_text(yaml.safe_dump({**seeing, "engine": engine}))
    flags = ["--served-model-name", "proxy", "--allowed-local-media-path", str(pictures)]
    flags += ["--limit-mm-per-prompt", json.dumps(ENGINE["limit_mm_per_prompt"])]
    with serving([VLLM_PROXY, "serve", str(config), *flags], directory) as address:
        yield address


def asked(server: str, messages: list[dict], **body: object) -> httpx.Response:
    settings = {"model": "proxy", "max_tokens": TOKENS, "return_token_ids": True}
    body = {**settings, **GREEDY, "messages": messages, **body}
    return httpx.post(f"{server}/v1/chat/completions", json=body, timeout=120)


def answer(server: str, messages: list[dict], **body: object) -> list[int]:
    response = asked(server, messages, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


class TestHTTP:
    def test_images_by_every_url(self, server, pictures, reference):
        for url in (data_url(pictures / "0.png"), (pictures / "0.png").as_uri()):
            assert answer(server, conversation(url)) == expected(reference, [0])
        two = [(pictures / f"{seed}.png").as_uri() for seed in (1, 2)]
        assert answer(server, conversation(*two)) == expected(reference, [1, 2])

    def test_strength_and_members_by_name(self, server, pictures, reference):
        messages = conversation(data_url(pictures / "1.png"))
        given = {"vllm_xargs": {"proxy_alpha": 0.5}}
        assert answer(server, messages, **given) == expected(reference, [1], (1.0, 0.5, -0.5))
        for role, weights in ALONE.items():
            found = answer(server, messages, model=f"proxy:{role}")
            assert found == expected(reference, [1], weights), role

    @pytest.mark.parametrize(
        ("urls", "says"),
        [
            (["text.png"], "Failed to load image"),
            (["none.png"], "an image cannot be read"),
            (["data:image/png;base64,A"], "base64"),
            (["file:///etc/hostname"], "must be a subpath"),
            (["0.png", "1.png", "2.png"], "At most 2 image"),
        ],
    )
    def test_a_bad_image_is_a_mistake(self, server, pictures, urls, says):
        full = [url if ":" in url else (pictures / url).as_uri() for url in urls]
        response = asked(server, conversation(*full))
        assert response.status_code == 400, response.text
        assert says in response.json()["error"]["message"]

    def test_what_else_is_refused(self, server, pictures):
        url = (pictures / "0.png").as_uri()
        cases = [
            (conversation(url, text="word " * 60), {}, "maximum"),
            (
                [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}],
                {},
                "video",
            ),
            (
                conversation(url),
                {"vllm_xargs": {"proxy_expert_prompt": "a"}},
                "`proxy_expert_prompt`: not possible with images (limit_mm_per_prompt)",
            ),
        ]
        for messages, body, says in cases:
            response = asked(server, messages, **body)
            assert response.status_code == 400, response.text
            assert says in response.json()["error"]["message"]

    def test_the_server_lives_and_reads_text(self, server, reference):
        messages = [{"role": "user", "content": QUESTION}]
        assert answer(server, messages) == expected(reference, [])


def test_a_batch_with_images(seeing, pictures, reference, tmp_path):
    """Paths begin at the input; a bad image is one record; the same command goes on."""
    rows = [
        {"messages": conversation("0.png")},
        {"messages": conversation("none.png"), "id": "none"},
        {"messages": conversation("1.png", "2.png"), "alpha": 0.5},
        {"messages": conversation("text.png")},
        {"messages": conversation("0.png", "1.png", "2.png")},
        {"messages": [{"role": "user", "content": QUESTION}]},
        {"messages": conversation(data_url(pictures / "2.png"))},
    ]
    source, out = pictures / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{**row, "sampling": GREEDY} for row in rows]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = {**ENGINE, "allowed_local_media_path": str(pictures)}
    words = ["--input", str(source), "--output", str(out), "--ordered", "--max-tokens", str(TOKENS)]
    command, log = Command(tmp_path, seeing, *words, engine=engine), tmp_path / "log.txt"
    assert Fork(command.words[1:], command.env, log, log).wait() == 1, log.read_text()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = {
        0: expected(reference, [0]),
        2: expected(reference, [1, 2], (1.0, 0.5, -0.5)),
        5: expected(reference, []),
        6: expected(reference, [2]),
    }
    assert {r["index"]: r["token_ids"] for r in records if "error" not in r} == wanted
    errors = {r["index"]: r["error"] for r in records if "error" in r}
    assert errors.keys() == {1, 3, 4}
    assert "`messages`: an image cannot be read" in errors[1]
    assert "image" in errors[3]
    assert "At most 2 image" in errors[4]
    assert records[1]["id"] == "none"
    kept = out.read_bytes()
    assert Fork(command.words[1:], command.env, log, log).wait() == 1, log.read_text()
    assert f"finished already: {len(rows)} rows (3 errors)" in log.read_text()
    assert out.read_bytes() == kept
