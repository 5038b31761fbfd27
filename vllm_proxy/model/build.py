"""Building each member inside one vLLM engine, and loading its weights."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
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
"""What vLLM's model classes raise for a config.json that says something else than they expect."""

_UNLOADABLE = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""What they raise for tensors of another model."""


def build_member(config: "VllmConfig", role: Role) -> "nn.Module":
    """Build a member with vLLM's own class for its architecture, weights not yet loaded.

    Args:
        config: what `member_vllm_config` returned for *role*.
        role: tag of what is compiled for the member and, but for the base, prefix of its layers:
            the engine sees the layers of all members as those of one model. The base's keep the
            names they have when it is served alone, which its quantization may refer to.

    Raises:
        ProxyConfigError: vLLM cannot build it on this platform.
    """
    import torch
    from vllm.compilation.backends import set_model_tag
    from vllm.model_executor.models.utils import init_vllm_registered_model

    prefix = "" if role == "base" else role
    with set_model_tag(role), _names_below(prefix, config.compilation_config):
        try:
            return init_vllm_registered_model(config, prefix=prefix)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # nobody's mistake
        except _UNBUILDABLE as error:
            raise ProxyConfigError(
                f"{role} {config.model_config.model!r}: vLLM cannot build it: {_reason(error)}; "
                "check its config.json, or use another model"
            ) from error


def load_member(
    member: "nn.Module",
    role: Role,
    model: str,
    weights: "Iterable[tuple[str, torch.Tensor]]",
    *,
    quantized: bool,
) -> set[str]:
    """Load a member's checkpoint with its own class; returns the names of the parameters set.

    Args:
        member: what `build_member` returned.
        role: of the member.
        model: what problems call it.
        weights: `(name, tensor)`, named as in its checkpoint.
        quantized: whether it is: then vLLM makes some parameters itself.

    Raises:
        ProxyConfigError: the checkpoint has a tensor too many, too few, or of another shape.
    """
    import torch

    remedy, at = "use the config.json that belongs to these weights", ""

    def noted() -> "Iterator[tuple[str, torch.Tensor]]":
        nonlocal at
        for name, tensor in weights:
            at = name
            yield name, tensor

    try:
        names = member.load_weights(noted())
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # nobody's mistake
    except ProxyConfigError as error:  # of its adapter
        raise ProxyConfigError(f"{role}: {error}") from error
    except ValueError as error:  # names the tensor
        raise ProxyConfigError(f"{role} {model!r}: {one_line(error)}; {remedy}") from error
    except _UNLOADABLE as error:
        raise ProxyConfigError(
            f"{role} {model!r}: vLLM cannot load {at} ({_reason(error)}); {remedy}"
        ) from error
    if names is None:  # an older model class, which does not report what it loaded
        names = {name for name, _ in member.named_parameters()}
    if missing := sorted(_required(member, quantized=quantized) - names):
        raise ProxyConfigError(
            f"{role} {model!r}: its checkpoint lacks {len(missing)} of the model's tensors: "
            f"{', '.join(missing[:3])}; {remedy}"
        )
    return names


def _required(member: "nn.Module", *, quantized: bool) -> set[str]:
    """Return the parameters that a member's checkpoint must have, which vLLM checks in part.

    Of a quantized one, its embedding and head, unless they are quantized: other layers may make
    theirs of tensors with other names.
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
    """Return an error of vLLM's in one line, with its kind where the text is not made for users."""
    text, kind = one_line(error), type(error).__name__
    return (
        text
        if isinstance(error, ValueError | NotImplementedError) or text == kind
        else f"{kind}: {text}"
    )


@contextlib.contextmanager
def _names_below(prefix: str, compilation: "CompilationConfig") -> Iterator[None]:
    """Have the layers that are registered in the body bear *prefix*.

    vLLM's Transformers backend (0.32) gives its experts names without the prefix that it was given,
    the same names in every member.
    """
    layers, experts = compilation.static_forward_context, compilation.static_all_moe_layers
    others, known = dict(layers), len(experts)
    layers.clear()
    try:
        yield
    finally:
        own, names = dict(layers), {}
        for name, layer in own.items():
            names[name] = name
            if prefix and not name.startswith(f"{prefix}."):
                names[name] = layer.layer_name = f"{prefix}.{name}"
        layers.clear()
        layers.update(others | {names[name]: layer for name, layer in own.items()})
        experts[known:] = [names[name] for name in experts[known:]]


def admit_twice_the_rows(vllm_config: "VllmConfig") -> None:
    """Let compiled code run on twice as many rows as a step has tokens.

    vLLM compiles for ranges of rows, the last of which ends at `max_num_batched_tokens`.
    """
    compilation = vllm_config.compilation_config
    most = vllm_config.scheduler_config.max_num_batched_tokens
    compilation.compile_ranges_endpoints = [
        2 * end if end == most else end for end in compilation.compile_ranges_endpoints or ()
    ]


def member_weights(vllm_config: "VllmConfig", role: Role) -> "DefaultModelLoader.Source":
    """Return where vLLM's loader finds a member's checkpoint; names come out as `role.name`."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    member = configured_member(vllm_config.model_config, role)
    return DefaultModelLoader.Source(member.model, member.revision, prefix=f"{role}.")
