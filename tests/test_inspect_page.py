"""What people see: pieces of tokens, tables, and a page that shows any text as text, offline.

The page is opened in headless Chromium, and driven by a script whose hash is let into its policy.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from support.tiny_models import write_tokenizer
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.inspect import page as page_module
from vllm_proxy.jobs.inspect.job import require_free_page
from vllm_proxy.jobs.inspect.page import write_page
from vllm_proxy.jobs.inspect.summary import ShiftSummary, render
from vllm_proxy.llm.pieces import KINDS, TokenTexts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='o'\">"
    "<!-- &amp; &lt; \u2028 \u2029 \u202e \x00 {{data}} {{policy}} \ud800 [/bold] [red]"
)
SHOWN = HOSTILE.replace("\ud800", "\ufffd")
"""A surrogate alone is no character."""
CONFIG = ProxyConfig(base="/models/base", expert="/models/<b>&amp;</b>")


# -- pieces ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> PreTrainedTokenizerFast:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a sign for spaces, and a token for every byte that no other token has."""
    words = ["<unk>", "</s>", "▁", "▁the", "cat", "é", "Ã", "\n", "▁1"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("text", ["a ☘ b", "日本語", "😀😀", "naïve café\n\n  x", "\ufffd \u2581"])
def test_pieces_of_bytes_come_to_the_text(byte_level, text):
    """Escapes are the token's very bytes, and everything else is the text itself."""
    pieces, ids = TokenTexts(byte_level), byte_level(text)["input_ids"]
    seen = [pieces[token_id] for token_id in ids]
    # With spaces around, whatever bytes a token has stand apart from text.
    parts = (part for piece in seen for part in re.split(r"(⟨[0-9A-F ]+⟩)", piece.text))
    data = b"".join(
        bytes.fromhex(part.strip("⟨⟩")) if part.startswith("⟨") else part.encode() for part in parts
    )
    assert data.decode() == text
    assert any(not piece.is_whole for piece in seen) == (not text.isascii())


def test_pieces_of_sentencepiece(sentencepiece):
    ids = sentencepiece.convert_tokens_to_ids
    pieces = TokenTexts(sentencepiece)
    assert pieces[ids("▁the")].text == " the"
    assert pieces[ids("é")].text == "é"
    assert pieces[ids("Ã")].text == "Ã"  # in GPT-2's alphabet, a byte
    assert pieces[ids("<0xE2>")] == ("⟨E2⟩", False, False)
    assert pieces[ids("<0x41>")].text == "A"
    assert pieces[ids("</s>")] == ("</s>", True, True)


def test_padding_and_no_tokenizer(byte_level):
    assert TokenTexts(byte_level)[100_000] == ("⟨100000⟩", True, True)
    assert TokenTexts(None)[5].text == "⟨5⟩"


def test_kinds(sentencepiece):
    words = ["▁the", "cat", "é", "▁1", "\n", "cat", "<0xE2>", "<0x2E>", "cat", "</s>"]
    kinds = TokenTexts(sentencepiece).kinds(sentencepiece.convert_tokens_to_ids(words))
    start, continuation, digit, punctuation, whitespace, special, part = KINDS
    assert kinds == [
        *(start, continuation, continuation, digit, whitespace, start),
        *(part, punctuation, start, special),
    ]


# -- tables ----------------------------------------------------------------------------------------


def token(text: str, *, changed: bool, kl: float = 0.5, kind: str = "word start") -> dict:
    top = [{"token_id": i, "token": piece, "logprob": -1.0 - i} for i, piece in enumerate("ab")]
    moved = [{"token_id": 9, "token": HOSTILE, "logprob": -0.1}] if changed else top
    own = {"logprob": -1.5, "rank": 2, "top": top}
    return {
        **{"token_id": 3, "token": text, "kind": kind, "kl": kl, "changed": changed},
        **{"base": own, "expert": own, "antiexpert": own},
        "proxy": {"logprob": None, "rank": 9, "top": moved},
    }


def record(index: int, *tokens: dict, **own: object) -> dict:
    text = "".join(one["token"] for one in tokens)
    prompts = {"base": f"prompt {index}"}
    fixed = {"index": index, "id": f"row-{index}", "text": text, "finish_reason": "stop"}
    return {**fixed, "alpha": 1.0, "prompts": prompts, "tokens": list(tokens), **own}


RECORDS = [
    record(0, token("One", changed=True, kl=2.0), token(" two", changed=False, kl=0.1)),
    record(
        1,
        *[token(HOSTILE, changed=True, kl=7.0), token("⟨E2 98⟩", changed=False, kind=KINDS[-1])],
        *[token(" x\n", changed=False)] * 6,
        id=HOSTILE,
        prompts={"base": HOSTILE, "expert": HOSTILE},
    ),
    {"index": 2, "id": 5, "error": f"wrong {HOSTILE}"},
]


def summary_of(records: list[dict]) -> ShiftSummary:
    summary = ShiftSummary()
    for one in records:
        summary.add(one)
    return summary


def test_tables_count():
    summary = summary_of(RECORDS)
    said = summary.to_record()
    assert (summary.records, said["answers"], said["tokens"]) == (3, 2, 10)
    assert said["changed"] == pytest.approx(0.2)
    assert said["kl"] == pytest.approx((2.0 + 0.1 + 7.0 + 7 * 0.5) / 10)
    shares = {row["name"]: (row["tokens"], row["changed"]) for row in said["by_position"]}
    assert shares == {"1": (2, 1.0), "2-3": (3, 0.0), "4-7": (4, 0.0), "8-15": (1, 0.0)}
    assert [row["name"] for row in said["by_kind"]] == ["word start", "part of a character"]
    assert said["changes"] == [{"base": "a", "proxy": HOSTILE, "count": 2}]
    console = Console(width=300, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(render(summary))
    text = console.export_text()
    assert "20.0%" in text
    assert "[red]" in text  # no markup of a model's


# -- page ------------------------------------------------------------------------------------------


def written(path: Path, records: list[dict] = RECORDS) -> str:
    write_page(str(path), records, summary_of(records), CONFIG)
    return path.read_text(encoding="utf-8")


def test_data_cannot_leave_their_element(tmp_path):
    page = written(tmp_path / "page.html")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert not set("<>&\u2028\u2029") & set(data)
    read = json.loads(data)
    assert read["rows"][1]["prompts"] == {"base": SHOWN, "expert": SHOWN}
    assert SHOWN in read["pieces"]
    assert page.count("<script") == 2


def test_page_needs_no_network(tmp_path):
    page = written(tmp_path / "page.html")
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    code = re.sub(r'<script type="application/json".*?</script>', "", page)
    assert not re.search(r"https?:|//\w|src=|href=|url\(|import|fetch|innerHTML|insertAdj", code)


def test_page_is_in_the_package():
    assert Path(page_module.__file__).with_name("page.html").exists()


def test_a_large_job_s_page_has_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_TOKENS", 5)
    assert write_page(str(tmp_path / "a"), RECORDS, summary_of(RECORDS), CONFIG) == 1
    assert write_page(str(tmp_path / "b"), RECORDS[1:], summary_of(RECORDS), CONFIG) == 1


def test_only_our_own_pages_are_replaced(tmp_path):
    page = tmp_path / "page.html"
    require_free_page(str(page), overwrite=False)
    written(page)
    require_free_page(str(page), overwrite=False)
    page.write_text("precious")
    with pytest.raises(ProxyConfigError, match="not written by `vllm-proxy inspect`") as caught:
        require_free_page(str(page), overwrite=False)
    assert caught.value.field == f"--html {str(page)!r}"
    assert "--overwrite" in caught.value.remedy
    require_free_page(str(page), overwrite=True)
    with pytest.raises(ProxyConfigError, match="a directory that exists"):
        require_free_page(str(tmp_path / "no" / "page.html"), overwrite=True)


@pytest.fixture
def browse(tmp_path):
    """Open the page of `RECORDS`, run a script in it, and return what it says and what there is."""
    if CHROMIUM is None:
        pytest.skip("no chromium; `apt-get install chromium` to look at the page")

    def browse(script: str, *, dark: bool = False, width: int = 1200) -> tuple[dict, str]:
        page, path = written(tmp_path / "page.html"), tmp_path / "driven.html"
        code = f"document.body.dataset.said = JSON.stringify((() => {{{script}}})())"
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        path.write_text(page.replace("</body>", f"<script>{code}</script></body>"))
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        said = re.search(r'<body data-said="(.*?)">', done.stdout, re.DOTALL)
        assert said, done.stderr
        return json.loads(unescape(said[1])), done.stdout

    return browse


def test_text_stays_text(browse):
    said, dom = browse("""return {
        title: document.title,
        elements: [...document.querySelectorAll("img, script, b")].map((e) => e.tagName),
        prompts: [...document.querySelectorAll(".prompt pre")].map((e) => e.textContent),
        tokens: [...document.querySelectorAll("main .t")].map((e) => e.textContent),
        error: document.querySelector(".error").textContent,
    }""")
    assert said["title"] == "What proxy tuning changed"
    assert said["elements"].count("IMG") == 0
    assert said["elements"].count("SCRIPT") == 3
    assert said["prompts"] == ["prompt 0", SHOWN, SHOWN]
    assert said["tokens"][:2] == ["One", " two"]
    assert "</script><script>document.title = 'owned'</script><img" in said["tokens"][2]
    assert "⟨U+202E⟩" in said["tokens"][2]
    assert said["tokens"][3:5] == ["⟨E2 98⟩", " x↵\n"]
    assert "<!-- &amp; &lt;" in said["error"]
    assert "<script>document.title" not in dom


FILTERS = """
    const seen = () => ({
        rows: [...document.querySelectorAll("article")].map((e) => !e.classList.contains("hidden")),
        lit: [...document.querySelectorAll("main .t")].filter((e) => e.matches(".match")).length,
        nothing: document.querySelector(".nothing").checkVisibility(),
    });
    const set = (id, value) => {
        const control = document.getElementById(id);
        if (id === "only") control.checked = value; else control.value = value;
        control.dispatchEvent(new Event("input"));
        return seen();
    };
    return [
        seen(), set("only", true), set("least", 80), set("only", false), set("least", 0),
        set("search", "PROMPT 0"), set("search", "no such words"),
    ]
"""


def test_filters(browse):
    every, only, large, _, again, found, none = browse(FILTERS)[0]
    assert (every["rows"], every["lit"]) == ([True, True, True], 10)
    assert (only["rows"], only["lit"]) == ([True, True, False], 2)
    assert (large["rows"], large["lit"]) == ([False, True, False], 1)  # 5.12 nats and more
    assert again == every
    assert (found["rows"], found["nothing"]) == ([True, False, False], False)
    assert (none["rows"], none["nothing"]) == ([False, False, False], True)


PANEL = """
    const tokens = [...document.querySelectorAll("main .t")];
    const panel = document.getElementById("panel");
    const press = (key) => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    const state = () => {
        const { left, right, top, bottom } = panel.getBoundingClientRect();
        return {
            on: getComputedStyle(panel).visibility === "visible",
            inside: left >= 0 && top >= 0 && right <= innerWidth && bottom <= innerHeight,
            heading: panel.querySelector("b")?.textContent,
            columns: [...panel.querySelectorAll("section")].map((e) => e.innerText.split(/\\s+/)),
        };
    };
    const states = [state()];
    tokens[0].focus(); states.push(state());
    press("ArrowRight"); states.push(state());
    press("Escape"); states.push(state());
    tokens.at(-1).scrollIntoView(); tokens.at(-1).focus(); states.push(state());
    tokens.at(-1).blur();
    tokens[3].dispatchEvent(new MouseEvent("mouseover", { bubbles: true })); states.push(state());
    return states
"""


@pytest.mark.parametrize("width", [1200, 500])
def test_focus_and_hover_show_the_four_distributions(browse, width):
    before, first, second, escaped, last, hovered = browse(PANEL, width=width)[0]
    assert not before["on"]
    assert not escaped["on"]
    for state in (first, second, last, hovered):
        assert state["on"]
        assert state["inside"]
    assert [first["heading"], second["heading"], hovered["heading"]] == ["One", "·two", "⟨E2 98⟩"]
    names = [column[0] for column in first["columns"]]
    assert names == ["base", "expert", "antiexpert", "proxy"]
    # exp(-1.5), and the likeliest: exp(-1), exp(-2)
    base = ["base", "p", "=", "22.3%,", "rank", "2", "a", "36.8%", "b", "13.5%"]
    assert first["columns"][0] == base
    assert first["columns"][3][:6] == ["proxy", "p", "=", "0,", "rank", "9"]
    assert second["columns"][3][-4:] == base[-4:]
    assert first["columns"][2][1:4] == ["(missing:", "the", "base)"]


def test_light_and_dark(browse):
    script = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    light, dark = (browse(script, dark=dark)[0] for dark in (False, True))
    assert min(light) > 200
    assert max(dark) < 60
