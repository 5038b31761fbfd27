"""The result of a check, and its form on a terminal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_proxy.config.roles import Role

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class MemberReport:
    """The main properties of a member.

    Attributes:
        role: base, expert or antiexpert.
        model: the path or hub id, with the revision if one was given.
        architecture: the model class with which vLLM runs it.
        parameters: number of weights, tied ones once, with the tower if images are allowed; None if
            transformers lacks the architecture.
        vocabulary: number of logits (`vocab_size`), padding included.
        tokenizer_size: number of tokens in the tokenizer; 0 if there is none.
        context_length: length of the longest sequence, as vLLM derives it.
        dtype: the checkpoint's dtype.
        quantization: vLLM's name of the method, or None.
        tied: whether the LM head is the embedding.
    """

    role: Role
    model: str
    architecture: str
    parameters: int | None
    vocabulary: int
    tokenizer_size: int
    context_length: int
    dtype: str
    quantization: str | None
    tied: bool


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of `check`.

    Attributes:
        members: the members that could be read, in the order of `ROLES`.
        notes: sentences on what will run, and on what happens where the members differ.
        problems: one line each, naming field, value and remedy; empty if the engine may start.
    """

    members: tuple[MemberReport, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def render(report: CheckReport) -> "RenderableType":
    """Return a table with a column per member, followed by notes and problems."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows: dict[str, Callable[[MemberReport], str]] = {
        "model": lambda member: member.model,
        "architecture": lambda member: member.architecture,
        "parameters": lambda member: f"{member.parameters:,}" if member.parameters else "?",
        "vocabulary": lambda member: f"{member.vocabulary:,}",
        "tokenizer": lambda member: f"{member.tokenizer_size:,}" if member.tokenizer_size else "-",
        "context": lambda member: f"{member.context_length:,}",
        "dtype": lambda member: member.dtype,
        "quantization": lambda member: member.quantization or "-",
        "tied head": lambda member: "yes" if member.tied else "no",
    }
    table = Table("", *(member.role for member in report.members), box=SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for name, show in rows.items():
        table.add_row(name, *(Text(show(member)) for member in report.members))
    lines = [Text(f"• {sentence}") for sentence in report.notes]
    lines += [Text(f"✗ {problem}", style="bold red") for problem in report.problems]
    if not report.problems:
        lines.append(Text("✓ no problems", style="bold green"))
    return Group(*([table] if report.members else []), *lines)
