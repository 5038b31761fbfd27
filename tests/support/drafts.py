"""Requests for which the expert drafts, and how many of its drafts are accepted."""

import random
from collections.abc import Sequence

from support.engines import SAFE_MARGIN, TOKEN_ENGINE
from support.reference import Reference

DRAFTS = 3
MAX_TOKENS = 16
DRAFTING_ENGINE = {**TOKEN_ENGINE, "max_model_len": 512}
NEAR_EXPERT = {"proxy_weights": [0.2, 0.9, -0.1]}
"""Weights under which many, and by far not all, drafts are accepted."""
CONTROLS = [
    None,
    NEAR_EXPERT,
    {"proxy_weights": [0, 1, 0]},  # the expert's own answers: every draft is accepted
    {"proxy_alpha": 3.0},
    {"proxy_alpha": 2.0, "proxy_plausibility": 0.02},
    NEAR_EXPERT | {"proxy_expert_prompt": 70},
    {"proxy_weights": [0, 1, 0], "proxy_expert_prompt": 40},
    {"proxy_weights": [0, 1, 0], "proxy_antiexpert_prompt": 130},
]
"""What requests ask for; a number stands for a prompt of that length."""


class Case:
    """One request, its answer, and what becomes of the drafts on the way to it."""

    def __init__(self, reference: Reference, rng: random.Random, control: dict | None) -> None:
        def draw(length: int) -> list[int]:
            return [rng.randrange(3, 470) for _ in range(length)]

        self.prompt = draw(rng.choice((1, 5, 31, 32, 33, 64, 100)))
        self.control = control and {
            key: draw(value) if key.endswith("_prompt") else value for key, value in control.items()
        }
        path = reference.greedy(self.prompt, MAX_TOKENS + DRAFTS, self.control)
        self.answer, self.margin = path.token_ids[:MAX_TOKENS], path.margin
        self.drafted = self.accepted = 0
        own_prompt = (self.control or {}).get("proxy_expert_prompt", self.prompt)
        done = 1  # by the pass over the prompt
        while done < MAX_TOKENS:
            expert = {"proxy_weights": [0, 1, 0]}
            drafts = reference.greedy(own_prompt + path.token_ids[:done], DRAFTS, expert)
            self.margin = min(self.margin, drafts.margin)
            coming = path.token_ids[done : done + DRAFTS]
            same = [a == b for a, b in zip(drafts.token_ids, coming, strict=True)]
            good = (*same, False).index(False)
            self.drafted, self.accepted = self.drafted + DRAFTS, self.accepted + good
            done += good + 1


def draw_cases(reference: Reference, controls: Sequence[dict | None] = CONTROLS * 2) -> list[Case]:
    """One of every control, none of which comes near a tie."""
    rng, drawn = random.Random(0), []
    for control in controls:
        while (case := Case(reference, rng, control)).margin < SAFE_MARGIN:
            pass
        drawn.append(case)
    return drawn


def greedy(cases: list[Case]) -> dict:
    """Ask all of them at once."""
    return {
        "name": "greedy",
        "prompts": [case.prompt for case in cases],
        "extra_args": [case.control for case in cases],
        "params": {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
    }
