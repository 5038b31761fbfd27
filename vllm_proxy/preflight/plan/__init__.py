"""What a configuration would take of GPUs that are not rented yet: memory, requests, time, layout.

Members are read from their configs alone (`read`, `quantized`); what follows is arithmetic
(`shape`, `layout`, `memory`, `cost`, `predict`) on the figures of data sheets, or of this machine,
measured (`hardware`, `roofline`).
"""

from vllm_proxy.preflight.plan.hardware import GPUS, HERE
from vllm_proxy.preflight.plan.plan import Plan, plan
from vllm_proxy.preflight.plan.predict import Demand
from vllm_proxy.preflight.plan.report import as_record, render

__all__ = ["GPUS", "HERE", "Demand", "Plan", "as_record", "plan", "render"]
