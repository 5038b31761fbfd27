"""What can be asked of a worker from outside (`worker_extension_cls`), under both model runners."""


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
        model = self.get_model()
        found = model.requests.take(req_ids) if model.requests else {}
        if model.head is None or model.head.start > 0:  # every rank has them; the first one tells
            return {}
        return {req_id: probe.figures.pack() for req_id, probe in found.items()}
