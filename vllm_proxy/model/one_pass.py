"""Both small members in one pass, if experts are the antiexpert with an adapter.

The small model runs once, on the rows of both: the expert's, and after them the antiexpert's. Its
weights exist once and are read once. Linear layers that the adapter changes add its product to the
first half of the rows,

    y = W x + scaling * B (A x)                 (Hu et al. 2021, eq. 3)

and each attention layer becomes two, one for each half, with the KV cache of its member. W may be
quantized (QLoRA, Dettmers et al. 2023): its own kernel computes W x.

There may be several adapters, one for each row. Their A's are stacked, and so are their B's. All of
A x is computed, and what does not belong to a row's adapter is multiplied by 0. So the shapes never
depend on the requests, as CUDA graphs need it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.utils import set_weight_attrs

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.members.adapter_set import AdapterSet
from vllm_proxy.members.lora import LoraModule, cannot_be_merged

_QKV = "q", "k", "v"
"""The names of the parts in vLLM's layer for all three."""


def can_pair(
    adapters: AdapterSet,
    model: nn.Module,
    *,
    must: bool | None,
    quantization: str | None,
    spreads_experts: bool = False,
) -> bool:
    """Return whether *model* has attention that can be paired, and a layer for each product.

    Args:
        adapters: by which experts differ from the antiexpert.
        model: the antiexpert's.
        must: whether the user requires it.
        quantization: vLLM's name of the model's, into which no adapter can be merged; or None.
        spreads_experts: whether its experts are on several data-parallel ranks, which tell each
            other how many rows of a step they have: half as many as would run.

    Raises:
        ProxyConfigError: it does not, but it must.
    """
    every = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    obstacle = None
    if not all(isinstance(module, Attention) for module in every):
        obstacle = "attention of another kind than `Attention`"
    elif spreads_experts:
        obstacle = "experts on several data-parallel ranks"
    elif missing := [
        name for name, place in _places(adapters.shapes, model).items() if place is None
    ]:
        obstacle = f"no linear layer {missing[0]}"
    if obstacle is None:
        return True
    problem = (
        f"vLLM's {type(model).__name__} has {obstacle}, so the adapter "
        f"`{adapters.first.location}` must be merged"
    )
    if quantization:
        raise cannot_be_merged(problem, quantization)
    if must:
        raise ProxyConfigError(problem, field="one_pass", value=must, remedy="remove it")
    if len(adapters.adapters) > 1:
        raise ProxyConfigError(
            problem, field="experts", remedy="give one adapter, as `expert.lora`, or another model"
        )
    return False


def _places(
    names: Iterable[str], model: nn.Module
) -> dict[str, tuple[LinearBase | PPMissingLayer, int | None] | None]:
    """Return for each module of an adapter vLLM's layer, and which part of the layer it is.

    None if there is no such layer; a `PPMissingLayer` is on another pipeline stage.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    parts = {part: (whole, i) for whole, names in packed.items() for i, part in enumerate(names)}
    layers = dict(model.named_modules())
    found = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        whole, place = (leaf, None) if name in layers else parts.get(leaf, (leaf, None))
        layer = layers.get(f"{parent}.{whole}")
        elsewhere = (layers.get(one) for one in _parents(name))
        if missing := next((one for one in elsewhere if isinstance(one, PPMissingLayer)), None):
            layer = missing
        fits = isinstance(layer, LinearBase | PPMissingLayer)
        found[name] = (layer, place) if fits else None
    return found


class PairAttention(nn.Module):
    """Attention of both members: the expert's on the first half of the rows, then the other's."""

    def __init__(self, expert: Attention, antiexpert: Attention) -> None:
        super().__init__()
        self.expert, self.antiexpert = expert, antiexpert

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[2 * tokens, heads * head size]`, of as many rows."""
        rows = query.shape[0] // 2
        return torch.cat(
            [
                self.expert(query[:rows], key[:rows], value[:rows]),
                self.antiexpert(query[rows:], key[rows:], value[rows:]),
            ]
        )


def pair_up(expert: nn.Module, antiexpert: nn.Module) -> None:
    """Put the attention layers of both into the antiexpert's model, which then runs for both."""
    layers = {name: m for name, m in antiexpert.named_modules() if isinstance(m, Attention)}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        pair = PairAttention(expert.get_submodule(name), layer)
        setattr(antiexpert.get_submodule(parent), leaf, pair)


class _AdaptedMethod(LinearMethodBase):
    """The layer's product, and for the first half of the rows an adapter's product added to it."""

    def __init__(self, inner: LinearMethodBase) -> None:
        super().__init__()
        self.inner = inner

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.inner.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        # `[rows, in]`; in vLLM's Transformers backend `[1, rows, in]`
        output, rows = self.inner.apply(layer, x, bias), x.shape[-2] // 2
        low = linear(x[..., :rows, :], layer.lora_a)
        if layer.lora_choice is not None:
            low = low * layer.lora_choice[:rows].index_select(1, layer.lora_slots)
        output[..., :rows, :] += linear(low, layer.lora_b)
        return output


def attach(adapters: AdapterSet, model: nn.Module, choice: torch.Tensor | None) -> None:
    """Give a paired model the adapters that make the antiexpert an expert.

    To be called before vLLM processes the loaded weights.

    Args:
        adapters: by slot.
        model: the antiexpert's.
        choice: `[rows, slots]`, 1 in the slot of each of the expert's rows and 0 in the others, at
            an address that stays; None if there is one slot.
    """
    count = len(adapters.adapters)
    for slot, modules in adapters.in_slots():
        if slot > 0:
            put(modules, model, slot)
            continue
        for layer, parts in _by_layer(modules, model).items():
            a, b = _matrices(layer, parts, next(layer.parameters()).device)
            slots = torch.arange(count, device=a.device).repeat_interleave(len(a))
            layer.register_buffer("lora_a", a.repeat(count, 1), persistent=False)
            layer.register_buffer("lora_b", b.repeat(1, count), persistent=False)
            layer.register_buffer("lora_slots", None if choice is None else slots, persistent=False)
            layer.register_buffer("lora_choice", choice, persistent=False)
            layer.quant_method = _AdaptedMethod(layer.quant_method)
            # Else vLLM's MLPs give layers with FP8 or FP4 activations an input without its own
            # dtype.
            layer.requires_unquantized_input = True


def put(modules: Mapping[str, LoraModule], model: nn.Module, slot: int) -> None:
    """Write an adapter to where the one in its slot is, and compiled code and CUDA graphs read it.

    Each tensor-parallel rank keeps its part of the larger side of each pair of matrices, cut by the
    loader of the layer itself.

    Args:
        modules: what `fitted` returned for the engine's shapes.
        model: to which adapters are attached.
        slot: which one to replace.
    """
    for layer, parts in _by_layer(modules, model).items():
        a, b = _matrices(layer, parts, layer.lora_a.device)
        own = slice(slot * len(a), (slot + 1) * len(a))
        layer.lora_a[own] = a
        layer.lora_b[:, own] = b


def _by_layer(
    modules: Mapping[str, LoraModule], model: nn.Module
) -> dict[LinearBase, dict[int | None, LoraModule]]:
    """Return an adapter's tensors by layer of this rank, and by part of the layer."""
    by_layer: dict[LinearBase, dict[int | None, LoraModule]] = defaultdict(dict)
    for name, found in _places(modules, model).items():
        layer, place = found or (None, None)
        if isinstance(layer, LinearBase):
            by_layer[layer][place] = modules[name]
    return by_layer


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _matrices(
    layer: LinearBase, parts: dict[int | None, LoraModule], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's A `[ranks, in]`, and B `[out, ranks]` times scaling.

    They have the dtype of the layer's inputs. If the layer is several in the checkpoint (q, k and
    v), their A's are stacked, and each B has different columns.

    Args:
        layer: the layer.
        parts: the adapter's tensors for each of its parts.
        device: of the result.
    """
    like: dict[str, Any] = {"dtype": layer.params_dtype, "device": device}
    ranks = sum(lora.a.shape[0] for lora in parts.values())
    a = torch.cat([lora.a for lora in parts.values()]).to(**like)
    is_column = isinstance(layer, ColumnParallelLinear)
    outputs = layer.output_size_per_partition if is_column else layer.output_size
    b = torch.zeros(outputs, ranks, **like)
    end = 0
    for place, lora in parts.items():
        start, end = end, end + lora.a.shape[0]
        part = torch.zeros(lora.b.shape[0], ranks, **like)
        part[:, start:end] = lora.scaling * lora.b.float()
        if not is_column:
            b = part
        else:
            shard: list[int | str] = [] if place is None else [place]
            if place is not None and isinstance(layer, QKVParallelLinear):
                shard = [_QKV[place]]
            _load(layer, b, part, *shard)
    if isinstance(layer, RowParallelLinear):
        whole, a = a, torch.zeros(ranks, layer.input_size_per_partition, **like)
        _load(layer, a, whole)
    return a, b


def _load(layer: LinearBase, target: torch.Tensor, whole: torch.Tensor, *shard: int | str) -> None:
    """Copy this rank's part of *whole* to *target*, as the layer does with its weight."""
    parameter = nn.Parameter(target, requires_grad=False)
    set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0})
    layer.weight_loader(parameter, whole, *shard)
