"""Engines that share KV caches tell each other apart by all members, not by the base alone.

vLLM's connectors for stores look blocks up by their hashes or by a request's salt; NIXL compares a
hash of two engines when these first meet. Blocks themselves move on GPUs only.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import vllm
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    compute_nixl_compatibility_hash,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from support.checks import engine_config
from support.newest_vllm import newest_tree
from support.tiny_adapters import write_adapter
from support.tiny_models import write_alike
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.kv_transfer import CONNECTORS
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.limits import prompts_problem
from vllm_proxy.members.identity import members_digest
from vllm_proxy.members.vllm_configs import member_model_config
from vllm_proxy.preflight.check.run import check
from vllm_proxy.preflight.plan.plan import plan
from vllm_proxy.preflight.plan.predict import Demand

BLOCK = 16
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
LOCAL = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}
"""A connector that a CPU can start."""
ELSEWHERE = """
import json, sys
from types import SimpleNamespace
from vllm_proxy.members.identity import members_digest

facts = json.loads(sys.argv[1])
hf_config = SimpleNamespace(proxy=facts["hf_overrides"]["proxy"])
config = SimpleNamespace(
    model_config=SimpleNamespace(**facts, hf_config=hf_config),
    cache_config=SimpleNamespace(cache_dtype="auto"),
    load_config=SimpleNamespace(load_format="auto"),
)
print(members_digest(config), "vllm" in sys.modules)
"""


@pytest.fixture(scope="module")
def triple(tmp_path_factory) -> dict[str, str]:
    return write_alike(tmp_path_factory.mktemp("members"))


def parsed(members: dict[str, object], **engine: object) -> ProxyConfig:
    return ProxyConfig.parse({**members, "engine": {"dtype": "float32", **engine}}, "test")


class TestDigest:
    """It is that of another engine if, and only if, both compute the same keys and values."""

    @pytest.mark.parametrize(
        ("fields", "engine"),
        [
            ({"alpha": 2.0}, {}),
            ({"chat": {"expert": "template"}}, {}),
            ({}, {"max_model_len": 32}),
            ({}, {"kv_transfer_config": NIXL}),
        ],
    )
    def test_the_same_members(self, triple, fields, engine):
        one, other = engine_config(triple), engine_config({**triple, **fields}, **engine)
        assert members_digest(one) == members_digest(other)

    @pytest.mark.parametrize("change", ["model", "revision", "lora", "fewer", "dtype", "rope"])
    def test_other_members(self, triple, tmp_path, change):
        expert, engine = triple["expert"], {}
        members: dict[str, object] = dict(triple)
        if change == "model":
            members["expert"] = triple["antiexpert"]
        if change == "revision":
            members["expert"] = {"model": expert, "revision": "other"}
        if change == "lora":
            adapter = write_adapter(Path(expert), tmp_path, target_modules=["q_proj"])
            members["expert"] = {"model": expert, "lora": str(adapter)}
        if change == "fewer":
            del members["antiexpert"]
        if change == "dtype":
            engine["dtype"] = "bfloat16"
        if change == "rope":
            engine["hf_overrides"] = {"rope_theta": 5000.0}
        one, other = engine_config(triple), engine_config(members, **engine)
        assert members_digest(one) != members_digest(other)

    @pytest.mark.parametrize("part", ["expert", "lora"])
    def test_trained_again_in_the_same_place(self, triple, tmp_path, part):
        expert = shutil.copytree(triple["expert"], tmp_path / "expert")
        adapter = write_adapter(expert, tmp_path / "adapter", target_modules=["q_proj"])
        members = {**triple, "expert": {"model": str(expert), "lora": str(adapter)}}
        before = members_digest(engine_config(members))
        files = {
            "expert": expert / "model.safetensors",
            "lora": adapter / "adapter_model.safetensors",
        }
        content, tensors = files[part].read_bytes(), load_file(files[part])
        save_file({n: t + 0.01 for n, t in tensors.items()}, files[part], {"format": "pt"})
        assert members_digest(engine_config(members)) != before
        files[part].write_bytes(content)
        assert members_digest(engine_config(members)) == before

    def test_another_process(self, triple):
        """One without vLLM, whose import takes long: with what matters of the configuration."""
        config = engine_config(triple)
        parent, section = config.model_config, parsed(triple).engine_args()["hf_overrides"]
        facts = {
            "model": triple["base"],
            "revision": None,
            "quantization": None,
            "hf_overrides": section,
            "dtype": str(parent.dtype),
        }
        words = [sys.executable, "-c", ELSEWHERE, json.dumps(facts)]
        other = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        assert other.stdout.split() == [members_digest(config), "False"]


def hashes_of_a_request(config: vllm.config.VllmConfig, salt: str | None = None) -> list[bytes]:
    """Return the hashes of the blocks of a text in the engine's scheduler."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    config.cache_config.num_gpu_blocks = 8
    manager = StructuredOutputManager(config)
    scheduler = config.scheduler_config.get_scheduler_cls()(config, cache, manager, BLOCK)
    init_none_hash(sha256)
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(2 * BLOCK + 1)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    before = list(request.block_hashes)
    scheduler.add_request(request)
    scheduler.shutdown()
    assert len(request.block_hashes) == len(before) == 2
    if config.kv_transfer_config is None:
        assert request.block_hashes == before  # vLLM's own
    return request.block_hashes


class TestBlockHashes:
    """By these, and by the salt in them, stores of KV caches find blocks."""

    def test_of_engines_with_a_connector(self, triple):
        other = {**triple, "expert": triple["antiexpert"]}
        one, same, different, salted = (
            hashes_of_a_request(engine_config(members, kv_transfer_config=LOCAL), salt)
            for members, salt in ((triple, None), (triple, None), (other, None), (triple, "user"))
        )
        assert one == same
        assert not {*one} & {*different}
        assert not {*one} & {*salted}

    def test_of_engines_without_one(self, triple):
        other = {**triple, "expert": triple["antiexpert"]}
        assert hashes_of_a_request(engine_config(triple)) == hashes_of_a_request(
            engine_config(other)
        )


class TestNixl:
    """Two engines that exchange KV caches compare a hash first."""

    def handshake(self, config: vllm.config.VllmConfig) -> str:
        cls = KVConnectorFactory.get_connector_class(config.kv_transfer_config)
        cache = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[])
        connector = cls(config, KVConnectorRole.SCHEDULER, cache)
        side = connector.connector_scheduler
        found = compute_nixl_compatibility_hash(side.vllm_config, "TRITON_ATTN")
        connector.shutdown()
        assert found != compute_nixl_compatibility_hash(config, "TRITON_ATTN")  # vLLM's own
        return found

    @pytest.mark.parametrize("name", ["NixlConnector", "NixlPullConnector", "NixlPushConnector"])
    def test_engines_must_have_the_same_members(self, triple, name):
        engine = {"kv_transfer_config": {**NIXL, "kv_connector": name}}
        one, same, other, ranks = (
            self.handshake(engine_config(members, **engine, **more))
            for members, more in (
                (triple, {}),
                ({**triple, "alpha": 2.0}, {"max_model_len": 32}),
                ({**triple, "expert": triple["antiexpert"]}, {}),
                (triple, {"tensor_parallel_size": 2}),
            )
        )
        assert one == same
        assert len({one, other, ranks}) == 3

    def test_among_several_connectors(self, triple):
        children = {"connectors": [NIXL, LOCAL]}
        several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": children}
        config = engine_config(triple, kv_transfer_config={**several, "kv_role": "kv_both"})
        first, second = config.kv_transfer_config.kv_connector_extra_config["connectors"]
        assert first == {**NIXL, "kv_connector_module_path": "vllm_proxy.engine.nixl"}
        assert second == LOCAL


class TestRefused:
    """What cannot tell engines apart is refused by `check`, `plan` and vLLM alike."""

    @pytest.mark.parametrize(
        ("transfer", "words"),
        [
            (
                {"kv_connector": "LMCacheConnectorV1"},
                "kv_transfer_config.kv_connector` is 'LMCacheConnectorV1': it does not tell "
                "engines with the same base and different experts apart; use one of NixlConnector",
            ),
            (
                {"kv_connector": "MooncakeConnector"},
                "kv_transfer_config.kv_connector` is 'MooncakeConnector': it does not tell",
            ),
            (
                {"kv_connector": "Mine", "kv_connector_module_path": "my.module"},
                "kv_transfer_config.kv_connector` is 'my.module.Mine': it does not tell",
            ),
            (
                {
                    "kv_connector": "MultiConnector",
                    "kv_connector_extra_config": {
                        "connectors": [NIXL, {**NIXL, "kv_connector": "ExampleConnector"}]
                    },
                },
                "kv_transfer_config.kv_connector` is 'ExampleConnector': it does not tell",
            ),
            (
                {
                    "kv_connector": "NixlConnector",
                    "kv_connector_extra_config": {"enforce_handshake_compat": False},
                },
                "kv_transfer_config.kv_connector_extra_config.enforce_handshake_compat` is False: "
                "engines with different experts would send each other their KV caches; remove it",
            ),
        ],
    )
    def test_connector(self, triple, transfer, words):
        engine = {"kv_transfer_config": {"kv_role": "kv_both", **transfer}}
        with pytest.raises(ValueError, match="`" + re.escape(words)):
            engine_config(triple, **engine)
        config = parsed(triple, **engine)
        assert f"`engine.{words}" in "\n".join(check(config).problems)
        with pytest.raises(ProxyConfigError, match=re.escape(f"`engine.{words}")):
            plan(config, "A100-80G", Demand(1, 16, 16))

    @pytest.mark.parametrize(
        "engine", [{"kv_transfer_config": LOCAL}, {"kv_offloading_size": 1.0}], ids=str
    )
    def test_a_scheduler_of_the_user_s(self, triple, engine):
        engine = {**engine, "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}
        words = r"scheduler_cls` is .*: a KV connector .* needs vllm-proxy's scheduler, .*; remove"
        with pytest.raises(ValueError, match=f"`{words}"):
            engine_config(triple, **engine)
        assert any(
            re.search(f"`engine.{words}", p) for p in check(parsed(triple, **engine)).problems
        )

    @pytest.mark.parametrize(
        ("engine", "reason"),
        [
            ({}, None),
            ({"kv_transfer_config": NIXL}, "transfer"),
            ({"kv_offloading_size": 1.0}, "transfer"),
        ],
        ids=str,
    )
    def test_a_prompt_for_each_member(self, triple, engine, reason):
        config = engine_config(triple, **engine)
        members = {r: member_model_config(config.model_config, r, "auto") for r in ROLES}
        assert prompts_problem(config, members) == reason


@pytest.mark.parametrize("which", ["installed", "newest"])
def test_connectors_are_vllm_s(which):
    root = Path(find_spec("vllm").origin).parents[1] if which == "installed" else newest_tree().root
    factory = root / "vllm/distributed/kv_transfer/kv_connector/factory.py"
    assert {*CONNECTORS} < {*re.findall(r'^ {4}"(\w+)",$', factory.read_text(), re.MULTILINE)}
