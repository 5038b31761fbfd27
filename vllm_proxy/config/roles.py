"""The members' roles."""

from typing import Literal

Role = Literal["base", "expert", "antiexpert"]

ROLES: tuple[Role, ...] = ("base", "expert", "antiexpert")

DISTRIBUTIONS = (*ROLES, "proxy")
"""The four that are measured of every token, in this order."""
