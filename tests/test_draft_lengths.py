"""How many drafts are chosen, against an engine that is a formula: seconds and acceptance known."""

import random

import pytest

from vllm_proxy.engine.drafting.lengths import PROBE_MOST, REMEASURED, DraftLengths

MOST = 6
PLAIN = 0.02
"""Seconds of a step without drafts."""


class Engine:
    """Steps of *requests* whose drafts are each accepted with some probability, or with theirs."""

    def __init__(
        self, most: int = MOST, requests: int = 1, noise: float = 0.0, jump: float = 0.0
    ) -> None:
        self.lengths, self.requests, self.noise = DraftLengths([0] + [most] * 8), requests, noise
        self.jump = jump
        self.rng, self.before = random.Random(0), 0

    def run(
        self, steps: int, accepted: float | list[float], draft: float
    ) -> tuple[list[int], float]:
        """Return the drafts of each step, and tokens a second of each request."""
        drafts, tokens, seconds = [], 0, 0.0
        each = accepted if isinstance(accepted, list) else [accepted] * self.requests
        for _ in range(steps):
            for probability in each:
                right = 0
                while right < self.before and self.rng.random() < probability:
                    right += 1
                if self.before:
                    self.lengths.record_acceptance(self.before, right)
                tokens += right + 1
            now = self.lengths[self.requests]
            took = PLAIN + draft * (self.before + now) / 2
            took += self.jump * (self.before > 0)
            took *= 1 + self.noise * self.rng.random()
            if now == self.before:
                self.lengths.record_step_time(took, self.requests, now)
            seconds, self.before = seconds + took, now
            drafts.append(now)
        return drafts, tokens / seconds / self.requests


def speed(drafts: int, accepted: float, draft: float, jump: float = 0.0) -> float:
    seconds = PLAIN + drafts * draft + jump * (drafts > 0)
    return sum(accepted**i for i in range(drafts + 1)) / seconds


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize(
    ("accepted", "draft"),
    [
        (0.95, 0.1 * PLAIN),  # all six
        (0.6, 0.2 * PLAIN),  # a few
        (0.3, 0.35 * PLAIN),  # none
        (0.0, 0.4 * PLAIN),  # none, whatever they cost
        (0.9, 0.95 * PLAIN),  # good ones, which cost more than they save
    ],
)
def test_it_is_nearly_as_fast_as_the_best_number(accepted, draft, requests, noise):
    engine = Engine(requests=requests, noise=noise)
    best = max(speed(k, accepted, draft) for k in range(MOST + 1)) / (1 + noise / 2)
    _, found = engine.run(2000, accepted, draft)
    assert found > 0.95 * best


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("accepted", [0.95, 0.8, 0.6])
@pytest.mark.parametrize("jump", [0.3 * PLAIN, PLAIN])
def test_the_first_draft_may_cost_most(jump, accepted, noise):
    """A pass of several rows is another product, or another graph, than one of a single row."""
    draft = 0.15 * PLAIN
    best = max(speed(k, accepted, draft, jump) for k in range(MOST + 1)) / (1 + noise / 2)
    _, found = Engine(jump=jump, noise=noise).run(2000, accepted, draft)
    assert found > 0.94 * best


@pytest.mark.parametrize("draft", [0.1 * PLAIN, 0.35 * PLAIN])
@pytest.mark.parametrize("predicted", [1, 2, 3])
def test_requests_may_differ_in_what_is_predicted(predicted, draft):
    """A request without an accepted draft counts as much as one whose drafts are all accepted."""
    each = [0.95] * predicted + [0.0] * (4 - predicted)
    best = max(sum(speed(k, p, draft) for p in each) / 4 for k in range(MOST + 1))
    engine = Engine(requests=4)
    engine.run(200, each, draft)
    _, found = engine.run(2000, each, draft)
    assert found > 0.97 * best


def test_what_pays_for_nothing_is_off_but_for_a_probe_now_and_then():
    engine = Engine()
    engine.run(200, 0.0, 0.4 * PLAIN)
    drafts, found = engine.run(10 * PROBE_MOST, 0.0, 0.4 * PLAIN)
    assert 5 < sum(drafts) < 15
    assert max(drafts) == 1
    assert found > 0.99 / PLAIN


def test_a_right_probe_of_one_among_many_changes_nothing():
    engine = Engine(requests=8)
    engine.run(200, 0.1, 0.4 * PLAIN)
    drafts, _ = engine.run(10 * PROBE_MOST, 0.1, 0.4 * PLAIN)
    assert sum(drafts) < 20


def test_it_comes_back_when_drafts_are_good_again():
    engine = Engine()
    engine.run(1000, 0.0, 0.1 * PLAIN)
    drafts, _ = engine.run(2 * PROBE_MOST, 0.95, 0.1 * PLAIN)
    assert drafts[0] == 0
    assert min(drafts[-20:]) > 4


def test_a_slower_machine_is_noticed():
    """Times are forgotten; what a step without drafts takes is measured again, drafts or not."""
    engine = Engine()
    assert min(engine.run(200, 0.8, 0.1 * PLAIN)[0][-20:]) > 3
    assert set(engine.run(2 * REMEASURED, 0.8, 2 * PLAIN)[0][-20:]) <= {0, 1}


def test_few_steps_are_spent_on_finding_out():
    engine = Engine()
    drafts, _ = engine.run(40, 0.95, 0.1 * PLAIN)
    assert drafts.count(0) <= 4
    assert set(drafts[4:]) == {MOST}


def test_batches_of_another_size_are_not_tried_where_nothing_is_foreseen():
    """As a batch runs empty it has many sizes, each for a few steps."""
    engine = Engine()
    engine.run(100, 0.0, 0.4 * PLAIN)
    for engine.requests in (2, 4, 8):
        assert sum(engine.run(12, 0.0, 0.4 * PLAIN)[0]) <= 1


def test_batches_of_another_size_are_tried_where_drafts_may_pay():
    """Learned where drafts are expensive; accepted often enough to pay where they are cheap."""
    engine = Engine(requests=8)
    assert engine.run(200, 0.7, 0.95 * PLAIN)[0][-1] <= 1
    engine.requests = 1
    assert min(engine.run(60, 0.7, 0.1 * PLAIN)[0][-10:]) > 2


def test_it_drafts_where_no_step_can_be_timed():
    """Beside prompts, say: the configuration's number is the best guess."""
    lengths = DraftLengths([0] + [MOST] * 8)
    assert {*[lengths[2] for _ in range(100)][-20:]} == {MOST}


def test_nothing_is_drafted_beyond_the_configured_number_of_requests():
    lengths = DraftLengths([0, MOST, MOST, 0, 0])
    assert [lengths[n] for n in (3, 4)] == [0, 0]
