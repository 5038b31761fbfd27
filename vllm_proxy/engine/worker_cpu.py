"""Our worker on a CPU. In its own file because other platforms cannot import vLLM's CPU worker."""

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
    """vLLM's CPU worker, with our runner."""

    def init_device(self) -> None:
        """Make the runner, and its rejection sampler right."""
        super().init_device()
        sampler = getattr(self.model_runner, "rejection_sampler", None)
        if isinstance(sampler, RejectionSampler):  # Model Runner V2 has one of another class
            require_part("rejection on a CPU")
            sampler.__class__ = CPURejectionSampler


class CPURejectionSampler(RejectionSampler):
    """Verifies drafts by each request's own temperature, top-k and top-p.

    The kernel by which vLLM (0.32) spreads them over rows on a CPU writes to a copy unless they
    are int64, and leaves rows with whatever the memory held; greedy requests beside sampled ones
    got wrong tokens, too. Here they are applied before, and what is left to spread is int64.
    """

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """See vLLM's."""
        # A copy, which `apply_logits_processors` may change: after the bonus tokens are sampled.
        return super().forward(metadata, draft_probs, logits, replace(sampling_metadata))

    def apply_logits_processors(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        """Return logits of drafted places, `[drafts, vocab]`, constrained as well."""
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
