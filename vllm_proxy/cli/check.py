"""`vllm-proxy check`."""

import typer

from vllm_proxy.cli.options import Config, load_config


def check(config: Config) -> None:
    """Say whether the three models fit together, and what to do if not."""
    from rich.console import Console

    from vllm_proxy.preflight.check.run import check, render

    report = check(load_config(config, None))
    Console().print(render(report))
    if report.problems:
        raise typer.Exit(2)
