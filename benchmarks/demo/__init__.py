"""The demo: its questions, its measure, and the adapters of its small models."""
