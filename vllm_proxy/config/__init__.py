"""What users write: the configuration, and the values of one request.

Knows pydantic, YAML and the terms of the paper; not torch, vLLM or the files of models.
"""
