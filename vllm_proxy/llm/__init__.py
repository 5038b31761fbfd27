"""`ProxyLLM`: requests as Python values.

Knows `vllm.LLM`; not files, HTTP or terminals.
"""
