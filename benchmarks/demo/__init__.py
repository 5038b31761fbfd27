"""The demo: its questions, its metric, and the adapters of its small models."""
