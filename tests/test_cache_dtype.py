"""The KV cache has one dtype, which the base's checkpoint chooses; all layers are built with it."""

import json
from pathlib import Path

import pytest
import vllm
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from support.checks import run
from support.quantized import write_quantized
from support.tiny_models import write_model
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.vllm_configs import member_vllm_config

SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
ENGINE = {"dtype": "bfloat16", "max_model_len": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A plain checkpoint, and one (compressed-tensors) that is for keys and values in fp8."""
    root: Path = tmp_path_factory.mktemp("models")
    plain = write_model(root / "plain", seed=0)
    fp8 = write_quantized(plain, root / "fp8", root / "twin", "w8a8")
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = SCHEME
    (fp8 / "config.json").write_text(json.dumps(config))
    return {"plain": str(plain), "fp8": str(fp8)}


def dtypes_of_layers(members: dict[str, str], **engine: object) -> dict[str, str]:
    """Return the dtypes with which vLLM builds a layer of each member, one after the other."""
    config = ProxyConfig.parse({**members, "engine": {**ENGINE, **engine}}, "test")
    vllm_config = vllm.EngineArgs(**config.engine_args()).create_engine_config()
    dtypes = {}
    for role in members:
        member = member_vllm_config(vllm_config, role)
        given = {"cache_config": member.cache_config, "quant_config": member.quant_config}
        with set_current_vllm_config(member):
            dtypes[role] = Attention(4, 32, 1.0, 4, prefix=f"{role}.attn", **given).kv_cache_dtype
    assert set(dtypes.values()) == {vllm_config.cache_config.cache_dtype}
    return dtypes


@pytest.mark.parametrize(
    ("base", "expert", "antiexpert", "dtype"),
    [
        ("plain", "plain", "plain", "auto"),
        ("fp8", "plain", "plain", "fp8"),
        ("plain", "fp8", "plain", "auto"),
        ("plain", "plain", "fp8", "auto"),
        ("fp8", "fp8", "fp8", "fp8"),
    ],
)
def test_all_layers_have_the_dtype_of_the_base(models, base, expert, antiexpert, dtype):
    members = {"base": base, "expert": expert, "antiexpert": antiexpert}
    found = dtypes_of_layers({role: models[name] for role, name in members.items()})
    assert set(found.values()) == {dtype}


def test_the_user_s_dtype_is_for_all(models):
    members = {"base": models["plain"], "expert": models["fp8"]}
    assert set(dtypes_of_layers(members, kv_cache_dtype="fp8").values()) == {"fp8"}


@pytest.mark.parametrize(
    ("base", "expert", "words"),
    [
        ("fp8", "plain", "is in fp8, as the base's checkpoint says. That of expert does not"),
        ("plain", "fp8", "of expert is for a KV cache in fp8, and the base's is not: the cache is"),
        ("plain", "plain", None),
        ("fp8", "fp8", None),
    ],
)
def test_check_says_where_checkpoints_differ(models, base, expert, words):
    report = run({"base": models[base], "expert": models[expert]}, engine=ENGINE)
    assert report.problems == ()
    notes = " ".join(report.notes)
    assert ("kv_cache_dtype" in notes) == (words is not None)
    assert (words or "") in notes
    size = {
        "plain": "2,048 bytes per token in total (bf",
        "fp8": "1,024 bytes per token in total (fp8",
    }
    assert size[base] in notes
