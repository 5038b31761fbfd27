"""`CPUGraph`: stands in for `torch.cuda.CUDAGraph`.

A CUDA graph is a list of kernels with the addresses and the scalars of their arguments. Replaying
it runs no Python. So here: while a graph is captured, every operator and every launch of Triton's
interpreter is recorded; `replay` runs the same again on the same tensors. What a step decided on
the host, or put into a new tensor, is not seen by a replay.

Memory: tensors that a capture made belong to the pool of all graphs. CUDA gives the memory of those
that nobody holds when a capture begins to the graph that is captured, whose replays then write over
it. Here they are filled with NaN before each of its replays.
"""

import ctypes
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
WAITS = {
    getattr(operator, overload)
    for operator in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2)
    for overload in operator.overloads()
}
"""Operators for which the host waits: CUDA refuses them in a capture."""
FROM_HOST = {aten.lift_fresh.default, aten._pin_memory.default}
"""Operators that bring values of the host, which a replay would not bring again."""


class CaptureError(RuntimeError):
    """The step does what a CUDA graph cannot capture."""


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as another tensor object."""
    return aten.alias.default(tensor)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Storage:
    """Memory that a capture made, and how many tensors of the recorder keep it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.memory = tensor.untyped_storage()
        self.held = 0

    def is_free(self) -> bool:
        """Whether nobody but the recorder holds it."""
        return torch._C._storage_Use_Count(self.memory._cdata) <= self.held + 1

    def poison(self) -> None:
        # NaN in every floating-point type, -1 in every integer type. By an operator of torch's it
        # would be half of a replay's time.
        ctypes.memset(self.memory.data_ptr(), 0xFF, self.memory.nbytes())


class CPUGraph:
    """Has of `torch.cuda.CUDAGraph` what vLLM uses."""

    everyone: ClassVar[list["CPUGraph"]] = []
    replays: ClassVar[int] = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[Callable[[], None]] = []
        self.made: dict[int, _Storage] = {}
        self.reused: list[_Storage] = []

    def begin(self) -> None:
        """Note the memory of earlier graphs that this one may get."""
        made = (storage for graph in CPUGraph.everyone for storage in graph.made.values())
        self.reused = [storage for storage in made if storage.is_free()]

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Begin, or go on where an operator has interrupted the capture (breakable graphs)."""
        assert Recording.current is None, "two captures at once"
        self.begin()
        recording, Recording.interrupted = Recording.interrupted, None
        if recording is None:
            recording = Recording(self)
            recording.__enter__()
        recording.graph, Recording.current = self, recording

    def capture_end(self) -> None:
        """End; inside an operator, until the next graph begins."""
        recording, Recording.current = Recording.current, None
        CPUGraph.everyone.append(self)
        if recording.depth:
            recording.graph, Recording.interrupted = None, recording
        else:
            recording.__exit__(None, None, None)

    def replay(self) -> None:
        for storage in (*self.reused, *self.made.values()):
            if storage.is_free():
                storage.poison()
        with torch.inference_mode(), _disable_current_modes():
            for step in self.steps:
                step()
        CPUGraph.replays += 1

    def reset(self) -> None:
        self.steps.clear()
        self.made.clear()

    def kept(self, values: Any) -> Any:
        """Return *values* with aliases of their tensors."""
        return tree_map_only(torch.Tensor, self._kept, values)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        if (storage := self.made.get(address(tensor))) is not None:
            storage.held += 1
        return alias(tensor)

    def note_made(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            self.made[address(tensor)] = _Storage(tensor)


class Recording(TorchDispatchMode):
    """Records what runs inside it into a graph, unless it is interrupted."""

    current: ClassVar["Recording | None"] = None
    interrupted: ClassVar["Recording | None"] = None

    def __init__(self, graph: CPUGraph) -> None:
        super().__init__()
        self.graph: CPUGraph | None = graph
        self.depth = 0
        """Number of Python operators of vLLM's in which the recording is."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.graph is None:
            return func(*args, **kwargs)
        refuse(func, args)
        if func.namespace != "aten":
            body = python_body(func)
            if body is not None:
                return self._run(body, args, kwargs)
        elif func is not aten.alias.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not is_view(func):
            self._record(func, args, kwargs, result)
        return result

    def _run(self, body: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        self.depth += 1
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.depth -= 1

    def _record(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        given = {address(t) for t in tree_flatten((args, kwargs))[0] if is_tensor(t)}
        outputs = [t for t in tree_flatten(result)[0] if is_tensor(t)]
        fresh = [i for i, output in enumerate(outputs) if address(output) not in given]
        for i in fresh:
            self.graph.note_made(outputs[i])
        if not func._schema.is_mutable and not fresh:
            return
        args, kwargs = self.graph.kept((args, kwargs))
        targets = {i: self.graph.kept(outputs[i]) for i in fresh}

        def step() -> None:
            again = [t for t in tree_flatten(func(*args, **kwargs))[0] if is_tensor(t)]
            for i, target in targets.items():
                target.copy_(again[i])

        self.graph.steps.append(step)

    def record_launch(self, launch: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        args, kwargs = self.graph.kept((args, kwargs))
        self.graph.steps.append(lambda: launch(*args, **kwargs))


class graph:
    """Stands in for `torch.cuda.graph`."""

    def __init__(self, graph: CPUGraph, *_: Any, **__: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.capture_begin()

    def __exit__(self, *_: Any) -> None:
        self.graph.capture_end()


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def refuse(func: Any, args: tuple) -> None:
    """Raise for what a CUDA graph cannot capture."""
    if func in WAITS:
        raise CaptureError(f"{func}: the host waits for the device in a capture")
    if func in FROM_HOST and args[0].dim():  # a number of the host is captured by value
        raise CaptureError(f"{func}: a value of the host in a capture")
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        indices = [index for index in args[1] if is_tensor(index)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise CaptureError(f"{func}: a mask as index; the host waits for its number of rows")


_bodies: dict[Any, Callable[..., Any] | None] = {}


def python_body(func: Any) -> Callable[..., Any] | None:
    """Return the Python function of one of vLLM's operators, whose own operators are recorded.

    None for a kernel. vLLM gives an operator the name and the parameters of its function.
    """
    if func not in _bodies:
        name = func._schema.name.partition("::")[2]
        parameters = [argument.name for argument in func._schema.arguments]
        found = {
            value
            for module_name, module in [*sys.modules.items()]
            if module_name.startswith("vllm.")
            and callable(value := vars(module).get(name))
            and getattr(value, "__code__", None) is not None
            and func.namespace == "vllm"
        }
        if len(found) > 1:
            found = {body for body in found if list(signature(body).parameters) == parameters}
        assert len(found) < 2, f"{func}: which of {found}?"
        _bodies[func] = found.pop() if found else None
    return _bodies[func]


def weak_ref(tensor: Any) -> Any:
    """Stands in for vLLM's `weak_ref_tensor`: the same memory, which it does not keep."""
    if not is_tensor(tensor) or not tensor.numel():
        return tensor
    storage = tensor.untyped_storage()
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
