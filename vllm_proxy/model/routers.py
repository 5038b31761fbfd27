"""The choice of experts on a CPU, where vLLM's router leaves out what corrects it."""

from torch import nn
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter


def correct_choice_of_experts(member: nn.Module) -> None:
    """Have a member's routers on a CPU choose experts by their corrected scores.

    Of experts that are in no groups, vLLM's router for CPUs (0.32, 0.33) ignores the correction of
    softmax scores (ERNIE 4.5), and refuses sigmoid scores (MiniMax M2). One group of all experts
    makes the same choice as none.
    """
    for module in member.modules():
        router = getattr(module, "router", None)
        if (
            isinstance(router, CPURouter)
            and router.e_score_correction_bias is not None
            and router.scoring_func in ("softmax", "sigmoid")
            and not router.use_grouped_topk
        ):
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
