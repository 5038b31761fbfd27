"""The job of `vllm-proxy inspect`: a batch job, and the summary and page of its records."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.files import require_free_path
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.inspect.page import is_page, write_page
from vllm_proxy.jobs.inspect.summary import ShiftSummary
from vllm_proxy.jobs.prompt_job import PromptJob
from vllm_proxy.jobs.records import decode

if TYPE_CHECKING:
    from vllm_proxy.jobs.inspect.answerer import InspectingAnswerer
    from vllm_proxy.llm.proxy_llm import ProxyLLM


class InspectJob(PromptJob):
    """Answers and inspects every row; see `Job`.

    Args:
        config: the model, and the parameters of rows that set none.
        source: the rows.
        target: path of the records, which are sorted by row.
        top_k: number of the most likely tokens to keep of each distribution.
        keep: whether the records are kept, so that the job can be resumed.
        overwrite: replace the output of another job.

    Raises:
        ProxyConfigError: the job cannot be done; raised before an engine is started.
    """

    def __init__(
        self,
        config: ProxyConfig,
        source: Input,
        target: str,
        *,
        top_k: int,
        keep: bool = True,
        overwrite: bool = False,
    ) -> None:
        if other := config.engine.get("worker_extension_cls"):
            raise ProxyConfigError(
                "`inspect` sets this argument itself",
                field="engine.worker_extension_cls",
                value=other,
                remedy="remove it",
            )
        self._top_k = top_k
        self._keep = keep
        super().__init__(config, source, target, ordered=True, overwrite=overwrite)

    def fingerprint(self) -> dict[str, Any] | None:
        """See `Job`; `top_k` is part of it."""
        values = super().fingerprint() if self._keep else None
        return values and {**values, "inspect": {"top_k": self._top_k}}

    def answerer(self, engine: "ProxyLLM") -> "InspectingAnswerer":
        """See `PromptJob`."""
        from vllm_proxy.jobs.inspect.answerer import InspectingAnswerer

        return InspectingAnswerer(engine, self.config, self._top_k)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records, also those of earlier runs."""
        with open(self.output.name, "rb") as file:
            yield from map(decode, file)

    def summary_of_shift(self) -> ShiftSummary:
        """Return the summary of all records."""
        summary = ShiftSummary()
        for record in self.records():
            summary.add(record)
        return summary

    def write_page(self, path: str, summary: ShiftSummary) -> int:
        """Write the page, and return the number of records on it; see `page.write_page`."""
        return write_page(path, self.records(), summary, self.config)


def require_free_page(page: str, *, overwrite: bool) -> None:
    """Reject a page that cannot be written, or that would replace a file that is not a page.

    Raises:
        ProxyConfigError: names the option, its value and the remedy.
    """
    require_free_path(
        "--html",
        page,
        overwrite=overwrite,
        may_replace=is_page,
        problem="the file exists and was not written by `vllm-proxy inspect`",
    )
