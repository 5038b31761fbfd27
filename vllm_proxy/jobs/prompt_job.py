"""The job that answers rows in our own format with one engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.answerer import Answerer
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.job import Job
from vllm_proxy.llm.sampling import require_one_answer, sampling_params

if TYPE_CHECKING:
    from vllm_proxy.llm.proxy_llm import ProxyLLM


class PromptJob(Job):
    """A job of rows in our own format, answered by a `ProxyLLM` in this process."""

    isolates_rows = True

    def __init__(self, config: ProxyConfig, source: Input, target: str, **options: bool) -> None:
        require_one_answer(config.sampling.get("n", 1))
        super().__init__(config, source, target, **options)

    @contextmanager
    def engine(self) -> Iterator["ProxyLLM"]:
        """Start a `ProxyLLM`, after the cheap checks."""
        from vllm_proxy.server.command import NO_VLLM_MESSAGE

        try:
            from vllm_proxy.llm.proxy_llm import ProxyLLM
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ProxyConfigError(NO_VLLM_MESSAGE) from None
        sampling_params(self.config.sampling)
        llm = ProxyLLM.from_config(self.config)
        try:
            yield llm
        finally:
            # Not at exit, so that the engine's last messages go to the log, too.
            llm.llm_engine.engine_core.shutdown()

    def answerer(self, engine: "ProxyLLM") -> Answerer:
        """Return the object that turns rows into records."""
        return Answerer(engine, self.config)

    def answer(self, engine: "ProxyLLM") -> None:
        """See `Job`."""
        answerer = self.answerer(engine)

        def step() -> None:
            for record in answerer.step():
                self.finish(record)

        for line in self.lines():
            suspects = self._suspects
            suspects.alone = line.index if line.index in suspects.rows else None
            if record := answerer.submit(line):
                self.finish(record)
            while len(answerer) >= (answerer.capacity if suspects.alone is None else 1):
                step()
        while len(answerer):
            step()
