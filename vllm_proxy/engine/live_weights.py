"""New weights for a running engine: `reload_weights`, and vLLM's weight transfer.

What a trainer sends is collected in the memory of the host until `finish_weight_update`. Then it is
checked, and loaded only if it is complete and right on every rank. Until then, and after an error,
the old weights serve.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed import all_gather_object
from vllm.config import set_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.distributed.parallel_state import get_pcp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.model.loading import Source, staged

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object  # a mixin for each platform's worker

logger = init_logger(f"vllm.{__name__}")


class Staging(nn.Module):
    """What vLLM's transfer loads weights into instead of the model: it only keeps copies of them.

    Attributes:
        tensors: by name, on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Keep copies: transfers use their buffers again."""
        new = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        self.tensors |= new
        return set(new)


class LiveWeightsMixin(Worker):
    """Replaces the weights of a worker's model as a whole or not at all."""

    staging: Staging

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, in a vLLM that can also load it again."""
        require_part("live weights")
        self.staging = Staging()  # one for all updates: vLLM 0.33 keeps tensors' names by model
        super().load_model(load_dummy_weights=load_dummy_weights)

    def start_weight_update(self) -> None:
        """Begin an update, whose tensors are collected."""
        engine = self.weight_transfer_engine
        if engine is not None and not self._weight_update_active:
            self.staging.tensors = {}
            engine.set_weight_update_target(self.staging, self.model_config)
        super().start_weight_update()

    def start_draft_weight_update(self) -> None:
        """Raise an error: the drafter is the expert."""
        raise ProxyConfigError(
            "there is no draft model",
            remedy="send the expert's weights under `expert.`, between start_weight_update and "
            "finish_weight_update",
        )

    def finish_weight_update(self) -> None:
        """Check what was collected, and load it.

        Raises:
            ProxyConfigError: it is not complete and right; the old weights keep serving.
        """
        super().finish_weight_update()  # an error if no update was begun
        tensors, self.staging.tensors = self.staging.tensors, {}
        self._replace(lambda: staged(tensors))

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | Mapping[Role, str] | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Load weights again.

        Args:
            weights_iterator: new weights; named as in `ProxyModel.load_weights`, all of a member's.
            weights_path: where to read members' checkpoints, by role; a single path is the base's.
                None: all members' files, where they were.
            is_checkpoint_format: must be true.

        Raises:
            ProxyConfigError: the weights are not complete and right; the old ones keep serving.
        """
        if not is_checkpoint_format:
            raise ProxyConfigError(
                "weights must be named as in the members' checkpoints",
                field="is_checkpoint_format",
                value=is_checkpoint_format,
            )
        if weights_iterator is not None:
            sources = staged(dict(weights_iterator))
            self._replace(lambda: sources)
        else:
            self._replace(lambda: self._files(weights_path))

    def _files(self, path: str | Mapping[Role, str] | None) -> dict[Role, Source]:
        load_config = self.vllm_config.load_config
        loader = get_model_loader(load_config)
        if not hasattr(loader, "get_all_weights"):
            raise ProxyConfigError(
                "no files are read",
                field="load_format",
                value=load_config.load_format,
                remedy="send the weights",
            )
        paths: Mapping[Role, str] | None = {"base": path} if isinstance(path, str) else path
        return self.get_model().weights.files(loader, paths)

    def _replace(self, find: Callable[[], Mapping[Role, Source]]) -> None:
        """Load the weights that *find* returns, on all ranks or on none."""
        weights, problem = self.get_model().weights, None
        sources: Mapping[Role, Source] = {}
        with set_current_vllm_config(self.vllm_config):
            try:
                sources = find()
                weights.check(sources)
            except ProxyConfigError as error:
                problem = str(error)
            if problem := _first_problem(problem):
                # vLLM reads the ranks' replies in their order, and none after an error, so that
                # others would be taken for replies to the next call: the last one reports it.
                if self.rank == self.parallel_config.world_size - 1:
                    raise ProxyConfigError(f"{problem}; the old weights keep serving")
                return
            try:
                weights.replace(sources)
            except Exception as error:
                raise ProxyConfigError(
                    f"new weights were accepted, but loading them failed ({one_line(error)}), so "
                    "that answers are wrong now; send them again or restart the engine"
                ) from error
        logger.info("New weights: %s", ", ".join(sources))


def _first_problem(problem: str | None) -> str | None:
    """Return the first problem of all tensor and pipeline parallel ranks, or None."""
    for group in (get_tp_group(), get_pcp_group(), get_pp_group()):
        if group.world_size > 1:
            problems: list[str | None] = [None] * group.world_size
            all_gather_object(problems, problem, group=group.cpu_group)
            problem = next(filter(None, problems), None)
    return problem
