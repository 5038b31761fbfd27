"""What runs inside vLLM's processes: our scheduler, workers, runners, drafter and validator.

Knows vLLM's scheduler, workers and runners, and requests by id; not `ProxyLLM`, jobs, HTTP or
terminals.
"""
