"""The experiment: no leaks between splits, figures by plain arithmetic, a short run of it all."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import forks
from support.commands import COMMAND_ENV

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gap():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = ("tasks", "results", "measure")
        gap = {name: importlib.import_module(f"experiments.gap.{name}") for name in names}
        demo = {name: importlib.import_module(f"demo.{name}") for name in ("evaluate", "models")}
        yield gap | demo


def run(*words: object) -> subprocess.CompletedProcess:
    script = BENCHMARKS / "experiments" / "gap_closed.py"
    return forks.run([str(script), *map(str, words)], COMMAND_ENV)


def test_no_question_is_in_two_splits_and_no_test_country_is_trained_on(gap):
    tasks = [make() for make in gap["tasks"].TASKS.values()]
    for task in tasks:
        training = {item.prompt for item in task.training(0)}
        validation = {item.prompt for item in task.validation}
        test = {item.prompt for item in task.test}
        assert len(test) == len(task.test) >= 500
        assert len(validation) == len(task.validation) >= 150
        assert len(training) > 1000
        assert not training & validation | training & test | validation & test
    cities = [item for item in tasks[0].test if "Which country" in item.prompt]
    trained = {item.answer for item in tasks[0].training(0)}
    assert len(cities) > 200
    assert not trained & {item.answer for item in cities}
    assert tasks[1].training(0) != tasks[1].training(1)
    assert tasks[1].training(1) == tasks[1].training(1)


def test_strength_and_shots_are_chosen_by_validation_alone(gap):
    """By test, one would take strength 2 and one example."""
    right = {
        "base": {"validation": ["0000"], "test": ["0000"]},
        "antiexpert": {"validation": ["0000"], "test": ["0000"]},
        "expert": {"validation": ["0000"], "test": ["1000"]},
        "proxy 1.0": {"validation": ["0011"], "test": ["1100"]},
        "proxy 2.0": {"validation": ["0001"], "test": ["1111"]},
        "few-shot 1": {"validation": ["0001"], "test": ["1111"]},
        "few-shot 2": {"validation": ["0111"], "test": ["1110"]},
        "tuned": {"validation": ["0000"], "test": ["1110"]},
    }
    found = gap["results"].outcome(right, [1.0, 2.0], [1, 2])
    assert (found.alpha, found.shots, found.items) == (1.0, 2, 4)
    assert found.gap.value == pytest.approx(100 * 2 / 3)
    assert found.over_expert.value == pytest.approx(25)
    assert found.over_few_shot.value == pytest.approx(-25)
    right["tuned"]["test"] = ["0000"]
    assert gap["results"].outcome(right, [1.0, 2.0], [1, 2]).gap is None


def test_intervals_are_those_of_the_normal_approximation(gap):
    """300 of 1000 right: 30 +- 1.96 * sqrt(0.3 * 0.7 / 1000) %. Pairs that agree add no doubt."""
    marks, better = "1" * 300 + "0" * 700, "1" * 350 + "0" * 650
    right = {
        "base": {"validation": ["0"], "test": ["0" * 1000]},
        "expert": {"validation": ["0"], "test": [marks]},
        "proxy 1.0": {"validation": ["0"], "test": [better]},
        "few-shot 1": {"validation": ["0"], "test": [better]},
        "tuned": {"validation": ["0"], "test": ["1" * 1000]},
    }
    found = gap["results"].outcome(right, [1.0], [1])
    half = 100 * 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    expert = found.accuracy["expert"].mean
    assert expert.value == pytest.approx(30)
    assert expert.low == pytest.approx(30 - half, abs=0.2)
    assert expert.high == pytest.approx(30 + half, abs=0.2)
    half = 100 * 1.96 * (0.05 * 0.95 / 1000) ** 0.5
    assert found.over_expert.low == pytest.approx(5 - half, abs=0.2)
    assert found.over_few_shot == (0, 0, 0)


def test_seeds_are_averaged_item_by_item(gap):
    right = {
        system: {"validation": ["0", "0"], "test": ["0000", "0000"]}
        for system in ("base", "expert", "proxy 1.0", "few-shot 1")
    }
    right["tuned"] = {"validation": ["0", "0"], "test": ["1100", "1111"]}
    accuracy = gap["results"].outcome(right, [1.0], [1]).accuracy["tuned"]
    assert accuracy.mean.value == pytest.approx(75)
    assert accuracy.seeds == [50, 100]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "facs"], "--tasks: invalid choice: 'facs'"),
        (["--items", "0"], "--items: '0' is not a whole number above 0"),
        (["--redraw"], "--redraw: --results None: there is no such file; name an earlier run's"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_wrong_input_is_one_line(words, message):
    done = run(*words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.engine
def test_a_short_run(gap, tmp_path):
    """Trains, measures, reports; answers are those of a transformers loop; done once, not again."""
    results, drawing = tmp_path / "results.json", tmp_path / "gap.svg"
    words = ["--tasks", "family", "--seeds", 0, "--alphas", 1.0, "--shots", 1, "--items", 6]
    words += ["--heal-steps", 1, "--tune-steps", 3, "--dtype", "float32", "--eager"]
    words += ["--output", tmp_path / "kept", "--results", results, "--plot", drawing]
    done = run(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(results.read_text())
    assert json.loads(done.stdout.splitlines()[-1])["outcomes"] == record["outcomes"]
    assert record["versions"]["reasoning-gym"]
    assert "</svg>" in drawing.read_text()

    (kept,) = (tmp_path / "kept").glob("answers-*.json")
    answers = json.loads(kept.read_text())
    task = gap["tasks"].TASKS["family"]().at_most(6)
    paths = {path.name.partition("-")[0]: path for path in (tmp_path / "kept").glob("*-*/")}
    paths["base"] = gap["models"].build() / "base"
    models = {
        role: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for role, path in paths.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(paths["base"])
    (example,) = gap["measure"].examples(task, 0, [1])
    prompts = [item.prompt for item in task.test]
    solved = [f"{example.prompt} {example.answer}\n\n{prompt}" for prompt in prompts]
    systems = {
        "base": ([(1.0, "base")], prompts),
        "expert": ([(1.0, "expert")], prompts),
        "antiexpert": ([(1.0, "antiexpert")], prompts),
        "tuned": ([(1.0, "tuned")], prompts),
        "few-shot 1": ([(1.0, "base")], solved),
        "proxy 1.0": ([(1.0, "base"), (1.0, "expert"), (-1.0, "antiexpert")], prompts),
    }
    assert systems.keys() == answers.keys()
    for name, (terms, asked) in systems.items():
        texts = gap["evaluate"].generate([(w, models[m]) for w, m in terms], tokenizer, asked)
        # The loop does not stop at the end of a line, nor as soon.
        lines = [text.partition("\n")[0] for text in texts]
        for ours, line in zip(answers[name]["test"], lines, strict=True):
            assert line.startswith(ours)
            assert ours == line or len(tokenizer(ours).input_ids) >= task.max_tokens - 1
        right = [line.strip() == item.answer for line, item in zip(lines, task.test, strict=True)]
        assert record["right"]["family"][name]["test"] == ["".join(str(int(r)) for r in right)]

    again = run(*words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("there already") == 4
    assert json.loads(again.stdout.splitlines()[-1])["outcomes"] == record["outcomes"]
