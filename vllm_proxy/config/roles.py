"""The members' roles."""

from typing import Literal

Role = Literal["base", "expert", "antiexpert"]

ROLES: tuple[Role, ...] = ("base", "expert", "antiexpert")

DISTRIBUTIONS = (*ROLES, "proxy")
"""The four distributions that an inspection measures for every token, in this order."""


def drafting_roles(*, is_shared: bool) -> tuple[Role, ...]:
    """Return the members through whose layers drafts run.

    Args:
        is_shared: whether one model may run for expert and antiexpert.
    """
    return ("expert", "antiexpert") if is_shared else ("expert",)
