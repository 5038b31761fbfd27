"""Show proxy tuning at work: `python benchmarks/demo/run.py configs/demo.yaml`, or `make demo`.

Answers held-out questions three times: with the base alone, with the expert alone (both as stock
vLLM runs them), and proxy-tuned through `vllm-proxy generate`, and prints the answers side by side.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from textwrap import shorten

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_proxy.config.schema import ProxyConfig

QUESTIONS = Path(__file__).parent / "heldout.jsonl"


def read_rows(path: Path) -> list[dict]:
    """Return the JSON lines of *path*."""
    # Not `splitlines`, which also breaks at the U+2028 that an answer may have.
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answers_alone(config: ProxyConfig, model: str, prompts: list[str]) -> list[str]:
    """Answer with one model, under the engine and sampling settings of *config*."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, **config.engine)
    params = SamplingParams(**config.sampling)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [output.outputs[0].text for output in outputs]


def answers_proxy_tuned(path: Path, rows: list[dict], directory: Path) -> list[str]:
    """Answer with the command line, as a user would."""
    questions, answers = directory / "questions.jsonl", directory / "answers.jsonl"
    questions.write_text(
        "".join(json.dumps({"id": row["id"], "prompt": row["prompt"]}) + "\n" for row in rows)
    )
    command = [str(Path(sys.executable).with_name("vllm-proxy")), "generate", str(path)]
    command += ["--input", str(questions), "--output", str(answers), "--overwrite"]
    Console(stderr=True).print("$ " + " ".join(command[1:]), style="dim", highlight=False)
    subprocess.run(command, check=True)
    by_index = {row["index"]: row["text"] for row in read_rows(answers)}
    return [by_index[index] for index in range(len(rows))]


def main() -> None:
    """Print the table and the exact-match scores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="the proxy-tuned model")
    path = parser.parse_args().config
    # Questions this short are answered soonest by one process that uses every core.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    started = time.perf_counter()
    config = ProxyConfig.from_yaml(path)
    rows = read_rows(QUESTIONS)
    prompts = [row["prompt"] for row in rows]
    columns = {
        "proxy-tuned": answers_proxy_tuned(path, rows, Path(config.base.model).parent),
        "base": answers_alone(config, config.base.model, prompts),
        "expert": answers_alone(config, config.expert.model, prompts),
    }
    right = {
        name: [answer.strip() == row["answer"] for answer, row in zip(answers, rows, strict=True)]
        for name, answers in columns.items()
    }
    pairs = list(zip(right["proxy-tuned"], right["expert"], strict=True))
    gained = [index for index, pair in enumerate(pairs) if pair == (True, False)]
    lost = [index for index, pair in enumerate(pairs) if pair == (False, True)]

    console = Console()
    for title, chosen, shown in (
        ("Right by proxy tuning, wrong by the expert", gained, 10),
        ("Right by the expert, wrong by proxy tuning", lost, 4),
    ):
        note = f"{title}: {len(chosen)} of {len(rows)} held-out questions"
        console.print(side_by_side(f"{note}, the first {shown}", chosen[:shown], rows, columns))
    for name in ("base", "expert", "proxy-tuned"):
        console.print(f"{name:12} answers {sum(right[name]) / len(rows):6.1%} exactly right")
    console.print(f"alpha = {config.alpha}; {time.perf_counter() - started:.0f} s in all")


def side_by_side(
    title: str, chosen: list[int], rows: list[dict], columns: dict[str, list[str]]
) -> Table:
    """Return a table of the *chosen* rows with everyone's answers."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for heading in ("question", "right answer", "base", "expert", "proxy-tuned"):
        table.add_column(heading, overflow="fold")
    for index in chosen:
        row = rows[index]
        question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        answers = (columns[name][index] for name in ("base", "expert", "proxy-tuned"))
        table.add_row(question, row["answer"], *(marked(one, row["answer"]) for one in answers))
    return table


def marked(answer: str, right: str) -> str:
    """Return the answer on one line, green if it is the right one."""
    from rich.markup import escape

    line = escape(shorten(answer, 40, placeholder=" …")) or "[dim](nothing)[/]"
    return f"[bold green]{line}[/]" if answer.strip() == right else line


if __name__ == "__main__":
    main()
