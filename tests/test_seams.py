"""What we lean on in vLLM is there, and a version without it fails by name."""

import pytest
import vllm

from vllm_proxy import seams
from vllm_proxy.config import ARCHITECTURE
from vllm_proxy.errors import ProxyConfigError
from vllm_proxy.plugin import register


def test_installed_vllm_has_every_seam():
    seams.require_supported_vllm()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0"])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ProxyConfigError, match=rf"vllm {version} .*>= 0\.32, < 0\.34"):
        seams.require_supported_vllm()


@pytest.mark.parametrize("seam", ["vllm.nowhere:x", "vllm.config:ModelConfig.no_such_field"])
def test_missing_seam_is_named(monkeypatch, seam):
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, seam))
    with pytest.raises(ProxyConfigError, match=seam):
        seams.require_supported_vllm()


def test_registering_again_changes_nothing():
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register()
    before = dict(MODELS_CONFIG_MAP), set(ModelRegistry.get_supported_archs())
    register()
    assert (dict(MODELS_CONFIG_MAP), set(ModelRegistry.get_supported_archs())) == before
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
