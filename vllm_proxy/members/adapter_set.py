"""`AdapterSet`: the adapters by which several experts differ from one antiexpert.

Each has a slot. The adapter in slot 0 is for requests that name no expert; it may be missing, and
this expert then equals the antiexpert. All have room for the largest rank that one of them has in
a module, so that the adapter in a slot can be replaced.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxySection, expert_field
from vllm_proxy.members.lora import LoraAdapter, LoraModule, must_be_merged


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Adapters that only add low-rank products to linear layers of one model.

    Attributes:
        adapters: by slot; None if there is none.
        shapes: `[rank, in, out]` of each module that one of them changes, with the largest rank.
    """

    adapters: tuple[LoraAdapter | None, ...]
    shapes: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        shapes: dict[str, list[int]] = {}
        for adapter in filter(None, self.adapters):
            for name, (rank, *sizes) in adapter.shapes.items():
                known, *others = shapes.get(name, [rank, *sizes])
                if others != sizes:
                    raise ProxyConfigError(
                        f"it changes {name} of {sizes[0]} to {sizes[1]} units, and another one "
                        f"{others[0]} to {others[1]}",
                        field=f"adapter `{adapter.location}`",
                        remedy="all experts must be adapters of one model",
                    )
                shapes[name] = [max(rank, known), *sizes]
        object.__setattr__(self, "shapes", shapes)

    @property
    def first(self) -> LoraAdapter:
        """The first adapter, for errors about the model."""
        return next(filter(None, self.adapters))

    @property
    def parameters(self) -> int:
        """The numbers that all slots take."""
        per_slot = sum(rank * (inputs + outputs) for rank, inputs, outputs in self.shapes.values())
        return len(self.adapters) * per_slot

    def in_slots(self) -> Iterator[tuple[int, dict[str, LoraModule]]]:
        """Yield each slot and its modules (`fitted`)."""
        for slot, adapter in enumerate(self.adapters):
            yield slot, fitted(adapter, self.shapes)


def fitted(adapter: LoraAdapter | None, shapes: Mapping[str, list[int]]) -> dict[str, LoraModule]:
    """Return an adapter's modules with zeros where it has a lower rank, or no such module.

    Args:
        adapter: None for zeros alone.
        shapes: `[rank, in, out]` of each module.
    """
    modules = {}
    for name, (rank, inputs, outputs) in shapes.items():
        a, b, scaling = torch.zeros(rank, inputs), torch.zeros(outputs, rank), 1.0
        if adapter is not None and (lora := adapter.modules.get(name)) is not None:
            scaling, own = lora.scaling, lora.a.shape[0]
            a[:own], b[:, :own] = lora.a, lora.b
        modules[name] = LoraModule(a, b, scaling, embedding=False)
    return modules


def shared_adapters(
    section: ProxySection, *, dummy: bool, quantization: str | None
) -> AdapterSet | None:
    """Return the adapters by which experts differ from the antiexpert; None if one is merged.

    Their tensors have shapes only (meta device).

    Args:
        section: the members.
        dummy: whether their weights are random (`load_format: dummy`). Then no adapter is read,
            it need not exist, and each member is a separate model, whatever `one_pass` says.
        quantization: vLLM's name of the antiexpert's, or None.

    Raises:
        ProxyConfigError: `one_pass` is true or there are `experts`, and an adapter must be merged.
    """
    if dummy or not section.may_run_as_one:
        return None
    adapters: list[LoraAdapter | None] = []
    for name, location in section.adapters.items():
        if location is None:
            adapters.append(None)
            continue
        adapter = LoraAdapter.read(location, device="meta")
        adapter.require_mergeable(quantization)
        if not adapter.is_plain:
            if section.experts:
                raise must_be_merged(location, expert_field(name), "use one that does not")
            if section.one_pass:
                raise must_be_merged(location)
            return None
        adapters.append(adapter)
    return AdapterSet(tuple(adapters))
