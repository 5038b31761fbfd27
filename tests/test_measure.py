"""What is measured of rows, against scipy in float64; and how measurements find their tokens."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from vllm_proxy.config.request import INSPECTED
from vllm_proxy.model.measure import measured
from vllm_proxy.model.probe import InspectionRequest, ProbedStep, TokenStats

ROWS, VOCAB, K = 7, 1000, 4


@pytest.fixture
def logits() -> torch.Tensor:
    """Of the four, `[4, ROWS, VOCAB]`; some of the proxy's are filtered out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, ROWS, VOCAB, generator=generator) * 5
    logits[3, 1, 100:] = float("-inf")
    logits[3, 2, 1:] = float("-inf")
    logits[3, 3] = logits[0, 3]
    return logits


def test_measured_is_what_scipy_says(logits):
    tokens = torch.tensor([5, 50, 0, 3, 999, VOCAB, VOCAB + 20])
    logprobs, ranks, top_ids, top_logprobs, kl = measured(*logits, tokens, K)
    right = log_softmax(logits.double().numpy(), axis=-1)
    for row, token in enumerate(tokens.tolist()):
        for name, own in enumerate(right[:, row]):
            wanted = own[token] if token < VOCAB else -np.inf
            assert logprobs[row, name].item() == pytest.approx(wanted, abs=1e-5)
            assert ranks[row, name] == 1 + (own > wanted).sum()
            order = np.argsort(-own)[:K]
            np.testing.assert_allclose(top_logprobs[row, name], own[order], atol=1e-5)
            likely = own[order] > -np.inf
            assert top_ids[row, name][torch.from_numpy(likely)].tolist() == order[likely].tolist()
        divergence = rel_entr(np.exp(right[3, row]), np.exp(right[0, row])).sum()
        assert kl[row].item() == pytest.approx(divergence, rel=1e-5, abs=1e-6)
    assert torch.isfinite(kl).all()
    assert kl[3] == 0


def test_kl_of_a_large_vocabulary_keeps_its_precision():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(2, 128_000, generator=generator)
    proxy = base + 0.01 * torch.randn(2, 128_000, generator=generator)
    *_, kl = measured(base, base, base, proxy, torch.tensor([0, 1]), 1)
    p, q = (np.exp(log_softmax(x.double().numpy(), axis=-1)) for x in (proxy, base))
    np.testing.assert_allclose(kl, rel_entr(p, q).sum(-1), rtol=0.02)


def probe(*token_ids: int, top_k: int = 2) -> InspectionRequest:
    return InspectionRequest({INSPECTED: {"token_ids": list(token_ids), "top_k": top_k}})


def test_measurements_find_their_tokens():
    """In any order, a request in several parts, beside requests that are not inspected."""
    one, two = probe(7, 8, 9), probe(5, 6, top_k=1)
    step = ProbedStep([None, one, None, two], torch.device("cpu"))
    assert step.counts.tolist() == [0, 3, 0, 2]
    assert step.starts.tolist() == [0, 0, 3, 3]
    assert step.tokens.tolist() == [7, 8, 9, 5, 6]
    assert step.top_k == 2
    places = np.array([-1, 4, 0, -1, 2])
    rows = step.unmeasured(places)
    assert rows.tolist() == [1, 2, 4]
    logits = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    found = measured(*logits, step.tokens[places[rows]], step.top_k)
    step.store(places[rows], found)
    assert one.is_done.tolist() == [True, False, True]
    assert two.is_done.tolist() == [False, True]
    # What vLLM asks for again is not measured again.
    assert step.unmeasured(np.array([2, 1, 4, 3, -1])).tolist() == [1, 3]
    for own, index, row in ((two, 1, 0), (one, 0, 1), (one, 2, 2)):
        k = own.top_k
        np.testing.assert_array_equal(own.stats.logprobs[index], found.logprobs[row])
        np.testing.assert_array_equal(own.stats.ranks[index], found.ranks[row])
        np.testing.assert_array_equal(own.stats.top_ids[index], found.top_ids[row, :, :k])
        np.testing.assert_array_equal(own.stats.top_logprobs[index], found.top_logprobs[row, :, :k])
        assert own.stats.kl[index] == found.kl[row]


def test_figures_survive_vllm_s_messages():
    stats = TokenStats.empty(3, 2)
    for array in stats:
        array[:] = np.random.default_rng(0).integers(0, 100, array.shape)
    again = TokenStats.unpack(stats.pack(), 3)
    for array, other in zip(stats, again, strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


def test_a_small_vocabulary_fills_what_it_has():
    own = probe(1, top_k=5)
    step = ProbedStep([own], torch.device("cpu"))
    step.store(np.array([0]), measured(*torch.randn(4, 1, 3), step.tokens, 3))
    assert np.isfinite(own.stats.top_logprobs[0]).sum(-1).tolist() == [3] * 4
