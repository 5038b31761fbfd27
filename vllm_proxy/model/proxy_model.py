"""`ProxyModel`: the members, and the fusion of their logits, behind vLLM's interface of a model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn
from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_proxy.config.request import MOST_TOP_K
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.members.adapter_set import AdapterSet, shared_adapters
from vllm_proxy.members.images import sees
from vllm_proxy.members.text_part import image_levels
from vllm_proxy.members.vllm_configs import (
    member_vllm_config,
    proxy_section,
    tower_vllm_config,
)
from vllm_proxy.model.build import build_member, build_tower, member_weights
from vllm_proxy.model.compile_ranges import CompileRanges, endpoints_of
from vllm_proxy.model.controls import NO_EXTRA_OPS, ExtraOps, LogitControls
from vllm_proxy.model.fusion import NUM_CONTROLS, controlled_logits, controls_at
from vllm_proxy.model.head import ProxyHead
from vllm_proxy.model.images import Sight
from vllm_proxy.model.kernels import (
    attention_layers,
    require_attention_kernels,
    require_one_cache,
    separate_backends,
    settle_state_pages,
    take_latent_blocks,
)
from vllm_proxy.model.loading import AdapterPart, MemberWeights
from vllm_proxy.model.measure import measured
from vllm_proxy.model.one_pass import can_pair, pair_up
from vllm_proxy.model.probe import InspectionRequest, ProbedStep
from vllm_proxy.model.rehearsal import most_rows, rehearse
from vllm_proxy.model.side_by_side import SideBySide
from vllm_proxy.model.stages import Stage, as_only_rank
from vllm_proxy.model.states import state_copies

if TYPE_CHECKING:
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncsByType
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger: it has vLLM's level and format

NUM_EXTRA_COLUMNS = -8 * (-(NUM_CONTROLS + 1) // 8)
"""Extra columns per row: its controls, and then 1 + its index among the inspected tokens
(`probe.ProbedStep`), or 0 if it is not inspected. Rounded up to 8, so that rows of 16-bit hidden
states keep the alignment that kernels require: Marlin's a stride that is a multiple of 8."""
BASE_ALONE = LogitControls(1.0, 0.0, 0.0)
INSPECTED_ROWS = 64
"""Most rows that are inspected at once: several tensors of rows x vocabulary are held."""


class ProxyModel(SideBySide):
    """Base, expert and antiexpert, or the base and one of them, as one model of vLLM's.

    To the engine it is one model that has the attention layers of all members.

    Code that computes logits selects rows of the hidden states in several ways (sampling, prompt
    logprobs, a rank's share of the batch). So per-request settings are appended to each row: the
    last columns, W of them, are the bits of its `NUM_EXTRA_COLUMNS`. Whatever selects rows carries
    them along, without waiting for the device.

    Symbols: V is the base's vocabulary size; H and W as in `SideBySide`.
    """

    supports_pp: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        section = proxy_section(vllm_config.model_config)
        configs = {role: member_vllm_config(vllm_config, role) for role in section.roles}
        adapters = _shared_adapters(vllm_config, section, configs)
        stage = Stage.here(section, is_shared=adapters is not None)
        _complete_hashes(configs, adapters, stage)
        self.elsewhere = configs.keys() - stage.roles
        configs = {role: configs[role] for role in stage.roles}
        models = {role: config.model_config for role, config in configs.items()}
        super().__init__(
            _build_members(vllm_config, section, configs, adapters, stage),
            roles=stage.roles,
            hidden_sizes=[model.get_hidden_size() for model in models.values()],
            vocab_sizes={role: model.get_vocab_size() for role, model in models.items()},
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            num_columns=NUM_EXTRA_COLUMNS,
            dtype=vllm_config.model_config.dtype,
            is_last_rank=get_pp_group().is_last_rank,
            whole=stage.whole,
            slots=1 if adapters is None else len(adapters.adapters),
        )
        self.section = section
        self.slots = {name: slot for slot, name in enumerate(section.adapters)}
        self.default = LogitControls.of(section.control)
        self.use_default_controls()
        self.head = self._make_head(vllm_config) if self.is_last_rank else None
        towers = {
            role: tower_vllm_config(vllm_config, config, role)
            for role, config in configs.items()
            if sees(config.model_config)
        }
        if towers:
            self.sight = _build_sight(vllm_config, towers, models)
        self.compile_ranges = CompileRanges(
            vllm_config,
            {
                role: endpoints_of(configs[role], vllm_config, twice=self.is_paired)
                for role in self.modules_of
                if role != "base"
            },
        )
        scheduler = vllm_config.scheduler_config
        # On a CPU, vLLM does not measure memory.
        self.rehearsal_rows = 0
        if not current_platform.is_cpu():
            self.rehearsal_rows = most_rows(
                scheduler.max_num_seqs, scheduler.max_num_batched_tokens, section.speculate
            )
        self._note_checkpoints(vllm_config, configs, towers)
        logger.info_once(
            "Proxy tuning: base + %s * (%s - %s)",
            section.alpha,
            section.expert or "base",
            section.antiexpert or "base",
        )

    def _make_head(self, vllm_config: VllmConfig) -> ProxyHead:
        return ProxyHead(
            {role: self.member(role) for role in self.roles},
            self.hidden_sizes,
            self.vocab_sizes,
            self.default,
            separate_role="expert" if self.section.speculate else None,
            may_compile=vllm_config.compilation_config.mode != CompilationMode.NONE,
        )

    def _note_checkpoints(
        self,
        vllm_config: VllmConfig,
        configs: Mapping[Role, VllmConfig],
        towers: Mapping[Role, VllmConfig],
    ) -> None:
        """Make what loads weights, and name the checkpoints to vLLM's loader."""
        others = [role for role in self.roles if role != "base"]
        pair = None
        if self.is_paired:
            pair = AdapterPart(self.section.adapters, self.member("antiexpert"), self.choice)
        self.weights = MemberWeights(
            {role: self.member(role) for role in self.modules_of},
            configs,
            {role: lora for role in others if (lora := getattr(self.section, role).lora)},
            pair,
            self.head,
            elsewhere=self.elsewhere,
            towers={
                role: (self.sight.towers[role], config)
                for role, config in towers.items()
                if self.sight is not None
            },
            is_random=vllm_config.load_config.load_format == "dummy",
        )
        # vLLM's loader yields the base's checkpoint first, then these.
        self.secondary_weights = [
            member_weights(vllm_config, role) for role in others if role in self.modules_of
        ]

    def use_default_controls(self) -> None:
        """Fuse the next logits with the engine's own strength, in every row."""
        self.has_request_controls = False
        self.extra_ops = NO_EXTRA_OPS
        self.inspecting: ProbedStep | None = None

    def use_controls(
        self,
        rows: Sequence[LogitControls],
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        prompt_lens: torch.Tensor,
        probes: Sequence[InspectionRequest | None] | None = None,
        unshifted: Sequence[int] | None = None,
    ) -> None:
        """Fuse the next logits by each request's controls. Does not wait for the device.

        A row at position p predicts token p + 1. Rows within a prompt are fused like the first
        generated token. The tokens of an inspected answer, although all but the last belong to the
        request's prompt, count as generated.

        Args:
            rows: `[requests]`, on the host.
            query_start_loc: `[requests + 1]`: where each request's tokens begin in the batch.
            positions: `[tokens]`.
            prompt_lens: `[requests]`.
            probes: `[requests]`; None if no request is inspected.
            unshifted: `[requests]`: rows at positions before it are the base's alone.
        """
        step = None if probes is None else ProbedStep(probes, positions.device)
        if step is not None:
            prompt_lens = prompt_lens - (step.counts - 1).clamp_(min=0)
        request = _requests_of_rows(query_start_loc, len(positions))
        steps = positions + 1 - prompt_lens[request]
        table = async_tensor_h2d([*rows, BASE_ALONE], positions.device, torch.float32)
        columns, of_row = self.columns[: positions.shape[0]], request
        if unshifted is not None:
            begins = async_tensor_h2d(unshifted, positions.device, torch.int64)
            of_row = request.masked_fill(positions < begins[request], len(rows))
        columns[:, :NUM_CONTROLS] = controls_at(table[of_row], steps.clamp(min=0))
        if step is not None:
            is_inspected = (steps >= 0) & (steps < step.counts[request])
            places = (step.starts[request] + steps + 1) * is_inspected
            columns[:, NUM_CONTROLS] = places.int().view(torch.float32)
        self.has_request_controls = True
        self.extra_ops = ExtraOps.of(rows)
        self.inspecting = step

    def use_experts(
        self, slots: Sequence[int] | None, query_start_loc: torch.Tensor, tokens: int
    ) -> None:
        """Let the rows of the next step use their requests' adapters.

        Args:
            slots: `[requests]`, on the host; None if no running request names an expert.
            query_start_loc: `[requests + 1]`: where each request's tokens begin in the batch.
            tokens: rows of the batch, with those that pad it.
        """
        if self.choice is None or (slots is None and self.slots_of_rows is None):
            return
        if slots is None:
            self.slots_of_rows = None
            self.choice.zero_()[:, 0] = 1
            return
        table = async_tensor_h2d(slots, query_start_loc.device, torch.int64)
        self.slots_of_rows = table[_requests_of_rows(query_start_loc, tokens)]
        self.choose(self.slots_of_rows)

    def use_experts_of(self, slots: Sequence[int] | None) -> None:
        """Let the rows of drafts, one of each request, use their requests' adapters.

        The next pass of all members sets its rows' again.

        Args:
            slots: `[requests]`, on the host; None if no running request names an expert.
        """
        if slots is not None:
            self.choose(async_tensor_h2d(slots, self.columns.device, torch.int64))

    def get_mamba_state_copy_funcs(
        self, mamba_types: set["MambaAttentionBackendEnum"]
    ) -> "MambaStateCopyFuncsByType":
        """Return how vLLM copies each kind of recurrent state from one block to the next."""
        return state_copies([self.member(role) for role in self.modules_of])

    @contextmanager
    def running(self, role: Role) -> Iterator[None]:
        """Let vLLM compile the member as it needs it: the first run compiles."""
        whole = as_only_rank() if role in self.whole else nullcontext()
        with whole, self.compile_ranges.of(role):
            yield

    def draft(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run only the expert, on its own KV cache; returns `[tokens, H_e]`."""
        if self.is_paired:
            return self.run_pair(input_ids, positions)[0]
        return self.call("expert", input_ids, positions)

    def draft_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the expert's logits, `[rows, V]`, of rows that `draft` returned."""
        assert self.head is not None  # vLLM drafts on the last pipeline rank only
        return self.head.member_logits("expert", hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Fuse the members' logits. vLLM calls this for sampling and for prompt logprobs.

        Args:
            hidden_states: `[rows, H + W]`, rows of what `forward` returned.

        Returns:
            `[rows, V]`, float32; None on ranks to which vLLM does not gather logits.
        """
        return self._logits(hidden_states, gather=True)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Fuse the logits of this tensor-parallel rank's ids, for batch-sharded sampling.

        Returns:
            `[rows, V / ranks]` (V padded), float32.
        """
        return self._logits(hidden_states, gather=False)

    def _logits(self, hidden_states: torch.Tensor, *, gather: bool) -> torch.Tensor | None:
        assert self.head is not None  # vLLM computes logits on the last pipeline rank only
        total = sum(self.hidden_sizes)
        if self.rehearsal_rows:  # vLLM measures memory, before any request
            rows, self.rehearsal_rows = self.rehearsal_rows, 0
            rehearse(self.head, hidden_states[:, :total], rows, INSPECTED_ROWS, MOST_TOP_K)
        controls = None
        if self.has_request_controls:
            columns = hidden_states[:, total:].contiguous().view(torch.float32)
            controls = columns[:, :NUM_CONTROLS]
            if self.inspecting is not None:
                places = columns[:, NUM_CONTROLS].contiguous().view(torch.int32) - 1
                self._inspect(
                    self.head, self.inspecting, hidden_states[:, :total], controls, places
                )
        return self.head(hidden_states[:, :total], controls, self.extra_ops, gather=gather)

    def _inspect(
        self,
        head: ProxyHead,
        step: ProbedStep,
        hidden_states: torch.Tensor,
        controls: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """Measure the rows that have a place among the inspected tokens. Waits for the device."""
        on_host = places.cpu().numpy()
        unmeasured = torch.from_numpy(step.unmeasured(on_host))
        for rows in unmeasured.split(INSPECTED_ROWS) if len(unmeasured) else ():
            picked = async_tensor_h2d(rows, places.device)
            base, expert, antiexpert = head.by_role(hidden_states[picked])
            proxy = controlled_logits(base, expert, antiexpert, controls[picked], self.extra_ops)
            tokens, k = step.tokens[places[picked]], min(step.top_k, proxy.shape[-1])
            found = measured(base, expert, antiexpert, proxy, tokens, k)
            step.store(on_host[rows.numpy()], found)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the members' checkpoints, or tensors of a running engine; see `MemberWeights.load`.

        Args:
            weights: `(name, tensor)`; the base's under their own names, then the others' under
                `expert.` and `antiexpert.`.

        Returns:
            The names of the parameters that were set.

        Raises:
            ProxyConfigError: a checkpoint has a tensor too many or too few; names both.
        """
        return self.weights.load(weights)


def _requests_of_rows(query_start_loc: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the request of each row, `[tokens]`; of rows that pad the batch the last one."""
    every = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    request = torch.searchsorted(query_start_loc[1:].contiguous(), every, right=True)
    return request.clamp_(max=len(query_start_loc) - 2)


def _shared_adapters(
    vllm_config: VllmConfig, section: ProxySection, configs: Mapping[Role, VllmConfig]
) -> AdapterSet | None:
    """Return the adapters by which experts differ from the antiexpert; None if one is merged.

    It is merged where these see images.
    """
    quantization = None
    if "antiexpert" in configs:
        quantization = configs["antiexpert"].model_config.quantization
        if sees(configs["antiexpert"].model_config):
            return None
    dummy = vllm_config.load_config.load_format == "dummy"
    return shared_adapters(section, dummy=dummy, quantization=quantization)


def _complete_hashes(
    configs: Mapping[Role, VllmConfig], adapters: AdapterSet | None, stage: Stage
) -> None:
    """Add to the hashes that name compiled graphs what vLLM does not know of."""
    models = {role: config.model_config for role, config in configs.items()}
    width = sum(model.get_hidden_size() for model in models.values())
    for role, model in models.items():
        # An embedding tied to a head is read from the fused head's weight, whose rows are as long
        # as all members' together.
        model.hf_config.proxy_head_width = width
        # With the same ranks, but without drafts, some of its layers are here.
        model.hf_config.proxy_whole = role in stage.whole
    if adapters is not None:  # which layers add the adapters' products
        facts = {"shapes": adapters.shapes, "slots": len(adapters.adapters)}
        models["antiexpert"].hf_config.proxy_adapter = facts


def _build_sight(
    vllm_config: VllmConfig,
    towers: Mapping[Role, VllmConfig],
    models: Mapping[Role, ModelConfig],
) -> Sight:
    """Build the towers of the members that see images, without weights.

    Raises:
        ProxyConfigError: vLLM cannot build one on this machine.
    """
    return Sight(
        {role: build_tower(config, role) for role, config in towers.items()},
        {
            role: (models[role].get_hidden_size(), image_levels(models[role].hf_config) or 0)
            for role in towers
        },
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.dtype,
    )


def _build_members(
    vllm_config: VllmConfig,
    section: ProxySection,
    configs: Mapping[Role, VllmConfig],
    adapters: AdapterSet | None,
    stage: Stage,
) -> dict[Role, nn.Module]:
    """Build the models of this rank's members, without weights; a paired expert has none.

    Raises:
        ProxyConfigError: vLLM cannot build a member, or run its attention, on this machine.
    """
    members = {}
    for role, config in configs.items():
        with as_only_rank() if role in stage.whole else nullcontext():
            members[role] = build_member(config, role)
    models = {role: config.model_config for role, config in configs.items()}
    take_latent_blocks(vllm_config)
    separate_backends(attention_layers(vllm_config), models)
    require_attention_kernels(vllm_config, {role: one.model for role, one in models.items()})
    settle_state_pages(vllm_config)
    if current_platform.is_cpu():  # elsewhere vLLM chooses block sizes later
        require_one_cache(vllm_config)
    if adapters is not None and "expert" in members:
        small, ranks = configs["antiexpert"].model_config, vllm_config.parallel_config
        antiexpert = members["antiexpert"]
        if can_pair(
            adapters,
            antiexpert,
            must=section.one_pass,
            quantization=small.quantization,
            spreads_experts=small.is_moe and ranks.data_parallel_size > 1,
        ):
            pair_up(members.pop("expert"), antiexpert)  # keeps only its attention layers
            logger.info_once("The small members run in one pass: weights exist once")
    return members
