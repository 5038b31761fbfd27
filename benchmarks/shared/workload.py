"""The requests that systems get, and the answers that they give."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Request(NamedTuple):
    """A prompt, as token ids, and how many tokens to generate: neither more nor fewer.

    *params*: what else vLLM's sampling parameters have; no other system looks at it.
    """

    prompt: list[int]
    tokens: int
    params: Mapping[str, Any] = {}


class Answer(NamedTuple):
    """What a system did with a batch.

    Attributes:
        seconds: from the first request to the last token.
        tokens: generated, `[requests][tokens]`.
    """

    seconds: float
    tokens: list[list[int]]

    @property
    def seconds_per_token(self) -> float:
        """Wall time over generated tokens."""
        return self.seconds / sum(map(len, self.tokens))


@dataclass
class Workload:
    """How requests are drawn: lengths between bounds, few long and many short ones.

    Attributes:
        prompt: least and most tokens of a prompt.
        output: least and most tokens generated.
    """

    prompt: Sequence[int]
    output: Sequence[int]

    def draw(self, count: int, vocab_size: int, seed: int) -> list[Request]:
        """Return *count* requests; the same ones for the same *seed*."""
        rng = random.Random(seed)

        def length(least: int, most: int) -> int:
            return round(least * (most / least) ** rng.random())

        return [
            Request(
                [rng.randrange(3, vocab_size) for _ in range(length(*self.prompt))],
                length(*self.output),
            )
            for _ in range(count)
        ]
