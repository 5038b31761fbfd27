"""`vllm-proxy plan`."""

import json
from typing import Annotated

import typer

from vllm_proxy.cli.options import Config, load_config, require


def plan(
    config: Config,
    gpu: Annotated[
        str,
        typer.Option(metavar="NAME", help="H100-80G, A100-80G, …; or here, which is measured."),
    ],
    tp: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tensor-parallel ranks; else the configuration's, or 1."),
    ] = None,
    pp: Annotated[int | None, typer.Option(metavar="N", help="Pipeline stages, likewise.")] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Try all layouts of so many GPUs instead.")
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", help="Requests at once.")] = 256,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="What each has in its KV cache.")
    ] = 2048,
    prompt: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="To prefill; else as long as --context.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="A JSON object on standard output; the tables go to the other."
        ),
    ] = False,
) -> None:
    """Say what the models take of GPUs: memory, requests, time of a step. Reads no weights."""
    from rich.console import Console

    from vllm_proxy.preflight.plan import Demand, as_record, render
    from vllm_proxy.preflight.plan import plan as make_plan

    counts = {"tp": tp, "pp": pp, "gpus": gpus, "concurrency": concurrency, "context": context}
    for name, value in {**counts, "prompt": prompt}.items():
        require(f"--{name}", value, value is None or value > 0, "give at least 1")
    demand = Demand(concurrency, context, prompt or context)
    found = make_plan(load_config(config, None), gpu, demand, tp=tp, pp=pp, gpus=gpus)
    Console(stderr=as_json).print(render(found))
    if as_json:
        typer.echo(json.dumps(as_record(found)))
