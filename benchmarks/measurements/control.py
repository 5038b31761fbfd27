"""What requests cost that set per-request values.

`python benchmarks/measurements/control.py`

One engine answers the same batch repeatedly, each time with another kind of request: ordinary; with
a per-request strength; adaptive; filtered; with logprobs; with a separate prompt for each member,
as long as the base's. The kinds take turns with ordinary requests to the base alone. Ratios are to
the ordinary batch of the same round.
"""

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import prepare
from shared.options import parser, positive, require_device
from shared.report import finish, ratios, spread, table
from shared.systems import start_base, start_proxy
from shared.workload import Request

KINDS: Mapping[str, Mapping[str, Any]] = {
    "ordinary": {},
    "logprobs": {"logprobs": 5},
    "one alpha for all": {"extra_args": {"proxy_alpha": 0.7}},
    "linear schedule": {"extra_args": {"proxy_alpha_schedule": "linear", "proxy_alpha_steps": 64}},
    "plausibility": {"extra_args": {"proxy_plausibility": 0.1}},
    "top_p": {"extra_args": {"proxy_top_p": 0.9}},
    "adaptive": {"extra_args": {"proxy_alpha": "adaptive"}},
    "prompts": {},  # drawn for each request
}
"""Sampling parameters of a batch's requests, by kind."""


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 16], metavar="N")
    command.add_argument("--prompt-tokens", type=positive, default=16)
    command.add_argument("--tokens", type=positive, default=16)
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    members.require_context(command, arguments.prompt_tokens + arguments.tokens)
    engine = {"enforce_eager": arguments.eager}
    proxy, base = start_proxy(members, device, **engine), start_base(members, device, **engine)
    rng = random.Random(arguments.seed)

    def draw() -> list[int]:
        return [rng.randrange(3, members.vocab_size) for _ in range(arguments.prompt_tokens)]

    def request(kind: str) -> Request:
        params = KINDS[kind]
        if kind == "prompts":
            own = {f"proxy_{role}_prompt": draw() for role in ("expert", "antiexpert")}
            params = {"extra_args": own}
        return Request(draw(), arguments.tokens, params)

    shown, results = table("at once", "kind", "tokens/s", "time over ordinary"), []
    rounds_in_all = len(arguments.at_once) * (arguments.repeats + 1)
    progress = tqdm(total=rounds_in_all, unit="round")
    for at_once in arguments.at_once:
        times: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "base alone")}
        for _ in range(arguments.repeats + 1):
            for kind in KINDS:
                requests = [request(kind) for _ in range(at_once)]
                times[kind].append(proxy.answer(requests, at_once).seconds)
            requests = [request("ordinary") for _ in range(at_once)]
            times["base alone"].append(base.answer(requests, at_once).seconds)
            progress.update()
        times = {kind: own[1:] for kind, own in times.items()}  # the first warms up
        for kind, own in times.items():
            speed = spread(at_once * arguments.tokens / seconds for seconds in own)
            over = ratios(own, times["ordinary"])
            shown.add_row(str(at_once), kind, str(speed), str(over))
            results.append(
                {"at_once": at_once, "kind": kind, "tokens_per_s": speed, "over_ordinary": over}
            )
    progress.close()
    for system in (proxy, base):
        system.stop()
    finish("control", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
