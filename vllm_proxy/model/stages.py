"""Which members a pipeline rank has, and which of them whole: the last rank has all that drafts.

A draft runs the expert from its first layer to its last one. If its layers were on all ranks, each
draft would pass through all of them, and none could work on another batch meanwhile. So if the
expert drafts, the last rank, which chooses tokens, has all its layers, and the others have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from vllm.distributed import get_pp_group, parallel_state

from vllm_proxy.config.roles import Role, drafting_roles
from vllm_proxy.config.schema import ProxySection


class Stage(NamedTuple):
    """What this pipeline rank has.

    Attributes:
        roles: the members with layers here.
        whole: those of them that have all their layers here, and none on other ranks.
    """

    roles: tuple[Role, ...]
    whole: frozenset[Role] = frozenset()

    @classmethod
    def here(cls, section: ProxySection, *, is_shared: bool) -> "Stage":
        """Return what this process has.

        Args:
            section: the members.
            is_shared: whether one model may run for expert and antiexpert (`one_pass.py`).
        """
        roles = tuple(section.roles)
        if section.speculate is None or (pipeline := get_pp_group()).world_size == 1:
            return cls(roles)
        draws = drafting_roles(is_shared=is_shared)
        if pipeline.is_last_rank:
            return cls(roles, frozenset(draws))
        return cls(tuple(role for role in roles if role not in draws))


class _OnlyRank(NamedTuple):
    """A pipeline of one rank, as far as models look at their pipeline."""

    rank_in_group: int = 0
    world_size: int = 1
    is_first_rank: bool = True
    is_last_rank: bool = True


@contextmanager
def as_only_rank() -> Iterator[None]:
    """Let a whole member be built, and run, as on the only rank of a pipeline.

    Models ask for their process's pipeline, and have no parameter for another one.
    """
    pipeline = parallel_state._PP
    parallel_state._PP = _OnlyRank()
    try:
        yield
    finally:
        parallel_state._PP = pipeline
