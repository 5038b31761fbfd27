"""Structured output: proxy-tuned and base alone.

`python benchmarks/measurements/structured.py`

Real servers, `vllm-proxy serve` (with and without drafts) and stock `vllm serve` of the base, get
the same questions, each in every form that an answer can be constrained to: JSON schemas, tools,
regular expressions, grammars, choices. An answer that ends before its token limit must have its
form. The stock server shows how many answers do not end at this length.
"""

import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from vllm.utils.network_utils import get_open_port

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements.forms import FORMS, OWN, outcome
from measurements.serve import server
from shared.options import parser, positive
from shared.report import finish, table
from vllm_proxy.config.engine_arguments import serve_arguments
from vllm_proxy.config.schema import ProxyConfig, Speculate
from vllm_proxy.server.command import serve_command, vllm_command

COMPACT = ["--structured-outputs-config"]
COMPACT += ['{"backend": "xgrammar", "disable_any_whitespace": true}']
"""JSON allows blanks without end, and an expert that never saw JSON may like them best."""
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


async def outcomes(
    url: str, questions: list[str], settings: dict[str, Any], at_once: int
) -> dict[str, Counter[str]]:
    """Ask every question in every form; return how often each outcome came, by form."""
    places = asyncio.Semaphore(at_once)

    async with httpx.AsyncClient(base_url=url, timeout=1800) as http:

        async def one(form: str, question: str) -> tuple[str, str]:
            async with places:
                return form, await outcome(http, form, question, settings)

        found: dict[str, Counter[str]] = {form: Counter() for form in FORMS}
        asked = (one(form, question) for question in questions for form in FORMS)
        for form, result in await asyncio.gather(*asked):
            found[form][result] += 1
        return found


def main() -> None:
    """Ask, print a table, and one JSON line with everything."""
    command = parser(__doc__, models=None)
    command.add_argument("config", nargs="?", default="configs/demo.yaml")
    command.add_argument("--questions", type=positive, default=20)
    command.add_argument("--output-tokens", type=positive, default=96)
    command.add_argument("--temperature", type=float, default=0.0)
    command.add_argument("--at-once", type=positive, default=32, metavar="N")
    command.add_argument("--draft", type=positive, default=4, metavar="TOKENS")
    command.add_argument("--compact", action="store_true", help="no blanks between parts of JSON")
    arguments = command.parse_args()
    config = ProxyConfig.from_yaml(arguments.config)
    drafting = Speculate(tokens=arguments.draft, adapt=False)
    base = serve_arguments({**config.engine, "model": config.base.model})
    flags = [*TOOLS, *COMPACT] if arguments.compact else TOOLS
    commands = {
        "base": [*vllm_command(), "serve", *base, *flags],
        "proxy": serve_command(config, flags),
        "drafts": serve_command(config.model_copy(update={"speculate": drafting}), flags),
    }
    lines = Path("benchmarks/demo/prompts.jsonl").read_text().splitlines()
    questions = [json.loads(line)["prompt"] for line in lines[: arguments.questions]]
    shown = table("server", "asked", *FORMS, title="right / wrong / cut off / refused")
    results = []
    for name, words in commands.items():
        with (
            tempfile.TemporaryDirectory() as logs,
            server(words, get_open_port(), Path(logs, "log"), sleeps=False) as running,
        ):
            for own, values in ({"stock": {}} if name == "base" else OWN).items():
                settings = {
                    "max_tokens": arguments.output_tokens,
                    "temperature": arguments.temperature,
                    "seed": arguments.seed,
                    **({"vllm_xargs": values} if values else {}),
                }
                found = asyncio.run(outcomes(running.url, questions, settings, arguments.at_once))
                kinds = [Counter[str]() for _ in FORMS]
                for kind, counts in zip(kinds, found.values(), strict=True):
                    for result, count in counts.items():
                        kind[result.partition(":")[0].partition(" ")[0]] += count
                cells = (
                    "/".join(str(kind[key]) for key in ("right", "wrong", "cut", "HTTP"))
                    for kind in kinds
                )
                shown.add_row(name, own, *cells)
                results.append({"server": name, "asked": own, "outcomes": found})
                print(name, own, {form: dict(counts) for form, counts in found.items()}, flush=True)
    finish("structured", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
