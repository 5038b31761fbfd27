"""The newest vLLM's Python files with the kernels of the installed CPU build.

PyPI has vLLM's CPU build of a version long after its CUDA build. The Python files of both are the
same, and the kernels hardly change between two versions.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from support.vllm_source import SourceTree


def write_mixed_vllm(source: SourceTree, directory: Path) -> Path:
    """Write it to *directory*, which must not exist, and return what belongs on `PYTHONPATH`."""
    kernels = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(source.root / "vllm", directory / "vllm", ignore=kernels)
    for library in Path(find_spec("vllm").origin).parent.glob("*.so"):
        (directory / "vllm" / library.name).symlink_to(library)
    # The version is how vLLM detects its CPU platform.
    version = f"{source.version}+cpu"
    metadata = directory / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return directory
