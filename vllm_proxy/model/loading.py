"""Loading the members' weights: when an engine starts, and again while it runs.

While an engine runs, a member's weights are replaced as a whole or not at all. The new ones are
first loaded with the member's parameters on the meta device: whatever vLLM's loaders reject is
rejected there, before any weight changes. Then vLLM's layerwise reload loads them, and copies them
to where compiled code and CUDA graphs read the old ones.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta, to_meta_tensor
from vllm.platforms import current_platform

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import expert_field
from vllm_proxy.members.adapter_set import AdapterSet, fitted
from vllm_proxy.members.lora import LoraAdapter
from vllm_proxy.members.text_part import is_towers, text_weights
from vllm_proxy.model.alignment import role_of
from vllm_proxy.model.build import load_member, required_parameters
from vllm_proxy.model.head import ProxyHead
from vllm_proxy.model.one_pass import attach, put

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

Named = Iterable[tuple[str, Tensor]]
"""Tensors by their names in a member's checkpoint."""
Source = Callable[[], Named]
"""New weights of one member; called twice, to check them and to load them."""


class Part(Protocol):
    """What one member has of its own: a model, or with one pass the expert's adapter."""

    def files(self, loader: "DefaultModelLoader", path: str | None) -> Source:
        """Return the weights in its files; of a checkpoint elsewhere, if there is a *path*."""

    def check(self, weights: Named) -> None:
        """Raise `ProxyConfigError` if these weights cannot replace the old ones."""

    def replace(self, weights: Named) -> None:
        """Load weights that `check` has accepted."""


class ModelPart:
    """A member's model.

    Args:
        role: of the member.
        model: what vLLM built for it.
        config: the engine's configuration for it.
        lora: an adapter to merge into its checkpoint, or None.
    """

    def __init__(
        self, role: Role, model: nn.Module, config: "VllmConfig", lora: str | None
    ) -> None:
        self.role, self.model, self.lora = role, model, lora
        self.config = config.model_config
        self.is_quantized = config.quant_config is not None
        self.required = required_parameters(model, quantized=self.is_quantized)

    def start(self, weights: Named) -> set[str]:
        """Load the checkpoint at start; returns the names of the parameters that were set."""
        name = self.config.model
        weights = text_weights(self.config.hf_config, self._merged(weights))
        names = load_member(self.model, self.role, name, weights, required=self.required)
        if self.is_quantized:
            self.required = names  # which tensors it needs is only known now
        return names

    def load_some(self, weights: Named) -> set[str]:
        """Load a few tensors in place; returns the names of the parameters that were set."""
        return self._load(weights, required=set())

    def files(self, loader: "DefaultModelLoader", path: str | None) -> Source:
        """Return the weights in its files; of a checkpoint elsewhere, if there is a *path*."""
        if path is not None and not Path(path).is_dir():
            raise ProxyConfigError("not a local directory", field="weights_path", value=path)
        revision = self.config.revision if path is None else None
        where = SimpleNamespace(model=path or self.config.model, revision=revision)

        def read() -> Named:
            weights = loader.get_all_weights(where, SimpleNamespace())
            return weights if path else self._merged(weights)

        return read

    def check(self, weights: Named) -> None:
        """Raise `ProxyConfigError` if these weights cannot replace the old ones."""
        with _on_meta(self.model), _CheckedCopies():
            self._load(_finite(weights), required=self.required)

    def replace(self, weights: Named) -> None:
        """Load weights that `check` has accepted."""
        if current_platform.is_cpu():
            self._forget_packed_experts()
        with _without_warnings(), _scales_kept():
            initialize_layerwise_reload(self.model)
            try:
                self._load(weights, required=self.required)
            finally:
                finalize_layerwise_reload(self.model, self.config)
        if current_platform.is_cpu():
            self._pack_tied()

    def _load(self, weights: Named, required: set[str]) -> set[str]:
        weights = text_weights(self.config.hf_config, weights)
        return load_member(
            *(self.model, self.role, self.config.model, weights),
            required=required,
            source="the update",
            remedy=None,
        )

    def _merged(self, weights: Named) -> Named:
        if self.lora is None:
            return weights
        return LoraAdapter.read(self.lora).merge(weights, self.config.hf_text_config)

    def _forget_packed_experts(self) -> None:
        """Let vLLM pack a mixture's weights again, which it does only as it builds the kernel."""
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None

    def _pack_tied(self) -> None:
        """Pack a head that is tied to the embedding again; vLLM's reload packs only one of both."""
        layers = [m for m in self.model.modules() if isinstance(m, VocabParallelEmbedding)]
        weights = [id(layer.weight) for layer in layers]
        for layer in layers:
            if weights.count(id(layer.weight)) > 1:
                layer.quant_method.process_weights_after_loading(layer)


class AdapterPart:
    """The experts' adapters, if they run in one pass with the antiexpert.

    In an update the tensors of the expert without a name have their names in its file; those of
    another expert have its name and a slash before them.

    Args:
        locations: of the adapters, by name in the order of their slots; adapter_config.json there
            also applies to adapters that follow.
        model: the antiexpert's, which runs for both.
        choice: see `one_pass.attach`.
    """

    def __init__(
        self,
        locations: Mapping[str | None, str | None],
        model: nn.Module,
        choice: Tensor | None,
    ) -> None:
        self.locations, self.model, self.choice = dict(locations), model, choice
        self.slots = {name: slot for slot, name in enumerate(locations)}
        self.shapes: Mapping[str, list[int]] = {}  # known when they are attached

    def start(self) -> None:
        """Attach the adapters at start, after the model's checkpoint was loaded."""
        every = self.locations.values()
        adapters = AdapterSet(tuple(None if at is None else LoraAdapter.read(at) for at in every))
        self.shapes = adapters.shapes
        attach(adapters, self.model, self.choice)

    def files(self, loader: "DefaultModelLoader", path: str | None) -> Source:
        """Return the tensors in their files. Raises `ProxyConfigError` if there is a *path*."""
        if path is not None:
            raise ProxyConfigError(
                "the expert runs in one pass with the antiexpert and has no checkpoint",
                field="weights_path",
                value={"expert": path},
                remedy="write the adapter where it was and reload without a path, or send its "
                "tensors",
            )

        def read() -> Named:
            for name, place in self.locations.items():
                if place is not None:
                    prefix = "" if name is None else f"{name}/"
                    for key, tensor in LoraAdapter.tensors(place).items():
                        yield prefix + key, tensor

        return read

    def check(self, weights: Named) -> None:
        """Raise `ProxyConfigError` if these tensors cannot replace the adapters'."""
        for name, given in self._by_expert(_finite(weights, "expert")).items():
            field = expert_field(name)
            shapes = self._parsed(name, field, given).shapes
            for module in sorted(self.shapes.keys() | shapes.keys()):
                new, old = shapes.get(module), self.shapes.get(module)
                if new != old and not (len(self.slots) > 1 and _has_room(old, new)):
                    raise ProxyConfigError(
                        f"the adapter of {module} is {_size(new)}, and the engine's is "
                        f"{_size(old)}",
                        field=field,
                    )

    def replace(self, weights: Named) -> None:
        """Write tensors that `check` has accepted where the old ones are."""
        for name, given in self._by_expert(weights).items():
            adapter = self._parsed(name, "expert", given)
            put(fitted(adapter, self.shapes), self.model, self.slots[name])

    def _by_expert(self, weights: Named) -> dict[str | None, dict[str, Tensor]]:
        """Return an update's tensors by the expert's name."""
        found: dict[str | None, dict[str, Tensor]] = {}
        for key, tensor in weights:
            name, slash, rest = key.partition("/")
            found.setdefault(name if slash else None, {})[rest if slash else key] = tensor
        return found

    def _parsed(self, name: str | None, field: str, given: Mapping[str, Tensor]) -> LoraAdapter:
        """Return the adapter of these tensors. Raises `ProxyConfigError` if they are not one."""
        if (location := self.locations.get(name)) is None:
            raise ProxyConfigError("the engine has no such adapter", field=field)
        if wrong := next((key for key in given if ".lora_" not in key), None):
            raise ProxyConfigError(
                f"{wrong} is not a tensor of its adapter",
                field=field,
                remedy="in one pass send the adapter's tensors under their names in its file; for "
                "merged weights start with `one_pass: false`",
            )
        return LoraAdapter.read(location, tensors=given)


class MemberWeights:
    """The weights of all members.

    Args:
        models: the members' models, by role; a paired expert has none.
        configs: the engine's configuration for each member.
        adapters: the members' adapters, by role.
        pair: the adapters of experts that run in one pass; None if they do not.
        head: the fused head; None on pipeline ranks without one.
        elsewhere: members of which other pipeline ranks have all layers: nothing is loaded here.
        towers: those of members that see images, and the engine's configuration for them.
        is_random: whether the engine starts with random weights (`load_format: dummy`).
    """

    def __init__(
        self,
        models: Mapping[Role, nn.Module],
        configs: Mapping[Role, "VllmConfig"],
        adapters: Mapping[Role, str],
        pair: AdapterPart | None,
        head: ProxyHead | None,
        *,
        elsewhere: Set[Role] = frozenset(),
        towers: Mapping[Role, tuple[nn.Module, "VllmConfig"]] = MappingProxyType({}),
        is_random: bool,
    ) -> None:
        self.models = {
            role: ModelPart(role, model, configs[role], adapters.get(role))
            for role, model in models.items()
        }
        self.pair = pair
        self.towers = {
            role: ModelPart(role, tower, config, None) for role, (tower, config) in towers.items()
        }
        self.head, self.elsewhere = head, elsewhere
        self.is_loaded = is_random

    @property
    def parts(self) -> dict[Role, Part]:
        """What can be replaced, by role."""
        pair: dict[Role, Part] = {} if self.pair is None else {"expert": self.pair}
        return {**self.models, **pair}

    def load(self, weights: Named) -> set[str]:
        """Load checkpoints at start, or later any tensors in place, at once and unchecked.

        Args:
            weights: `(name, tensor)`; the base's under their own names, the others' under
                `expert.` and `antiexpert.`. Those of one member follow each other.

        Returns:
            The names of the parameters that were set.

        Raises:
            ProxyConfigError: at start, a checkpoint has a tensor too many or too few; later, these
                tensors cannot be loaded in place.
        """
        loaded: set[str] = set()
        for role, group in groupby(weights, key=lambda item: role_of(item[0])):
            if role in self.elsewhere:
                continue
            tensors: Named = ((name.removeprefix(f"{role}."), tensor) for name, tensor in group)
            part, seen = self._loadable(role), dict[str, Tensor]()
            if role in self.towers:
                tensors = _without_towers(tensors, seen)
            names = part.load_some(tensors) if self.is_loaded else part.start(tensors)
            loaded |= {f"{role}.{name}" for name in names}
            if role in self.towers:
                names = self.towers[role].start(seen.items())
                loaded |= {f"sight.towers.{role}.{name}" for name in names}
        if self.pair is not None and not self.is_loaded:
            self.pair.start()
        if self.head is not None:
            self.head.weights_loaded()
            loaded |= {f"head.{name}" for name, _ in self.head.named_parameters()}
        self.is_loaded = True
        return loaded

    def _loadable(self, role: Role) -> ModelPart:
        """Return a member's model. Raises `ProxyConfigError` if its weights cannot be set now."""
        remedy = "use start_weight_update, update_weights and finish_weight_update"
        if role not in self.models:
            problem = "it runs in one pass" if self.pair else "the engine has no such member"
            raise ProxyConfigError(problem, field=role, remedy=remedy if self.pair else None)
        if self.is_loaded:
            self._require_blind()
        part = self.models[role]
        is_packed = self.is_loaded and current_platform.is_cpu()
        if is_packed and not any(tensor.is_meta for tensor in part.model.parameters()):
            raise ProxyConfigError(
                "vLLM packs weights for a CPU, and cannot load tensors into them one by one",
                field=role,
                remedy=remedy,
            )
        return part

    def files(
        self, loader: "DefaultModelLoader", paths: Mapping[Role, str] | None = None
    ) -> dict[Role, Source]:
        """Return all members' weights in their files; or those of the members in *paths*."""
        self._require_members(paths or ())
        sources: dict[Role, Source] = {
            role: part.files(loader, (paths or {}).get(role))
            for role, part in self.parts.items()
            if paths is None or role in paths
        }
        others = self.elsewhere if paths is None else self.elsewhere & paths.keys()
        return sources | dict.fromkeys(others, tuple)  # nothing is read for them

    def check(self, sources: Mapping[Role, Source]) -> None:
        """Raise `ProxyConfigError` if the new weights are not complete and right."""
        self._require_blind()
        if not sources:
            raise ProxyConfigError("the update has no tensors")
        self._require_members(sources)
        for role, source in sources.items():
            if role not in self.elsewhere:
                self.parts[role].check(source())

    def _require_blind(self) -> None:
        """Raise `ProxyConfigError` if members see images: their towers cannot be loaded again."""
        if self.towers:
            raise ProxyConfigError(
                "members that see images cannot get new weights",
                field="limit_mm_per_prompt",
                remedy="start the engine again",
            )

    def replace(self, sources: Mapping[Role, Source]) -> None:
        """Load new weights that `check` has accepted."""
        with nullcontext() if self.head is None else self.head.loading_again():
            for role, source in sources.items():
                if role not in self.elsewhere:
                    self.parts[role].replace(source())

    def _require_members(self, roles: Iterable[str]) -> None:
        for role in roles:
            if role not in self.parts.keys() | self.elsewhere:
                raise ProxyConfigError("the engine has no such member", field=role)


def _without_towers(
    weights: Iterable[tuple[str, Tensor]], towers: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the text model's tensors, and collect the others in *towers*."""
    for name, tensor in weights:
        if is_towers(name):
            towers[name] = tensor
        else:
            yield name, tensor


def _has_room(slot: list[int] | None, new: list[int] | None) -> bool:
    """Whether an adapter of a module fits into a slot; both as `[rank, in, out]`."""
    return new is None or (slot is not None and new[0] <= slot[0] and new[1:] == slot[1:])


def _size(shape: list[int] | None) -> str:
    return "missing" if shape is None else "{1} to {2} units by rank {0}".format(*shape)


def _finite(weights: Named, field: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors. Raises `ProxyConfigError` if one has NaN or infinite values."""
    for name, tensor in weights:
        # Formats of one byte may have no NaN, and torch has no such test for them.
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():
            raise ProxyConfigError(f"{name} has NaN or infinite values", field=field)
        yield name, tensor


class _CheckedCopies(TorchDispatchMode):
    """Raises an error where a copy does not fit. On the meta device torch does not."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, new = (list(tensor.shape) for tensor in args[:2])
            if [size for size in target if size != 1] != [size for size in new if size != 1]:
                raise RuntimeError(f"its shape is {new}, and {target} is needed")
        return func(*args, **(kwargs or {}))


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Put a model's parameters on the meta device, as they were before they were first loaded."""
    saved = [
        (layer, *(dict(held) for held in (layer._parameters, layer._buffers)))
        for layer in model.modules()
    ]
    transient = {layer: set(layer._non_persistent_buffers_set) for layer, *_ in saved}
    try:
        for layer, *_ in saved:
            restore_layer_on_meta(layer, get_layerwise_info(layer))
            for name, parameter in layer._parameters.items():
                if parameter is not None and not parameter.is_meta:  # vLLM leaves biases
                    layer._parameters[name] = to_meta_tensor(parameter)
            for parameter in layer.parameters(recurse=False):
                # An earlier reload may have left its wrapper, which loads nothing now.
                if hasattr(parameter, "weight_loader"):
                    parameter.weight_loader = _get_original_loader(parameter)
        yield
    finally:
        for layer, parameters, buffers in saved:
            for held, old in ((layer._parameters, parameters), (layer._buffers, buffers)):
                held.clear()
                held.update(old)
            layer._non_persistent_buffers_set = transient[layer]


@contextmanager
def _scales_kept() -> Iterator[None]:
    """Let each int8 product of a CPU (W8A8) keep the scales that it reads.

    It has only their address. vLLM's reload copies them to where the old ones are, and frees them.
    """
    make = _custom_ops.create_onednn_scaled_mm

    def make_and_keep(weight: Tensor, weight_scales: Tensor, *args: Any) -> Any:
        product = make(weight, weight_scales, *args)
        product.weight_scales = weight_scales
        return product

    _custom_ops.create_onednn_scaled_mm = make_and_keep
    try:
        yield
    finally:
        _custom_ops.create_onednn_scaled_mm = make


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide vLLM's warnings about layers without new weights: tables, and heads that are tied."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def is_other(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def staged(weights: Mapping[str, Tensor]) -> dict[Role, Source]:
    """Return the members' new weights from tensors by name, with `expert.` or `antiexpert.`."""
    by_role: dict[Role, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        role = role_of(name)
        by_role.setdefault(role, {})[name.removeprefix(f"{role}.")] = tensor
    return {role: tensors.items for role, tensors in by_role.items()}
