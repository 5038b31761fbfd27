"""The systems that are compared: proxies, single members, a directly tuned model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import MEMBER_CONTROLS, RequestControl
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.config.strength import Strength

PROXY, TUNED = "proxy", "tuned"
KINDS = ("base", "antiexpert", "expert", PROXY)
"""The systems that one engine of a configuration can run, in the order of the table."""


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name: of the row, and of its results.
        kind: one of `KINDS`, or `TUNED`.
        control: the per-request values that make the engine answer as this system.
    """

    name: str
    kind: str
    control: RequestControl = field(default_factory=RequestControl)


def systems_of(
    config: ProxyConfig, kinds: Sequence[str] | None = None, alphas: Sequence[Strength] = ()
) -> list[System]:
    """Return the systems that an engine of *config* runs, in the order of the table.

    Args:
        config: of the engine.
        kinds: some of `KINDS`; by default proxy, base and expert, if the configuration has them.
        alphas: strengths of the proxy, one system each; by default the configuration's.

    Raises:
        ProxyConfigError: an unknown system, or one that the configuration does not have.
    """
    if kinds is None:
        kinds = [kind for kind in (PROXY, "base", "expert") if kind in (PROXY, *config.roles)]
    for kind in kinds:
        if kind not in KINDS:
            near = did_you_mean(kind, KINDS)
            raise ProxyConfigError("unknown system", field=f"--systems {kind!r}", remedy=near)
        if kind in ROLES and kind not in config.roles:
            raise ProxyConfigError(
                "it is not a member of this configuration",
                field=f"--systems {kind!r}",
                remedy="remove it",
            )
    if alphas and PROXY not in kinds:
        raise ProxyConfigError(
            "--systems does not include the proxy",
            field="--alpha",
            value=alphas[0],
            remedy="remove one of them",
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
            different = dict.fromkeys(alphas)
            rows += [System(f"proxy alpha={a}", PROXY, RequestControl(alpha=a)) for a in different]
    return rows
