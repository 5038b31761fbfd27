"""What each member and the proxy said of every token of an answer, and what the proxy changed."""

from vllm_proxy.config import ROLES

DISTRIBUTIONS = (*ROLES, "proxy")
"""The four that are measured of every token, in this order."""
