"""`LoraAdapter`: a PEFT adapter, merged into its model's checkpoint during loading.

    W' = W + scaling * B A                      LoRA (Hu et al. 2021, eq. 3) and rsLoRA
    W' = m * V / |V|, V = W + scaling * B A     DoRA (Liu et al. 2024, eq. 5), |V| one norm per row

Tensor by tensor, in float32: the result of PEFT's `merge_and_unload`, without a merged copy.
"""

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from vllm.lora.peft_helper import PEFTHelper

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.members.text_part import text_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Suffix of a key in the adapter's file -> what the tensor is.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
}
_TOKENS = ".token_adapter.trainable_tokens_delta"
"""Suffix of a key whose tensor has the rows of trained tokens, which replace the model's rows."""
_MORE = (
    "adapter `{}` does more than add products to linear layers (DoRA, biases, embeddings, "
    "modules_to_save) and must be merged"
)
# Options of adapter_config.json that we support, or that matter in training only.
_KNOWN_OPTIONS = (
    *("use_dora", "use_rslora"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    *("megatron_config", "runtime_config"),
)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The tensors of an adapter for one module.

    Attributes:
        a: `[rank, in]`; for an embedding, `in` is the vocabulary size.
        b: `[out, rank]`.
        scaling: factor of `b @ a`.
        embedding: whether the module is an embedding, whose weight is `[in, out]`.
        bias: `[out]`, scaled and added to the module's bias; or None.
        magnitude: `[out]`, DoRA's m; or None.
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the module's weight in the checkpoint, unless the module is a Conv1D."""
        out_in = self.b.shape[0], self.a.shape[1]
        return out_in[::-1] if self.embedding else out_in

    def merge(self, weight: Tensor, *, conv1d: bool) -> Tensor | None:
        """Return the merged weight in float32, or None if the shapes do not fit.

        Args:
            weight: `[out, in]`, or `[in, out]` for an embedding or a Conv1D.
            conv1d: whether the model's linear layers may be Conv1D; the shape decides, except for
                a square weight.
        """
        in_out = (self.a.shape[1], self.b.shape[0])
        transposed = self.embedding or (conv1d and tuple(weight.shape) == in_out)
        if tuple(weight.shape) != (in_out if transposed else in_out[::-1]):
            return None
        a, b = (tensor.to(weight.device).float() for tensor in (self.a, self.b))
        delta = b @ a
        merged = weight.float() + (delta.T if transposed else delta) * self.scaling
        if self.magnitude is not None:
            inputs = 0 if transposed else 1
            norm = torch.linalg.norm(merged, dim=inputs)  # [out]
            merged *= (self.magnitude.to(norm) / norm).unsqueeze(inputs)
        return merged


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter of which every tensor is supported.

    Attributes:
        location: a directory or a hub id, as the user gave it.
        trained_on: the model that adapter_config.json names, or None.
        conv1d: whether adapter_config.json says that weights are `[in, out]` (`fan_in_fan_out`).
        modules: module name -> the LoRA tensors to merge into it.
        replaced: tensor name -> the tensor that replaces it (`modules_to_save`, trained biases, a
            trained embedding under its LoRA).
        tokens: tensor name -> ids, and the rows `[ids, hidden]` that replace the rows of these ids
            (`trainable_token_indices`).
    """

    location: str
    trained_on: str | None
    conv1d: bool
    modules: Mapping[str, LoraModule]
    replaced: Mapping[str, Tensor]
    tokens: Mapping[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    @classmethod
    def read(
        cls, location: str, device: str = "cpu", tensors: Mapping[str, Tensor] | None = None
    ) -> Self:
        """Read an adapter's config and weights.

        Args:
            location: a local directory or a hub id, as in vLLM.
            device: `meta` to read the shapes only.
            tensors: new weights, instead of those in the file.

        Raises:
            ProxyConfigError: it is missing, broken or of an unsupported kind.
        """
        directory = _directory(location)
        config = read_adapter_config(location, directory)
        if tensors is None:
            tensors = _read_weights(location, directory, device)
        return cls.parse(location, config, tensors)

    @staticmethod
    def tensors(location: str) -> Mapping[str, Tensor]:
        """Return the tensors in an adapter's file by their names."""
        return _read_weights(location, _directory(location), "cpu")

    @classmethod
    def parse(cls, location: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Sort an adapter's tensors by what they change.

        Args:
            location: the name of the adapter in errors.
            config: what `read_adapter_config` returned.
            tensors: the tensors in the adapter's file; on the meta device for a check.

        Raises:
            ProxyConfigError: a tensor is unknown or missing, or does not have the config's rank.
        """
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        replaced: dict[str, Tensor] = {}
        tokens: dict[str, tuple[list[int], Tensor]] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.")
            name = text_names().map_name(name) or name  # a tower's stays, and fits no text model
            suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
            if name.endswith(_TOKENS):
                module = name.removesuffix(_TOKENS)
                ids = _trained_ids(location, config, module, tensor)
                tokens[f"{module}.weight"] = ids, tensor
            elif suffix is not None:
                parts[name.removesuffix(suffix)][_PARTS[suffix]] = tensor
            elif "lora_" in name:
                raise _unsupported(location, f"its tensor {key} is of an unknown kind")
            else:  # a whole tensor; PEFT puts its name for the wrapped layer in between
                replaced[name.replace(".base_layer.", ".")] = tensor
        if not parts and not replaced and not tokens:
            raise _error(location, "its file has no tensors", "save the adapter again")
        helper = PEFTHelper.from_dict(dict(config))
        return cls(
            location,
            trained_on=config.get("base_model_name_or_path"),
            conv1d=bool(config.get("fan_in_fan_out")),
            modules={name: _lora_module(location, name, parts[name], helper) for name in parts},
            replaced=replaced,
            tokens=tokens,
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of its modules, ascending."""
        return tuple(sorted({module.a.shape[0] for module in self.modules.values()}))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """`[rank, in, out]` of each module."""
        return {name: [*module.a.shape, module.b.shape[0]] for name, module in self.modules.items()}

    @property
    def is_plain(self) -> bool:
        """Whether it only adds low-rank products to linear layers."""
        return not (self.replaced or self.tokens or self.conv1d) and not any(
            module.embedding or module.bias is not None or module.magnitude is not None
            for module in self.modules.values()
        )

    def require_mergeable(self, quantization: str | None) -> None:
        """Raise `ProxyConfigError` if it must be merged, and its model is quantized.

        Args:
            quantization: vLLM's name of the model's, or None.
        """
        if quantization and not self.is_plain:
            raise cannot_be_merged(_MORE.format(self.location), quantization)

    def merge(
        self, weights: Iterable[tuple[str, Tensor]], config: "PreTrainedConfig"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a checkpoint's tensors in their order; those that the adapter changes in float32.

        Args:
            weights: `(name, tensor)` as in the checkpoint; in a checkpoint of the bare decoder the
                names lack the first part (`model.`), and in a multimodal one they may have more.
            config: the model's; says whether the head is tied, and whether GPT-2's Conv1D is used.

        Raises:
            ProxyConfigError: a shape does not fit, the head is tied to a changed embedding, or, at
                the end, the checkpoint lacks tensors that the adapter changes.
        """
        left = self._targets()
        self._refuse_tied(left, config)
        bare = {name.partition(".")[2]: name for name in left if name.count(".") > 1}
        conv1d = self.conv1d or config.model_type == "gpt2"
        for name, weight in weights:
            own = text_names().map_name(name) or name
            target = own if own in left else bare.get(own)
            if target in left:
                del left[target]
                weight = self._merged(target, weight, conv1d=conv1d)
            yield name, weight
        if left:
            listed = ", ".join([*left][:3]) + (", …" if len(left) > 3 else "")
            raise self._misfit(
                f"the checkpoint lacks {len(left)} of the {len(self._targets())} tensors that it "
                f"changes: {listed}"
            )

    def _targets(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors that the adapter changes, with the shapes that it knows for them."""
        targets = {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        targets |= {name: tuple(rows.shape) for name, (_, rows) in self.tokens.items()}
        for name, module in self.modules.items():
            targets[f"{name}.weight"] = module.shape
            if module.bias is not None:
                targets[f"{name}.bias"] = tuple(module.bias.shape)
        return targets

    def _refuse_tied(
        self, targets: Mapping[str, tuple[int, ...]], config: "PreTrainedConfig"
    ) -> None:
        """Reject a change of embedding or head if the model has one tensor for both.

        PEFT trains them separately, but vLLM would keep only one of them. Tokens that are trained
        in the embedding only also apply to the head, in PEFT as well as here.
        """
        if not getattr(config, "tie_word_embeddings", False):
            return
        for name, shape in targets.items():
            whole = len(shape) == 2 and shape[0] == config.vocab_size and name not in self.tokens
            if whole or (len(self.tokens) > 1 and name in self.tokens):
                raise _error(
                    self.location,
                    f"it changes {name}, and the model has one tensor for embedding and head "
                    "(`tie_word_embeddings`)",
                    "give a copy of the model that has two",
                )

    def _merged(self, target: str, weight: Tensor, *, conv1d: bool) -> Tensor:
        """Return the checkpoint's *weight* as the adapter changes it, in float32."""
        # On the weight's device: some loaders put tensors on the GPU.
        trained = self.replaced.get(target, weight).to(weight.device)
        merged: Tensor | None = trained  # None: a shape does not fit
        wanted = tuple(trained.shape)
        if target in self.replaced and wanted != tuple(weight.shape):
            self._refuse_resized(target, weight, wanted)
        module, _, kind = target.rpartition(".")  # kind: "weight" or "bias"
        lora = self.modules.get(module)
        if wanted == tuple(weight.shape) and lora is not None:
            if kind == "weight":
                wanted = lora.shape
                merged = lora.merge(trained, conv1d=conv1d)
            elif lora.bias is not None:
                wanted = tuple(lora.bias.shape)
                fits = wanted == tuple(weight.shape)
                merged = (
                    trained.float() + lora.scaling * lora.bias.to(weight.device).float()
                    if fits
                    else None
                )
        if target in self.tokens and merged is not None:
            ids, rows = self.tokens[target]
            if max(ids) >= merged.shape[0] or rows.shape[1] != merged.shape[1]:
                wanted, merged = (max(ids) + 1, rows.shape[1]), None
            else:
                index = torch.tensor(ids, device=merged.device)
                merged = merged.float()
                merged = merged.index_copy(0, index, rows.to(merged))
        if merged is None or merged.shape != weight.shape:
            raise self._misfit(
                f"{module} needs a {kind} of {list(wanted)}, and the checkpoint has "
                f"{list(weight.shape)}"
            )
        return merged.float()

    def _refuse_resized(self, target: str, weight: Tensor, trained: tuple[int, ...]) -> None:
        """Reject a tensor that replaces another one with a different number of rows only."""
        if trained[0] != weight.shape[0] and trained[1:] == weight.shape[1:]:
            raise _error(
                self.location,
                f"it was trained with {trained[0]} rows of {target}, and the model has "
                f"{weight.shape[0]}: its vocabulary was resized",
                "with PEFT, load the model, call "
                f"`resize_token_embeddings({trained[0]})`, merge the adapter, and give the result "
                "as `model`",
            )

    def _misfit(self, problem: str) -> ProxyConfigError:
        trained_on = f" ({self.trained_on!r}, says its config)" if self.trained_on else ""
        return _error(
            self.location, problem, f"give as `model` the one that it was trained on{trained_on}"
        )


def _lora_module(
    location: str, name: str, tensors: Mapping[str, Tensor], helper: PEFTHelper
) -> LoraModule:
    """Return the module called *name* from its tensors, by the names in `_PARTS`.

    Raises:
        ProxyConfigError: a tensor is missing, or does not have the config's rank.
    """
    rank, scaling = helper.get_rank_and_scaling(name)
    a, b = tensors.get("embedding_a", tensors.get("a")), tensors.get("b")
    if a is None or b is None or helper.use_dora != ("magnitude" in tensors):
        raise _error(
            location,
            f"{name} does not have the tensors that adapter_config.json says",
            "save the adapter again",
        )
    vectors = [tensors[kind] for kind in ("bias", "magnitude") if kind in tensors]
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank
    if not fits or any(vector.shape != b.shape[:1] for vector in vectors):  # each is `[out]`
        listed = " and ".join(str(list(tensor.shape)) for tensor in (a, b, *vectors))
        raise _error(
            location,
            f"{name} has tensors of {listed}, which is not a LoRA of a matrix of rank {rank}",
            "use the adapter_config.json that belongs to these weights",
        )
    return LoraModule(
        a, b, scaling, "embedding_a" in tensors, tensors.get("bias"), tensors.get("magnitude")
    )


def _trained_ids(location: str, config: Mapping[str, Any], module: str, rows: Tensor) -> list[int]:
    """Return the ids of a module's trained tokens, whose embeddings are *rows*.

    Raises:
        ProxyConfigError: adapter_config.json does not list one id per row.
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):  # by module; a list is the embedding's
        given = next((ids for name, ids in given.items() if module.endswith(name)), None)
    is_list = isinstance(given, list) and all(type(i) is int and i >= 0 for i in given)
    if given and is_list and rows.dim() == 2 and len(given) == len(rows):
        return given
    raise _error(
        location,
        f"{module} has trained tokens of {list(rows.shape)}, and adapter_config.json has "
        f"`trainable_token_indices` {given!r:.80}",
        "use the adapter_config.json that belongs to these weights",
    )


def _error(location: str, problem: str, remedy: str) -> ProxyConfigError:
    return ProxyConfigError(problem, field=f"adapter `{location}`", remedy=remedy)


def must_be_merged(
    location: str, field: str = "one_pass", remedy: str = "remove `one_pass`"
) -> ProxyConfigError:
    """Return the error for an adapter that is not plain, where *field* requires it."""
    return ProxyConfigError(_MORE.format(location), field=field, remedy=remedy)


def cannot_be_merged(problem: str, quantization: str) -> ProxyConfigError:
    """Return the error for an adapter that must be merged into a quantized model.

    Args:
        problem: why it must be.
        quantization: vLLM's name of the model's.
    """
    return ProxyConfigError.worded(
        f"{problem}, which a quantized model ({quantization}) does not allow",
        field="expert",
        remedy="use the unquantized checkpoint",
    )


def _unsupported(location: str, problem: str) -> ProxyConfigError:
    remedy = "merge it into its model with PEFT, if PEFT can, and give the result as `model`"
    return _error(location, problem, remedy)


def _directory(location: str) -> Path:
    from vllm.lora.utils import get_adapter_absolute_path

    reason = ""
    try:
        directory = Path(get_adapter_absolute_path(location))
    except (OSError, ValueError) as error:  # from the hub: offline, or not in its cache
        directory, reason = Path(location), f" ({one_line(error)})"
    if not directory.is_dir():
        raise _error(
            location, f"it is neither a local directory nor on the hub{reason}", "check the path"
        )
    return directory


def read_adapter_config(location: str, directory: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        location: the name of the adapter in errors.
        directory: where its files are.

    Raises:
        ProxyConfigError: the file is missing, or the adapter is of an unsupported kind.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise _error(location, "the directory has no adapter_config.json", "give one saved by PEFT")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"{path.name} cannot be read ({error})"
        raise _error(location, problem, "restore the file") from None
    if not isinstance(config, dict):
        raise _error(location, f"{path.name} is not a JSON object", "restore the file")
    if config.get("peft_type") != "LORA":
        raise _unsupported(location, f"its `peft_type` is {config.get('peft_type')!r}, not 'LORA'")
    for key, value in config.items():
        optional = key.endswith("_config") or key.startswith("use_")
        if value and ((optional and key not in _KNOWN_OPTIONS) or key == "target_parameters"):
            raise _unsupported(location, f"its `{key}` is {value!r}, which is not supported")
    try:
        helper = PEFTHelper.from_dict(config)
        # vLLM's check without the features that only we support, and without its limit on ranks.
        supported = replace(
            helper, modules_to_save=None, use_dora=False, lora_bias=False, bias="none"
        )
        supported.validate_legal(SimpleNamespace(max_lora_rank=inf))
    except (TypeError, ValueError) as error:
        raise _unsupported(location, f"{path.name}: {one_line(error)}") from None
    return config


def _read_weights(location: str, directory: Path, device: str) -> dict[str, Tensor]:
    safetensors, pickled = (directory / f"adapter_model.{end}" for end in ("safetensors", "bin"))
    path = safetensors if safetensors.is_file() else pickled
    try:
        if path is safetensors:  # memory-mapped: tensors for the meta device are not read
            return {name: tensor.to(device) for name, tensor in load_file(path).items()}
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        problem = f"the directory has no {safetensors.name}"
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        problem = f"{path.name} cannot be read ({one_line(error)})"
    raise _error(location, problem, "save the adapter again")
