"""What users write: the configuration, and the values of one request.

May know pydantic, YAML and the terms of the paper. Must not know torch, vLLM or model files.
"""
