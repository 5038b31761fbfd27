"""Checks and plans configurations, in a process in which no engine has run.

Standard input is a list of `[file, engine]`: a configuration, and engine arguments that `check`
gets in addition. Standard output is what `check` and `plan` say of each, as JSON.
"""

import json
import sys
from typing import Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.check.run import check
from vllm_proxy.preflight.plan import Demand, as_record, plan

GPU = "H100-80G"


def said(file: str, engine: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's report and plan."""
    config = ProxyConfig.from_yaml(file)
    report = check(config.model_copy(update={"engine": {**config.engine, **engine}}))
    parameters = {member.role: member.parameters for member in report.members}
    found = {"problems": report.problems, "notes": report.notes, "parameters": parameters}
    try:
        return {**found, "plan": as_record(plan(config, GPU, Demand(1, 1024, 1024)))}
    except ProxyConfigError as error:
        return {**found, "plan": str(error)}


json.dump([said(file, engine) for file, engine in json.load(sys.stdin)], sys.stdout)
