"""Our worker on a CPU: in a separate file, since vLLM's can be imported on a CPU only."""

from dataclasses import replace

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.engine.worker import ProxyWorkerMixin


class ProxyCPUWorker(ProxyWorkerMixin, CPUWorker):
    """vLLM's CPU worker with our runner."""

    def init_device(self) -> None:
        """Make the runner, and correct its rejection sampler."""
        super().init_device()
        sampler = getattr(self.model_runner, "rejection_sampler", None)
        if isinstance(sampler, RejectionSampler):  # of another class under Model Runner V2
            require_part("rejection on a CPU")
            sampler.__class__ = CPURejectionSampler


class CPURejectionSampler(RejectionSampler):
    """Verifies drafts with each request's temperature, top-k and top-p.

    On a CPU, the kernel with which vLLM (0.32) expands these per row writes to a copy unless they
    are int64, so rows keep what the memory held. Greedy requests in a batch with sampled ones got
    wrong tokens too. Here the values are applied first, and what is left to expand is int64.
    """

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Verify the drafts; arguments as in vLLM."""
        # A copy, which `apply_logits_processors` changes after the bonus tokens are sampled.
        return super().forward(metadata, draft_probs, logits, replace(sampling_metadata))

    def apply_logits_processors(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        """Return the logits of drafted positions, `[drafts, vocab]`, with all constraints."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if sampling_metadata.all_greedy:
            return logits
        drafts = torch.tensor(metadata.num_draft_tokens)
        temperature, top_k, top_p = (
            None if values is None else values[: len(drafts)].repeat_interleave(drafts)
            for values in (
                sampling_metadata.temperature,
                sampling_metadata.top_k,
                sampling_metadata.top_p,
            )
        )
        is_random = sampling_metadata.temperature != 0
        logits.div_(torch.where(temperature == 0, 1.0, temperature)[:, None])
        sampling_metadata.temperature = is_random.long()
        sampling_metadata.top_k = sampling_metadata.top_p = None
        return apply_top_k_top_p(logits, top_k, top_p)
