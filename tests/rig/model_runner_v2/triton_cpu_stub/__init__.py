"""A Triton backend named `cpu` that compiles nothing: for `TRITON_INTERPRET=1` only."""
