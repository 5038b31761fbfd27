"""The tasks: two of different kinds, each as prompts with one right answer.

- `facts`: short questions about countries and cities. The base already has the knowledge;
  fine-tuning teaches it to answer with the name alone. Test countries are never trained on.
- `family`: who is whom in a story of a few sentences, `reasoning-gym`'s `family_relationships`. A
  skill that the base hardly has. Stories are generated, as many as are needed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from demo.facts import load_facts

FACTS = {"heldout_countries": 80, "dev_countries": 26, "heldout_cities": 4}
TRAINING, VALIDATION, TEST = 4000, 150, 500  # of generated questions
SPLIT_SEED = 1_000_000  # of stories to choose by and to measure with; no training seed comes near


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: "Question: …\\nAnswer:".
        answer: the one right answer, without the space that follows "Answer:".
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task whose splits have no question in common.

    Attributes:
        name: a key of `TASKS`.
        training: gives the items to train on, by seed.
        validation: items by which strength and shots are chosen.
        test: items that are measured, and serve nothing else.
        max_tokens: the most tokens of an answer, and then some.
    """

    name: str
    training: Callable[[int], list[Item]]
    validation: list[Item]
    test: list[Item]
    max_tokens: int

    def at_most(self, items: int | None) -> "Task":
        """Return the task with at most this many items in validation and test."""
        return replace(self, validation=self.validation[:items], test=self.test[:items])


def facts() -> Task:
    """Questions about countries; the splits share no country. One training set for all seeds."""
    splits = {
        split: [Item(fact.prompt, fact.answer) for fact in found]
        for split, found in load_facts(**FACTS).items()
    }
    rng = random.Random(SPLIT_SEED)
    for split in splits.values():  # in the package's order, a part of one is no sample of it
        rng.shuffle(split)
    return Task("facts", lambda seed: splits["train"], splits["dev"], splits["heldout"], 16)


def generated(name: str, generator: str, max_tokens: int) -> Task:
    """Questions of one of `reasoning-gym`'s generators; each seed trains on its own."""
    measured = questions(generator, VALIDATION + TEST, SPLIT_SEED)
    known = {item.prompt for item in measured}

    def training(seed: int) -> list[Item]:
        found = questions(generator, TRAINING, seed)
        return [item for item in found if item.prompt not in known]

    return Task(name, training, measured[:VALIDATION], measured[VALIDATION:], max_tokens)


def questions(generator: str, count: int, seed: int) -> list[Item]:
    """Return *count* different questions."""
    from reasoning_gym import create_dataset

    found = create_dataset(generator, size=2 * count, seed=seed)
    items = (Item(f"Question: {row['question'].strip()}\nAnswer:", row["answer"]) for row in found)
    return list(dict.fromkeys(items))[:count]


TASKS: dict[str, Callable[[], Task]] = {
    "facts": facts,
    "family": lambda: generated("family", "family_relationships", 8),
}


def is_right(answer: str, item: Item) -> bool:
    """Whether *answer* is the right one, letter by letter, surrounding white space aside."""
    return answer.strip() == item.answer


def few_shot(item: Item, examples: list[Item]) -> str:
    """Return the prompt of *item* after solved examples."""
    solved = "".join(f"{example.prompt} {example.answer}\n\n" for example in examples)
    return solved + item.prompt
