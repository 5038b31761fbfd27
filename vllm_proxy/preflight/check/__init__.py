"""Can this configuration run here? Reports every problem with its remedy; reads no weights."""
