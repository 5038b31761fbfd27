"""One forward pass of all members, and the fusion of their logits.

Knows torch, vLLM's layers and the tensors of one step; not requests by id, schedulers,
configuration files, or who drafts.
"""
