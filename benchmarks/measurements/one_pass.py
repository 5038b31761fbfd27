"""What one pass for both small members saves.

`python benchmarks/measurements/one_pass.py --models smollm2`

The expert is the antiexpert plus an adapter (random weights of rank 16, on every linear layer). It
runs merged, as a separate model, and in one pass with the antiexpert. Both, and the base alone,
answer the same requests in turn. The table also shows the weight bytes that a step reads, and the
memory of the worker that holds them.

`--experts 8` adds an engine with eight such adapters, of which each request chooses one in turn.
"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import CACHE, Members, prepare
from shared.options import Parser, add_lengths, parser, positive, require_device
from shared.report import finish, ratios, spread, table
from shared.systems import BASE, ONE_PASS, System, start_base, start_proxy
from shared.workload import Request, Workload
from vllm_proxy.config.schema import Member

RANK = 16
MERGED = "merged"


def paired(command: Parser, members: Members, one_pass: bool | None = None) -> Members:
    """Return these members, but as the expert the antiexpert and an adapter.

    Members that have none end the program by one line.
    """
    if members.config.antiexpert is None or members.config.engine.get("load_format") == "dummy":
        command.error(
            "--models: for one pass there must be an antiexpert with weights, to make an adapter "
            "for; use smollm2"
        )
    antiexpert = members.config.antiexpert
    lora = _adapter_of(antiexpert.model)
    expert = Member(model=antiexpert.model, revision=antiexpert.revision, lora=lora)
    changes = {"expert": expert, "one_pass": one_pass}
    return replace(members, config=members.config.model_copy(update=changes))


def with_experts(members: Members, count: int) -> Members:
    """Return members with one pass, with this many adapters for requests to choose from."""
    model = members.config.antiexpert.model
    experts = {f"expert-{seed}": _adapter_of(model, seed) for seed in range(count)}
    config = members.config.model_copy(update={"experts": experts})
    return replace(members, config=config)


def in_turn(requests: list[Request], members: Members) -> list[Request]:
    """Return the requests with an expert for each, in turn; as they are if there are none."""
    names = [*members.config.experts]
    if not names:
        return requests
    return [
        one._replace(params={"extra_args": {"proxy_expert": names[i % len(names)]}})
        for i, one in enumerate(requests)
    ]


def _adapter_of(model: str, seed: int = 0) -> str:
    """Return an adapter of random weights on every linear layer of *model*; made once."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    digest = hashlib.sha256(str(Path(model).resolve()).encode()).hexdigest()[:12]
    path = CACHE / "adapters" / f"{digest}-{RANK}-{seed}"
    if not (path / "adapter_config.json").is_file():
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(path)
    return str(path)


def resident_bytes(engine: Any) -> int:
    """Return what the largest of an engine's processes, its worker, has of memory."""
    import psutil

    own = psutil.Process()
    return max(p.memory_info().rss for p in (own, *own.children(recursive=True)))


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 16], metavar="N")
    command.add_argument("--experts", type=positive, metavar="N", help="adapters to choose from")
    add_lengths(command)
    return command


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    run = {MERGED: paired(command, members, False), ONE_PASS: paired(command, members, True)}
    if arguments.experts:
        run[f"{arguments.experts} experts"] = with_experts(run[ONE_PASS], arguments.experts)
    read = dict.fromkeys(run, members.bytes_read("base", "antiexpert"))
    read |= {BASE: members.bytes_read("base"), MERGED: members.bytes_read()}
    systems: dict[str, System] = {
        BASE: start_base(members, device, enforce_eager=arguments.eager),
        **{
            name: start_proxy(own, device, enforce_eager=arguments.eager)
            for name, own in run.items()
        },
    }
    shown = table(
        *("at once", "system", "ms a token", "over base", "bytes over base", "over merged"),
        *("over one pass", "GiB"),
        title=f"{arguments.models}, {arguments.dtype}",
    )
    workload = Workload(arguments.prompt_tokens, arguments.output_tokens)
    results = []
    for at_once in arguments.at_once:
        requests = workload.draw(max(at_once, 4), members.vocab_size, arguments.seed)
        times: dict[str, list[float]] = {name: [] for name in systems}
        for number in tqdm(range(arguments.repeats + 1), f"{at_once} at once", unit="round"):
            for name, system in systems.items():
                asked = in_turn(requests, run.get(name, members))
                seconds = system.answer(asked, at_once).seconds_per_token
                times[name] += [seconds] if number else []  # the first warms up
        for name, system in systems.items():
            result = {
                "at_once": at_once,
                "system": name,
                "ms_per_token": spread(1e3 * t for t in times[name]),
                "over_base": ratios(times[name], times[BASE]),
                "bytes_ratio": read[name] / read[BASE],
                "over_merged": ratios(times[name], times[MERGED]),
                "over_one_pass": ratios(times[name], times[ONE_PASS]),
                "resident_bytes": system.call(resident_bytes),
            }
            results.append(result)
            shown.add_row(
                str(at_once),
                name,
                str(result["ms_per_token"]),
                str(result["over_base"]),
                f"{result['bytes_ratio']:.2f}",
                str(result["over_merged"]) if name == ONE_PASS else "",
                str(result["over_one_pass"]) if name not in (BASE, MERGED, ONE_PASS) else "",
                f"{result['resident_bytes'] / 2**30:.2f}",
            )
    for system in systems.values():
        system.stop()
    finish("one_pass", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
