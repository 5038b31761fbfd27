"""What can be known before any weight is read: `check` and `plan`.

May know members, the engine's rules and data sheets of hardware. Must not know a running engine.
"""
