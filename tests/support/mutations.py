"""Mistakes that only CUDA graphs bring to light, put into our code in an engine's process."""

from collections.abc import Iterator
from typing import Any

import torch


def outputs_joined_at_the_end() -> None:
    """Members' outputs are concatenated after the last one ran, not copied before the next."""
    from vllm_proxy.model.side_by_side import SideBySide

    def joined(self: SideBySide, outputs: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
        every = [output for _, output in outputs]
        columns = self.columns[: len(every[0])].view(every[0].dtype)
        return torch.cat([*every, columns], dim=-1)

    SideBySide._joined = joined


def ids_made_anew() -> None:
    """A member's ids are a new tensor in each step."""
    from vllm_proxy.model.side_by_side import SideBySide

    known_ids = SideBySide.known_ids

    def known_ids_anew(self: SideBySide, role: str, ids: torch.Tensor) -> torch.Tensor:
        return known_ids(self, role, ids).clone()

    SideBySide.known_ids = known_ids_anew


def members_share_a_builder() -> None:
    """All layers of a class and shape have one metadata builder, as vLLM would make it."""
    from vllm_proxy.model import proxy_model

    proxy_model.separate_backends = lambda *_: None


def builders_share_a_plan() -> None:
    """Members have builders of their own, which keep their plans in one buffer."""
    from graphs_on_cpu.attention import Builder

    init, plans = Builder.__init__, []

    def init_with_the_first_plan(self: Builder, *args: Any) -> None:
        init(self, *args)
        plans.append(self.plan)
        self.plan = plans[0]

    Builder.__init__ = init_with_the_first_plan


def graphs_for_different_rows() -> None:
    """Full graphs are replayed even in steps in which members have different rows."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    from vllm_proxy.engine.runner_v2 import MemberGraphs

    MemberGraphs.dispatch = ModelCudaGraphManager.dispatch
