"""Where the time of a decode step goes, and how much of it is our own code.

`python benchmarks/measurements/budget.py`

Timers in the worker process measure each member's forward pass, the head, the sampler and the
runner's whole step. What the worker does not do in a step (scheduler, engine process, messages,
front end) is the rest of the wall time. `ours` is what a single model in vLLM would not need: the
copies that the model makes, the runner's hooks, and what the head does around its product.

On a GPU the timers wait for the device, so a step takes longer than without them: the parts are
right, their sum is not. CUDA graphs are piecewise there, since a full graph has no parts. The step
of the base alone is measured without timers.
"""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import prepare
from shared.options import parser, positive, require_device
from shared.report import finish, spread, table
from shared.systems import ask, start_base, start_proxy, worker_extension
from shared.workload import Request

PROMPT = 16
"""Tokens of every prompt."""


def step_seconds(engine: Any, requests: list[Request], by_part: bool) -> dict[str, float]:
    """Return seconds a decode step, whole and by part, of *requests* of one length each.

    Times two batches of different lengths; the steps of the difference are pure decoding.
    """

    def spent() -> dict[str, float]:
        return ask(engine, "timers")[1] if by_part else {}

    def timed(tokens: int) -> dict[str, float]:
        start = spent()
        answer = engine.answer([Request(request.prompt, tokens) for request in requests])
        parts = {part: seconds - start.get(part, 0.0) for part, seconds in spent().items()}
        return {"step": answer.seconds, **parts}

    short, long = requests[0].tokens // 4, requests[0].tokens
    before, after = timed(short), timed(long)
    return {part: (after[part] - before.get(part, 0.0)) / (long - short) for part in after}


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 64], metavar="N")
    command.add_argument("--tokens", type=positive, default=32)
    arguments = command.parse_args()
    if arguments.tokens < 8:
        command.error(f"--tokens {arguments.tokens}: at least 8 are needed to tell steps apart")
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    members.require_context(command, PROMPT + arguments.tokens)
    engine = {"enforce_eager": arguments.eager}
    if device == "cuda":
        engine["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    proxy = start_proxy(
        members, device, worker_extension_cls=worker_extension("shared.timers.Timers"), **engine
    )
    base = start_base(members, device, **engine)
    proxy.call(ask, "time_parts")
    tables, results = [], []
    for at_once in arguments.at_once:
        requests = [Request(list(range(5, 5 + PROMPT)), arguments.tokens)] * at_once
        rounds = []
        for _ in tqdm(range(arguments.repeats + 1), f"{at_once} at once", unit="round"):
            parts = proxy.call(step_seconds, requests, True)
            alone = base.call(step_seconds, requests, False)["step"]
            rounds.append((parts, alone))
        rounds = rounds[1:]  # the first warms up
        shown = table(
            "part of a step",
            "ms",
            "of the step",
            title=f"{arguments.models}, {arguments.dtype}, {at_once} at once",
        )
        budgets = [budget(parts) for parts, _ in rounds]
        for part in budgets[0]:
            ms = spread(1e3 * one[part] for one in budgets)
            share = spread(100 * one[part] / one["whole step"] for one in budgets)
            shown.add_row(part, str(ms), f"{share} %")
            results.append({"at_once": at_once, "part": part, "ms": ms, "per_cent": share})
        alone = spread(1e3 * one for _, one in rounds)
        shown.add_row("base alone, whole step", str(alone), "")
        results.append({"at_once": at_once, "part": "base alone", "ms": alone})
        tables.append(shown)
    proxy.stop()
    base.stop()
    finish("budget", arguments, tables, results=results)


def budget(parts: dict[str, float]) -> dict[str, float]:
    """Return the parts of a step, which add up to it."""
    members = {
        f"{role}'s forward": parts[role]
        for role in ("base", "expert", "antiexpert")
        if role in parts
    }
    product = parts.get("product", parts["head"])
    sampler = parts["sampler"] if "sampler" in parts else parts["head and sampler"] - parts["head"]
    hooks = parts.get("model with hooks", parts["model"]) - parts["model"]
    ours = parts["model"] - sum(members.values()) + hooks
    runner = parts["runner"] - parts["model"] - hooks - parts["head"] - sampler
    return {
        **members,
        "product of the head": product,
        "sampler": sampler,
        "rest of vLLM's runner": runner,
        "scheduler, messages, front": parts["step"] - parts["runner"],
        "ours: head around its product": parts["head"] - product,
        "ours: model and hooks": ours,
        "whole step": parts["step"],
    }


if __name__ == "__main__":
    main()
