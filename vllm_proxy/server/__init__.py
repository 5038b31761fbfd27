"""HTTP: vLLM's OpenAI server with our request fields.

Knows vLLM's server and ASGI; not jobs or `ProxyLLM`.
"""
