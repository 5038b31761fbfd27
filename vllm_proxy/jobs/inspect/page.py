"""A page for people: one file, which needs nothing else, and asks nothing of a network.

Data are JSON in an element that no browser runs; the page's script puts them in place as text.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_proxy import __version__
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import DISTRIBUTIONS
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.files import replacing
from vllm_proxy.jobs.inspect.summary import ShiftSummary
from vllm_proxy.llm.pieces import KINDS

MOST_TOKENS = 20_000
"""How many tokens a page shows: with more, browsers grow slow."""
_MARK = '<meta name="generator" content="vllm-proxy inspect">'


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return _MARK in file.read(1024)
    except OSError:
        return False


def write_page(
    path: str,
    records: Iterable[Mapping[str, Any]],
    summary: ShiftSummary,
    config: ProxyConfig,
) -> int:
    """Write the page, at once.

    Args:
        path: of the page.
        records: of the rows, in their order.
        summary: of all of them.
        config: what they were made with.

    Returns:
        How many of the records are on it: whole ones, of at most `MOST_TOKENS` tokens together, but
        one at least.

    Raises:
        ProxyConfigError: the system refuses.
    """
    rows, pieces, tokens = [], _Numbers(), 0
    for record in records:
        tokens += len(record.get("tokens", ()))
        if rows and tokens > MOST_TOKENS:
            break
        rows.append(_row(record, pieces))
    members = {role: str(config.member(role)) for role in config.roles}
    alpha = config.alpha if isinstance(config.alpha, str | float) else str(config.alpha)
    data = {
        "version": __version__,
        "members": members,
        "alpha": alpha,
        "kinds": KINDS,
        "summary": summary.to_record(),
        "pieces": list(pieces),
        "rows": rows,
        "total": summary.records,
    }
    try:
        with replacing(path) as file:
            file.write(fill(data).encode())
    except OSError as error:
        raise ProxyConfigError(f"--html {path!r}: {error.strerror}") from None
    return len(rows)


class _Numbers(dict[str, int]):
    """Texts by number, in the order of their first use."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _row(record: Mapping[str, Any], pieces: _Numbers) -> dict[str, Any]:
    """Return what the page's script reads: lists in the place of names, for there are many."""
    names = "index", "id", "error", "text", "alpha", "weights", "finish_reason", "prompts"
    row = {name: record[name] for name in names if record.get(name) is not None}
    row["tokens"] = [
        [
            pieces[token["token"]],
            KINDS.index(token["kind"]),
            round(token["kl"], 4),
            int(token["changed"]),
            [
                [
                    _rounded(token[name]["logprob"]),
                    token[name]["rank"],
                    [[pieces[c["token"]], _rounded(c["logprob"])] for c in token[name]["top"]],
                ]
                for name in DISTRIBUTIONS
            ],
        ]
        for token in record.get("tokens", ())
    ]
    return row


def _rounded(logprob: float | None) -> float | None:
    return None if logprob is None else round(logprob, 4)


def fill(data: Mapping[str, Any]) -> str:
    """Return the page with *data* in it."""
    page = files("vllm_proxy.jobs.inspect").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for name in ("style", "script"):
        (code,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        hashes[name] = f"{name}-src 'sha256-{digest}'"
    policy = f"default-src 'none'; {hashes['style']}; {hashes['script']}"
    policy += "; base-uri 'none'; form-action 'none'"
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # a surrogate alone is no character
    # What HTML, or a script, would read as its own; only strings have any of these.
    text = re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    head, rest = page.split("{{policy}}")
    body, tail = rest.split("{{data}}")
    return f"{head}{policy}{body}{text}{tail}"
