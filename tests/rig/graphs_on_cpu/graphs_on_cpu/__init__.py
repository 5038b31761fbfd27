"""CUDA graphs without CUDA: operators are recorded once and replayed on the same memory."""
