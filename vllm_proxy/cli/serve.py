"""`vllm-proxy serve`."""

import shlex
from typing import Annotated

import typer

from vllm_proxy.cli.options import Alpha, Config, load_config, say


def serve(
    context: typer.Context,
    config: Config,
    alpha: Alpha = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command on stdout and exit.")
    ] = False,
) -> None:
    """Serve the OpenAI API.

    Prints the equivalent `vllm serve` command and then replaces itself with
    it. CONFIG can be followed by any option of `vllm serve`.
    """
    from vllm_proxy.config.redaction import HIDDEN, shown_words
    from vllm_proxy.preflight.check.run import require_valid
    from vllm_proxy.server.command import (
        become,
        environment,
        serve_command,
        unserved,
        with_media_limits,
    )

    settings, flags = with_media_limits(load_config(config, alpha), context.args)
    command = serve_command(settings, flags)
    require_valid(settings)
    if note := unserved(settings):
        say(note)
    additions = environment(settings)
    words = shown_words(command)
    hidden = [*additions, *([f"what is shown as {HIDDEN}"] if words != command else [])]
    printed = shlex.join(words)
    if dry_run:
        if hidden:
            say(f"note: secrets are not printed; set {' and '.join(hidden)} before you run it")
        typer.echo(printed)
    else:
        say(printed)
        become(command, additions)
