"""The rig `graphs_on_cpu`: what it records and refuses, and the mistakes that it brings to light.

Engines that replay graphs in it are asked for more in `test_requests.py`.
"""

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from triton import language as tl
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from support.engines import RIGS, SAFE_MARGIN, TOKEN_ENGINE, in_graphs, run_engines
from support.reference import Reference
from support.tiny_models import VOCAB_SIZE, write_triple

sys.path.append(str(RIGS / "graphs_on_cpu"))

from graphs_on_cpu import plug, recorder

Capture = Callable[[Callable[[], Any]], tuple[recorder.CPUGraph, Any]]


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def capture(monkeypatch) -> Capture:
    monkeypatch.setattr(recorder.CPUGraph, "everyone", [])
    monkeypatch.setattr(GridExecutor, "__call__", GridExecutor.__call__)
    plug.record_launches()

    def record(step: Callable[[], Any]) -> tuple[recorder.CPUGraph, Any]:
        graph = recorder.CPUGraph()
        with torch.inference_mode(), recorder.graph(graph):
            return graph, step()

    return record


def scaled_sum(x, y, out, scale, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + i, tl.load(x + i, i < n) + scale * tl.load(y + i, i < n), i < n)


class Step:
    """Operators, views, writes in place and a launch; `scale` and `bias` are the host's to set."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.weight, self.bias = torch.randn(4, 6), torch.randn(6, 6), torch.randn(6)
        self.scale, self.calls = 2.0, 0
        self.kernel = InterpretedFunction(scaled_sum)

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        hidden = torch.relu(self.x @ self.weight) + self.bias
        out = torch.empty_like(hidden)
        self.kernel[(2,)](hidden, hidden, out, self.scale, out.numel(), block=16)
        first, last = out.chunk(2)
        first += last
        return out.softmax(-1)


@pytest.mark.usefixtures("inference")
class TestRecorder:
    def test_a_replay_is_the_step_on_what_its_tensors_hold(self, capture):
        step = Step()
        graph, result = capture(step)
        for seed in range(3):
            torch.manual_seed(seed)
            step.x.normal_()
            step.bias.normal_()
            graph.replay()
            assert torch.equal(result, step())
        assert step.calls == 1 + 3  # a replay runs no Python

    @pytest.mark.parametrize(
        "change",
        [
            lambda step: setattr(step, "scale", 3.0),
            lambda step: setattr(step, "bias", 2 * step.bias),
        ],
        ids=["a scalar of the host", "a new address"],
    )
    def test_what_a_graph_cannot_know_makes_a_difference(self, capture, change):
        step = Step()
        graph, result = capture(step)
        before = result.clone()
        change(step)
        graph.replay()
        assert torch.equal(result, before)
        assert not torch.allclose(result, step())

    @pytest.mark.parametrize(
        "step",
        [
            lambda x: x.sum().item(),
            lambda x: bool((x > 0).all()),
            lambda x: x[x > 0],
            lambda x: x.masked_select(x > 0),
            lambda x: (x > 0).nonzero(),
            lambda x: x.unique(),
            lambda x: x.index_put_((x > 0,), x.new_zeros(())),
            lambda x: x + torch.tensor([1.0, 2.0]),
        ],
    )
    def test_what_cuda_refuses_in_a_capture(self, capture, step):
        x = torch.randn(2)
        with pytest.raises(recorder.CaptureError, match="host"):
            capture(lambda: step(x))
        capture(lambda: x + 1)  # the next capture works

    def test_an_operator_may_interrupt_a_capture(self, inference):
        """As in vLLM's breakable graphs: what it does is in no graph, and Python does it again."""
        x, middle, host = torch.ones(2), torch.zeros(2), [10.0]
        graphs = [recorder.CPUGraph(), recorder.CPUGraph()]
        library = torch.library.Library("vllm", "FRAGMENT")
        library.define("interrupting(Tensor x, Tensor(a!) out) -> ()")

        def interrupting(x: torch.Tensor, out: torch.Tensor) -> None:
            graphs[0].capture_end()
            out.copy_(x * host[0])
            graphs[1].capture_begin()

        library.impl("interrupting", interrupting, "CPU")
        recorder._bodies[torch.ops.vllm.interrupting.default] = interrupting
        graphs[0].capture_begin()
        doubled = x * 2
        torch.ops.vllm.interrupting(doubled, middle)
        result = middle + 1
        graphs[1].capture_end()
        assert result.tolist() == [21, 21]
        x.fill_(3)
        host[0] = 100.0
        graphs[0].replay()
        middle.copy_(doubled * host[0])
        graphs[1].replay()
        assert result.tolist() == [601, 601]
        torch.zeros(2) + 1  # recorded by nobody any more
        assert [len(graph.steps) for graph in graphs] == [1, 1]

    def test_memory_that_nobody_holds_is_the_next_graph_s(self, capture):
        x = torch.ones(2)
        before, output = capture(lambda: x + 1)
        weak = recorder.weak_ref(output)
        held, _ = capture(lambda: x + 2)  # begins while the output is held
        del output
        later, kept = capture(lambda: x + 3)
        for graph, is_lost in ((held, False), (later, True)):
            before.replay()
            assert weak.tolist() == [2, 2]
            graph.replay()
            assert weak.isnan().all() == is_lost
        assert kept.tolist() == [4, 4]

    def test_memory_that_another_graph_reads_is_not_free(self, capture):
        x = torch.ones(2)
        first, middle = capture(lambda: x + 1)
        second, result = capture(partial(torch.mul, middle, 3))
        del middle
        x.fill_(2)
        first.replay()
        second.replay()
        assert result.tolist() == [9, 9]


# The kind of graphs that show a mistake, and the mistake.
MUTATIONS = {
    "right": ("FULL_AND_PIECEWISE", None),
    "joined": ("FULL_AND_PIECEWISE", "outputs_joined_at_the_end"),
    "ids": ("FULL_AND_PIECEWISE", "ids_made_anew"),
    "builder": ("FULL", "members_share_a_builder"),
    "one-plan": ("FULL", "builders_share_a_plan"),
    "rows": ("FULL", "graphs_for_different_rows"),
}
MAX_TOKENS = 6
LENGTHS = ((7, 11, 3), (5, 5, 40))
"""Of the prompts of base, expert and antiexpert. All of them fit into one graph: virtual prompts of
32 and 64 tokens, and 12 tokens of the same requests without prompts for members."""


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> dict[str, str]:
    return write_triple(tmp_path_factory.mktemp("members"), "llama")


@pytest.fixture(scope="module")
def requests(members) -> list[tuple[list[int], dict, list[int]]]:
    """Prompts, `extra_args` and right answers."""
    rng, reference, found = random.Random(0), Reference(**members), []
    for lengths in LENGTHS:
        base, expert, antiexpert = (
            [rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths
        )
        own = {"proxy_expert_prompt": expert, "proxy_antiexpert_prompt": antiexpert}
        for control in ({}, own):
            answer = reference.greedy(base, MAX_TOKENS, control)
            assert answer.margin > SAFE_MARGIN, "a tie: draw another prompt"
            found.append((base, control, answer.token_ids))
    return found


@pytest.fixture(scope="module")
def engines(members, requests, tmp_path_factory) -> dict[str, dict]:
    def engine(name: str, mode: str, mutation: str | None = None) -> dict:
        options = {"max_model_len": 128, "max_num_seqs": 8, **in_graphs(mode, (4, 128))}
        # One after the other: where rows differ, a member's output is copied to its rows anyway.
        questions = [
            {
                "name": name,
                "prompts": [prompt for prompt, _, _ in asked],
                "extra_args": [control or None for _, control, _ in asked],
                "params": {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
            }
            for name, asked in (("ordinary", requests[::2]), ("all", requests))
        ]
        config = {**members, "engine": {**TOKEN_ENGINE, **options}}
        made = {"name": name, "config": config, "questions": questions}
        return made | ({"mutation": mutation} if mutation else {})

    plan = [engine(name, *how) for name, how in MUTATIONS.items()]
    found = run_engines(plan, tmp_path_factory.mktemp("graphs"), "v2")
    root, env = tmp_path_factory.mktemp("breakable"), {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
    return found | run_engines([engine("breakable", "PIECEWISE")], root, "v2", env)


def tokens(result: dict) -> list[list[int]]:
    assert "error" not in result, result["error"]
    answers = result["answers"]
    return [answer["token_ids"][0] for answer in answers["ordinary"] + answers["all"]]


def right_answers(requests: list) -> list[list[int]]:
    return [answer for _, _, answer in requests[::2] + requests]


def test_our_code_is_right_in_graphs(engines, requests):
    assert tokens(engines["right"]) == right_answers(requests)
    once = {"PIECEWISE": 1, "FULL": MAX_TOKENS - 1}
    assert engines["right"]["steps"] == once | {f"{kind} own": n for kind, n in once.items()}


def test_breakable_graphs_are_left_where_prompts_differ(engines, requests):
    """They stop at attention, and contain what passes members their inputs.

    With the mutation `graphs_for_different_rows` this engine's tokens are wrong.
    """
    assert tokens(engines["breakable"]) == right_answers(requests)
    assert engines["breakable"]["steps"] == {"PIECEWISE": MAX_TOKENS, "NONE own": MAX_TOKENS}


@pytest.mark.parametrize("name", ["joined", "ids", "one-plan", "rows"])
def test_a_mistake_shows_as_wrong_tokens(engines, requests, name):
    assert tokens(engines[name]) != right_answers(requests)


def test_a_shared_builder_is_refused_or_wrong(engines, requests):
    result = engines["builder"]
    assert "error" in result or tokens(result) != right_answers(requests)
