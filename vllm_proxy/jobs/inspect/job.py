"""The job behind `vllm-proxy inspect`: a batch job, and what is made of its records."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.inspect.page import is_page, write_page
from vllm_proxy.jobs.inspect.summary import ShiftSummary
from vllm_proxy.jobs.prompt_job import PromptJob
from vllm_proxy.jobs.records import decode

if TYPE_CHECKING:
    from vllm_proxy.jobs.inspect.answerer import InspectingAnswerer
    from vllm_proxy.llm.proxy_llm import ProxyLLM


class InspectJob(PromptJob):
    """Answers and inspects every row; see `batch.Job`.

    Args:
        config: the model and the parameters of rows that give none of their own.
        source: where the rows are.
        target: path of the records, which are in the order of the rows.
        top_k: how many of the likeliest tokens to keep of each distribution.
        keep: whether the records stay, so that the job can be resumed.
        overwrite: replace an output of another job.

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
                f"`engine.worker_extension_cls` is {other!r}: inspecting needs its place; remove it"
            )
        self._top_k, self._keep = top_k, keep
        super().__init__(config, source, target, ordered=True, overwrite=overwrite)

    def fingerprint(self) -> dict[str, Any] | None:
        """See `Job`; the number of tokens that are kept is part of it."""
        own = super().fingerprint() if self._keep else None
        return own and {**own, "inspect": {"top_k": self._top_k}}

    def answerer(self, engine: "ProxyLLM") -> "InspectingAnswerer":
        """See `PromptJob`."""
        from vllm_proxy.jobs.inspect.answerer import InspectingAnswerer

        return InspectingAnswerer(engine, self.config, self._top_k)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records that were written, those of earlier runs too."""
        with open(self.output.name, "rb") as file:
            yield from map(decode, file)

    def summary_of_shift(self) -> ShiftSummary:
        """Return what all records come to."""
        summary = ShiftSummary()
        for record in self.records():
            summary.add(record)
        return summary

    def write_page(self, path: str, summary: ShiftSummary) -> int:
        """Write the page of all records, and return how many are on it; see `page.write_page`."""
        return write_page(path, self.records(), summary, self.config)


def require_free(page: str, *, overwrite: bool) -> None:
    """Refuse a page that cannot be written, or that would replace what is none of ours.

    Raises:
        ProxyConfigError: names the option, its value and the remedy.
    """
    path = Path(page)
    if not path.parent.is_dir() or path.is_dir():
        raise ProxyConfigError(f"--html {page!r}: give a file in a directory that exists")
    if path.exists() and not overwrite and not is_page(path):
        raise ProxyConfigError(
            f"--html {page!r} exists and is no page of ours; add --overwrite to replace it, or "
            "give another --html"
        )
