"""The members' files, and what vLLM derives from them.

May know checkpoints, tokenizers, PEFT and vLLM's `ModelConfig`. Must not know workers, engines or
rows of a job.
"""
