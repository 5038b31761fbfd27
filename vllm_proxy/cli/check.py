"""`vllm-proxy check`."""

import typer

from vllm_proxy.cli.options import Config, load_config


def check(config: Config) -> None:
    """Check whether the three models work together, and say what to change if they do not."""
    from rich.console import Console

    from vllm_proxy.preflight.check.run import check, render

    report = check(load_config(config, None))
    Console().print(render(report))
    if report.problems:
        raise typer.Exit(2)
