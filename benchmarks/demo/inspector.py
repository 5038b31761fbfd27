"""Inspect the demo's answers: what the inspecting pass costs, and the page with its screenshot.

`python benchmarks/demo/inspector.py configs/demo.yaml --html PAGE --screenshot PNG`, after
`python benchmarks/demo/models.py --output .cache/demo` has built the models.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.options import Parser, positive
from shared.report import finish, ratios, spread, table
from vllm_proxy import ProxyConfig, ProxyLLM
from vllm_proxy.jobs.inspect.page import write_page
from vllm_proxy.jobs.inspect.summary import ShiftSummary

QUESTIONS = Path(__file__).parent / "heldout.jsonl"
GIVEN = {
    "id": "a text of somebody else's",
    "prompt": "Question: What is the capital of Chile?\nAnswer:",
    "completion": " The capital of Chile is Santiago. It lies in a valley between the Andes and "
    "the Pacific, was founded in 1541, and has six million inhabitants, a third of the country's.",
}
"""An answer that is given: the first one on the page."""
TOKEN = "#3.1"
"""Which token of which row the screenshot points at."""


def read_questions() -> list[dict]:
    """Return the held-out questions."""
    with QUESTIONS.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def measure(llm: ProxyLLM, prompts: list[str], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Return seconds of each round: to generate, and to inspect what was generated."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {"generate": [], "inspect": [], "top 1": []}
    for round_ in range(repeats + 1):
        # Ids that no round before has cached.
        asked = [f"Round {round_}. {prompt}" for prompt in prompts]
        started = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        times = [time.perf_counter() - started]
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        for top_k in (5, 1):
            started = time.perf_counter()
            llm.inspect(asked, completions=answers, top_k=top_k)
            times.append(time.perf_counter() - started)
        if round_:  # the first one warms up
            for own, value in zip(seconds.values(), times, strict=True):
                own.append(value)
    return seconds


def screenshot(page: Path, path: Path) -> None:
    """Have Chromium draw the page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("--screenshot: there is no chromium; install it, or leave this out")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--window-size=1160,1330"]
        command += ["--virtual-time-budget=2000", f"--screenshot={path.resolve()}"]
        url = page.resolve().as_uri() + TOKEN
        subprocess.run([*command, url], check=True, capture_output=True, timeout=120)


def main() -> None:
    """Measure, and write the page."""
    parser = Parser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="the proxy-tuned model")
    parser.add_argument(
        "--requests", type=positive, default=16, metavar="N", help="requests at once"
    )
    parser.add_argument(
        "--tokens", type=positive, default=32, metavar="N", help="tokens per answer"
    )
    parser.add_argument("--shown", type=positive, default=40, metavar="N", help="questions on PAGE")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="timed rounds")
    parser.add_argument("--html", type=Path, metavar="PAGE")
    parser.add_argument(
        "--screenshot", type=Path, metavar="PNG", help="write a screenshot of the page"
    )
    arguments = parser.parse_args()
    if arguments.screenshot and not arguments.html:
        parser.error("--screenshot is given without --html; name the page, too")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    config = ProxyConfig.from_yaml(arguments.config)
    llm = ProxyLLM.from_config(config)
    questions = read_questions()
    prompts = [row["prompt"] for row in questions[: arguments.requests]]
    seconds = measure(llm, prompts, arguments.tokens, arguments.repeats)
    costs = table("pass", "s", "over generating", title="Inspecting what was generated")
    for name, own in seconds.items():
        costs.add_row(name, str(spread(own)), str(ratios(own, seconds["generate"])))

    summary, records = ShiftSummary(), []
    shown = [GIVEN, *questions[: arguments.shown]]
    inspections = llm.inspect(GIVEN["prompt"], completions=GIVEN["completion"])
    inspections += llm.inspect([row["prompt"] for row in shown[1:]])
    for index, (row, inspection) in enumerate(zip(shown, inspections, strict=True)):
        tokens = [token.to_record() for token in inspection.tokens]
        records.append(
            {
                "index": index,
                "id": row["id"],
                "text": inspection.text,
                "finish_reason": inspection.finish_reason,
                "prompts": {"base": row["prompt"]},
                "tokens": tokens,
            }
        )
        summary.add(records[-1])
    if arguments.html:
        write_page(str(arguments.html), records, summary, config)
        if arguments.screenshot:
            screenshot(arguments.html, arguments.screenshot)
    llm.llm_engine.engine_core.shutdown()
    finish(
        "inspect_demo",
        arguments,
        [costs],
        seconds=seconds,
        ratio=ratios(seconds["inspect"], seconds["generate"]),
        shift=summary.to_record(),
    )


if __name__ == "__main__":
    main()
