"""Speculative decoding in which the expert drafts and the fused logits verify."""
