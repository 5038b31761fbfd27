"""Drafting under Model Runner V1: replaces vLLM's proposer for draft models."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_proxy.engine.drafting.drafter import (
    Drafter,
    Sequences,
    drafting_layers,
    forward_context,
    metadata_of,
)

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class ExpertProposer(DraftModelProposer):
    """Drafts with the expert of the model that verifies.

    vLLM's class still does what comes before (which tokens were accepted, and which are next) and
    after (passing the drafts to the scheduler).
    """

    runner: "GPUModelRunner"
    sequences: Sequences | None = None

    @classmethod
    def take_over(cls, runner: "GPUModelRunner") -> None:
        """Make the proposer of *runner* one of these."""
        runner.drafter.__class__ = cls
        runner.drafter.runner = runner

    def load_model(self, target_model: "nn.Module") -> None:
        """Load nothing: the expert is part of the target model."""
        self.model = Drafter(target_model)
        self._draft_attn_layer_names = drafting_layers(self.vllm_config, target_model)

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the pass of all members has run the expert, with at least as many tokens."""

    def _sequences(self, block_table: torch.Tensor) -> Sequences:
        if self.sequences is None:
            size = self.runner.input_batch.block_table[0].block_size
            most = self.vllm_config.scheduler_config.max_num_seqs
            self.sequences = Sequences(most, block_table, size, self.max_model_len)
        return self.sequences

    def propose(
        self,
        num_speculative_tokens: int,
        target_positions: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        **_: Any,
    ) -> torch.Tensor:
        """Return drafts, `[requests, num_speculative_tokens]`; arguments as in vLLM."""
        self._last_draft_probs = None
        batch, last = self.runner.input_batch, token_indices_to_sample
        if last is None:  # after a pass without drafts: each request's last token
            last = common_attn_metadata.query_start_loc[1:] - 1
        sequences, requests = self._sequences(common_attn_metadata.block_table_tensor), len(last)
        sequences.begin(
            virtual=target_positions[last] + 1,
            block_table=common_attn_metadata.block_table_tensor[:requests],
            prompts=self.runner.overrides.prompts_of(batch.req_ids[:requests]),
            rows=requests,
        )
        overrides = self.runner.overrides
        overrides.model.use_experts_of(overrides.slots_of(batch.req_ids[:requests]))
        ids = next_token_ids.int()
        drafts: list[torch.Tensor] = []
        probabilities: list[torch.Tensor | None] = []
        while len(drafts) < num_speculative_tokens:
            longest = common_attn_metadata.max_seq_len + 1 + len(drafts)
            common = sequences.common(requests, longest)
            metadata = metadata_of(self.draft_attn_groups, common)
            with forward_context(self.vllm_config, metadata, sequences, requests):
                hidden_states = self.model(ids, common.positions)
            draft, probs = self._sample_draft_tokens(hidden_states, sampling_metadata)
            drafts.append(draft)
            probabilities.append(probs)
            ids = draft.int()
            sequences.advance(requests)
        if not drafts:
            return next_token_ids.new_empty(len(last), 0, dtype=torch.int64)
        if probabilities[0] is not None:
            self._last_draft_probs = torch.stack(probabilities, dim=1)
        return torch.stack(drafts, dim=1)
