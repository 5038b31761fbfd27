"""A plan as text for a terminal, and as a record for scripts."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.roles import Role
from vllm_proxy.preflight.plan.cost import Time, total
from vllm_proxy.preflight.plan.launches import LAUNCH, PYTHON_OPERATOR
from vllm_proxy.preflight.plan.pages import state_blocks
from vllm_proxy.preflight.plan.plan import Plan
from vllm_proxy.preflight.plan.predict import Choice, Drafting, Prediction
from vllm_proxy.preflight.plan.shape import Shape

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_GIB, _MIB, _KIB = 2**30, 2**20, 2**10


def render(plan: Plan) -> "RenderableType":
    """Return tables of the layouts, if there are several, and of the members on the best one.

    Below them are notes and assumptions.
    """
    from rich.console import Group
    from rich.text import Text

    tables = [_layouts(plan)] if len(plan.choices) > 1 else []
    lines = [Text(f"• {sentence}") for sentence in (*plan.notes, *_assumptions(plan))]
    return Group(*tables, _members(plan, plan.throughput), *lines)


def as_record(plan: Plan) -> dict[str, Any]:
    """Return the plan for JSON: bytes, seconds, counts and ratios."""
    gpu, engine = plan.gpu, plan.engine
    return {
        "gpu": {
            "name": gpu.name,
            "memory_bytes": gpu.memory,
            "bytes_per_second": gpu.roofline.bytes_per_second,
            "flops": gpu.roofline.flops,
            "link_bytes_per_second": gpu.link and gpu.link.bytes_per_second,
            "link_latency_seconds": gpu.link and gpu.link.latency,
            "workspace_bytes": gpu.workspace,
        },
        "dtype": engine.dtype,
        "kv_cache_bytes_per_number": engine.kv_itemsize,
        "gpu_memory_utilization": engine.utilization,
        "max_num_batched_tokens": engine.batch.tokens,
        "max_num_seqs": engine.batch.requests,
        **plan.demand._asdict(),
        "members": {
            shape.role: {
                "model": shape.model,
                "parameters": shape.parameters,
                "active_parameters": round(shape.active_parameters),
                "quantization": shape.quantization,
                "weight_bytes": shape.weight_bytes,
                "kv_bytes_per_token": shape.kv_numbers() * engine.kv_itemsize,
                "state_bytes": sum(shape.states),
            }
            for shape in plan.shapes
        },
        "layouts": [_choice_record(plan, choice) for choice in plan.choices],
        "best_throughput": plan.choices.index(plan.throughput),
        "best_latency": plan.choices.index(plan.latency),
        "notes": [*plan.notes],
        "assumptions": [*_assumptions(plan)],
    }


def _choice_record(plan: Plan, choice: Choice) -> dict[str, Any]:
    return {
        **choice.layout._asdict(),
        "gpu_weight_bytes": {s.role: _gpu_weights(s, choice) for s in plan.shapes},
        "gpu_activation_bytes": choice.activations,
        "gpu_kv_bytes_per_token": {s.role: _gpu_kv(plan, s, choice) for s in plan.shapes},
        "gpu_kv_block": _block_record(plan, choice),
        "proxy": _prediction_record(choice.proxy),
        "base": _prediction_record(choice.base),
        "base_at_most": _prediction_record(choice.base_at_most),
        "step_overhead": choice.step_overhead,
        "prefill_overhead": choice.prefill_overhead,
        "fit_over_base": choice.proxy.fit / choice.base.fit,
        "drafting": choice.drafting and _drafting_record(choice.drafting),
    }


def _block_record(plan: Plan, choice: Choice) -> dict[str, Any] | None:
    """Return the size of a block that attention and recurrent layers share; None without states."""
    if (block := state_blocks(plan.shapes, choice.layout, 0, plan.engine)) is None:
        return None
    return {"tokens": block.tokens, "bytes": block.bytes, "page_bytes": block.page}


def _drafting_record(drafting: Drafting) -> dict[str, Any]:
    return {
        "drafts": drafting.drafts,
        "requests_running": drafting.running,
        "pass": _time_record(total(drafting.times)),
        "pass_by_member": {role: _time_record(time) for role, time in drafting.times.items()},
        "step_seconds": drafting.plain,
        "base_step_seconds": drafting.base,
        "acceptance_to_pay": drafting.acceptance_to_pay,
        "acceptance_to_beat_base": drafting.acceptance_to_beat_base,
    }


def _prediction_record(prediction: Prediction) -> dict[str, Any]:
    def times(by_role: Any) -> dict[str, Any]:
        return {role: _time_record(time) for role, time in by_role.items()}

    return {
        "requests_that_fit": prediction.fit,
        "requests_running": prediction.running,
        "step": _time_record(total(prediction.step)),
        "prefill": _time_record(total(prediction.prefill)),
        "step_by_member": times(prediction.step),
        "prefill_by_member": times(prediction.prefill),
        "tokens_per_second": prediction.tokens_per_second,
    }


def _time_record(time: Time) -> dict[str, Any]:
    parts = {f"{kind}_seconds": getattr(time, kind) for kind in Time.__slots__}
    return {"seconds": time.seconds, **parts, "bound": time.bound}


def _gpu_weights(shape: Shape, choice: Choice) -> float:
    """Return the memory of a member's weights on the GPU that has most of them."""
    layout = choice.layout
    return max(shape.gpu_weight_bytes(layout, stage) for stage in range(layout.pp))


def _gpu_kv(plan: Plan, shape: Shape, choice: Choice) -> int:
    layout, size = choice.layout, plan.engine.kv_itemsize
    return size * max(
        shape.gpu_kv_numbers(layout, stage, 1, windows=False) for stage in range(layout.pp)
    )


def _table(*columns: str, title: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    return table


def _layouts(plan: Plan) -> "Table":
    count = plan.choices[0].layout
    gpus = count.tp * count.pp * count.replicas
    table = _table(
        *("TP", "PP", "replicas", "requests that fit", "running", "decode step (ms)"),
        *("over base", "tokens/s", "best for"),
        title=f"{gpus} x {plan.gpu.name}",
    )
    for choice in plan.choices:
        proxy = choice.proxy
        best = [
            name
            for name in ("throughput", "latency")
            if getattr(plan, name).layout == choice.layout
        ]
        table.add_row(
            *map(str, choice.layout),
            f"{proxy.fit:,}",
            f"{proxy.running:,}",
            f"{1e3 * proxy.step_seconds:.2f}",
            f"{choice.step_overhead:.2f}",
            f"{proxy.tokens_per_second:,.0f}",
            " and ".join(best),
            style="bold" if best else None,
        )
    return table


def _members(plan: Plan, choice: Choice) -> "Table":
    """Return a column per member, and columns for all together and for their ratio to the base."""
    roles: list[Role] = [shape.role for shape in plan.shapes]
    title = f"{choice.layout} on {plan.gpu.name}, {plan.engine.dtype}"
    table = _table("", *roles, "together", "over base", title=title)
    table.add_row("model", *(shape.model for shape in plan.shapes), "", "")
    if any(shape.quantization for shape in plan.shapes):
        table.add_row("quantization", *(shape.quantization or "-" for shape in plan.shapes), "", "")
    _add_sizes(table, plan, choice)
    _add_speeds(table, plan, choice)
    if choice.drafting is not None:
        _add_drafting(table, choice.drafting)
    return table


def _add_sizes(table: "Table", plan: Plan, choice: Choice) -> None:
    shapes, size, layout = plan.shapes, plan.engine.kv_itemsize, choice.layout
    is_split = layout.tp * layout.pp > 1

    def row(name: str, values: list[float], text: str) -> None:
        together = sum(values)
        cells = [text.format(value) for value in (*values, together)]
        table.add_row(name, *cells, f"{together / values[0]:.2f}" if values[0] else "-")

    row("parameters", [shape.parameters for shape in shapes], "{:,}")
    row("weights (GiB)", [shape.weight_bytes / _GIB for shape in shapes], "{:.2f}")
    if is_split:
        row("  on a GPU", [_gpu_weights(shape, choice) / _GIB for shape in shapes], "{:.2f}")
    row("KV per token (KiB)", [shape.kv_numbers() * size / _KIB for shape in shapes], "{:,.1f}")
    if is_split:
        row("  on a GPU", [_gpu_kv(plan, shape, choice) / _KIB for shape in shapes], "{:,.1f}")
    if (block := state_blocks(shapes, layout, 0, plan.engine)) is not None:
        row(
            "states of a request (MiB)",
            [sum(s.states) * plan.engine.states / _MIB for s in shapes],
            "{:,.1f}",
        )
        blank = [""] * len(shapes)
        table.add_row("tokens in a block", *blank, f"{block.tokens:,}" if block.tokens else "-", "")
    activations = f"{choice.activations / _GIB:.2f}"
    table.add_row("activations (GiB)", *[""] * len(shapes), activations, "")


def _add_speeds(table: "Table", plan: Plan, choice: Choice) -> None:
    proxy, base, most = choice.proxy, choice.base, choice.base_at_most
    blank = [""] * (len(plan.shapes) - 1)
    fit = f"requests of {plan.demand.context:,} tokens that fit"
    table.add_row(fit, f"{base.fit:,}", *blank, f"{proxy.fit:,}", f"{proxy.fit / base.fit:.2f}")
    name = f"decode step of {proxy.running:,} (ms)"
    _add_times(table, name, proxy.step, base.step_seconds)
    table.add_row(
        f"tokens/s, {plan.demand.concurrency:,} demanded",
        f"{most.tokens_per_second:,.0f}",
        *blank,
        f"{proxy.tokens_per_second:,.0f}",
        f"{proxy.tokens_per_second / most.tokens_per_second:.2f}",
    )
    name = f"prefill of {plan.demand.prompt:,} tokens (ms)"
    _add_times(table, name, proxy.prefill, base.prefill_seconds)


def _add_drafting(table: "Table", drafting: Drafting) -> None:
    name = f"pass after {drafting.drafts} drafts, of {drafting.running:,} (ms)"
    _add_times(table, name, drafting.times, drafting.base)
    for purpose, least in (
        ("for it to pay", drafting.acceptance_to_pay),
        ("to be faster than the base", drafting.acceptance_to_beat_base),
    ):
        text = "never" if least is None else f"from {least:.0%}"
        table.add_row(f"  acceptance {purpose}", *[""] * len(drafting.times), text, "")


def _add_times(table: "Table", name: str, times: Mapping[Role, Time], base: float) -> None:
    """Add a row of milliseconds, with the ratio to *base* (in seconds), and one of their bounds."""
    together = total(times)
    cells = [f"{1e3 * time.seconds:.2f}" for time in (*times.values(), together)]
    table.add_row(name, *cells, f"{together.seconds / base:.2f}")
    table.add_row("  bound by", *(time.bound for time in (*times.values(), together)), "")


def _assumptions(plan: Plan) -> Iterator[str]:
    """Yield the assumptions behind the figures."""
    gpu, engine = plan.gpu, plan.engine
    peak = f"{gpu.roofline.bytes_per_second / 1e9:,.0f} GB/s and {gpu.roofline.flops / 1e12:,.4g}"
    source = "measured" if gpu.link is None else "data sheet, dense 16-bit"
    yield (
        f"{gpu.name}: {gpu.memory / _GIB:.1f} GiB, {peak} TFLOP/s ({source}). Times are lower "
        "limits; engines take longer, so compare the ratios."
    )
    if engine.kv_cache_bytes is None:
        cache = f"{engine.utilization:.0%} of the memory, less weights and"
    else:
        cache = f"{engine.kv_cache_bytes / _GIB:.1f} GiB per GPU, as configured, in addition to"
    yield (
        f"The KV cache has {cache} activations, which are those of a step of "
        f"{engine.batch.tokens:,} tokens and {engine.batch.requests:,} requests, and "
        f"{gpu.workspace / _GIB:.0f} GiB per GPU for CUDA graphs and libraries."
    )
    if gpu.link is not None and any(c.layout.tp * c.layout.pp > 1 for c in plan.choices):
        speed, latency = gpu.link.bytes_per_second / 1e9, 1e6 * gpu.link.latency
        yield (
            f"All GPUs of an engine are linked by {gpu.link.kind}: {speed:.0f} GB/s each way, and "
            f"{latency:.0f} µs (assumed) for every message; two all-reduces per layer."
        )
    if gpu.launches and (parts := [*_without_graphs(plan)]):
        yield (
            f"Without FULL CUDA graphs: {', '.join(parts)}. There the host launches each kernel "
            f"({1e6 * LAUNCH:.0f} µs each, and {1e6 * PYTHON_OPERATOR:.0f} µs for an operator in "
            "Python, assumed), and a member takes at least this time."
        )
    if any(shape.moe_experts for shape in plan.shapes):
        yield "Tokens are assumed to pick the experts of a layer uniformly at random."


def _without_graphs(plan: Plan) -> Iterator[str]:
    """Yield, in words, what this engine does without a FULL CUDA graph."""
    engine = plan.engine
    if engine.graphs[engine.decoding] != "full":
        yield "decode steps" + (" with different prompts" if engine.different_prompts else "")
    if engine.drafts and engine.graphs["drafts"] != "full":
        yield "drafts"
    if engine.graphs["prefill"] != "full":
        yield "prefills"
