"""The thin seams to vLLM's scheduler and its two model runners; nothing else knows which runs."""
