"""What is known before any weight is read: `check` and `plan`.

Knows members, the engine's rules and data sheets of hardware; not a running engine.
"""
