"""Options that several benchmarks have."""

import argparse
import sys
from typing import NoReturn

import torch

DTYPES = ("bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """A parser whose every complaint is one line on standard error, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End the program; *message* names the option, its value and the remedy."""
        sys.stderr.write(f"{self.prog}: {message}\n")
        sys.exit(2)


def parser(doc: str, *, models: str | None = "smollm2") -> Parser:
    """Return a parser with the options of benchmarks that run engines; *models*: the usual set.

    None leaves `--models` out.
    """
    result = Parser(
        description=doc.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if models:
        sets = "a set of members (see members.py), or a YAML config"
        result.add_argument("--models", default=models, metavar="NAME", help=sets)
    result.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    result.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    result.add_argument("--eager", action="store_true", help="compile nothing")
    result.add_argument("--repeats", type=positive, default=5, metavar="N", help="timed rounds")
    result.add_argument("--seed", type=int, default=0)
    return result


def add_lengths(command: Parser) -> None:
    """Add the bounds between which the lengths of mixed requests are drawn."""
    bounds = {"nargs": 2, "type": positive, "metavar": ("LEAST", "MOST")}
    command.add_argument(
        "--prompt-tokens", default=[8, 64], **bounds, help="between these two lengths"
    )
    command.add_argument(
        "--output-tokens", default=[4, 64], **bounds, help="between these two lengths"
    )


def positive(text: str) -> int:
    """Read a count. Raises `argparse.ArgumentTypeError`, which argparse puts in its message."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def require_device(parser: Parser, asked: str) -> str:
    """Return the device that vLLM will run on: `cuda` or `cpu`."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and here == "cpu":
        parser.error("--device cuda: no GPU answers here; use --device cpu, or a CUDA build")
    if asked == "cpu" and torch.version.cuda:
        parser.error("--device cpu: vLLM's CUDA build is installed; run `make setup BUILD=cpu`")
    return here
