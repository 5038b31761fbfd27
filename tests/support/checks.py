"""`check` of members with mistakes in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from vllm import EngineArgs
from vllm.config import VllmConfig

from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.check.run import CheckReport, check
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes
from vllm_proxy.preflight.plan.shape import Shape

Mutate = Callable[[Path], object]


def run(triple: dict[str, str], **changes: Any) -> CheckReport:
    return check(ProxyConfig.parse({**triple, **changes}, "test"))


def planned_shapes(config: ProxyConfig) -> dict[Role, Shape]:
    """Return what `plan` reads of the members."""
    members = read_all(config)
    shapes = read_shapes(config, members, read_engine(config, members))
    return {shape.role: shape for shape in shapes}


def engine_config(members: dict[str, Any], **engine: Any) -> VllmConfig:
    """Have vLLM build the configuration of an engine, with our hook in it."""
    engine = {"dtype": "float32", "max_model_len": 64, **engine}
    config = ProxyConfig.parse({**members, "engine": engine}, "test")
    return EngineArgs(**config.engine_args()).create_engine_config()


def set_config(**values: object) -> Mutate:
    def mutate(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return mutate


def edit_tensors(edit: Callable[[dict], object]) -> Mutate:
    def mutate(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return mutate
