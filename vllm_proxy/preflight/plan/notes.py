"""What a user should know about a plan that its figures do not show."""

from collections.abc import Iterator, Sequence

from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.plan.cost import EngineSettings
from vllm_proxy.preflight.plan.hardware import HERE, Hardware
from vllm_proxy.preflight.plan.predict import Choice, Demand
from vllm_proxy.preflight.plan.shape import Shape


def notes(
    config: ProxyConfig,
    shapes: Sequence[Shape],
    engine: EngineSettings,
    gpu: Hardware,
    demand: Demand,
    choices: Sequence[Choice],
) -> Iterator[str]:
    """Yield sentences about this configuration; see `Plan` for the arguments."""
    if engine.dtype == "float32" and gpu.name != HERE:
        yield "Arithmetic is counted at the 16-bit peak; in float32 it is several times slower."
    if any(shape.runs_with for shape in shapes):
        yield (
            "Expert and antiexpert run in one pass: the expert's weights are its adapter's, its "
            "time is what its rows add to the antiexpert's."
        )
    if engine.drafts:
        yield (
            f"After {engine.drafts} drafts by the expert, one pass of all members verifies them; "
            f"with the acceptance p it yields 1 + p + … + p^{engine.drafts} tokens. The time of "
            "such a pass includes the drafting."
        )
        if any(choice.layout.pp > 1 for choice in choices):
            whole = " and ".join(shape.role for shape in shapes if shape.drafts)
            yield (
                f"With pipeline stages, all layers of the {whole} are on the last one, because the "
                "expert drafts there."
            )
    if any(shape.states for shape in shapes):
        yield (
            f"A request has {_states(engine.states)} in each recurrent layer. Pages of the KV "
            "cache have one size, so attention has blocks of as many tokens as the largest state "
            "needs. Arithmetic on states, and states of cached prefixes, are not counted."
        )
    if any(shape.tower.parameters for shape in shapes):
        yield (
            "Towers' weights are counted, not the time and memory in which they read images; an "
            "image's tokens are tokens of the prompt."
        )
    if config.engine.get("speculative_config"):
        yield "Speculation is not counted: neither its drafts nor the steps that they save."
    most = config.engine.get("max_num_seqs")
    if isinstance(most, int) and any(c.proxy.running > most * c.layout.replicas for c in choices):
        yield f"`engine.max_num_seqs` is {most}: an engine will not run more requests at once."
    if any(choice.proxy.running < demand.concurrency for choice in choices):
        yield f"Where fewer than {demand.concurrency} requests fit, the others wait."


def _states(count: int) -> str:
    return "1 state" if count == 1 else f"{count} states"
