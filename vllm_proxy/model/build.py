"""Building each member inside one vLLM engine, and loading its weights."""

import contextlib
import pkgutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.members.images import text_model
from vllm_proxy.members.text_part import layer_prefix
from vllm_proxy.members.tying import has_separate_head, is_tied
from vllm_proxy.members.vllm_configs import configured_member

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader


_UNBUILDABLE = (
    *(ValueError, NotImplementedError),  # a kernel that this platform lacks, for one
    *(AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError),
)
"""What vLLM's model classes raise for a config.json that they do not expect."""

_UNLOADABLE = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""What they raise for the tensors of another model."""


def build_member(config: "VllmConfig", role: Role) -> "nn.Module":
    """Build a member with vLLM's own class for its architecture, weights not yet loaded.

    Args:
        config: what `member_vllm_config` returned for *role*.
        role: tags the member's compiled code, and prefixes the names of its layers, since the
            engine sees the layers of all members as those of one model. The base's layers have no
            prefix: its quantization may refer to their names.

    Raises:
        ProxyConfigError: vLLM cannot build it on this platform.
    """
    import torch
    from vllm.compilation.backends import set_model_tag
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.utils import init_vllm_registered_model

    from vllm_proxy.model.routers import correct_choice_of_experts

    parts = "" if role == "base" else role, layer_prefix(config.model_config.hf_config)
    prefix = ".".join(filter(None, parts))
    with set_model_tag(role), _names_below(prefix, config.compilation_config):
        try:
            if (path := text_model(config.model_config)) is None:
                member = init_vllm_registered_model(config, prefix=prefix)
            else:
                member = initialize_model(
                    config, prefix=prefix, model_class=pkgutil.resolve_name(path)
                )
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # not a mistake of the user
        except _UNBUILDABLE as error:
            raise ProxyConfigError(
                f"vLLM cannot build it: {_reason(error)}",
                field=f"{role} {config.model_config.model!r}",
                remedy="check its config.json, or use another model",
            ) from error
    _require_its_head(member, config, role)
    correct_choice_of_experts(member)
    return member


def _require_its_head(member: "nn.Module", config: "VllmConfig", role: Role) -> None:
    """Reject a separate head in the checkpoint of a model that vLLM always ties (LFM2, Zamba 2).

    vLLM would read one of head and embedding, and use it for both. Raises `ProxyConfigError`.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from vllm_proxy.model.projection import owners_of_weight

    model = config.model_config
    if is_tied(model):
        return  # its checkpoint was examined before it was built
    heads = [layer for layer in member.modules() if isinstance(layer, ParallelLMHead)]
    weights = [getattr(head, "weight", None) for head in heads]
    tied = any(w is not None and len(owners_of_weight(member, w)) > 1 for w in weights)
    if tied and has_separate_head(model, str(config.load_config.load_format)):
        raise ProxyConfigError(
            f"its checkpoint has a separate head, but vLLM's {type(member).__name__} always uses "
            "the embedding as its head",
            field=f"{role} {model.model!r}",
            remedy="use another model",
        )


def build_tower(config: "VllmConfig", role: Role) -> "nn.Module":
    """Build the tower of a member that sees images: vLLM's whole model without its text model.

    Args:
        config: what `tower_vllm_config` returned for *role*.
        role: the member.

    Raises:
        ProxyConfigError: vLLM cannot build it.
    """
    from vllm.model_executor.models.utils import init_vllm_registered_model
    from vllm.platforms import current_platform

    # vLLM builds the text model too, on the meta device, and throws it away. Its layers must not
    # stay among those of the engine.
    with _nothing_registered(config.compilation_config):
        try:
            tower = init_vllm_registered_model(config)
        except _UNBUILDABLE as error:
            raise ProxyConfigError(
                f"vLLM cannot build its vision tower: {_reason(error)}",
                field=f"{role} {config.model_config.model!r}",
                remedy="check its config.json, or remove `limit_mm_per_prompt`",
            ) from error
    if current_platform.is_cpu():
        _let_rows_be_strided(tower)
    return tower


def _let_rows_be_strided(tower: "nn.Module") -> None:
    """Let a tower's products take inputs whose rows are not in one piece.

    vLLM's product for CPUs (0.32) refuses them, as Llama 4's patches come.
    """
    from vllm.model_executor.layers.linear import LinearBase

    for layer in tower.modules():
        if isinstance(layer, LinearBase):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


def load_member(
    member: "nn.Module",
    role: Role,
    model: str,
    weights: "Iterable[tuple[str, torch.Tensor]]",
    *,
    required: set[str],
    source: str = "its checkpoint",
    remedy: str | None = "use the config.json that belongs to these weights",
) -> set[str]:
    """Load a member's checkpoint with its own class; returns the names of the parameters set.

    Args:
        member: what `build_member` returned.
        role: of the member.
        model: its name in error messages.
        weights: `(name, tensor)`, named as in its checkpoint.
        required: the parameters that must be set, as `required_parameters` returned them.
        source: what *weights* are, in error messages.
        remedy: what to do about an error, in its message.

    Raises:
        ProxyConfigError: the checkpoint has a tensor too many, too few, or of another shape.
    """
    import torch

    field, at, shape = f"{role} {model!r}", "", ""

    def noted() -> "Iterator[tuple[str, torch.Tensor]]":
        nonlocal at, shape
        for name, tensor in weights:
            at, shape = name, f", its shape is {list(tensor.shape)}"
            yield name, tensor

    try:
        names = member.load_weights(noted())
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not a mistake of the user
    except ProxyConfigError as error:  # about its adapter
        raise ProxyConfigError(str(error), field=role) from error
    except ValueError as error:  # it names the tensor
        raise ProxyConfigError(one_line(error), field=field, remedy=remedy) from error
    except _UNLOADABLE as error:
        detail = shape if isinstance(error, AssertionError) else ""  # it says nothing itself
        problem = f"vLLM cannot load {at} ({_reason(error)}{detail})"
        raise ProxyConfigError(problem, field=field, remedy=remedy) from error
    if names is None:  # an old model class, which does not report what it loaded
        names = {name for name, _ in member.named_parameters()}
    if missing := sorted(required - _all_names(member, names)):
        listed = ", ".join(missing[:3])
        raise ProxyConfigError(
            f"{source} lacks {len(missing)} of the model's tensors: {listed}",
            field=field,
            remedy=remedy,
        )
    return names


def _all_names(member: "nn.Module", names: set[str]) -> set[str]:
    """Return the names of parameters, and the other names that they have.

    vLLM's Transformers backend gives a router to its block of experts and to their layer.
    """
    named: dict[int, set[str]] = {}
    for name, parameter in member.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), set()).add(name)
    return names.union(*(group for group in named.values() if group & names))


def required_parameters(member: "nn.Module", *, quantized: bool) -> set[str]:
    """Return the parameters that a member's checkpoint must have. vLLM checks only some of them.

    To be called before weights are loaded. If the member is quantized, these are its embedding and
    head, unless they are quantized too: other layers may make their parameters from tensors with
    other names.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    plain = {
        id(module.weight)
        for module in member.modules()
        if isinstance(module, VocabParallelEmbedding)
        and isinstance(module.quant_method, UnquantizedEmbeddingMethod)
    }
    named = member.named_parameters()
    return {name for name, parameter in named if not quantized or id(parameter) in plain}


def _reason(error: Exception) -> str:
    """Return vLLM's error in one line, with its type if the text is not written for users."""
    text, kind = one_line(error), type(error).__name__
    return (
        text
        if isinstance(error, ValueError | NotImplementedError) or text == kind
        else f"{kind}: {text}"
    )


@contextlib.contextmanager
def _nothing_registered(compilation: "CompilationConfig") -> Iterator[None]:
    """Forget the layers that are registered in the body."""
    layers, moe_layers = compilation.static_forward_context, compilation.static_all_moe_layers
    others, known = dict(layers), len(moe_layers)
    layers.clear()
    try:
        yield
    finally:
        layers.clear()
        layers.update(others)
        del moe_layers[known:]


@contextlib.contextmanager
def _names_below(prefix: str, compilation: "CompilationConfig") -> Iterator[None]:
    """Give the layers that are registered in the body the *prefix*, if they lack it.

    vLLM's Transformers backend (0.32) ignores the prefix for layers of routed experts, so they
    would have the same names in every member.
    """
    layers, moe_layers = compilation.static_forward_context, compilation.static_all_moe_layers
    others, known = dict(layers), len(moe_layers)
    layers.clear()
    try:
        yield
    finally:
        new, names = dict(layers), {}
        for name, layer in new.items():
            names[name] = name
            if prefix and not name.startswith(f"{prefix}."):
                names[name] = layer.layer_name = f"{prefix}.{name}"
        layers.clear()
        layers.update(others | {names[name]: layer for name, layer in new.items()})
        moe_layers[known:] = [names[name] for name in moe_layers[known:]]


def member_weights(vllm_config: "VllmConfig", role: Role) -> "DefaultModelLoader.Source":
    """Return where vLLM's loader finds a member's checkpoint; names come out as `role.name`."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    member = configured_member(vllm_config.model_config, role)
    return DefaultModelLoader.Source(member.model, member.revision, prefix=f"{role}.")
