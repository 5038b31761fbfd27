"""A backend of vLLM's weight transfer that runs on a CPU: buckets of tensors come in files.

It does what vLLM's own backends do around `load_weights`; only the transport differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.worker.worker_base import WorkerBase

TRANSFER = {"weight_transfer_config": {"backend": "files"}}
"""The argument of an engine that receives weights so."""


@dataclass
class File(WeightTransferUpdateInfo):
    path: str


class FileTransferEngine(WeightTransferEngine[WeightTransferInitInfo, File]):
    init_info_cls, update_info_cls = WeightTransferInitInfo, File

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """There is nothing to connect to."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One call per tensor, out of a buffer that is used again."""
        for name, tensor in load_file(self.parse_update_info(update_info).path).items():
            buffer = tensor.clone()
            self.model.load_weights([(name, buffer)])
            buffer.fill_(-1)

    def receive_weights(self, update_info: File) -> None:
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """There is nothing to close."""


def lose_weights(worker: WorkerBase) -> None:
    """Do to a model what vLLM's sleep at level 2 and its wake-up do on a GPU.

    All memory from the time when it was loaded is lost. Buffers alone are restored.
    """
    model = worker.get_model()
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name != "kv_cache"  # made later
    ]
    for tensor in filter(torch.is_tensor, tree_leaves(held)):
        if not tensor.is_meta:
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)  # NaN
    for name, buffer in model.named_buffers():
        buffer.copy_(saved[name])


def register_transfer() -> None:
    """Also let `collective_rpc` call `lose_weights`."""
    WeightTransferEngineFactory.register_engine("files", FileTransferEngine)
    WorkerBase.lose_weights = lose_weights


def update(name: str, tensors: Mapping[str, Tensor], root: Path, bucket: int = 7) -> dict:
    """Return the question that sends these tensors in buckets; its answers are the errors."""
    root.mkdir(parents=True, exist_ok=True)
    names, calls = list(tensors), []
    for start in range(0, len(names), bucket):
        path = root / f"{name}-{start}.safetensors"
        chosen = names[start : start + bucket]
        save_file({one: tensors[one].clone().contiguous() for one in chosen}, path)
        calls.append(["update_weights", {"update_info": {"path": str(path)}}])
    return {"name": name, "calls": [["start_weight_update"], *calls, ["finish_weight_update"]]}


def checkpoint(path: str | Path, role: str = "base") -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the names that a trainer sends."""
    prefix = "" if role == "base" else f"{role}."
    return {prefix + name: tensor for name, tensor in load_file(Path(path, FILE)).items()}


FILE = "model.safetensors"
