"""The members' roles."""

from typing import Literal

Role = Literal["base", "expert", "antiexpert"]

ROLES: tuple[Role, ...] = ("base", "expert", "antiexpert")

DISTRIBUTIONS = (*ROLES, "proxy")
"""The four distributions that an inspection measures for every token, in this order."""
