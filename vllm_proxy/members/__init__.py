"""What members' files say, and what vLLM makes of them.

Knows checkpoints, tokenizers, PEFT and vLLM's `ModelConfig`; not requests, workers or rows.
"""
