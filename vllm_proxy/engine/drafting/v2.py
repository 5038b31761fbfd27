"""Drafting under Model Runner V2: replaces vLLM's speculator for draft models."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_proxy.engine.drafting.drafter import Drafter, Sequences, drafting_layers, forward_context
from vllm_proxy.engine.drafting.graphs import capture_every_length
from vllm_proxy.members.vllm_configs import proxy_section

if TYPE_CHECKING:
    from torch import nn
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class ExpertSpeculator(StandaloneARSpeculator):
    """Drafts with the expert of the model that verifies."""

    num_extra_query_per_req = 0
    runner: "GPUModelRunner"

    @classmethod
    def take_over(cls, runner: "GPUModelRunner") -> None:
        """Make the speculator of *runner* one of these."""
        runner.speculator.__class__ = cls
        if (logits := runner.speculator.draft_logits) is not None:
            runner.speculator.draft_logits = logits.float()  # as `Drafter.compute_logits` returns
        runner.speculator.runner = runner

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Choose the graphs of passes that verify drafts; vLLM's runner has just made its own."""
        super().init_cudagraph_manager(cudagraph_mode)
        speculate = proxy_section(self.vllm_config.model_config).speculate
        assert speculate is not None
        # Data-parallel engines draft for any number of requests: see `limits.drafts_problem`.
        alone = self.vllm_config.parallel_config.data_parallel_size == 1
        requests = speculate.requests if alone else None
        capture_every_length(self.runner.cudagraph_manager, speculate.tokens, requests)

    def load_model(self, target_model: "nn.Module") -> None:
        """Load nothing: the expert is part of the target model."""
        self.model = Drafter(target_model)
        self._validate_local_argmax_reduction()
        self.draft_attn_layer_names = drafting_layers(self.vllm_config, target_model)
        self.supports_mm_inputs = False

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return drafts, `[requests, num_speculative_steps]`; arguments as in vLLM."""
        requests = input_batch.num_reqs
        if dummy_run and skip_attn_for_dummy_run:
            return self.draft_tokens[:requests]  # the pass of all members has run the expert
        self._copy_request_inputs(
            requests, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run
        )
        # The rows of each request's last accepted token.
        last = self._accepted_last_indices(input_batch, num_rejected, requests)
        sequences = Sequences(
            virtual=input_batch.positions[last] + 1,
            longest=int(input_batch.seq_lens_cpu_upper_bound[:requests].max()),
            block_table=self.block_tables.input_block_tables[0][:requests],
            block_size=self.block_tables.block_sizes[0],
            prompts=self.model_state.overrides.prompts_of(input_batch.req_ids),
            max_model_len=self.max_model_len,
        )
        ids = last_sampled[input_batch.idx_mapping].view(-1).int()
        steps = self.num_speculative_steps
        for step in range(steps if num_speculative_tokens is None else num_speculative_tokens):
            common = sequences.common()  # the next token of each request, in the expert's cache
            groups = self.attn_groups[0]
            with forward_context(self.vllm_config, groups, common, stores=not dummy_run):
                hidden_states = self.model(ids, common.positions)
            self.current_draft_step.fill_(step)
            self.draft_tokens[:requests, step] = self.sample_draft(
                hidden_states,
                common.positions,
                self.idx_mapping[:requests],
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
            )
            ids = self.draft_tokens[:requests, step].int()
            sequences.advance()
        return self.draft_tokens[:requests]
