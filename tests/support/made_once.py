"""What all pytest workers need and one of them makes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from filelock import FileLock

Made = TypeVar("Made")


class MadeOnce(dict[str, Made]):
    """Values by name, each made by the worker that asks first; the others wait, and read it.

    Args:
        make: makes a value that `torch.save` can write.
        factory: knows the directory that this run's workers share.
    """

    def __init__(self, make: Callable[[str], Made], factory: pytest.TempPathFactory) -> None:
        super().__init__()
        own = factory.getbasetemp()
        root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
        self._make, self._directory = make, root / "made-once"
        self._directory.mkdir(exist_ok=True)

    def __missing__(self, name: str) -> Made:
        path = Path(self._directory, f"{name}.pt")
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.save(self._make(name), path)
        self[name] = torch.load(path, weights_only=False)
        return self[name]
