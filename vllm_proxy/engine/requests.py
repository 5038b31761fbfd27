"""What a worker keeps of running requests that have per-request values."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from vllm_proxy.config.request import (
    BASE_LENGTH,
    EXPERT_KEY,
    INSPECTED,
    RequestControl,
    extra_args_of,
)
from vllm_proxy.model.alignment import MemberPrompts
from vllm_proxy.model.controls import LogitControls
from vllm_proxy.model.probe import InspectionRequest
from vllm_proxy.model.proxy_model import ProxyModel

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object  # a mixin for each platform's worker


def forbids_tokens(params: SamplingParams) -> bool:
    """Whether vLLM may forbid tokens of a request, by a grammar or otherwise, after our filters."""
    return bool(
        params.structured_outputs
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
    )


def scores_prompt(params: SamplingParams) -> bool:
    """Whether a request asks for log probabilities of its prompt."""
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


class RequestOverrides:
    """Controls, prompts and inspections of running requests, by request id.

    Ordinary requests, which have none of these, take no room here.

    Attributes:
        rows: controls that differ from the engine's.
        prompts: of requests whose members have different prompts.
        probes: of running requests that are inspected.
        inspected: of inspected requests that have ended, until `take` fetches them.
        unshifted: of requests whose prompt is scored: the first virtual position at which both
            small members have begun, if tokens of the base's prompt come before.
        slots: of the adapters of requests that name an expert.
    """

    def __init__(self, model: ProxyModel) -> None:
        self.model = model
        self.rows: dict[str, LogitControls] = {}
        self.prompts: dict[str, MemberPrompts] = {}
        self.probes: dict[str, InspectionRequest] = {}
        self.inspected: dict[str, InspectionRequest] = {}
        self.unshifted: dict[str, int] = {}
        self.slots: dict[str, int] = {}

    def add(self, request: NewRequestData) -> None:
        """Keep the values of a new or resumed request."""
        self.remove(request.req_id)
        params = request.sampling_params
        extra_args = extra_args_of(params)
        if INSPECTED in extra_args:
            self.probes[request.req_id] = InspectionRequest(extra_args)
        control = RequestControl.from_extra_args(extra_args)
        row = self.model.default
        if control is not None and not control.is_default:
            row = LogitControls.of(control, self.model.section.control)
        if row.is_filtered and params is not None and forbids_tokens(params):
            row = row._replace(lenient=1.0)
        if row is not self.model.default:
            self.rows[request.req_id] = row
        if (name := extra_args.get(EXPERT_KEY)) is not None:
            self.slots[request.req_id] = self.model.slots[name]
        if BASE_LENGTH in extra_args:
            prompts = MemberPrompts(request.prompt_token_ids, extra_args, self.model.roles)
            self.prompts[request.req_id] = prompts
            begin = max(prompts.offsets.values())
            if params is not None and scores_prompt(params) and begin > prompts.offsets["base"]:
                self.unshifted[request.req_id] = begin

    def remove(self, req_id: str) -> None:
        """Forget a request, except its measurements if they are complete."""
        self.rows.pop(req_id, None)
        self.prompts.pop(req_id, None)
        self.unshifted.pop(req_id, None)
        self.slots.pop(req_id, None)
        probe = self.probes.pop(req_id, None)
        if probe is not None and probe.is_done.all():
            self.inspected[req_id] = probe

    def take(self, req_ids: Iterable[str]) -> dict[str, InspectionRequest]:
        """Return and forget the inspections of these requests that are complete."""
        both = self.probes, self.inspected
        found = {id_: probe for id_ in req_ids for held in both if (probe := held.pop(id_, None))}
        return {req_id: probe for req_id, probe in found.items() if probe.is_done.all()}

    def probes_of(self, req_ids: Iterable[str]) -> list[InspectionRequest | None] | None:
        """Return the inspections by request; None if there are none."""
        if not self.probes:
            return None
        probes = [self.probes.get(req_id) for req_id in req_ids]
        return probes if any(probes) else None

    def prompts_of(self, req_ids: Iterable[str]) -> list[MemberPrompts | None] | None:
        """Return the members' prompts by request; None if no request has different ones."""
        if not self.prompts:
            return None
        prompts = [self.prompts.get(req_id) for req_id in req_ids]
        return prompts if any(prompts) else None

    def slots_of(self, req_ids: Iterable[str]) -> list[int] | None:
        """Return the requests' slots of adapters; None if no running request names an expert."""
        if not self.slots:
            return None
        return [self.slots.get(req_id, 0) for req_id in req_ids]

    def rows_of(self, req_ids: Sequence[str]) -> list[LogitControls] | None:
        """Return the requests' controls; None if all use the engine's constant weights.

        An inspected request always needs its controls, and so does one with a row of the base
        alone. If no running request has values, *req_ids* are not iterated.
        """
        default = self.model.default
        measured = self.probes.keys() | self.unshifted.keys()
        if not self.rows and not measured and default.is_constant:
            return None
        rows = [self.rows.get(req_id, default) for req_id in req_ids]
        ordinary = default.is_constant and all(row is default for row in rows)
        return None if ordinary and measured.isdisjoint(req_ids) else rows

    def unshifted_of(self, req_ids: Iterable[str]) -> list[int] | None:
        """Return by request the virtual position before which logits are the base's alone."""
        if not self.unshifted:
            return None
        return [self.unshifted.get(req_id, 0) for req_id in req_ids]


class InspectedWorker(Worker):
    """vLLM mixes this into its worker class (`worker_extension_cls`), under both runners."""

    def take_inspected(self, req_ids: list[str]) -> dict[str, list[bytes]]:
        """Return and forget the measurements of requests that `ProxyLLM.inspect` sent.

        Args:
            req_ids: ids of requests that have ended, in the engine's form.

        Returns:
            Packed `probe.TokenStats` of those that were measured completely. Nothing on workers
            that have no logits, or that have the same logits as another worker.
        """
        head = self.get_model().head
        # Under V2 the model's state has the overrides; V1 has none before its first batch.
        runner: Any = self.model_runner
        overrides: RequestOverrides | None = getattr(runner, "model_state", runner).overrides
        found = overrides.take(req_ids) if overrides else {}
        if head is None or head.start > 0:  # all tensor-parallel ranks have them; the first answers
            return {}
        return {req_id: probe.stats.pack() for req_id, probe in found.items()}
