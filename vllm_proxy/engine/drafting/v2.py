"""Drafting under Model Runner V2: replaces vLLM's speculator for draft models."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_proxy.engine.drafting.drafter import (
    Drafter,
    Sequences,
    drafting_layers,
    forward_context,
    metadata_of,
)
from vllm_proxy.engine.drafting.graphs import capture_up_to, most_requests

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
        """Choose the graphs of drafts."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.graphs = CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)
        capture_up_to(self.graphs, most_requests(self.vllm_config))
        table, size = self.block_tables.input_block_tables[0], self.block_tables.block_sizes[0]
        self.sequences = Sequences(self.max_num_reqs, table, size, self.max_model_len)

    def capture(self) -> None:
        """Capture one draft for each number of requests: a pass of the expert, and its token."""
        if not self.graphs.needs_capture():
            return
        self.idx_mapping.fill_(-1)

        def prepare(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            self.current_draft_step.fill_(0)
            self.sequences.begin_nowhere(desc.num_tokens)
            metadata = self._metadata(desc.num_tokens, self.max_model_len, for_capture=True)
            return lambda _: self._draft(desc.num_tokens, metadata)

        self.graphs.capture(prepare, "Capturing CUDA graphs of drafts")

    def load_model(self, target_model: "nn.Module") -> None:
        """Load nothing: the expert is part of the target model."""
        self.model = Drafter(target_model)
        target_model.batch_ids = self.runner.input_buffers.input_ids
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
        steps = self.num_speculative_steps
        if num_speculative_tokens is not None:
            steps = num_speculative_tokens
        # In a dummy run without attention, the pass of all members has run the expert.
        if not steps or (dummy_run and skip_attn_for_dummy_run):
            return self.draft_tokens[:requests]
        self._copy_request_inputs(
            requests, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run
        )
        graph = self.graphs.dispatch(requests, requests, 1, 0)
        rows = graph.num_tokens
        if dummy_run:
            self.sequences.begin_nowhere(rows)
        else:
            # The rows of each request's last accepted token.
            last = self._accepted_last_indices(input_batch, num_rejected, requests)
            self.sequences.begin(
                virtual=input_batch.positions[last] + 1,
                block_table=self.block_tables.input_block_tables[0][:requests],
                prompts=self.model_state.prompts,
                rows=rows,
            )
            slots = self.model_state.overrides.slots_of(input_batch.req_ids)
            self.model_state.model.use_experts_of(slots)
        self.input_buffers.input_ids[:requests] = last_sampled[input_batch.idx_mapping].view(-1)
        self.current_draft_step.fill_(0)
        longest = int(input_batch.seq_lens_cpu_upper_bound[:requests].max())
        for step in range(steps):
            metadata = self._metadata(rows, longest + step + 1)
            if graph.cg_mode == CUDAGraphMode.FULL:
                self.graphs.run_fullgraph(graph)
            else:
                self._draft(rows, metadata)
        return self.draft_tokens[:requests]

    def _metadata(self, rows: int, longest: int, *, for_capture: bool = False) -> dict[str, Any]:
        common = self.sequences.common(rows, longest)
        return metadata_of(self.attn_groups[0], common, for_capture=for_capture)

    def _draft(self, rows: int, metadata: dict[str, Any]) -> None:
        """Run the next token of each request, and make the token that it predicts the next one.

        All inputs and outputs have addresses that stay; a CUDA graph may hold this method's work.
        """
        sequences, ids = self.sequences, self.input_buffers.input_ids[:rows]
        positions, requests = sequences.positions[:rows], self.idx_mapping[:rows]
        with forward_context(self.vllm_config, metadata, sequences, rows):
            hidden_states = self.model(ids, positions)
        tokens = self.sample_draft(
            hidden_states,
            positions,
            requests,
            self.temperature,
            self.seeds,
            self.current_draft_step,
            self.draft_logits,
        )
        tokens = tokens.masked_fill(requests < 0, 0)  # rows that pad: may be anything
        step = self.current_draft_step.expand(rows, 1)
        self.draft_tokens[:rows].scatter_(1, step, tokens[:, None])
        ids.copy_(tokens)
        sequences.advance(rows)
        self.current_draft_step += 1
