"""Declares the operators without which torchvision cannot be imported; see pyproject.toml."""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

NEEDED = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

kept: list[Any] = []
"""What declared the operators: they last as long as it does."""


class Finder:
    """Finds torchvision where Python does, and changes how it is loaded."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return where torchvision is; None for other modules."""
        spec = PathFinder.find_spec(name) if name == "torchvision" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    """Declares the operators, and then loads torchvision."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code."""
        if not kept:
            declare_missing(Path(self.path).parent)
        super().exec_module(module)


def declare_missing(folder: Path) -> None:
    """Declare the operators, unless those in torchvision's *folder* can be loaded."""
    import torch

    for compiled in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in NEEDED:
        library.define(name + SIGNATURE)
    kept.append(library)


def install() -> None:
    """Wait for the import of torchvision. Python calls this as it starts."""
    sys.meta_path.insert(0, Finder)
