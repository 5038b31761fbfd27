"""Scores of systems side by side, the part of the gap that a proxy closes, and their table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_proxy.evaluate.systems import PROXY, TUNED, System

if TYPE_CHECKING:
    from rich.console import Console

_ARROWS = {True: "↑", False: "↓", None: ""}


class Value(NamedTuple):
    """A score, and its standard error if the harness computes one."""

    value: float
    stderr: float | None = None


class Gap(NamedTuple):
    """The closed part of the gap from base to tuned; or None and the reason if it is undefined."""

    closed: float | None
    reason: str = ""


@dataclass
class Metric:
    """One column of the table.

    Attributes:
        task: of the harness, or a group of tasks.
        name: of the metric.
        filter: that extracted the answers from the generated texts.
        higher_is_better: None if the task does not say.
        values: by system.
        gaps: by proxy, if there is a directly tuned model.
    """

    task: str
    name: str
    filter: str
    higher_is_better: bool | None
    values: dict[str, Value] = field(default_factory=dict)
    gaps: dict[str, Gap] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        values = {name: value._asdict() for name, value in self.values.items()}
        gaps = {name: gap._asdict() for name, gap in self.gaps.items()}
        return {**asdict(self), "values": values, "gaps": gaps}


def metrics_of(results: Mapping[str, Mapping[str, Any]], systems: Sequence[System]) -> list[Metric]:
    """Return the metrics of all systems, and the gaps if one system is a tuned model.

    Args:
        results: of the harness, by system.
        systems: those of *results*.
    """
    metrics: dict[tuple[str, str, str], Metric] = {}
    for system in systems:
        result = results[system.name]
        for task, scores in result["results"].items():
            better = result["higher_is_better"].get(task, {})
            for key, value in scores.items():
                name, comma, filter_ = key.partition(",")
                if not comma or name.endswith("_stderr") or not _is_number(value):
                    continue
                stderr = scores.get(f"{name}_stderr,{filter_}")
                metric = metrics.setdefault(
                    (task, name, filter_), Metric(task, name, filter_, better.get(name))
                )
                metric.values[system.name] = Value(value, stderr if _is_number(stderr) else None)
    tuned = next((system.name for system in systems if system.kind == TUNED), None)
    for metric in metrics.values():
        for system in systems:
            if tuned and system.kind == PROXY and system.name in metric.values:
                metric.gaps[system.name] = gap_closed(
                    metric.values[system.name],
                    metric.values.get("base"),
                    metric.values.get(tuned),
                    metric.higher_is_better,
                )
    return list(metrics.values())


def gap_closed(
    proxy: Value, base: Value | None, tuned: Value | None, higher_is_better: bool | None
) -> Gap:
    """Return (proxy - base) / (tuned - base), the measure of the paper's section 3.

    It is undefined if direct tuning does not help: there is no gap to close if tuned is not better
    than base by more than the standard error of their difference.
    """
    if higher_is_better is None:
        return Gap(None, "the task does not say whether higher or lower is better")
    if base is None or tuned is None:
        return Gap(None, f"{'base' if base is None else TUNED} was not measured")
    gap = tuned.value - base.value
    gain = gap if higher_is_better else -gap
    noise = math.hypot(base.stderr or 0.0, tuned.stderr or 0.0)
    if not math.isfinite(gap) or gain <= max(noise, 1e-9 * abs(base.value)):
        within = f" by more than {noise:.4f}, their standard error" if 0 < gain <= noise else ""
        return Gap(
            None, f"tuned ({tuned.value:.4f}) is not better than base ({base.value:.4f}){within}"
        )
    return Gap((proxy.value - base.value) / gap)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def print_table(
    console: "Console", metrics: Sequence[Metric], systems: Sequence[System], hidden: set[str]
) -> None:
    """Print systems as rows and metrics as columns; several tables where one would be too wide.

    Args:
        console: to print on.
        metrics: the columns.
        systems: the rows; each proxy has another row for its gap.
        hidden: tasks to leave out: members of a group that has its own scores.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = [metric for metric in metrics if metric.task not in hidden]
    gaps = {
        f"gap closed, {s.name}": s.name for s in systems if any(s.name in m.gaps for m in shown)
    }
    first = max(map(len, [system.name for system in systems] + [*gaps]))
    for columns in _fitting(shown, console.width - first - 4):
        table = Table("", box=SIMPLE_HEAD)
        for metric in columns:
            table.add_column(Text(_heading(metric)), justify="right", no_wrap=True)
        for system in systems:
            cells = [_cell(metric.values.get(system.name)) for metric in columns]
            table.add_row(system.name, *cells)
        for label, name in gaps.items():
            table.add_row(label, *(_gap_cell(metric.gaps.get(name)) for metric in columns))
        console.print(table)
    for metric in shown:
        for label, name in gaps.items():
            if reason := metric.gaps.get(name, Gap(None)).reason:
                where = f"{label}, {metric.task} {metric.name}"
                console.print(Text(f"• {where}: {reason}"))


def _fitting(metrics: Sequence[Metric], width: int) -> Iterator[list[Metric]]:
    """Yield groups of columns that fit into *width* characters."""
    columns: list[Metric] = []
    left = width
    for metric in metrics:
        lines = [*_heading(metric).splitlines(), "0.0000 ± 0.0000"]
        needed = max(map(len, lines)) + 2
        if columns and needed > left:
            yield columns
            columns, left = [], width
        columns.append(metric)
        left -= needed
    if columns:
        yield columns


def _heading(metric: Metric) -> str:
    by = "" if metric.filter == "none" else f" ({metric.filter})"
    return f"{metric.task}\n{metric.name}{by} {_ARROWS[metric.higher_is_better]}".rstrip()


def _cell(value: Value | None) -> str:
    if value is None:
        return "-"
    return f"{value.value:.4f}" + ("" if value.stderr is None else f" ± {value.stderr:.4f}")


def _gap_cell(gap: Gap | None) -> str:
    return "-" if gap is None or gap.closed is None else f"{gap.closed:.1%}"
