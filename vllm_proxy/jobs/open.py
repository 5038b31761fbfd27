"""`open_job`: the right kind of job for an input of `generate`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.job import Job
from vllm_proxy.jobs.outputs import require_new
from vllm_proxy.jobs.prompt_job import PromptJob

if TYPE_CHECKING:
    from vllm_proxy.jobs.ray_job import Replicas


def open_job(
    config: ProxyConfig,
    source: str | Sequence[str],
    target: str,
    *,
    limit: int | None = None,
    replicas: "Replicas | None" = None,
    ordered: bool = False,
    overwrite: bool = False,
) -> Job:
    """Return the job that answers *source*: rows in our format, or an OpenAI batch file.

    The first row decides which of the two it is: rows of an OpenAI batch file have a `custom_id`.

    Args:
        config: see `Job`.
        source: see `Input`.
        target: see `Job`.
        limit: see `Input`.
        replicas: spread the rows over several engines; only for rows in our format.
        ordered: see `Job`.
        overwrite: see `Job`.

    Raises:
        ProxyConfigError: the job cannot be done; raised before an engine is started.
    """
    from vllm_proxy.jobs.openai_job import OpenAIJob, is_batch_row

    rows = Input(source, limit)
    if rows.is_stream and not overwrite:
        require_new(target)  # now, because the first row may take long to arrive
    first = rows.first()
    is_openai = first is not None and is_batch_row(first)
    options = {"ordered": ordered, "overwrite": overwrite}
    if replicas is None:
        return (OpenAIJob if is_openai else PromptJob)(config, rows, target, **options)
    if is_openai:
        raise ProxyConfigError(
            "an OpenAI batch file is answered by one server",
            field=f"--input {rows.paths[0]!r}",
            remedy="set `engine.data_parallel_size`, and leave out --ray",
        )
    from vllm_proxy.jobs.ray_job import ReplicatedJob

    return ReplicatedJob(config, rows, target, replicas, **options)
