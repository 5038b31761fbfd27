"""`vllm-proxy plan`."""

import json
from typing import Annotated

import typer

from vllm_proxy.cli.options import Config, load_config, require


def plan(
    config: Config,
    gpu: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The GPU to plan for, such as H100-80G or A100-80G; `here` measures this machine.",
        ),
    ],
    tp: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of tensor-parallel ranks. The default is in CONFIG, or 1."
        ),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of pipeline stages. The default is in CONFIG, or 1."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(metavar="N", help="Compare all layouts of N GPUs, instead of --tp and --pp."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="N", help="Number of requests that run at the same time.")
    ] = 256,
    context: Annotated[
        int,
        typer.Option(metavar="TOKENS", help="Number of tokens per request in the KV cache."),
    ] = 2048,
    prompt: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Length of a prompt to prefill. The default is --context."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON on stdout and the tables on stderr."),
    ] = False,
) -> None:
    """Predict memory, concurrent requests and step time on a GPU. Reads no weights."""
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
