"""Summary of inspected tokens: where the proxy's most likely token differs from the base's.

The analysis of section 6 of the paper (Liu et al. 2024, arXiv 2401.08565), by kind of token and by
position in the answer.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vllm_proxy.llm.pieces import KINDS

if TYPE_CHECKING:
    from rich.console import Group

COMMONEST = 8
"""Number of the most frequent changes that are shown."""


@dataclass
class Tally:
    """Counts over some tokens: all, those whose most likely token changed, and the sum of KLs."""

    tokens: int = 0
    changed: int = 0
    kl: float = 0.0

    def add(self, token: Mapping[str, Any]) -> None:
        """Count a token of a record."""
        self.tokens += 1
        self.changed += token["changed"]
        self.kl += token["kl"]

    @property
    def share(self) -> float:
        """Fraction of the tokens that changed, from 0 to 1."""
        return self.changed / self.tokens if self.tokens else 0.0

    @property
    def mean_kl(self) -> float:
        """Mean KL(proxy ‖ base) in nats per token."""
        return self.kl / self.tokens if self.tokens else 0.0

    def to_record(self) -> dict[str, float]:
        """Return it for JSON."""
        return {"tokens": self.tokens, "changed": self.share, "kl": self.mean_kl}


@dataclass
class ShiftSummary:
    """Tallies of the records that were added.

    Attributes:
        records: number of records.
        answers: number of records with tokens.
        every: tally of all tokens.
        by_kind: tally of each of `pieces.KINDS`.
        by_position: tallies of the positions 1, 2-3, 4-7, 8-15, … in the answer, by the first one.
        changes: count of each pair of most likely tokens that differ, the base's and the proxy's.
    """

    records: int = 0
    answers: int = 0
    every: Tally = field(default_factory=Tally)
    by_kind: dict[str, Tally] = field(default_factory=dict)
    by_position: dict[int, Tally] = field(default_factory=dict)
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record's tokens."""
        tokens = record.get("tokens", ())
        self.records += 1
        self.answers += bool(tokens)
        for position, token in enumerate(tokens, 1):
            first = 1 << (position.bit_length() - 1)
            self.every.add(token)
            self.by_kind.setdefault(token["kind"], Tally()).add(token)
            self.by_position.setdefault(first, Tally()).add(token)
            if token["changed"]:
                pair = (token[name]["top"][0]["token"] for name in ("base", "proxy"))
                self.changes[tuple(pair)] += 1

    def kinds(self) -> list[tuple[str, Tally]]:
        """Return the tally of each kind that occurs, in the order of `KINDS`."""
        return [(kind, self.by_kind[kind]) for kind in KINDS if kind in self.by_kind]

    def positions(self) -> list[tuple[str, Tally]]:
        """Return the tally of each range of positions, in order."""
        return [
            (str(first) if first == 1 else f"{first}-{2 * first - 1}", tally)
            for first, tally in sorted(self.by_position.items())
        ]

    def to_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "answers": self.answers,
            **self.every.to_record(),
            "by_kind": [{"name": name, **tally.to_record()} for name, tally in self.kinds()],
            "by_position": [
                {"name": name, **tally.to_record()} for name, tally in self.positions()
            ],
            "changes": [
                {"base": base, "proxy": proxy, "count": count}
                for (base, proxy), count in self.changes.most_common(COMMONEST)
            ],
        }


def render(summary: ShiftSummary) -> "Group":
    """Return tables for the terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*headings: str, justify: Literal["left", "right"] = "right") -> Table:
        result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        result.add_column(headings[0])
        for heading in headings[1:]:
            result.add_column(heading, justify=justify)
        return result

    every = summary.every
    tables = []
    for heading, rows in (
        ("token", [("all", every), *summary.kinds()]),
        ("position in the answer", summary.positions()),
    ):
        tallies = table(heading, "tokens", "top token changed", "KL(proxy, base), nats")
        for name, tally in rows:
            share, mean_kl = f"{tally.share:.1%}", f"{tally.mean_kl:.2f}"
            tallies.add_row(name, f"{tally.tokens:,}", share, mean_kl)
        tables.append(tallies)
    if summary.changes:
        changes = table("base's top token", "proxy's", "times", justify="left")
        for (base, proxy), count in summary.changes.most_common(COMMONEST):
            changes.add_row(Text(repr(base)), Text(repr(proxy)), str(count))
        tables.append(changes)
    return Group(*tables)
