"""What a worker remembers of the requests that asked for something of their own."""

from collections.abc import Iterable, Sequence

from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from vllm_proxy.config.request import BASE_LENGTH, INSPECTED, RequestControl
from vllm_proxy.model.alignment import MemberPrompts
from vllm_proxy.model.controls import LogitControls
from vllm_proxy.model.probe import InspectionRequest
from vllm_proxy.model.proxy_model import ProxyModel


def forbids_tokens(params: SamplingParams) -> bool:
    """Whether vLLM may forbid a request tokens, by a grammar or otherwise, whatever we say."""
    return bool(
        params.structured_outputs
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
    )


class RequestOverrides:
    """Controls, prompts and probes of running requests, by request id; nothing of ordinary ones.

    Attributes:
        inspected: probes of requests that are gone, and that nobody has asked for yet.
    """

    def __init__(self, model: ProxyModel) -> None:
        self.model = model
        self.rows: dict[str, LogitControls] = {}
        self.prompts: dict[str, MemberPrompts] = {}
        self.probes: dict[str, InspectionRequest] = {}
        self.inspected: dict[str, InspectionRequest] = {}

    def add(self, request: NewRequestData) -> None:
        """Note what a new, or resumed, request asks for."""
        self.remove(request.req_id)
        params = request.sampling_params
        extra_args = (params.extra_args if params is not None else None) or {}
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
        if BASE_LENGTH in extra_args:
            self.prompts[request.req_id] = MemberPrompts(
                request.prompt_token_ids, extra_args, self.model.roles
            )

    def remove(self, req_id: str) -> None:
        """Forget a request, but for what was measured if that is complete."""
        self.rows.pop(req_id, None)
        self.prompts.pop(req_id, None)
        probe = self.probes.pop(req_id, None)
        if probe is not None and probe.is_done.all():
            self.inspected[req_id] = probe

    def take(self, req_ids: Iterable[str]) -> dict[str, InspectionRequest]:
        """Return and forget the probes of these requests, those that are complete."""
        both = self.probes, self.inspected
        found = {id_: probe for id_ in req_ids for own in both if (probe := own.pop(id_, None))}
        return {req_id: probe for req_id, probe in found.items() if probe.is_done.all()}

    def probes_of(self, req_ids: Iterable[str]) -> list[InspectionRequest | None] | None:
        """Return probes by request; None if there are none."""
        if not self.probes:
            return None
        probes = [self.probes.get(req_id) for req_id in req_ids]
        return probes if any(probes) else None

    def prompts_of(self, req_ids: Iterable[str]) -> list[MemberPrompts | None] | None:
        """Return the members' prompts by request; None if all are ordinary."""
        if not self.prompts:
            return None
        prompts = [self.prompts.get(req_id) for req_id in req_ids]
        return prompts if any(prompts) else None

    def rows_of(self, req_ids: Sequence[str]) -> list[LogitControls] | None:
        """Return what requests ask of their logits; None for the engine's constant weights alone.

        Where one is inspected, its controls are needed, whatever they are.
        *req_ids* are not looked through where no running request has anything of its own.
        """
        default = self.model.default
        if not self.rows and not self.probes and default.is_constant:
            return None
        rows = [self.rows.get(req_id, default) for req_id in req_ids]
        ordinary = default.is_constant and all(row is default for row in rows)
        return None if ordinary and self.probes.keys().isdisjoint(req_ids) else rows


class InspectedWorker:
    """Mixed into vLLM's worker class by vLLM (`worker_extension_cls`), under both runners."""

    def take_inspected(self, req_ids: list[str]) -> dict[str, list[bytes]]:
        """Return and forget what was measured for requests of `ProxyLLM.inspect`.

        Args:
            req_ids: requests that ended, by the engine's own ids.

        Returns:
            Packed `probe.TokenStats`, of those that were measured to their end; nothing on workers
            that have no logits, or the same as another.
        """
        head = self.get_model().head
        # V2 keeps requests in the model's state; V1 has none before its first batch.
        overrides = getattr(self.model_runner, "model_state", self.model_runner).overrides
        found = overrides.take(req_ids) if overrides else {}
        if head is None or head.start > 0:  # every rank has them; the first one tells
            return {}
        return {req_id: probe.stats.pack() for req_id, probe in found.items()}
