"""Whether the attention kernels of this machine can run the members' layers."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.model.alignment import role_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec

PLENTY = 1 << 50
"""Bytes of a KV cache that is planned but not allocated."""
Layers = Mapping[str, Any]
"""Attention layers by name: vLLM's `AttentionLayerBase`."""


def attention_layers(vllm_config: "VllmConfig") -> Layers:
    """Return the attention layers of all members that are built."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return get_layers_from_vllm_config(vllm_config, AttentionLayerBase)


def cache_specs(vllm_config: "VllmConfig", layers: Layers) -> dict[str, "KVCacheSpec"]:
    """Return what each layer stores in the KV cache, as vLLM's runners determine it."""
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    specs = {}
    for name, layer in layers.items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue  # it reads the cache of another layer
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = customize_attention_spec(layer.get_attn_backend(), spec)
        if spec is not None:
            specs[name] = spec
    return joint_specs(vllm_config, specs)


def joint_specs(
    vllm_config: "VllmConfig", specs: dict[str, "KVCacheSpec"]
) -> dict[str, "KVCacheSpec"]:
    """Return what layers store, changed where vLLM wants all members' layers alike."""
    return without_checkpoints(in_one_window(vllm_config, specs))


def in_one_window(
    vllm_config: "VllmConfig", specs: dict[str, "KVCacheSpec"]
) -> dict[str, "KVCacheSpec"]:
    """Give layers of different sliding windows the largest one, where they share a KV cache group.

    Only blocks outside a group's window are freed. Attention has each layer's own window. If some
    layers have full attention, vLLM itself makes all of them keep everything.
    """
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    windows = [s.sliding_window for s in specs.values() if isinstance(s, SlidingWindowSpec)]
    is_one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    if not is_one_group or len(windows) < len(specs):
        return specs
    return {name: replace(s, sliding_window=max(windows)) for name, s in specs.items()}


def without_checkpoints(specs: dict[str, "KVCacheSpec"]) -> dict[str, "KVCacheSpec"]:
    """Return the specs without states saved amid a prefill: it is cut where one is to be cached.

    vLLM's scheduler asks one recurrent layer whether all save them, and a layer saves the one at a
    position of its member's sequence, where others have another prompt. On a CPU the kernel of
    Mamba 2 (0.32) does not return such states, so that vLLM alone fails at the first long prompts
    (`varlen_states[last_chunk_indices_p]`).
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    none = {"num_prefill_checkpoint_blocks": 0, "prefill_checkpoint_alignment": None}
    return {
        name: replace(spec, **none) if isinstance(spec, MambaSpec) else spec
        for name, spec in specs.items()
    }


def settle_state_pages(vllm_config: "VllmConfig") -> None:
    """Choose the blocks of the KV cache so that the largest attention page holds the largest state.

    All pages of an engine with recurrent layers have one size, and vLLM pads the smaller ones: it
    chooses blocks by the states of the engine's one model. To be called when all members are built.

    Args:
        vllm_config: the engine's, whose block sizes are changed.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

    layers, cache = attention_layers(vllm_config), vllm_config.cache_config
    states = [
        spec for spec in cache_specs(vllm_config, layers).values() if isinstance(spec, MambaSpec)
    ]
    if not states:
        return
    current_platform.update_block_size_for_backend(vllm_config)  # what the attention kernels want
    per_token = max(
        (
            spec.page_size_bytes / spec.block_size
            for spec in cache_specs(vllm_config, layers).values()
            if isinstance(spec, AttentionSpec)
        ),
        default=0,
    )
    if per_token:
        step = cache.block_size
        largest = max(spec.page_size_bytes for spec in states)
        cache.block_size = step * max(1, ceil(largest / (step * per_token)))
    if cache.mamba_cache_mode == "align":
        cache.mamba_block_size = cache.block_size
    cache.user_specified_block_size = True  # or vLLM would choose it again


def take_latent_blocks(vllm_config: "VllmConfig") -> None:
    """Have all attention kernels of a CPU take the blocks of vLLM's kernel for latent attention.

    That one (0.32, 0.33) takes blocks of 16 tokens and no others. The backend of the others names
    multiples of 32, but it has a kernel for 16 as well, which vLLM chooses by the size of blocks.
    To be called when all members are built.

    Args:
        vllm_config: the engine's, which knows the members' layers; they get other backends.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

    if not current_platform.is_cpu():
        return
    layers = attention_layers(vllm_config).values()
    backends = {layer.get_attn_backend() for layer in layers}
    fixed = {
        size
        for backend in backends
        if not backend.is_ssm() and backend.is_mla()
        for size in backend.get_supported_kernel_block_sizes()
        if isinstance(size, int)
    }
    if not fixed:
        return  # none is latent, or their kernels (AMX) take what the others take
    size, dtype = max(fixed), vllm_config.model_config.dtype
    for layer in layers:
        is_other = layer.get_attn_backend() is CPUAttentionBackend
        if is_other and _get_attn_isa(dtype, size, layer.head_size) == f"vec{size}":
            layer.attn_backend = _in_blocks(CPUAttentionBackend, size)


@cache
def _in_blocks(backend: Any, size: int) -> type:
    """Return a backend that names multiples of *size* as its kernels' blocks."""
    from vllm.v1.attention.backend import MultipleOf

    sizes = staticmethod(lambda kv_cache_spec=None: [MultipleOf(size)])
    return type(backend.__name__, (backend,), {"get_supported_kernel_block_sizes": sizes})


def separate_backends(layers: Layers, models: Mapping[Role, "ModelConfig"]) -> None:
    """Give layers a backend class of each member's own; not the base's attention.

    vLLM makes one metadata builder for all layers of a class and shape. A builder keeps its plan in
    buffers, and a CUDA graph of all members needs the plans of all of them at once. Builders also
    read the model's config: the size of heads, of latent vectors, of the chunks of recurrent
    layers. vLLM gives its own builder for gated delta nets the blocks of states ahead of time, for
    all requests of a batch: so the base's recurrent layers have a class of their own too.

    Args:
        layers: of all members.
        models: the members' configs.
    """
    made: dict[tuple[Role, type], type] = {}
    for name, layer in layers.items():
        key = role, backend = role_of(name), layer.get_attn_backend()
        if role == "base" and not backend.is_ssm():
            continue
        if key not in made:
            made[key] = _backend_of(*key, models[role])
        if hasattr(layer, "attn_backend"):
            layer.attn_backend = made[key]
        else:  # recurrent layers, and the index of sparse attention
            layer.get_attn_backend = _returning(made[key])


def _returning(backend: type) -> Callable[[], type]:
    return lambda: backend


def _backend_of(role: Role, backend: Any, model: "ModelConfig") -> type:
    """Return a backend class whose builder sees *model* as the engine's. vLLM compares its name."""
    builder = backend.get_builder_cls()

    def seen(vllm_config: "VllmConfig") -> "VllmConfig":
        view = copy.copy(vllm_config)
        view.model_config = model
        return view

    def make(
        self: Any, spec: Any, layers: Any, config: "VllmConfig", device: Any, **more: Any
    ) -> None:
        builder.__init__(self, spec, layers, seen(config), device, **more)

    def graphs(vllm_config: "VllmConfig", kv_cache_spec: Any) -> Any:
        return builder.get_cudagraph_support(seen(vllm_config), kv_cache_spec)

    members = {"__init__": make, "get_cudagraph_support": staticmethod(graphs)}
    own = type(f"{role}_{builder.__name__}", (builder,), members)
    methods = {"get_builder_cls": staticmethod(lambda: own)}
    return type(f"{role}_{backend.__name__}", (backend,), methods)


def require_attention_kernels(vllm_config: "VllmConfig", models: Mapping[Role, str]) -> None:
    """Reject layers with which vLLM would start on a CPU, and fail at the first step.

    On other platforms vLLM compares layers with the limits of its backends while it builds them. On
    a CPU it takes the only backend that it has, without a check, and the backend's list of head
    sizes is not what its kernels support. So this tries the kernels.

    Args:
        vllm_config: the engine's, which knows the members' layers.
        models: what each member was loaded from.

    Raises:
        ProxyConfigError: naming role, model and remedy.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    layers, tried = attention_layers(vllm_config), set()
    _require_state_kernels(vllm_config, layers, models)
    layers = {n: one for n, one in layers.items() if not one.get_attn_backend().is_ssm()}
    _require_cache_dtype(vllm_config, layers)
    for name, spec in cache_specs(vllm_config, layers).items():
        backend = layers[name].get_attn_backend()
        if (backend, spec) not in tried and (reason := _problem(vllm_config, backend, name, spec)):
            role = role_of(name)
            raise ProxyConfigError(
                f"vLLM's {backend.get_name()} cannot run its attention on this machine: {reason}",
                field=f"{role} {models[role]!r}",
                remedy="use another model, or another machine",
            )
        tried.add((backend, spec))


def _require_state_kernels(
    vllm_config: "VllmConfig", layers: Layers, models: Mapping[Role, str]
) -> None:
    """Reject recurrent layers for which vLLM (0.32) has no kernel on a CPU."""
    import torch
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    dtype = vllm_config.model_config.dtype
    for name, layer in layers.items():
        if not isinstance(layer, MambaBase):
            continue
        role, kind = role_of(name), layer.mamba_type.name
        field = f"{role} {models[role]!r}"
        if kind not in _ON_CPU:
            raise ProxyConfigError(
                f"vLLM has no kernel for its recurrent layers ({kind}) on a CPU",
                field=field,
                remedy="use another model, or another machine",
            )
        if kind in BFLOAT16_ON_CPU and dtype != torch.bfloat16:
            raise ProxyConfigError(
                f"vLLM's kernel for gated delta nets on a CPU computes in bfloat16, not {dtype}",
                field=field,
                remedy="set `engine.dtype: bfloat16`",
            )


_ON_CPU = "MAMBA2", "SHORT_CONV", "GDN_ATTN"
BFLOAT16_ON_CPU = frozenset({"GDN_ATTN"})
"""Recurrent layers whose kernel on a CPU computes in bfloat16."""


def _problem(
    vllm_config: "VllmConfig", backend: "type[AttentionBackend]", name: str, spec: "AttentionSpec"
) -> str | None:
    """Return why a backend's kernels cannot run a layer, found by planning a step of one token."""
    import torch
    from vllm.v1.worker.utils import AttentionGroup

    if backend.is_mla() and not backend.supports_head_size(spec.head_size):
        # This kernel does not check, and returns wrong results.
        sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
        return f"latent vectors have {spec.head_size} numbers, its kernel supports {sizes}"
    group = AttentionGroup(backend, [name], spec, 0)
    try:
        group.create_metadata_builders(vllm_config, torch.device("cpu"))
        group.get_metadata_builder().build(0, _step_of_one_token())
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"heads of size {spec.head_size} ({one_line(error)})"
    return None


def _step_of_one_token() -> Any:
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    start, one = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=one,
        seq_lens_cpu_upper_bound=one,
        num_reqs=1,
        num_actual_tokens=1,
        max_query_len=1,
        max_seq_len=1,
        block_table_tensor=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
    )


def _require_cache_dtype(vllm_config: "VllmConfig", layers: Layers) -> None:
    """Reject a KV cache dtype that a CPU's kernels do not support: they would store another one."""
    dtype = vllm_config.cache_config.cache_dtype
    if dtype == str(vllm_config.model_config.dtype).removeprefix("torch."):
        return
    for backend in {layer.get_attn_backend() for layer in layers.values()}:
        if not backend.supports_kv_cache_dtype(dtype):
            known = ", ".join(backend.supported_kv_cache_dtypes)
            raise ProxyConfigError(
                f"vLLM's {backend.get_name()} has no kernel for it on a CPU",
                field="kv_cache_dtype",
                value=dtype,
                remedy=f"use one of {known}",
            )


def require_one_cache(vllm_config: "VllmConfig", room: int = PLENTY) -> None:
    """Reject members for whose layers vLLM cannot plan one KV cache.

    `block_size` must be final. On a CPU it always is; elsewhere it is after
    `Platform.update_block_size_for_backend`.

    Args:
        vllm_config: the engine's, which knows the members' layers; it is not changed.
        room: bytes of the KV cache.

    Raises:
        ProxyConfigError: naming the roles and the block sizes that their backends support, or the
            argument that would leave more room.
    """
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )
    from vllm.v1.worker.utils import AttentionGroup, prepare_kernel_block_sizes

    plan = copy.copy(vllm_config)  # planning changes it, and vLLM plans again when it starts
    plan.cache_config = copy.copy(plan.cache_config)
    plan.model_config = copy.copy(plan.model_config)
    layers = attention_layers(plan)
    backends = {name: layer.get_attn_backend() for name, layer in layers.items()}
    if not (specs := cache_specs(plan, layers)):
        return  # a pipeline rank without layers
    try:
        layouts = get_supported_kv_cache_layouts(backends.values())
        resolve_kv_cache_layout(plan, [[layout.name for layout in layouts]], specs.values())
        config = _cache_config(plan, specs, room)
    except ValueError as error:
        length = plan.model_config.max_model_len
        raise ProxyConfigError(one_line(error), field="max_model_len", value=length) from error
    except NotImplementedError as error:
        raise _pages_error(backends) from error
    groups = [
        [AttentionGroup(backends[name], [name], specs[name], i) for name in group.layer_names]
        for i, group in enumerate(config.kv_cache_groups)
    ]
    try:
        prepare_kernel_block_sizes(config, groups)
    except ValueError as error:
        raise _blocks_error(plan, layers) from error


def _cache_config(
    plan: "VllmConfig", specs: dict[str, "KVCacheSpec"], room: int
) -> "KVCacheConfig":
    """Let vLLM plan the cache of a worker, as its engine does. Raises `ValueError`."""
    from vllm.v1.engine import core

    arguments: list[Any] = [plan, [specs], [room]]
    if (groups_of := getattr(core, "get_global_kv_cache_groups", None)) is not None:  # 0.33
        arguments.append(groups_of(plan, [specs]))
    (config,) = core.get_kv_cache_configs(*arguments)
    return config


def _pages_error(backends: "Mapping[str, type[AttentionBackend]]") -> ProxyConfigError:
    """Name the members whose pages cannot be as large as those of all others."""
    latent = dict.fromkeys(role_of(name) for name, one in backends.items() if one.is_mla())
    return ProxyConfigError(
        "with recurrent layers all pages of the KV cache have one size, and vLLM can make those of "
        f"latent attention ({', '.join(latent)}) no larger than they are",
        remedy="use members without one of the two",
    )


def _blocks_error(vllm_config: "VllmConfig", layers: Layers) -> ProxyConfigError:
    """Name the block sizes that the members' kernels support, and the remedy."""
    wanted: dict[str, dict[Role, None]] = {}
    for name, layer in layers.items():
        if (backend := layer.get_attn_backend()).is_ssm():
            continue
        sizes = " or ".join(map(_size, backend.get_supported_kernel_block_sizes()))
        wanted.setdefault(f"{backend.get_name()}, {sizes}", {})[role_of(name)] = None
    listed = "; ".join(f"{', '.join(roles)}: {kernel}" for kernel, roles in wanted.items())
    if len(wanted) > 1:
        return ProxyConfigError(
            "members share the blocks of one KV cache, but their attention kernels on this machine "
            f"have no common block size ({listed})",
            remedy="use members with one kind of attention, or another machine",
        )
    return ProxyConfigError(
        f"the members' attention kernels do not support it ({listed})",
        field="block_size",
        value=vllm_config.cache_config.block_size,
        remedy="leave it out",
    )


def _size(size: Any) -> str:
    return str(size) if isinstance(size, int) else f"multiples of {size.base}"
