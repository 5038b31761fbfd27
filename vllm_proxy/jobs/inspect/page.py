"""The page of `vllm-proxy inspect`: one HTML file that loads nothing else.

The data are JSON in an element that browsers do not execute. The page's script inserts them as
text.
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
"""The most tokens on a page: with more, browsers become slow."""
_MARK = '<meta name="generator" content="vllm-proxy inspect">'


def is_page(path: Path) -> bool:
    """Whether a file is a page that `write_page` has written."""
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
    """Write the page atomically.

    Args:
        path: of the page.
        records: of the rows, in their order.
        summary: of all records.
        config: that the records were made with.

    Returns:
        The number of records on the page: the first ones, with at most `MOST_TOKENS` tokens in
        total, but at least one record.

    Raises:
        ProxyConfigError: the system refuses.
    """
    rows: list[dict[str, Any]] = []
    pieces, tokens = _TextNumbers(), 0
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
            file.write(render_page(data).encode())
    except OSError as error:
        raise ProxyConfigError(str(error.strerror), field=f"--html {path!r}") from None
    return len(rows)


class _TextNumbers(dict[str, int]):
    """The number of each text; a new text gets the next number."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _row(record: Mapping[str, Any], pieces: _TextNumbers) -> dict[str, Any]:
    """Return a record as the page's script reads it: its many tokens are lists, to save space."""
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


def render_page(data: Mapping[str, Any]) -> str:
    """Return the page template with *data* and a content security policy inserted."""
    page = files("vllm_proxy.jobs.inspect").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for name in ("style", "script"):
        (code,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        hashes[name] = f"{name}-src 'sha256-{digest}'"
    policy = f"default-src 'none'; {hashes['style']}; {hashes['script']}"
    policy += "; base-uri 'none'; form-action 'none'"
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # a lone surrogate is not a character
    # Escape what HTML or JavaScript would interpret; in JSON, only strings contain these.
    text = re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    head, rest = page.split("{{policy}}")
    body, tail = rest.split("{{data}}")
    return f"{head}{policy}{body}{text}{tail}"
