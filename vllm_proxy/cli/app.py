"""`vllm-proxy generate | inspect | evaluate | serve | check | plan`: options in, exit codes out.

Exit codes: 0 for success; 1 when some rows of a batch could not be answered; 2 for a mistake in
the configuration or the options, or when an engine fails; 130 after Ctrl-C; 141 when the program
that reads the output has ended (what a shell reports for SIGPIPE).
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vllm_proxy import __version__
from vllm_proxy.cli.check import check
from vllm_proxy.cli.evaluate import evaluate
from vllm_proxy.cli.generate import GenerateCommand, generate
from vllm_proxy.cli.inspect import inspect
from vllm_proxy.cli.options import say
from vllm_proxy.cli.plan import plan
from vllm_proxy.cli.serve import serve
from vllm_proxy.config.errors import ProxyConfigError

# Each command imports what it needs inside its function: `--help` must not wait for torch and vLLM.
# Typer keeps the line breaks of docstrings, so those of commands fit into 80 columns.


class _Commands(TyperGroup):
    """Prints every user mistake as one line and exits with code 2."""

    def main(self, *args: Any, **kwargs: Any) -> None:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            say(f"error: {error.format_message()}")
            code = 2
        except (ProxyConfigError, OSError) as error:
            say(f"error: {error}")
            code = 2
        sys.exit(code or 0)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Proxy tuning in vLLM: next-token logits = base + alpha * (expert - antiexpert).",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-proxy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command(cls=GenerateCommand)(generate)
app.command()(inspect)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(check)
app.command()(plan)
app.command()(evaluate)
