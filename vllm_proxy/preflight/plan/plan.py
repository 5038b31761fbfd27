"""`plan`: a configuration and a GPU, to figures; what cannot be is one line."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.plan.cost import Engine
from vllm_proxy.preflight.plan.hardware import HERE, Hardware, find_hardware, require_known
from vllm_proxy.preflight.plan.layout import Layout, layouts
from vllm_proxy.preflight.plan.memory import room
from vllm_proxy.preflight.plan.predict import Choice, Demand, best_latency, best_throughput, choose
from vllm_proxy.preflight.plan.shape import Shape

_GIB = 2**30
_MOST_GPUS = 64
"""So many are looked at for a remedy."""

Unfit = Callable[[int], str | None]
"""Why so many ranks cannot share every member's heads; None if they can."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found.

    Attributes:
        shapes: the members.
        engine: what they have in common.
        gpu: each of the GPUs.
        demand: the requests.
        choices: the layouts on which the members fit, at least one.
        notes: what to know of this configuration.
    """

    shapes: tuple[Shape, ...]
    engine: Engine
    gpu: Hardware
    demand: Demand
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    @property
    def throughput(self) -> Choice:
        """The layout with most tokens a second."""
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
    """Plan one layout (*tp*, *pp*; if not given, the configuration's) or all those of *gpus*.

    Args:
        config: the members, and the engine's dtypes and memory limits.
        gpu: a name of `GPUS`, or `here`.
        demand: requests to plan for.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        gpus: how many GPUs there are; instead of *tp* and *pp*.

    Raises:
        ProxyConfigError: an option or a field of the configuration is wrong, or nothing fits.
    """
    if gpus is not None and (tp is not None or pp is not None):
        option = "--tp" if tp is not None else "--pp"
        raise ProxyConfigError(
            f"--gpus is {gpus} beside {option}: it tries all layouts; leave one of them out"
        )
    require_known(gpu)
    if demand.prompt > demand.context:
        raise ProxyConfigError(
            f"--prompt is {demand.prompt}, longer than --context {demand.context}; make it shorter"
        )
    from vllm_proxy.engine.compatibility import require_supported_vllm
    from vllm_proxy.engine.limits import tensor_parallel_size_problem
    from vllm_proxy.preflight.check.run import quiet
    from vllm_proxy.preflight.plan.read import notes, read_all, read_batch, read_engine, read_shapes

    with quiet():
        require_supported_vllm()
        members = read_all(config)
        configs = {role: member.model_config for role, member in members.items()}
        engine = read_engine(config, members)
        shapes = tuple(read_shapes(config, members, engine.itemsize))
    require_context(shapes, demand.context, config.engine.get("max_model_len"))

    def unfit(ranks: int) -> str | None:
        return tensor_parallel_size_problem(configs, ranks)

    if gpus is None:
        layout, source = _one(config, tp, pp)
        require_layout(shapes, layout, unfit, source)
    device = find_hardware(gpu, engine.dtype)
    if device.link is None and (count := gpus or layout.tp * layout.pp) > 1:
        raise ProxyConfigError(
            f"--gpu is '{HERE}' with {count} devices: links between them are not measured; plan "
            "one (`--tp 1 --pp 1`), or name the GPU"
        )
    engine = replace(engine, batch=read_batch(config, device))
    if gpus is None:
        choice = fitting(shapes, layout, demand, engine, device, unfit, source)
        choices = [choice]
    else:
        choices = all_fitting(shapes, gpus, demand, engine, device, unfit)
    found = notes(config, shapes, engine, device, demand, choices)
    return Plan(shapes, engine, device, demand, tuple(choices), tuple(found))


def _one(config: ProxyConfig, tp: int | None, pp: int | None) -> tuple[Layout, Mapping[str, str]]:
    """Return the layout that was asked for, and where its numbers stand."""
    sizes, source = {}, {}
    for name, given, key in (
        ("tp", tp, "tensor_parallel_size"),
        ("pp", pp, "pipeline_parallel_size"),
    ):
        sizes[name] = given or config.engine.get(key) or 1
        source[name] = f"--{name}" if given or key not in config.engine else f"`engine.{key}`"
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            raise ProxyConfigError(f"{source[name]} is {sizes[name]!r}; give a count, or --{name}")
    return Layout(**sizes), source


def require_context(shapes: Sequence[Shape], context: int, most: object) -> None:
    """Refuse requests that are longer than a member, or (*most*) the engine, can take."""
    if isinstance(most, int) and 0 < most < context:
        raise ProxyConfigError(
            f"--context is {context}, longer than `engine.max_model_len` {most}; use at most {most}"
        )
    if short := [shape for shape in shapes if shape.context < context]:
        listed = ", ".join(f"{shape.role} {shape.context}" for shape in short)
        least = min(shape.context for shape in short)
        raise ProxyConfigError(
            f"--context is {context}, longer than the context of {listed}; use at most {least}"
        )


def require_layout(
    shapes: Sequence[Shape], layout: Layout, unfit: Unfit, source: Mapping[str, str]
) -> None:
    """Refuse ranks that do not divide heads, and stages without a layer."""
    if reason := unfit(layout.tp):
        raise ProxyConfigError(f"{source['tp']} is {layout.tp}: {reason}")
    fewest = min(shapes, key=lambda shape: len(shape.attention))
    if layout.pp > len(fewest.attention):
        raise ProxyConfigError(
            f"{source['pp']} is {layout.pp}: {fewest.role} has {len(fewest.attention)} layers; "
            f"use at most {len(fewest.attention)}"
        )


def possible(shapes: Sequence[Shape], gpus: int, unfit: Unfit) -> Iterator[Layout]:
    """Yield the layouts of so many GPUs that every member's heads and layers allow."""
    layers = min(len(shape.attention) for shape in shapes)
    for layout in layouts(gpus):
        if layout.pp <= layers and unfit(layout.tp) is None:
            yield layout


def fitting(
    shapes: Sequence[Shape],
    layout: Layout,
    demand: Demand,
    engine: Engine,
    gpu: Hardware,
    unfit: Unfit,
    source: Mapping[str, str],
) -> Choice:
    """Return the layout's figures. Raises `ProxyConfigError` if no request fits."""
    found = choose(shapes, layout, demand, engine, gpu)
    if isinstance(found, Choice):
        return found
    for ranks in range(layout.tp + 1, _MOST_GPUS + 1) if gpu.link else ():
        if unfit(ranks) is None and _fits(shapes, layout._replace(tp=ranks), demand, engine, gpu):
            remedy = f"use --tp {ranks}"
            break
    else:
        remedy = _fewest(shapes, demand, engine, gpu, unfit)
    raise ProxyConfigError(
        f"{source['tp']} is {layout.tp}: weights, a step's tensors, workspace and one request of "
        f"{demand.context} "
        f"tokens take {found.needed / _GIB:.1f} GiB a GPU, {found.lacking / _GIB:.1f} GiB more "
        f"than {_usable(engine, gpu)}; {remedy}"
    )


def all_fitting(
    shapes: Sequence[Shape],
    gpus: int,
    demand: Demand,
    engine: Engine,
    gpu: Hardware,
    unfit: Unfit,
) -> list[Choice]:
    """Return the layouts of so many GPUs on which the members fit. Raises `ProxyConfigError`."""
    tried = {
        layout: choose(shapes, layout, demand, engine, gpu)
        for layout in possible(shapes, gpus, unfit)
    }
    if choices := [choice for choice in tried.values() if isinstance(choice, Choice)]:
        return choices
    layout, nearest = min(tried.items(), key=lambda entry: entry[1].lacking)
    raise ProxyConfigError(
        f"--gpus is {gpus}: no layout has room for weights, a step's tensors, workspace and one "
        f"request of {demand.context} tokens; the nearest, {layout}, lacks "
        f"{nearest.lacking / _GIB:.1f} GiB a GPU of {nearest.needed / _GIB:.1f} "
        f"({_usable(engine, gpu)}); "
        f"{_fewest(shapes, demand, engine, gpu, unfit)}"
    )


def _fits(
    shapes: Sequence[Shape], layout: Layout, demand: Demand, engine: Engine, gpu: Hardware
) -> bool:
    return room(shapes, layout, demand.context, engine, gpu).requests > 0


def _fewest(
    shapes: Sequence[Shape], demand: Demand, engine: Engine, gpu: Hardware, unfit: Unfit
) -> str:
    """Return the remedy: the fewest GPUs of this kind that would do."""
    for count in range(1, _MOST_GPUS + 1 if gpu.link else 1):
        for layout in possible(shapes, count, unfit):
            if _fits(shapes, layout, demand, engine, gpu):
                return f"use --tp {layout.tp} --pp {layout.pp}, or --gpus {count}"
    return "use larger GPUs, a shorter --context or smaller members"


def _usable(engine: Engine, gpu: Hardware) -> str:
    """Say what a GPU has for an engine."""
    memory = f"{gpu.memory / _GIB:.1f} GiB"
    if engine.kv_cache_bytes is not None:
        return f"{gpu.name} has ({memory}, `engine.kv_cache_memory_bytes` included)"
    return f"{gpu.name} gives ({memory} x gpu_memory_utilization {engine.utilization})"
