"""What can be asked of a worker from outside (`worker_extension_cls`), under both model runners."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_proxy.runner.requests import OwnRequests


class InspectedWorker:
    """Mixed into vLLM's worker class by vLLM."""

    def take_inspected(self, req_ids: list[str]) -> dict[str, list[bytes]]:
        """Return and forget what was measured for requests of `ProxyLLM.inspect`.

        Args:
            req_ids: requests that ended, by the engine's own ids.

        Returns:
            Packed `probe.Figures`, of those that were measured to their end; nothing on workers
            that have no logits, or the same as another.
        """
        runner = self.model_runner
        own: OwnRequests | None = getattr(runner, "own", None)  # V1: none before the first request
        if own is None and hasattr(runner, "model_state"):
            own = runner.model_state.own
        found = own.take(req_ids) if own is not None else {}
        head = self.get_model().head
        if head is None or head.start > 0:  # ranks have the whole vocabulary; the first one tells
            return {}
        return {req_id: probe.figures.pack() for req_id, probe in found.items()}
