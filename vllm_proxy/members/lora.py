"""`LoraAdapter`: a PEFT adapter, merged into its model's checkpoint while that is loaded.

    W' = W + scaling * B A                      LoRA (Hu et al. 2021, eq. 3) and rsLoRA
    W' = m * V / |V|, V = W + scaling * B A     DoRA (Liu et al. 2024, eq. 5), |V| one norm a row

Tensor by tensor, in float32: what PEFT's `merge_and_unload` gives, without a merged copy.
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
from vllm_proxy.config.schema import ProxySection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# How a key of the adapter's file ends -> what the tensor is.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
}
_TOKENS = ".token_adapter.trainable_tokens_delta"
"""How the key of trained tokens' rows ends, which replace the model's."""
# Switches and sections of adapter_config.json that we follow, or that matter in training only.
_KNOWN_OPTIONS = (
    *("use_dora", "use_rslora"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    *("megatron_config", "runtime_config"),
)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What an adapter has for one module.

    Attributes:
        a: `[rank, in]`; of an embedding, `in` is the vocabulary.
        b: `[out, rank]`.
        scaling: of `b @ a`.
        embedding: whether it is an embedding's: its weight is `[in, out]`.
        bias: `[out]`, added to the module's own after scaling; or None.
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
        """Of the weight in the checkpoint, unless that is a Conv1D's."""
        out_in = self.b.shape[0], self.a.shape[1]
        return out_in[::-1] if self.embedding else out_in

    def merge(self, weight: Tensor, *, conv1d: bool) -> Tensor | None:
        """Return the merged weight in float32, or None if the shapes do not fit.

        Args:
            weight: `[out, in]`, or `[in, out]` of an embedding or a Conv1D.
            conv1d: whether linear layers of the model may be Conv1D's; the shape decides, but for
                a square one.
        """
        in_out = (self.a.shape[1], self.b.shape[0])
        transposed = self.embedding or (conv1d and tuple(weight.shape) == in_out)
        if tuple(weight.shape) != (in_out if transposed else in_out[::-1]):
            return None
        delta = self.b.float() @ self.a.float()
        merged = weight.float() + (delta.T if transposed else delta) * self.scaling
        if self.magnitude is not None:
            inputs = 0 if transposed else 1
            norm = torch.linalg.norm(merged, dim=inputs)  # [out]
            merged *= (self.magnitude.float() / norm).unsqueeze(inputs)
        return merged


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter whose every tensor is understood.

    Attributes:
        location: as the user gave it: a directory or a hub id.
        trained_on: the model that adapter_config.json names, or None.
        conv1d: whether adapter_config.json says that weights are `[in, out]` (`fan_in_fan_out`).
        modules: module -> what is added to it.
        replaced: tensor -> what stands in its place (`modules_to_save`, trained biases, a trained
            embedding under its LoRA).
        tokens: tensor -> ids, and their rows `[ids, hidden]`, which replace its own
            (`trainable_token_indices`).
    """

    location: str
    trained_on: str | None
    conv1d: bool
    modules: Mapping[str, LoraModule]
    replaced: Mapping[str, Tensor]
    tokens: Mapping[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    @classmethod
    def read(cls, location: str, device: str = "cpu") -> Self:
        """Read an adapter's config and weights.

        Args:
            location: a local directory or a hub id, as vLLM takes it.
            device: `meta` for the shapes alone.

        Raises:
            ProxyConfigError: it is missing, broken or of a kind that is not supported.
        """
        directory = _directory(location)
        config = read_adapter_config(location, directory)
        return cls.parse(location, config, _read_weights(location, directory, device))

    @classmethod
    def parse(cls, location: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make sense of an adapter's tensors.

        Args:
            location: what errors call it.
            config: what `read_adapter_config` returned.
            tensors: those of its file; of a check, on the meta device.

        Raises:
            ProxyConfigError: a tensor is unknown, missing, or not of the config's rank.
        """
        helper = PEFTHelper.from_dict(dict(config))
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        replaced: dict[str, Tensor] = {}
        tokens: dict[str, tuple[list[int], Tensor]] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.")
            suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
            if name.endswith(_TOKENS):
                module = name.removesuffix(_TOKENS)
                ids = _trained_ids(location, config, module, tensor)
                tokens[f"{module}.weight"] = ids, tensor
            elif suffix is not None:
                parts[name.removesuffix(suffix)][_PARTS[suffix]] = tensor
            elif "lora_" in name:
                raise _unsupported(location, f"its tensor {key} is of an unknown kind")
            else:
                replaced[name.replace(".base_layer.", ".")] = tensor
        if not parts and not replaced and not tokens:
            raise _error(location, "its file has no tensors; save the adapter again")
        conv1d = bool(config.get("fan_in_fan_out"))
        modules = {}
        for module, own in parts.items():
            rank, scaling = helper.get_rank_and_scaling(module)
            embedding = "embedding_a" in own
            a, b = own.get("embedding_a", own.get("a")), own.get("b")
            if a is None or b is None or helper.use_dora != ("magnitude" in own):
                raise _error(
                    location,
                    f"{module} has not the tensors that adapter_config.json says; save the adapter "
                    "again",
                )
            out = b.shape[:1]
            vectors = [own[name] for name in ("bias", "magnitude") if name in own]
            whole = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank
            if not whole or any(vector.shape != out for vector in vectors):
                listed = " and ".join(str(list(tensor.shape)) for tensor in (a, b, *vectors))
                raise _error(
                    location,
                    f"{module} has tensors of {listed}, which is no LoRA of a matrix of rank {rank}"
                    "; use the adapter_config.json that belongs to these weights",
                )
            modules[module] = LoraModule(
                a, b, scaling, embedding, own.get("bias"), own.get("magnitude")
            )
        trained_on = config.get("base_model_name_or_path")
        return cls(location, trained_on, conv1d, modules, replaced, tokens)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its modules, ascending, each once."""
        return tuple(sorted({module.a.shape[0] for module in self.modules.values()}))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Rank, width in and out of each module."""
        return {name: [*module.a.shape, module.b.shape[0]] for name, module in self.modules.items()}

    @property
    def is_plain(self) -> bool:
        """Whether it is products beside linear layers, and nothing else."""
        return not (self.replaced or self.tokens or self.conv1d) and not any(
            module.embedding or module.bias is not None or module.magnitude is not None
            for module in self.modules.values()
        )

    def merge(
        self, weights: Iterable[tuple[str, Tensor]], config: "PreTrainedConfig"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a checkpoint's tensors in their order, those that the adapter changes in float32.

        Args:
            weights: `(name, tensor)` as the checkpoint has them; a checkpoint of the bare decoder
                has the names without the first part (`model.`).
            config: the model's, for what the tensors do not say: a tied head, GPT-2's Conv1D.

        Raises:
            ProxyConfigError: a shape does not fit, the head is tied to a changed embedding, or, at
                the end, the adapter has what the checkpoint has not.
        """
        left = self._targets()
        self._refuse_tied(left, config)
        bare = {name.partition(".")[2]: name for name in left if name.count(".") > 1}
        conv1d = self.conv1d or config.model_type == "gpt2"
        for name, weight in weights:
            target = name if name in left else bare.get(name)
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
        """Return the tensors that the adapter changes, with their shapes as far as it knows."""
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
        """Refuse a change of embedding or head where the model has one tensor for both.

        PEFT trains them apart, whatever becomes of that when it merges: vLLM would keep one. Tokens
        that are trained in the embedding alone are the head's, too, with PEFT as here.
        """
        if not getattr(config, "tie_word_embeddings", False):
            return
        for name, shape in targets.items():
            whole = len(shape) == 2 and shape[0] == config.vocab_size and name not in self.tokens
            if whole or (len(self.tokens) > 1 and name in self.tokens):
                raise _error(
                    self.location,
                    f"it changes {name}, and the model has one tensor for embedding and head "
                    "(`tie_word_embeddings`); give a copy of the model that has two",
                )

    def _merged(self, target: str, weight: Tensor, *, conv1d: bool) -> Tensor:
        merged = self.replaced.get(target, weight)
        wanted = tuple(merged.shape)
        if (
            target in self.replaced
            and wanted[0] != weight.shape[0]
            and wanted[1:] == weight.shape[1:]
        ):
            raise _error(
                self.location,
                f"it was trained with {wanted[0]} rows of {target}, and the model has "
                f"{weight.shape[0]}: its vocabulary was resized; with PEFT, load the model, call "
                f"`resize_token_embeddings({wanted[0]})`, merge the adapter, and give the result "
                "as `model`",
            )
        module, _, kind = target.rpartition(".")
        lora = self.modules.get(module)
        if wanted == tuple(weight.shape) and lora is not None:
            if kind == "weight":
                wanted = lora.shape
                merged = lora.merge(merged, conv1d=conv1d)
            elif lora.bias is not None:
                wanted = tuple(lora.bias.shape)
                fits = wanted == tuple(weight.shape)
                merged = merged.float() + lora.scaling * lora.bias.float() if fits else None
        if target in self.tokens and merged is not None:
            ids, rows = self.tokens[target]
            if max(ids) >= merged.shape[0] or rows.shape[1] != merged.shape[1]:
                wanted, merged = (max(ids) + 1, rows.shape[1]), None
            else:
                index = torch.tensor(ids, device=merged.device)
                merged = merged.float().index_copy(0, index, rows.float())
        if merged is None or merged.shape != weight.shape:
            raise self._misfit(
                f"{module} needs a {kind} of {list(wanted)}, and the checkpoint has "
                f"{list(weight.shape)}"
            )
        return merged.float()

    def _misfit(self, problem: str) -> ProxyConfigError:
        trained_on = f" ({self.trained_on!r}, says its config)" if self.trained_on else ""
        return _error(
            self.location, f"{problem}; give as `model` the one that it was trained on{trained_on}"
        )


def _trained_ids(location: str, config: Mapping[str, Any], module: str, rows: Tensor) -> list[int]:
    """Return the ids of a module's trained tokens, of which *rows* are in the file.

    Raises:
        ProxyConfigError: adapter_config.json has not as many.
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):  # by module; a list is the embedding's
        given = next((ids for name, ids in given.items() if module.endswith(name)), None)
    is_list = isinstance(given, list) and all(type(i) is int and i >= 0 for i in given)
    if not is_list or rows.dim() != 2 or len(given) != len(rows) or not given:
        raise _error(
            location,
            f"{module} has trained tokens of {list(rows.shape)}, and adapter_config.json has "
            f"`trainable_token_indices` {given!r:.80}; use the one that belongs to these weights",
        )
    return given


def _error(location: str, problem: str) -> ProxyConfigError:
    return ProxyConfigError(f"adapter `{location}`: {problem}")


def must_be_merged(location: str) -> str:
    """Return what is wrong with `one_pass: true` and an adapter that is not plain."""
    return (
        f"one_pass: adapter `{location}` changes more than products of linear layers (DoRA, "
        "biases, embeddings, modules_to_save) and must be merged; remove it"
    )


def shared_adapter(section: ProxySection, *, dummy: bool) -> LoraAdapter | None:
    """Return the adapter, by shapes alone, that is the difference of the members; None if merged.

    Args:
        section: the members.
        dummy: whether their weights are random (`load_format: dummy`). Then no adapter is read,
            there need not be one, and each member is a model of its own, whatever `one_pass` says.

    Raises:
        ProxyConfigError: they are to run in one pass, and the adapter must be merged.
    """
    if dummy or not section.may_run_as_one:
        return None
    adapter = LoraAdapter.read(section.expert.lora, device="meta")
    if adapter.is_plain:
        return adapter
    if section.one_pass:
        raise ProxyConfigError(must_be_merged(section.expert.lora))
    return None


def _unsupported(location: str, problem: str) -> ProxyConfigError:
    remedy = "merge it into its model with PEFT, if that can, and give the result as `model`"
    return _error(location, f"{problem}; {remedy}")


def _directory(location: str) -> Path:
    from vllm.lora.utils import get_adapter_absolute_path

    reason = ""
    try:
        directory = Path(get_adapter_absolute_path(location))
    except (OSError, ValueError) as error:  # of the hub: offline, or not in its cache
        directory, reason = Path(location), f" ({one_line(error)})"
    if not directory.is_dir():
        raise _error(
            location, f"it is neither a local directory nor on the hub{reason}; check the path"
        )
    return directory


def read_adapter_config(location: str, directory: Path) -> dict[str, Any]:
    """Return what adapter_config.json says.

    Args:
        location: what errors call the adapter.
        directory: where it lies.

    Raises:
        ProxyConfigError: there is none, or it is of a kind that is not supported.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise _error(location, "the directory has no adapter_config.json; give one that PEFT saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _error(location, f"{path.name} cannot be read ({error}); restore the file") from None
    if not isinstance(config, dict):
        raise _error(location, f"{path.name} is not a JSON object; restore the file")
    if config.get("peft_type") != "LORA":
        raise _unsupported(location, f"its `peft_type` is {config.get('peft_type')!r}, not 'LORA'")
    for key, value in config.items():
        optional = key.endswith("_config") or key.startswith("use_")
        if value and ((optional and key not in _KNOWN_OPTIONS) or key == "target_parameters"):
            raise _unsupported(location, f"its `{key}` is {value!r}, which is not supported")
    try:
        helper = PEFTHelper.from_dict(config)
        # What vLLM cannot do and we can, and its limit on the rank, are taken out of its check.
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
        if path is safetensors:  # mapped: what goes to the meta device is not read
            return {name: tensor.to(device) for name, tensor in load_file(path).items()}
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        problem = f"the directory has no {safetensors.name}; save the adapter again"
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        problem = f"{path.name} cannot be read ({one_line(error)}); save the adapter again"
    raise _error(location, problem)
