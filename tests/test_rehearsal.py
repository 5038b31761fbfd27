"""vLLM's memory profile has the largest logits stage, so that none in service needs more."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from support.allocations import peak_bytes
from support.heads import Triple, rank_of
from vllm_proxy.config.request import INSPECTED, MOST_TOP_K
from vllm_proxy.config.schema import Speculate
from vllm_proxy.model import fused_product
from vllm_proxy.model.controls import LogitControls
from vllm_proxy.model.probe import InspectionRequest
from vllm_proxy.model.proxy_model import NUM_EXTRA_COLUMNS, ProxyModel
from vllm_proxy.model.rehearsal import most_rows

VOCABULARY = 4096
ROWS = 192
PLAIN = LogitControls(1.0, 1.0, -1.0)
STEPS = {
    "another strength": LogitControls(1.0, 0.0, 0.0, start=0.7),
    "adaptive": LogitControls(1.0, 0.0, 0.0, adaptive=1.0),
    "top_p": LogitControls(1.0, 1.0, -1.0, top_p=0.6),
    "plausibility": LogitControls(1.0, 1.0, -1.0, plausibility=0.1),
    "all": LogitControls(1.0, 0.0, 0.0, adaptive=1.0, top_p=0.6, plausibility=0.1),
}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products, next to other tests
    with rank_of(1, 0):
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


class LogitsStage(ProxyModel):
    """The part of the model that makes logits of hidden states: no engine and no layers."""

    def __init__(self, triple: Triple) -> None:
        nn.Module.__init__(self)
        self.hidden_sizes, self.head = triple.hidden_sizes, triple.head
        self.columns = torch.zeros(ROWS, NUM_EXTRA_COLUMNS, dtype=torch.float32)
        self.rehearsal_rows = 0
        self.use_default_controls()
        self.states = torch.randn(ROWS, sum(self.hidden_sizes))

    def step(self, control: LogitControls, *, inspects: bool = False) -> None:
        """Compute the logits of one request's rows."""
        probes = None
        if inspects:
            wanted = {"token_ids": [3] * ROWS, "top_k": MOST_TOP_K}
            probes = [InspectionRequest({INSPECTED: wanted})]
        starts, positions = torch.tensor([0, ROWS]), torch.arange(ROWS)
        self.use_controls([control], starts, positions, torch.tensor([ROWS]), probes)
        self.compute_logits(self.rows(ROWS))

    def profile(self, rows: int) -> None:
        """As vLLM does before there are requests, with a row for each that there may be."""
        self.rehearsal_rows = ROWS
        self.use_default_controls()
        self.compute_logits(self.rows(rows))

    def rows(self, rows: int) -> torch.Tensor:
        columns = self.columns.view(self.states.dtype)
        return torch.cat([self.states, columns], dim=-1)[:rows]


def logits_stage(monkeypatch, dtype: torch.dtype, **configs: object) -> LogitsStage:
    def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rows.float() @ weight.float().T

    # The product of a GPU, which a CPU lacks.
    monkeypatch.setattr(fused_product, "MM_TO_FLOAT32", True)
    monkeypatch.setattr(fused_product, "multiply_to_float32", multiply)
    return LogitsStage(Triple((VOCABULARY,) * 3, dtype, 1.0, **configs).ready())


@pytest.mark.parametrize("configs", [{}, {"base": {"bias": True}}], ids=["fused", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_step_holds_more_than_the_profile(monkeypatch, dtype, configs):
    model = logits_stage(monkeypatch, dtype, **configs)
    with torch.inference_mode():
        steps = {name: peak_bytes(lambda c=c: model.step(c)) for name, c in STEPS.items()}
        steps["inspected"] = peak_bytes(lambda: model.step(STEPS["all"], inspects=True))
        default = peak_bytes(lambda: model.step(PLAIN))
        profile = peak_bytes(lambda: model.profile(ROWS // 4))
    assert max(steps.values()) <= profile, (steps, profile)
    # The rehearsal is what makes it so, and reserves little more than is needed.
    assert max(steps.values()) > 1.2 * default
    assert profile < 1.2 * max(steps.values())


@pytest.mark.parametrize("configs", [{}, {"base": {"bias": True}}], ids=["fused", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drafts_hold_less_than_the_profile(monkeypatch, dtype, configs):
    """Drafting needs no rehearsal: a draft is one row per request, of one member.

    Even if all requests draft at once it holds no more than ordinary logits of as many rows, of
    which the profile has at least as many (below). `test_engine.py` counts the expert's pass.
    """
    model = logits_stage(monkeypatch, dtype, separate_role="expert", **configs)
    states = model.states.split(model.hidden_sizes, dim=-1)[1].contiguous()
    with torch.inference_mode():
        draft = peak_bytes(lambda: model.draft_logits(states).argmax(-1))
        default = peak_bytes(lambda: model.step(PLAIN))
        profile = peak_bytes(lambda: model.profile(ROWS // 4))
    assert ROWS * VOCABULARY * 4 <= draft < 1.01 * default  # logits are float32
    assert draft < profile


def test_no_more_requests_draft_than_rows_are_in_the_profile():
    """vLLM's batches have at least as many tokens as requests (`max_num_batched_tokens`)."""
    for requests, tokens in [(1, 1), (8, 8), (64, 64), (1024, 1024), (2048, 8192)]:
        for most in (None, 4, 4096):
            speculate = Speculate(tokens=3, requests=most)
            assert most_rows(requests, tokens, speculate) >= requests


def test_the_rehearsal_is_before_the_first_logits_only(monkeypatch):
    model = logits_stage(monkeypatch, torch.float32)
    with torch.inference_mode():
        first = peak_bytes(lambda: model.profile(8))
        again = peak_bytes(lambda: model.compute_logits(model.rows(8)))
    assert again < first / 4


@pytest.mark.parametrize(
    ("requests", "tokens", "speculate", "rows"),
    [
        (256, 8192, None, 1024),
        (2048, 8192, None, 2048),
        (256, 512, None, 512),
        (256, 8192, Speculate(tokens=4), 1280),
        (256, 8192, Speculate(tokens=4, requests=8), 1024),
        (1024, 8192, Speculate(tokens=4, requests=8), 1056),
    ],
)
def test_most_rows_of_a_step(requests, tokens, speculate, rows):
    assert most_rows(requests, tokens, speculate) == rows
