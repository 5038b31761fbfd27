"""What a worker remembers of the requests that asked for something of their own."""

from collections.abc import Iterable, Sequence

from vllm.v1.core.sched.output import NewRequestData

from vllm_proxy.alignment import MemberPrompts
from vllm_proxy.control import BASE_LENGTH, Control, Row
from vllm_proxy.model import ProxyTunedForCausalLM


class OwnRequests:
    """Controls and prompts of running requests, by request id; nothing of ordinary requests."""

    def __init__(self, model: ProxyTunedForCausalLM) -> None:
        self.model = model
        self.rows: dict[str, Row] = {}
        self.prompts: dict[str, MemberPrompts] = {}

    def add(self, request: NewRequestData) -> None:
        """Note what a new, or resumed, request asks for."""
        self.remove(request.req_id)
        params = request.sampling_params
        extra_args = params.extra_args if params is not None else None
        control = Control.from_request(extra_args)
        if control is None:
            return
        if not control.is_default:
            self.rows[request.req_id] = control.row(self.model.section.control)
        if BASE_LENGTH in extra_args:
            self.prompts[request.req_id] = MemberPrompts(
                request.prompt_token_ids, extra_args, self.model.roles
            )

    def remove(self, req_id: str) -> None:
        """Forget a request."""
        self.rows.pop(req_id, None)
        self.prompts.pop(req_id, None)

    def prompts_of(self, req_ids: Iterable[str]) -> list[MemberPrompts | None] | None:
        """Return the members' prompts by request; None if all are ordinary."""
        if not self.prompts:
            return None
        prompts = [self.prompts.get(req_id) for req_id in req_ids]
        return prompts if any(prompts) else None

    def rows_of(self, req_ids: Sequence[str]) -> list[Row] | None:
        """Return what requests ask of their logits; None if all want the engine's constant weights.

        *req_ids* are not looked through where no running request has anything of its own.
        """
        default = self.model.default
        if not self.rows and default.is_constant:
            return None
        rows = [self.rows.get(req_id, default) for req_id in req_ids]
        ordinary = default.is_constant and all(row is default for row in rows)
        return None if ordinary else rows
