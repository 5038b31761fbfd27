"""What requests pay for having something of their own: `python benchmarks/control.py CONFIG`.

One engine answers the same batch again and again, each time with another kind of request: ordinary
ones; with a strength of their own; adaptive; filtered; with a prompt for each member, as long as
the base's. The kinds take turns. Times are medians over the repeats; ratios are medians of the
ratios to the ordinary batch of the same repeat, with their range.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from provenance import provenance
from rich import box
from rich.console import Console
from rich.table import Table
from vllm import SamplingParams

from vllm_proxy import ProxyLLM

CONTROLS = {
    "ordinary": {},
    "one alpha for all": {"proxy_alpha": 0.7},
    "linear schedule": {"proxy_alpha_schedule": "linear", "proxy_alpha_steps": 64},
    "plausibility": {"proxy_plausibility": 0.1},
    "top_p": {"proxy_top_p": 0.9},
    "adaptive": {"proxy_alpha": "adaptive"},
    "prompts": {},  # drawn for each request
}
"""What the requests of a batch ask for, by kind."""


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="configs/demo.yaml")
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    llm = ProxyLLM.from_config(arguments.config)
    rng = random.Random(0)
    vocab_size = llm.model_config.get_vocab_size()

    def draw() -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(arguments.prompt_tokens)]

    def seconds(count: int, kind: str) -> float:
        # New prompts every time: nothing is in the prefix cache.
        prompts = [{"prompt_token_ids": draw()} for _ in range(count)]
        if kind == "prompts":
            prompts = [p | {"expert_prompt": draw(), "antiexpert_prompt": draw()} for p in prompts]
        params = SamplingParams(
            temperature=0.0,
            max_tokens=arguments.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=CONTROLS[kind] or None,
        )
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started

    results = []
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("requests at once", "kind", "tokens/s", "time over ordinary (range)"):
        table.add_column(column, justify="right")
    for count in arguments.requests:
        for kind in CONTROLS:
            seconds(count, kind)  # warm up
        times = [
            {kind: seconds(count, kind) for kind in CONTROLS} for _ in range(arguments.repeats)
        ]
        for kind in CONTROLS:
            median = statistics.median(repeat[kind] for repeat in times)
            ratios = sorted(repeat[kind] / repeat["ordinary"] for repeat in times)
            speed = count * arguments.max_tokens / median
            ratio = statistics.median(ratios)
            results.append({"requests": count, "kind": kind, "seconds": median, "ratios": ratios})
            words = f"{ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            table.add_row(str(count), kind, f"{speed:.0f}", words)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    record = {
        **provenance("control", arguments),
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
