"""`plan`: the figures of a configuration on a GPU; if it cannot run there, one line says why."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.plan.cost import EngineSettings
from vllm_proxy.preflight.plan.hardware import HERE, Hardware, find_hardware, require_known
from vllm_proxy.preflight.plan.layout import Layout, layouts
from vllm_proxy.preflight.plan.memory import room
from vllm_proxy.preflight.plan.predict import Choice, Demand, best_latency, best_throughput, choose
from vllm_proxy.preflight.plan.shape import Shape

_GIB = 2**30
_MOST_GPUS = 64
"""Remedies are searched up to this number of GPUs."""

RanksProblem = Callable[[int], str | None]
"""Returns why this number of ranks cannot share every member's heads; None if they can."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of `plan`.

    Attributes:
        shapes: the members.
        engine: settings that they share.
        gpu: each of the GPUs.
        demand: the requests.
        choices: the layouts on which the members fit, at least one.
        notes: remarks on this configuration.
    """

    shapes: tuple[Shape, ...]
    engine: EngineSettings
    gpu: Hardware
    demand: Demand
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    @property
    def throughput(self) -> Choice:
        """The layout with most tokens per second."""
        return best_throughput(self.choices)

    @property
    def latency(self) -> Choice:
        """The layout with the shortest step."""
        return best_latency(self.choices)


def plan(
    config: ProxyConfig,
    gpu: str,
    demand: Demand,
    *,
    tp: int | None = None,
    pp: int | None = None,
    gpus: int | None = None,
) -> Plan:
    """Plan one layout (*tp*, *pp*; if not given, the configuration's) or all layouts of *gpus*.

    Args:
        config: the members, and the engine's dtypes and memory limits.
        gpu: a name of `GPUS`, or `here`.
        demand: the requests to plan for.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        gpus: how many GPUs there are; instead of *tp* and *pp*.

    Raises:
        ProxyConfigError: an option or a field of the configuration is wrong, or nothing fits.
    """
    _require_options(gpu, demand, tp, pp, gpus)
    from vllm_proxy.engine.compatibility import require_supported_vllm
    from vllm_proxy.engine.limits import tensor_parallel_size_problem
    from vllm_proxy.preflight.check.run import quiet
    from vllm_proxy.preflight.plan.notes import notes
    from vllm_proxy.preflight.plan.read import read_all, read_batch, read_engine, read_shapes

    with quiet():
        require_supported_vllm()
        members = read_all(config)
        engine = read_engine(config, members)
        shapes = tuple(read_shapes(config, members, engine, here=gpu == HERE))
    require_context(shapes, demand.context, config.engine.get("max_model_len"))
    configs = {role: member.model_config for role, member in members.items()}
    problem = partial(tensor_parallel_size_problem, configs)
    if gpus is None:
        layout, source = _configured_layout(config, tp, pp)
        require_layout(shapes, layout, problem, source)
    device = find_hardware(gpu, engine.dtype)
    _require_link(device, gpus or layout.tp * layout.pp)
    engine = replace(engine, batch=read_batch(config, device))
    if gpus is None:
        choices = [fitting(shapes, layout, demand, engine, device, problem, source)]
    else:
        choices = all_fitting(shapes, gpus, demand, engine, device, problem)
    found = notes(config, shapes, engine, device, demand, choices)
    return Plan(shapes, engine, device, demand, tuple(choices), tuple(found))


def _require_options(
    gpu: str, demand: Demand, tp: int | None, pp: int | None, gpus: int | None
) -> None:
    """Reject options that are wrong whatever the configuration says."""
    if gpus is not None and (tp is not None or pp is not None):
        option = "--tp" if tp is not None else "--pp"
        raise ProxyConfigError(
            f"it tries all layouts, but {option} is given, too",
            field="--gpus",
            value=gpus,
            remedy="leave one of them out",
        )
    require_known(gpu)
    if demand.prompt > demand.context:
        raise ProxyConfigError(
            f"longer than --context {demand.context}",
            field="--prompt",
            value=demand.prompt,
            remedy="make it shorter",
        )


def _require_link(device: Hardware, count: int) -> None:
    if device.link is None and count > 1:
        raise ProxyConfigError(
            f"a layout of {count} devices cannot be planned, because links between them are not "
            "measured",
            field="--gpu",
            value=HERE,
            remedy="plan one device (`--tp 1 --pp 1`), or name the GPU",
        )


def _configured_layout(
    config: ProxyConfig, tp: int | None, pp: int | None
) -> tuple[Layout, Mapping[str, str]]:
    """Return the layout of the options or the configuration, and the field of each number."""
    sizes, source = {}, {}
    for name, given, key in (
        ("tp", tp, "tensor_parallel_size"),
        ("pp", pp, "pipeline_parallel_size"),
    ):
        sizes[name] = given or config.engine.get(key) or 1
        source[name] = f"--{name}" if given or key not in config.engine else f"engine.{key}"
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            raise ProxyConfigError(
                field=source[name], value=sizes[name], remedy=f"give a count, or --{name}"
            )
    return Layout(**sizes), source


def require_context(shapes: Sequence[Shape], context: int, most: object) -> None:
    """Reject requests that are longer than a member, or the engine (*most*), can process."""
    if isinstance(most, int) and 0 < most < context:
        raise ProxyConfigError(
            f"longer than `engine.max_model_len` {most}",
            field="--context",
            value=context,
            remedy=f"use at most {most}",
        )
    if short := [shape for shape in shapes if shape.context < context]:
        listed = ", ".join(f"{shape.role} {shape.context}" for shape in short)
        raise ProxyConfigError(
            f"longer than the context of {listed}",
            field="--context",
            value=context,
            remedy=f"use at most {min(shape.context for shape in short)}",
        )


def require_layout(
    shapes: Sequence[Shape], layout: Layout, problem: RanksProblem, source: Mapping[str, str]
) -> None:
    """Reject ranks that do not divide the heads, and stages without a layer."""
    if reason := problem(layout.tp):
        raise ProxyConfigError(reason, field=source["tp"], value=layout.tp)
    fewest = min(shapes, key=lambda shape: len(shape.attention))
    if layout.pp > len(fewest.attention):
        raise ProxyConfigError(
            f"{fewest.role} has {len(fewest.attention)} layers",
            field=source["pp"],
            value=layout.pp,
            remedy=f"use at most {len(fewest.attention)}",
        )


def possible(shapes: Sequence[Shape], gpus: int, problem: RanksProblem) -> Iterator[Layout]:
    """Yield the layouts of *gpus* GPUs that every member's heads and layers allow."""
    layers = min(len(shape.attention) for shape in shapes)
    for layout in layouts(gpus):
        if layout.pp <= layers and problem(layout.tp) is None:
            yield layout


def fitting(
    shapes: Sequence[Shape],
    layout: Layout,
    demand: Demand,
    engine: EngineSettings,
    gpu: Hardware,
    problem: RanksProblem,
    source: Mapping[str, str],
) -> Choice:
    """Return the layout's figures. Raises `ProxyConfigError` if no request fits."""
    found = choose(shapes, layout, demand, engine, gpu)
    if isinstance(found, Choice):
        return found
    for ranks in range(layout.tp + 1, _MOST_GPUS + 1) if gpu.link else ():
        more = layout._replace(tp=ranks)
        if problem(ranks) is None and _fits(shapes, more, demand, engine, gpu):
            remedy = f"use --tp {ranks}"
            break
    else:
        remedy = _fewest(shapes, demand, engine, gpu, problem)
    raise ProxyConfigError(
        f"weights, a step's tensors, workspace and one request of {demand.context} tokens take "
        f"{found.needed / _GIB:.1f} GiB per GPU, {found.lacking / _GIB:.1f} GiB more than "
        f"{_usable(engine, gpu)}",
        field=source["tp"],
        value=layout.tp,
        remedy=remedy,
    )


def all_fitting(
    shapes: Sequence[Shape],
    gpus: int,
    demand: Demand,
    engine: EngineSettings,
    gpu: Hardware,
    problem: RanksProblem,
) -> list[Choice]:
    """Return the layouts of *gpus* GPUs on which the members fit. Raises `ProxyConfigError`."""
    choices, nearest = [], None
    for layout in possible(shapes, gpus, problem):
        found = choose(shapes, layout, demand, engine, gpu)
        if isinstance(found, Choice):
            choices.append(found)
        elif nearest is None or found.lacking < nearest[1].lacking:
            nearest = layout, found
    if choices or nearest is None:
        return choices
    layout, lacks = nearest
    raise ProxyConfigError(
        f"no layout has room for weights, a step's tensors, workspace and one request of "
        f"{demand.context} tokens; the nearest, {layout}, lacks {lacks.lacking / _GIB:.1f} GiB per "
        f"GPU of {lacks.needed / _GIB:.1f} ({_usable(engine, gpu)})",
        field="--gpus",
        value=gpus,
        remedy=_fewest(shapes, demand, engine, gpu, problem),
    )


def _fits(
    shapes: Sequence[Shape], layout: Layout, demand: Demand, engine: EngineSettings, gpu: Hardware
) -> bool:
    return room(shapes, layout, demand.context, engine, gpu).requests > 0


def _fewest(
    shapes: Sequence[Shape],
    demand: Demand,
    engine: EngineSettings,
    gpu: Hardware,
    problem: RanksProblem,
) -> str:
    """Return the remedy: the least number of GPUs of this kind that is enough."""
    for count in range(1, _MOST_GPUS + 1 if gpu.link else 1):
        for layout in possible(shapes, count, problem):
            if _fits(shapes, layout, demand, engine, gpu):
                return f"use --tp {layout.tp} --pp {layout.pp}, or --gpus {count}"
    return "use larger GPUs, a shorter --context or smaller members"


def _usable(engine: EngineSettings, gpu: Hardware) -> str:
    """Return, in words, how much memory of a GPU an engine may use."""
    memory = f"{gpu.memory / _GIB:.1f} GiB"
    if engine.kv_cache_bytes is not None:
        return f"{gpu.name} has ({memory}, `engine.kv_cache_memory_bytes` included)"
    return f"{gpu.name} gives ({memory} x gpu_memory_utilization {engine.utilization})"
