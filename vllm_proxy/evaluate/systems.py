"""What is compared: the proxy at one strength or several, its members, a directly tuned model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import MEMBER_CONTROLS, RequestControl
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.config.strength import Strength

PROXY, TUNED = "proxy", "tuned"
KINDS = ("base", "antiexpert", "expert", PROXY)
"""What one engine of a configuration answers as, in the order of the table."""


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name: of the row, and of its results.
        kind: one of `KINDS`, or `TUNED`.
        control: what makes a request this system's, in an engine of the configuration.
    """

    name: str
    kind: str
    control: RequestControl = field(default_factory=RequestControl)


def systems_of(
    config: ProxyConfig, kinds: Sequence[str] | None = None, alphas: Sequence[Strength] = ()
) -> list[System]:
    """Return what an engine of *config* is to answer as, in the order of the table.

    Args:
        config: of the engine.
        kinds: some of `KINDS`; by default proxy, base and expert, as far as there are.
        alphas: strengths of the proxy, a system each; by default the configuration's.

    Raises:
        ProxyConfigError: an unknown system, or one that the configuration does not have.
    """
    if kinds is None:
        kinds = [kind for kind in (PROXY, "base", "expert") if kind in (PROXY, *config.roles)]
    for kind in kinds:
        if kind not in KINDS:
            raise ProxyConfigError(f"--systems: unknown system `{kind}`{did_you_mean(kind, KINDS)}")
        if kind in ROLES and kind not in config.roles:
            raise ProxyConfigError(
                f"--systems: `{kind}` is no member of this configuration; remove it"
            )
    if alphas and PROXY not in kinds:
        raise ProxyConfigError(
            f"--alpha is {alphas[0]!r}, and --systems has no proxy; remove one of them"
        )
    rows = []
    for kind in KINDS:
        if kind not in kinds:
            continue
        if kind in ROLES:
            rows.append(System(kind, kind, MEMBER_CONTROLS[kind]))
        elif not alphas:
            rows.append(System(PROXY, PROXY))
        else:
            unlike = dict.fromkeys(alphas)
            rows += [System(f"proxy alpha={a}", PROXY, RequestControl(alpha=a)) for a in unlike]
    return rows
