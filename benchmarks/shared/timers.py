"""Timers in the worker process, around the methods that make up a step."""

import time
from collections import Counter, defaultdict
from typing import Any

import torch


class Timers:
    """vLLM's seam `worker_extension_cls`: methods added to the worker, called from the front.

    Where there is an accelerator, timers wait for it before and after what they time.
    """

    def time_step(self) -> None:
        """Put timers around a step of the runner, and around the drafting in it."""
        self.calls, self.seconds = Counter(), defaultdict(float)
        runner = self.model_runner
        self._put_timer(runner, "execute_model", "runner")
        self._put_timer(runner, "sample_tokens", "runner")
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        if drafter is not None:
            self._put_timer(drafter, "propose", "drafting")

    def time_parts(self) -> None:
        """Put timers around a step of a proxy-tuned model, and around its parts."""
        self.time_step()
        runner = self.model_runner
        model = runner.get_model()
        for role in model.roles:
            self._put_timer(model.member(role), "forward", role)
        self._put_timer(model, "forward", "model")
        self._put_timer(model, "compute_logits", "head")
        if model.head.product is not None:
            self._put_timer(model.head.product, "_multiply", "product")
        if isinstance(runner.sampler, torch.nn.Module):  # Model Runner V1
            self._put_timer(runner.sampler, "forward", "sampler")
        else:
            self._put_timer(runner, "sample", "head and sampler")
        if hasattr(runner, "overrides"):  # Model Runner V1; V2 calls ours while it prepares inputs
            self._put_timer(runner, "_model_forward", "model with hooks")

    def timers(self) -> tuple[int, dict[str, float]]:
        """Return how many steps there were, and the seconds in each part."""
        return self.calls["execute_model"], dict(self.seconds)

    def _put_timer(self, owner: Any, name: str, part: str) -> None:
        run = getattr(owner, name)
        wait = torch.accelerator.synchronize if torch.accelerator.is_available() else None

        def timed(*args: Any, **kwargs: Any) -> Any:
            if wait is not None:
                wait()
            before = time.perf_counter()
            result = run(*args, **kwargs)
            if wait is not None:
                wait()
            self.seconds[part] += time.perf_counter() - before
            self.calls[name] += 1
            return result

        setattr(owner, name, timed)
