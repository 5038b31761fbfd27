"""What a configuration would need on GPUs that are not rented yet: memory, requests, time, layout.

`read` and `quantized` read members from their configs only. The rest is arithmetic (`shape`,
`layout`, `memory`, `cost`, `predict`) with figures from data sheets, or measured on this machine
(`hardware`, `roofline`).
"""

from vllm_proxy.preflight.plan.hardware import GPUS, HERE
from vllm_proxy.preflight.plan.plan import Plan, plan
from vllm_proxy.preflight.plan.predict import Demand
from vllm_proxy.preflight.plan.report import as_record, render

__all__ = ["GPUS", "HERE", "Demand", "Plan", "as_record", "plan", "render"]
