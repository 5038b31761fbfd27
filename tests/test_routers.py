"""Routers of mixtures on a CPU choose the experts that those of transformers choose."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Ernie4_5_MoeConfig, MiniMaxM2Config
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from vllm_proxy.model.routers import correct_choice_of_experts

EXPERTS, CHOSEN, WIDTH, ROWS = 8, 2, 16, 64


class Routers(nn.Module):
    """A model that has a router, as vLLM's runner of experts has."""

    def __init__(self, scoring_func: str, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.router = CPURouter(
            CHOSEN, EXPERTS, scoring_func=scoring_func, e_score_correction_bias=bias
        )

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Return `[rows, experts]`, zero for those that are not chosen."""
        weights, chosen = self.router.select_experts(logits, logits)
        return torch.zeros_like(logits).scatter(1, chosen.long(), weights)


@pytest.fixture
def drawn() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        rows=torch.randn(ROWS, WIDTH, generator=generator),
        weight=torch.randn(EXPERTS, WIDTH, generator=generator),
        bias=torch.randn(EXPERTS, generator=generator),
    )


@torch.no_grad()
def of_transformers(scoring_func: str, drawn: SimpleNamespace) -> torch.Tensor:
    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": CHOSEN}
    if scoring_func == "softmax":
        router = Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(moe_num_experts=EXPERTS, **sizes))
        router.moe_statics.e_score_correction_bias.data[0] = drawn.bias
        more = ()
    else:
        router = MiniMaxM2TopKRouter(MiniMaxM2Config(num_local_experts=EXPERTS, **sizes))
        more = (drawn.bias,)
    router.weight.data = drawn.weight
    _, weights, chosen = router(drawn.rows, *more)
    return torch.zeros(ROWS, EXPERTS).scatter(1, chosen, weights)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_corrected_scores_choose(drawn, scoring_func):
    model, logits = Routers(scoring_func, drawn.bias), drawn.rows @ drawn.weight.T
    correct_choice_of_experts(model)
    right = of_transformers(scoring_func, drawn)
    torch.testing.assert_close(model.weights(logits), right, rtol=1e-5, atol=1e-6)


def test_vllm_alone_ignores_the_correction(drawn):
    """If it no longer does, `correct_choice_of_experts` is not needed any more."""
    logits = drawn.rows @ drawn.weight.T
    same = Routers("softmax", drawn.bias).weights(logits) == Routers("softmax", None).weights(
        logits
    )
    assert same.all()
    with pytest.raises(AssertionError):
        Routers("sigmoid", drawn.bias).weights(logits)


def test_other_routers_stay_as_they_are(drawn):
    model = Routers("softmax", None)
    correct_choice_of_experts(model)
    assert not model.router.use_grouped_topk
