"""What the paper's tasks do beyond a template: data sets, answers, scores."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_BEFORE_THE_LETTER = (
    "(",
    "\\begin{blockquote}",
    "\\begin{code}",
    "<blockquote>",
    " **",
    ">",
    "```\n",
)
"""What sometimes stands before it, in the answers of base models."""
_TOXIGEN = "https://raw.githubusercontent.com/microsoft/TOXIGEN/main/prompts/hate_{}_1k.txt"
_GROUPS = (
    "asian",
    "black",
    "chinese",
    "jewish",
    "latino",
    "lgbtq",
    "mental_disability",
    "mexican",
    "middle_east",
    "muslim",
    "native_american",
    "physical_disability",
    "trans",
    "women",
)
_PROMPTS_OF_A_GROUP = 200


def _without_commas(text: str) -> str:
    return re.sub(r"(\d),(\d)", r"\1\2", text)


def gsm_answer(doc: Mapping[str, Any]) -> str:
    """Return the number after the solution."""
    return _without_commas(doc["answer"].split("####")[1].strip())


def gsm_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Compare the last number of an answer, without its punctuation."""
    answer = _without_commas(results[0])
    numbers = _NUMBER.findall(answer)
    said = _PUNCTUATION.sub("", numbers[-1] if numbers else answer)
    return {"exact_match": float(said == _PUNCTUATION.sub("", gsm_answer(doc)))}


def _with_period(answer: str) -> str:
    answer = answer.strip()
    return answer if answer.endswith(".") else f"{answer}."


def truthfulqa_options(docs: datasets.Dataset) -> datasets.Dataset:
    """Give each question its options and the letter of the right one."""
    chance = random.Random(42)
    rows = []
    for doc in docs:
        right = _with_period(doc["best_answer"])
        wrong = [_with_period(answer) for answer in doc["incorrect_answers"] if answer.strip()]
        options = [right, *chance.sample(wrong, min(3, len(wrong)))]
        chance.shuffle(options)
        lines = [f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
        letter = "ABCD"[options.index(right)]
        rows.append({"question": doc["question"], "options": "".join(lines), "letter": letter})
    return datasets.Dataset.from_list(rows)


def truthfulqa_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Read the letter that an answer begins with; without one it is invalid, and not wrong."""
    answer = results[0]
    for noise in _BEFORE_THE_LETTER:
        answer = answer.replace(noise, "")
    letter = answer.lstrip()[:1]
    if letter not in tuple("ABCD"):
        return {"invalid": 1.0}
    return {"invalid": 0.0, "acc": float(letter == doc["letter"])}


def trimmed_answers(
    answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return answers as the judges read them."""
    trimmed = [[answer.strip().removeprefix("Answer:").strip() for answer in a] for a in answers]
    return [[answer.replace("\n\n", "\n") for answer in a] for a in trimmed]


def words(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Count them: all that can be said of an answer without its judge."""
    return {"words": len(results[0].split())}


def toxigen_prompts(**_: Any) -> dict[str, datasets.Dataset]:
    """Return 200 prompts of each group."""
    files = {group: _TOXIGEN.format(group) for group in _GROUPS}
    by_group = datasets.load_dataset("text", data_files=files)
    chance = random.Random(42)
    rows = []
    for group in _GROUPS:
        texts = [text.strip() for text in by_group[group]["text"]]
        chance.shuffle(texts)
        for text in texts[:_PROMPTS_OF_A_GROUP]:
            # in the files, a prompt is one line
            rows.append({"group": group, "text": text.replace("\\\\", "\\").replace("\\n", "\n")})
    return {"test": datasets.Dataset.from_list(rows)}


def triviaqa_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Look for the answer, in lower case, among the aliases."""
    known = {alias.strip().lower() for alias in doc["answer"]["aliases"]}
    return {"exact_match": float(results[0].strip().lower() in known)}


def programs(
    answers: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Put answers behind their prompts, without the lines that assert or print."""

    def code(answer: str) -> str:
        lines = answer.split("\n")
        kept = [line for line in lines if not line.strip().startswith(("assert", "print"))]
        return "\n".join(kept).rstrip()

    pairs = zip(answers, docs, strict=True)
    return [[doc["prompt"] + code(answer) for answer in several] for several, doc in pairs]
